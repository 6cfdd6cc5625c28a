"""A process that has imported torch and transformers and forks for each command of a page, which saves seconds for each.

Started as `python preloaded.py SOCKET`; a shim on the PATH hands it arguments, folder, environment and the three streams.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.glm.modeling_glm",
    "hypothesis",
    "pytest",
    "numerics_suite.engine.cell_context",
    "numerics_suite.judgement.assertions",
    "numerics_suite.reports.terminal",
    "numerics_suite.training_watch.session",
)
READY = b"ready"


def serve(address: str) -> None:
    """Answer requests until whoever started this closes standard input.

    Args:
        address: path of the socket to make.
    """
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.write(1, READY)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(0)


def _answer(connection: socket.socket) -> None:
    """Run one command in this fork, tell its exit status and leave."""
    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    request = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    status = _status_of(request["program"], request["arguments"])
    with suppress(OSError):
        connection.sendall(str(status).encode())
    os._exit(status)


def _status_of(program: str, arguments: list[str]) -> int:
    """What the process would exit with."""
    import atexit

    status = 0
    try:
        _run(program, arguments)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
    except BaseException:  # noqa: BLE001 - as the interpreter would end
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    return status & 0xFF


def _run(program: str, arguments: list[str]) -> Any:
    """What the console scripts and the interpreter do with these arguments."""
    sys.argv = [program, *arguments]
    if program == "numerics-suite":
        from numerics_suite.cli.main import main

        sys.exit(main())
    if program == "pytest":
        sys.exit(importlib.import_module("pytest").console_main())
    if arguments[:1] == ["-m"]:
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        return runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    if arguments and not arguments[0].startswith("-"):
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        return runpy.run_path(arguments[0], run_name="__main__")
    message = f"{program} {' '.join(arguments)}: a page gives a script or -m"
    raise NotImplementedError(message)


if __name__ == "__main__":
    serve(sys.argv[1])
