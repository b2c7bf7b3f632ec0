"""Refits the feed-forwards of a streamed model in as much memory as it is said to need; run as a script: SOURCE OUT TEXT."""

import json
import re
import sys
import threading

from billhook.cli.main import main
from billhook.engine.memory import resident


def cut(source, out, text, memory):
    """Removes a quarter of the channels, and has the linears that read them refitted."""
    shown = ["--examples", "40", "--length", "128", "--evaluate", "2", "--data", json.dumps({"train": text, "test": text})]
    asked = ["--channels", "0.25", "--importance", "WeightNorm", "--repair", "RepairConfig", "--repair.ridges", "[0.1, 1.0]"]
    main(["prune-structure", source, out, *asked, *shown, "--stream", "--memory", memory])


class Anonymous(threading.Thread):
    """Watches how much memory the process takes at most that is no page of a file, which the system could take back."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self):
        """Looks every five milliseconds."""
        while not self.done.wait(0.005):
            self.most = max(self.most, resident("RssAnon"))


def work(source, out, text):
    """Asks with too little memory, and again with as much as the refusal says; prints that, and the peak, in bytes."""
    memory = 0.1
    for _ in range(4):  # what is imported late counts the next time
        before, files = resident("RssAnon"), resident() - resident("RssAnon")
        watch = Anonymous()
        watch.start()
        try:
            cut(source, out, text, f"{memory:.3f}GiB")
            break
        except SystemExit as refused:
            (needed,) = re.findall(r"needs at least ([\d.]+) GiB", str(refused))
            memory = float(needed) + 0.006  # it is rounded
        finally:
            watch.done.set()
    print(json.dumps({"before": files + before, "memory": memory * 2**30, "peak": files + watch.most}))


if __name__ == "__main__":
    work(*sys.argv[1:])
