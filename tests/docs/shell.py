"""Commands as a reader types them, in bash, with the tool and Python answered by one process that has torch loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(__file__).with_name("preloaded.py")
PROGRAMS = ("numerics-suite", "python", "python3", "pytest")
SHIM = """\
#!{interpreter} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = {{"program": {program!r}, "arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
status = connection.recv(16)
sys.exit(int(status) if status else 139)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command line left: its exit status and what it printed, both streams as a terminal shows them."""

    status: int
    printed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """bash in one folder, with the shims first on its PATH."""

    folder: Path
    programs: Path

    def run(self, script: str) -> Done:
        """Run lines of bash, which stop at the first that fails.

        Args:
            script: as it stands on the page.
        """
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment(self.folder) | {"PATH": f"{self.programs}:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        return Done(status=done.returncode, printed=done.stdout)


def environment(home: Path) -> dict[str, str]:
    """The variables of a new machine without a network: none of this one's settings take part.

    Args:
        home: where programs put what they keep.
    """
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # the package under test
    return kept | {
        "HOME": str(home.parent),
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
        "NUMERICS_SUITE_NOTICES": "off",  # how long something takes is the machine's affair
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONHASHSEED": "0",
    }


@contextmanager
def preloaded(folder: Path) -> Iterator[Path]:
    """The folder of shims, while the process behind them lives.

    Args:
        folder: for the shims.
    """
    # A socket's path may be 107 bytes long, which pytest's folders exceed on some machines.
    with tempfile.TemporaryDirectory(prefix="docs-") as short:
        address = str(Path(short) / "socket")
        for program in PROGRAMS:
            shim = folder / program
            shim.write_text(SHIM.format(interpreter=sys.executable, address=address, program=program), encoding="utf-8")
            shim.chmod(0o755)
        with subprocess.Popen(
            [sys.executable, SERVER, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(folder), "PATH": os.environ["PATH"]},
        ) as server:
            assert server.stdout is not None
            assert server.stdin is not None
            assert server.stdout.read(5) == b"ready", "the process behind the shims did not start"
            try:
                yield folder
            finally:
                server.stdin.close()
