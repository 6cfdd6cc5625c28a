"""What a load that failed says: which file, what was raised, and whether the files or the release are to blame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numerics_suite.core.errors import CheckError, NumericsSuiteError, UnsupportedError, UnusableError
from numerics_suite.core.records import Subject
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.subjects import compat
from numerics_suite.subjects.buildable import why_not_loaded

NO_CUDA = ("Torch not compiled with CUDA enabled", "Found no NVIDIA driver", "No CUDA GPUs are available")
"""What torch says, in an AssertionError or a RuntimeError, where code asks for CUDA by name (ChatGLM's own `quantization_bit` does)."""


@contextmanager
def load_failures(subject: Subject, attn: str) -> Iterator[None]:
    """Give every failure of a load one line: an implementation that is lacking is a skip, files that cannot be used are bad input.

    Args:
        subject: that is loaded.
        attn: that was asked for.

    Raises:
        UnsupportedError: this class has no such attention, nothing here can read its quantised weights, or its code
            needs CUDA where there is none.
        UnusableError: no model comes of the files.
        CheckError: none comes of a fixture's, which are right.
    """
    try:
        yield
    except NumericsSuiteError:
        raise
    except Exception as error:
        reraise_if_fatal(error)
        text = f"{type(error).__name__}: {compat.first_line(error)}"
        if attn != "default" and isinstance(error, (ImportError, ValueError)) and _is_about_attention(text):
            message = f"{subject.model_class} cannot use {attn} attention: {compat.first_line(error)}"
            raise UnsupportedError(message) from error
        if subject.quantized and isinstance(error, (ImportError, ValueError, RuntimeError)):
            message = f"this quantised checkpoint cannot be loaded here: {compat.first_line(error)}"
            raise UnsupportedError(message) from error
        if any(said in text for said in NO_CUDA):
            message = (
                f"the code of {subject.model_class} needs CUDA, which this machine has not: {compat.first_line(error)}"
            )
            raise UnsupportedError(message) from error
        if subject.kind == "fixture":  # its files are right, so it is the release that cannot
            message = f"{subject.model_class} could not be loaded by transformers {compat.version()}: {text}"
            raise CheckError(message) from error
        folder = Path(subject.adapter_base or str(subject.path))
        trusted = subject.trust_remote_code
        raise UnusableError(
            why_not_loaded(folder, subject.task, subject.model_class, error, trust_remote_code=trusted)
        ) from error


@contextmanager
def adapter_failures(subject: Subject) -> Iterator[None]:
    """Name the adapter's folder where its base could be loaded and it cannot be put on that.

    Args:
        subject: the adapter.

    Raises:
        UnusableError: peft refuses it.
    """
    try:
        yield
    except NumericsSuiteError:
        raise
    except Exception as error:
        reraise_if_fatal(error)
        import peft  # heavy

        said = f"{type(error).__name__}: {compat.first_line(error)}"
        message = (
            f"{subject.path}: peft {peft.__version__} cannot put this adapter on {subject.adapter_base}: {said}; save it again, "
            "from the model that it was trained on"
        )
        raise UnusableError(message) from error


def _is_about_attention(text: str) -> bool:
    return any(word in text.lower() for word in ("attention", "attn", "flash", "sdpa", "flex"))
