"""Turns a failed load into one line: which file, what was raised, and whether files or release are the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from numerics_suite.core.errors import CheckError, NumericsSuiteError, UnsupportedError, UnusableError
from numerics_suite.core.records import Subject
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.subjects import compat
from numerics_suite.subjects.buildable import why_not_loaded

NO_CUDA = ("Torch not compiled with CUDA enabled", "Found no NVIDIA driver", "No CUDA GPUs are available")
"""Torch's words, in an AssertionError or a RuntimeError, when code needs CUDA (as ChatGLM's own `quantization_bit`
does)."""


@contextmanager
def _in_one_line(word: Callable[[Exception], NumericsSuiteError]) -> Iterator[None]:
    """Raise the result of `word` for an exception; our own, and fatal ones, stay as they are."""
    try:
        yield
    except NumericsSuiteError:
        raise
    except Exception as error:
        reraise_if_fatal(error)
        raise word(error) from error


def load_failures(subject: Subject, attn: str) -> AbstractContextManager[None]:
    """Turn a failed load into a skip (missing implementation) or bad input (unusable files), in one line.

    Args:
        subject: the one being loaded.
        attn: the requested one.

    Raises:
        UnsupportedError: this class has no such attention, nothing here can read its quantised weights, or its code
            needs CUDA where there is none.
        UnusableError: the files cannot be used.
        CheckError: a fixture's files, which are right, cannot be loaded.
    """
    return _in_one_line(lambda error: _of_load(error, subject, attn))


def _of_load(error: Exception, subject: Subject, attn: str) -> NumericsSuiteError:
    line = compat.first_line(error)
    text = f"{type(error).__name__}: {line}"
    if attn != "default" and isinstance(error, (ImportError, ValueError)) and _is_about_attention(text):
        return UnsupportedError(f"{subject.model_class} cannot use {attn} attention: {line}")
    if subject.quantized and isinstance(error, (ImportError, ValueError, RuntimeError)):
        return UnsupportedError(f"this quantised checkpoint cannot be loaded here: {line}")
    if any(said in text for said in NO_CUDA):
        return UnsupportedError(f"the code of {subject.model_class} needs CUDA, which this machine lacks: {line}")
    if subject.kind == "fixture":  # its files are right, so it is the release that cannot
        return CheckError(f"{subject.model_class} could not be loaded by transformers {compat.version()}: {text}")
    folder, trusted = Path(subject.adapter_base or str(subject.path)), subject.trust_remote_code
    return UnusableError(why_not_loaded(folder, subject.task, subject.model_class, error, trust_remote_code=trusted))


def adapter_failures(subject: Subject) -> AbstractContextManager[None]:
    """Name the adapter's folder if its base loads and the adapter does not.

    Args:
        subject: the adapter.

    Raises:
        UnusableError: peft refuses it.
    """
    return _in_one_line(lambda error: _of_adapter(error, subject))


def _of_adapter(error: Exception, subject: Subject) -> NumericsSuiteError:
    import peft  # heavy

    return UnusableError(
        f"{subject.path}: peft {peft.__version__} cannot put this adapter on {subject.adapter_base}: "
        f"{type(error).__name__}: {compat.first_line(error)}; save it again, from the model that it was trained on"
    )


def _is_about_attention(text: str) -> bool:
    return any(word in text.lower() for word in ("attention", "attn", "flash", "sdpa", "flex"))
