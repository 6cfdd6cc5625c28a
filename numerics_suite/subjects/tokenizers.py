"""The tokenizer that comes with a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Subject
from numerics_suite.subjects import compat
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.remote_code import private_modules

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class TokenizerRefusedError(NumericsSuiteError):
    """The installed transformers cannot read the tokenizer that is there; the text is its reason."""


def tokenizer_folder(subject: Subject) -> Path | None:
    """The folder with the tokenizer's files: the subject's own, else its base's; None where there are none."""
    folders = (subject.path, Path(subject.adapter_base) if subject.adapter_base else None)
    return next((folder for folder in folders if folder and any((folder / name).is_file() for name in _FILES)), None)


def load_tokenizer(subject: Subject) -> Any | None:
    """The subject's tokenizer, None where it has no tokenizer files.

    Raises:
        TokenizerRefusedError: this release refuses it.
    """
    folder = tokenizer_folder(subject)
    if folder is None:
        return None
    from transformers import AutoTokenizer  # heavy

    try:
        with quiet_transformers(), private_modules():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=subject.trust_remote_code, local_files_only=True
            )
    except Exception as error:
        message = f"transformers {compat.version()} refuses the tokenizer: {compat.first_line(error)}"
        raise TokenizerRefusedError(message) from error
