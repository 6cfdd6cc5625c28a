"""Commands under test without five seconds of imports each: a process that has torch loaded forks for each of them.

:func:`python` is a program that stands for `sys.executable` in a command line; it is small, hands arguments, folder,
environment and the three streams to the process behind it, passes signals on and ends as the fork does, by a signal too.
In the fork `sys.executable` is that program again, so that worker processes of a command are forks as well. What it cannot
stand for it leaves to the interpreter: options such as `-I`, and variables that torch reads once.

Tests of what a bare interpreter does (start-up, odd encodings, signals to a group) name `sys.executable`.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOADED = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.glm.modeling_glm",
    "transformers.models.glm4.modeling_glm4",
    "transformers.trainer",
    "hypothesis",
    "_hypothesis_pytestplugin",
    "numpy.ctypeslib",
    "pdb",
    "pytest",
    "safetensors.numpy",
    "xdist.dsession",
    "xdist.newhooks",
    "xdist.remote",
)
"""Beside the whole package and pytest's own plugins."""

READ_ONCE = (
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "PYTHONWARNINGS",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)
"""Variables that a fork inherits from the forking process; a command with other values starts an interpreter of its own."""

PROGRAM = """\
#!{interpreter} -IS
import os, sys
arguments = sys.argv[1:]
given = arguments[1:] if arguments[:1] == ["-u"] else arguments
known = {program!r} != "python" or given[:1] in (["-m"], ["-c"]) or given and not given[0].startswith("-")
if not known or any(os.environ.get(name) != value for name, value in {read_once!r}):
    os.execv({interpreter!r}, [{interpreter!r}, *arguments])
import json, signal, socket
def is_open(descriptor):
    try:
        return bool(os.fstat(descriptor))
    except OSError:
        return False
streams = [descriptor for descriptor in (0, 1, 2) if is_open(descriptor)]
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ignored = [number for number in signals if signal.getsignal(number) == signal.SIG_IGN]
request = {{
    "program": {program!r}, "executable": {executable!r}, "arguments": given, "cwd": os.getcwd(),
    "environment": dict(os.environ), "ignored": ignored, "streams": streams,
}}
for number in signals:
    if number not in ignored:
        signal.signal(number, lambda number, _: connection.send(str(number).encode()))
socket.send_fds(connection, [json.dumps(request).encode()], streams)
for descriptor in streams:
    os.close(descriptor)
status = int(connection.recv(16) or 70)
if status < 0:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
LEASE = b"lease"
"""What a pytest process says to keep the forking process; it ends with the last that did."""

_held: dict[str, tuple[Path, socket.socket]] = {}
"""Folder of the programs and lease, by what is on the path beside the usual."""
_holding = threading.Lock()
"""Jobs of a command begin in threads."""


# --- in the process of the tests ---------------------------------------------------------------------------------------


def python(beside: str = "") -> str:
    """A program that runs what follows it as the interpreter does; the interpreter itself where that needs fork and pidfd.

    Args:
        beside: a folder that must be on the path when torch is imported, as that of a device is.
    """
    return str(programs(beside) / "python") if hasattr(os, "pidfd_open") else sys.executable


def programs(beside: str = "") -> Path:
    """The folder of the programs, behind which a process lives that xdist's workers share.

    Args:
        beside: as for :func:`python`.
    """
    with _holding:
        return _held[beside][0] if beside in _held else _lease(beside)


def _lease(beside: str) -> Path:
    from filelock import FileLock

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"pid-{os.getpid()}")[:16]
    # A socket's path may be 107 bytes long, which pytest's folders exceed on some machines.
    folder = Path(tempfile.gettempdir()) / f"preloaded-{os.getuid()}-{run}{Path(beside).name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "lock"):
        lease = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            lease.connect(str(folder / "socket"))
        except OSError:
            _start(folder, beside)
            lease.connect(str(folder / "socket"))
        lease.send(LEASE)
    _held[beside] = folder, lease
    return folder


def _start(folder: Path, beside: str) -> None:
    for program in ("python", "python3", "pytest", "numerics-suite"):
        file = folder / program
        file.write_text(
            PROGRAM.format(
                interpreter=sys.executable,
                executable=str(folder / "python"),
                program="python" if program == "python3" else program,
                read_once=[(name, os.environ.get(name)) for name in READ_ONCE],
                address=str(folder / "socket"),
            ),
            encoding="utf-8",
        )
        file.chmod(stat.S_IRWXU)
    (folder / "socket").unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (beside, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], stdin=subprocess.DEVNULL, env=environment, start_new_session=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, "the process behind the commands did not start"


def release() -> None:
    """Let the process behind the commands end."""
    for _, lease in _held.values():
        lease.close()
    _held.clear()


# --- in the process that forks -----------------------------------------------------------------------------------------


class Server:
    """Forks for each request, tells how each fork ended, and ends with the last lease."""

    def __init__(self, address: str) -> None:
        """Listen there."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.leases = 0

    def serve(self) -> None:
        """Until nobody holds a lease."""
        events = self.selector.select(60)  # for the first lease
        while events:
            for key, _ in events:
                if key.fd in self.selector.get_map():  # not closed by the one before
                    key.data(key.fileobj)
            if not self.leases and len(self.selector.get_map()) == 1:
                return
            events = self.selector.select()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self.selector.register(connection, selectors.EVENT_READ, self._first)

    def _close(self, connection: Any) -> None:
        self.selector.unregister(connection)
        os.close(connection) if isinstance(connection, int) else connection.close()

    def _first(self, connection: socket.socket) -> None:
        """A lease or a request."""
        try:
            text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        except OSError:
            text, streams = b"", []
        if text == LEASE:
            self.leases += 1
            self.selector.modify(connection, selectors.EVENT_READ, self._released)
        elif not text:
            self._close(connection)
        else:
            self._fork(connection, json.loads(text), streams)

    def _released(self, connection: socket.socket) -> None:
        self.leases -= 1
        self._close(connection)

    def _fork(self, connection: socket.socket, request: dict[str, Any], streams: list[int]) -> None:
        process = os.fork()
        if process == 0:
            for key in list(self.selector.get_map().values()):
                os.close(key.fd)
            self.selector.close()
            run(request, streams)
        for stream in streams:
            os.close(stream)
        ending = os.pidfd_open(process)

        def said(_: socket.socket) -> None:
            number = connection.recv(16)
            with suppress(ProcessLookupError):
                os.kill(process, int(number) if number else signal.SIGKILL)
            if not number:  # whoever waited for it is gone
                self._close(connection)

        def ended(_: int) -> None:
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            self._close(ending)
            if connection.fileno() >= 0:
                with suppress(OSError):
                    connection.send(str(status).encode())
                self._close(connection)

        self.selector.modify(connection, selectors.EVENT_READ, said)
        self.selector.register(ending, selectors.EVENT_READ, ended)


def run(request: dict[str, Any], streams: list[int]) -> None:
    """Become the process of one command, and end as it does.

    Args:
        request: program, arguments, folder and environment.
        streams: standard input, output and error.
    """
    status = 1
    try:
        _become(request, streams)
        status = _status_of(request["program"], request["arguments"])
    except BaseException:  # noqa: BLE001 - as the interpreter would end
        traceback.print_exc()
    finally:
        os._exit(status)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """What the interpreter takes over when it starts."""
    for number, stream in zip(request["streams"], streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    for number in {0, 1, 2} - set(request["streams"]):
        os.close(number)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    environment = request["environment"]
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number, unbuffered=unbuffered) if number in request["streams"] else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    before = {place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(environment)
    given = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*given, *(place for place in sys.path[1:] if place not in before)]
    if (xdist := sys.modules.get("xdist.plugin")) is not None:
        xdist._sys_path[:] = sys.path  # what its workers get: it was copied when xdist was imported
    sys.executable = request["executable"]
    sys.orig_argv = [sys.executable, *request["arguments"]]
    importlib.invalidate_caches()
    if (standin := sys.modules.get("numerics_standin.switches")) is not None:  # read when torch is imported
        standin.switches.__init__()
    if "TRANSFORMERS_VERBOSITY" in environment:  # read when transformers is imported
        from transformers.utils import logging

        logging.set_verbosity(logging.log_levels[environment["TRANSFORMERS_VERBOSITY"]])
    if environment.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1":
        from huggingface_hub.utils import tqdm

        tqdm._progress_bar_states = {"_global": False}


def _stream(number: int, *, unbuffered: bool) -> io.TextIOWrapper:
    """One of the interpreter's three.

    Args:
        number: its descriptor.
        unbuffered: as PYTHONUNBUFFERED says.
    """
    if number == 0:
        return io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8", errors="surrogateescape")
    raw = open(number, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115 - as long as the process
    errors = "backslashreplace" if number == 2 else "strict"
    direct = number == 2 or os.isatty(number)
    return io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=direct, write_through=unbuffered)


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
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:  # noqa: BLE001 - as the interpreter would end
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status & 0xFF


def _run(program: str, arguments: list[str]) -> Any:
    """What the console scripts and the interpreter do with these arguments."""
    if program == "numerics-suite":
        from numerics_suite.cli.main import main

        sys.argv = [program, *arguments]
        sys.exit(main())
    if program == "pytest":
        sys.argv = [program, *arguments]
        sys.exit(importlib.import_module("pytest").console_main())
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        if not hasattr(sys.modules.get(arguments[1]), "__path__"):  # a module that no bare interpreter would have yet
            sys.modules.pop(arguments[1], None)
        return runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main_module = sys.modules["__main__"] = ModuleType("__main__")
        return exec(compile(arguments[1], "<string>", "exec"), main_module.__dict__)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    main_module.__dict__.update(__file__=arguments[0], __builtins__=__builtins__)
    with io.open_code(arguments[0]) as file:
        return exec(compile(file.read(), arguments[0], "exec"), main_module.__dict__)


def _import_all() -> None:
    """Whatever a command would import; of the package all but what pytest collects, whose assertions it rewrites."""
    from _pytest.config import default_plugins

    import numerics_suite

    own = (module.name for module in pkgutil.walk_packages(numerics_suite.__path__, "numerics_suite."))
    of_package = [name for name in own if not name.rpartition(".")[2].startswith(("test_", "__main__"))]
    for name in (*PRELOADED, *(f"_pytest.{plugin}" for plugin in default_plugins), *of_package):
        importlib.import_module(name)


def _fill_caches() -> None:
    """What a process finds out once: transformers' names and patterns of weights' names, how fast the machine is."""
    import torch
    import transformers

    from numerics_suite.subjects import compat
    from numerics_suite.suite import run

    compat.knows_architecture("")
    transformers.AutoModelForCausalLM.from_pretrained(Path(__file__).parents[1] / "fixtures" / "glm4-tiny")
    threads, measure = torch.get_num_threads(), run.measure_speed
    torch.set_num_threads(1)  # others would be missing from every fork, which then waits for them
    cpu = measure("cpu", ("float64", "float32", "float16", "bfloat16"))
    torch.set_num_threads(threads)
    # torch's pool of threads is no fork's, and is replaced where it is next asked for: by two threads at once that is an error.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
    run.measure_speed = lambda device, dtypes: cpu if device == "cpu" else measure(device, dtypes)


def main(folder: Path) -> None:
    """Import, listen, and let whoever started this go on.

    Args:
        folder: of the socket; deleted in the end.
    """
    import shutil

    _import_all()
    _fill_caches()
    # Said of a fork alone: what pytest would rewrite is imported there already.
    importlib.import_module("_pytest.assertion.rewrite").AssertionRewritingHook._warn_already_imported = lambda *_: None
    gc.collect()
    gc.freeze()  # no fork looks through all of torch again, not even once its run is over
    importlib.import_module("numerics_suite.core.garbage")._set_aside = True
    server = Server(str(folder / "socket"))
    if os.fork():
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server.serve()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
