"""Runs functions in processes that are forked from one that has imported what they need, and has no threads yet."""

import os
import signal
import time
import traceback


def forked(what, *arguments, seconds=120):
    """Runs a function in a process of its own, kills it after so many seconds, and returns what it exited with: less than 0
    for a signal."""
    return _ended(_fork(what, *arguments), time.monotonic() + seconds)


def forked_ranks(what, ranks, log, *arguments, seconds=120):
    """Runs a function as each of some ranks at the same time; returns for each what it exited with, and what it wrote.

    Args:
        what: The function.
        ranks: How many there are.
        log: Returns the file that a rank writes to.
        arguments: What the function takes.
        seconds: After which those that still run are killed.
    """

    def rank_of(number):
        file = os.open(log(number), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        what(*arguments)

    numbers, end = [_fork(rank_of, number) for number in range(ranks)], time.monotonic() + seconds
    codes = [_ended(number, end) for number in numbers]
    return [(code, log(number).read_text()) for number, code in enumerate(codes)]


def _fork(what, *arguments):
    number = os.fork()
    if number:
        return number
    try:
        what(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _ended(number, end):
    """Returns what a process exited with, which is killed at a time."""
    while not (found := os.waitpid(number, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(number, signal.SIGKILL)
            found = os.waitpid(number, 0)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])
