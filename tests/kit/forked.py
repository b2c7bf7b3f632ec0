"""Runs functions in processes that are forked from one that has imported what they need, and has no threads yet."""

import os
import signal
import time
import traceback


def forked(what, *arguments, seconds=120):
    """Runs a function in a process of its own, kills it after so many seconds, and returns what it exited with: less than 0
    for a signal."""
    number = os.fork()
    if not number:
        try:
            what(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while not (found := os.waitpid(number, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(number, signal.SIGKILL)
            found = os.waitpid(number, 0)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])
