"""The tokenizer that comes with a subject."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError
from numerics_suite.core.records import Subject
from numerics_suite.subjects import compat
from numerics_suite.subjects.files import read_json
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.remote_code import private_modules

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class TokenizerRaisesError(NumericsSuiteError):
    """The checkpoint's tokenizer cannot be opened or called; the text is its exception, in one line.

    Attributes:
        line: `file.py:123`, where it was raised.
        doing: the operation, in words.
    """

    def __init__(self, error: Exception, doing: str) -> None:
        """Take the exception's message.

        Args:
            error: as the tokenizer raised it.
            doing: "opening it", "padding 4 texts".
        """
        super().__init__(f"{type(error).__name__}: {compat.first_line(error)}")
        frames = traceback.extract_tb(error.__traceback__)
        self.line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        self.doing = doing


@contextmanager
def tokenizer_failures(doing: str) -> Iterator[None]:
    """Around code that opens or calls a tokenizer.

    Args:
        doing: the operation, in words.

    Raises:
        TokenizerRaisesError: it raised.
        NotApplicableError: a package that it needs is not installed, or its own code may not run: neither is a defect
            of the checkpoint.
    """
    try:
        yield
    except NumericsSuiteError:
        raise
    except ImportError as error:
        reason = f"the tokenizer needs a package that is not installed: {compat.first_line(error)}"
        raise NotApplicableError(reason) from error
    except Exception as error:
        raise TokenizerRaisesError(error, doing) from error


def tokenizer_folder(subject: Subject) -> Path | None:
    """The folder with the tokenizer's files: the subject's own, else its base's; None where there are none."""
    folders = (subject.path, Path(subject.adapter_base) if subject.adapter_base else None)
    return next((folder for folder in folders if folder and any((folder / name).is_file() for name in _FILES)), None)


def load_tokenizer(subject: Subject) -> Any | None:
    """The subject's tokenizer, None where it has no tokenizer files. Its own code runs only where the subject is trusted.

    Raises:
        TokenizerRaisesError: this release cannot open it.
        NotApplicableError: a package that it needs is not installed, or its own code may not run.
    """
    folder = tokenizer_folder(subject)
    if folder is None:
        return None
    from transformers import AutoTokenizer  # heavy

    with tokenizer_failures("opening it"), quiet_transformers(), private_modules():
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=subject.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            if subject.trust_remote_code or not _has_own_code(folder):
                raise
            reason = "the tokenizer is the checkpoint's own code, which needs --trust-remote-code"
            raise NotApplicableError(reason) from error


def _has_own_code(folder: Path) -> bool:
    """Whether the tokenizer's config names a class in a file of the checkpoint's own."""
    config = folder / "tokenizer_config.json"
    return config.is_file() and "AutoTokenizer" in (read_json(config).get("auto_map") or {})
