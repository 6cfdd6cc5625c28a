"""What runs in a worker of `record`: it measures the cells that come by its standard input, one after another.

Plain processes with a pipe each way: `multiprocessing` would begin a helper beside its workers, which tracks named
semaphores and prints tracebacks once it was killed.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from typing import IO, Any

GRACE = 1.0
"""Seconds that a busy worker has left once its parent is gone; the pipe to its standard input closes then."""


def main() -> int:
    """Take a session, then cells of its plan; give an answer for each."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)  # what a library or a factory prints is no answer
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, received), daemon=True).start()
    if (session := received.get()) is None:
        return 1
    # Not before: two threads that import the same modules wait for each other.
    from numerics_suite.suite.recording import cell_answer

    while (cell := received.get()) is not None:
        pickle.dump(cell_answer(session, cell), answers)
        answers.flush()
    return 0


def _receive(requests: IO[bytes], received: queue.SimpleQueue[Any]) -> None:
    """Hand on what comes; where the process that sends it ends, or is killed, this one ends too."""
    try:
        while True:
            received.put(pickle.load(requests))  # noqa: S301 - our own parent's
    except (EOFError, OSError, pickle.UnpicklingError):
        received.put(None)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
