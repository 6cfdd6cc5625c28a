"""What every test needs: no network, one thread per process, quiet tokenizers, no extensions, an interrupt that arrives."""

from __future__ import annotations

import gc
import os
import signal
import threading
from contextlib import ExitStack

import preloaded
import pytest

from numerics_suite.core import activity
from numerics_suite.core.garbage import living_set_aside

# Before anything imports torch: the models are tiny, and xdist's workers would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What else is installed beside the suite takes no part in its own tests; those of extensions turn them on.
os.environ["NUMERICS_SUITE_EXTENSIONS"] = "off"
# Notices of long work depend on how busy the machine is; the tests of notices ask for them.
os.environ["NUMERICS_SUITE_NOTICES"] = "off"
activity.FIRST = threading.TIMEOUT_MAX  # of this process: the plugin was imported before this file

# Commands under test say what they say to everybody; tests of what they tell GitHub set these themselves.
for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(name, None)

# A run that was begun in the background of a shell ignores SIGINT, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_last_file = ""
_kept = ExitStack()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """With each file, what lives then is left to no later garbage collection: pytest within a test collects ten times."""
    global _last_file  # noqa: PLW0603 - of the process
    if item.nodeid.partition("::")[0] != _last_file:
        _last_file = item.nodeid.partition("::")[0]
        gc.collect()
        _kept.enter_context(living_set_aside())
        gc.freeze()


def pytest_unconfigure() -> None:
    """Commands are over."""
    preloaded.release()
    _kept.close()
