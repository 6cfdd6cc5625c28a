"""A modules folder of this process's own for a checkpoint's code, so that parallel workers never race."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = "transformers_modules"
_folders: dict[int, Path] = {}


def modules_folder() -> Path:
    """This process's modules folder; made on the first call, removed at exit. A forked child gets another one."""
    pid = os.getpid()
    if pid not in _folders:
        folder = Path(tempfile.mkdtemp(prefix="numerics-suite-modules-"))
        _folders[pid] = folder
        atexit.register(_remove, pid, folder)
    return _folders[pid]


def _remove(pid: int, folder: Path) -> None:
    # A forked child inherits this handler, but the folder is its parent's.
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def private_modules() -> Iterator[Path]:
    """Set transformers' modules folder (`HF_MODULES_CACHE`) for this process during a load, and yield it.

    The variable itself is read once, when transformers is imported, so the constant is changed instead.
    """
    from transformers import dynamic_module_utils  # heavy

    folder, usual = modules_folder(), dynamic_module_utils.HF_MODULES_CACHE
    _let_be_found(folder)
    dynamic_module_utils.HF_MODULES_CACHE = str(folder)
    try:
        yield folder
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = usual
        _let_be_found(Path(usual))
        _forget_registered_classes()


def _forget_registered_classes() -> None:
    """Take a checkpoint's classes out of the auto classes, which register them for its config's class and prefer them from then on.

    A second checkpoint with an equal configuration file has the same config class, and would be built from the first
    one's modeling code.
    """
    for name in [name for name in sys.modules if name.startswith("transformers.models.auto.")]:
        for mapping in list(vars(sys.modules[name]).values()):
            extra = vars(mapping).get("_extra_content") if hasattr(mapping, "__dict__") else None
            if isinstance(extra, dict):
                for key in [key for key, value in extra.items() if is_a_checkpoints(value)]:
                    del extra[key]


def is_a_checkpoints(registered: object) -> bool:
    """Whether a class, or one of several, comes from a checkpoint's own code.

    Args:
        registered: a class, or several.
    """
    classes = registered if isinstance(registered, tuple) else (registered,)
    return any(getattr(each, "__module__", "").startswith(f"{_PACKAGE}.") for each in classes)


def _let_be_found(folder: Path) -> None:
    """Let relative imports of code in `folder` work although the package was first imported from another one."""
    package = sys.modules.get(_PACKAGE)
    inside = str(folder / _PACKAGE)
    if package is not None and inside not in package.__path__:
        package.__path__.append(inside)
