"""Remedies that change the tokenizer, or what the model knows of its pad token: each is tried on a tokenizer opened afresh."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding, Subject
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.load import Loaded
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.remote_code import private_modules
from numerics_suite.subjects.tokenizers import TokenizerRaisesError, tokenizer_failures, tokenizer_folder

KEYWORD = re.compile(r"(\w+)\(\) got an unexpected keyword argument '(\w+)'")
NO_SETTER = re.compile(r"(?:property|attribute) '(\w+)'(?: of '\w+' object has no setter)?")
MOST_CHANGES = 4
"""Methods and keys that are mended one after another before a tokenizer counts as beyond mending."""

OPPOSITE = {"left": "right", "right": "left"}

Opener = Callable[[Subject], Any]


def _changed(opener: Opener, change: Callable[[Any], None]) -> Opener:
    def opened(subject: Subject) -> Any:
        tokenizer = opener(subject)
        if tokenizer is not None:
            change(tokenizer)
        return tokenizer

    return opened


def _tokenizer(context: CellContext) -> Any | None:
    try:
        return context.tokenizer
    except (TokenizerRaisesError, NotApplicableError):
        return None


# --- fix-padding, set-pad-token ------------------------------------------------------------------------------------


def other_side(context: CellContext) -> Iterator[tuple[CellContext, str]]:
    """The cell whose tokenizer pads on the other side, and how that is written."""
    tokenizer = _tokenizer(context)
    if tokenizer is None or tokenizer.padding_side not in OPPOSITE:
        return
    side = OPPOSITE[tokenizer.padding_side]

    def change(opened: Any) -> None:
        opened.padding_side = side

    yield context.variant(tokenizer=_changed(context.request.tokenizer, change)), f'tokenizer.padding_side = "{side}"'


def pad_token(context: CellContext) -> Iterator[tuple[CellContext, str]]:
    """The cell whose model and tokenizer both know a pad token: the tokenizer's, else the config's, else EOS."""
    if not context.takes_ids:
        return
    tokenizer, known = _tokenizer(context), getattr(context.model.config, "pad_token_id", None)
    own = getattr(tokenizer, "pad_token_id", None)
    pad = context.space.pad_id if own is None else own
    token = None if tokenizer is None or own is not None else tokenizer.convert_ids_to_tokens(pad)
    if pad == known and token is None:
        return

    def of_model(loaded: Loaded) -> Loaded:
        loaded.model.config.pad_token_id = pad  # type: ignore[union-attr]
        return loaded

    def of_tokenizer(opened: Any) -> None:
        if token is not None:
            opened.pad_token = token

    opener = _changed(context.request.tokenizer, of_tokenizer)
    how = [] if pad == known else [f"pad_token_id {pad} in config.json"]
    how += [] if token is None else [f"pad_token {token!r} in tokenizer_config.json"]
    yield context.variant(change=of_model, tokenizer=opener), " and ".join(how)


# --- fix-tokenizer -------------------------------------------------------------------------------------------------


def mended(context: CellContext, finding: Finding) -> Iterator[tuple[CellContext, str]]:
    """The cell with its tokenizer mended, and the change: what the exception itself names is changed, as long as it names more.

    Raises:
        NotApplicableError: the exception names nothing that could be changed here, or what is changed needs a package.
    """
    opener, exception, done = context.request.tokenizer, str(finding.evidence.get("exception", "")), list[str]()
    while len(done) < MOST_CHANGES:
        change = _change(context, opener, exception)
        if change is None or change[1] in done:
            break
        opener = change[0]
        done.append(change[1])
        cured = context.variant(tokenizer=opener)
        exception = _exception(cured)
        yield cured, "; ".join(done)
    if not done:
        reason = f"not tried: no change is known that answers {exception}"
        raise NotApplicableError(reason)


def _exception(context: CellContext) -> str:
    """What the tokenizer raises now, empty where it does not.

    Raises:
        NotApplicableError: a package is missing, so that it is not known.
    """
    try:
        tokenizer = context.tokenizer
        if tokenizer is not None:
            with tokenizer_failures(""):
                tokenizer(["a", "b c"], padding=tokenizer.pad_token is not None)
    except TokenizerRaisesError as error:
        return str(error)
    return ""


def _change(context: CellContext, opener: Opener, exception: str) -> tuple[Opener, str] | None:
    if (found := KEYWORD.search(exception)) is not None:
        method, keyword = found.groups()
        does = "pads on that side" if keyword == "padding_side" else "is ignored where it is None or False"
        told = f"parameter {keyword} added to {method}: it {does}"
        return _changed(opener, functools.partial(_take_unknown, method=method)), told
    if (found := NO_SETTER.search(exception)) is not None and ("setter" in exception or "can't set" in exception):
        key = found.group(1)
        return _opened_with(context, {key: None}), f"no {key} in tokenizer_config.json: the class has its own"
    folder = tokenizer_folder(context.subject)
    if folder is not None and (folder / "tokenizer.json").is_file():
        told = "PreTrainedTokenizerFast as tokenizer_class in tokenizer_config.json, which reads tokenizer.json in every release"
        return _opened_with(context, None), told
    return None


def _take_unknown(tokenizer: Any, *, method: str) -> None:
    """Let a method written for an older release accept the keywords of a newer one.

    `padding_side` is the tokenizer's own for the call. Any other is left out where it is None or False and so asks for nothing;
    what asks for something that the method cannot do stays an error.
    """
    own = getattr(type(tokenizer), method)
    known = inspect.signature(own).parameters

    @functools.wraps(own)
    def tolerant(self: Any, *args: Any, **kwargs: Any) -> Any:
        side, usual = kwargs.pop("padding_side", None) if "padding_side" not in known else None, self.padding_side
        nothing = [name for name, value in kwargs.items() if name not in known and (value is None or value is False)]
        for name in nothing:
            del kwargs[name]
        try:
            self.padding_side = side or usual
            return own(self, *args, **kwargs)
        finally:
            self.padding_side = usual

    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (kind,), {method: tolerant, "__module__": kind.__module__})


def _opened_with(context: CellContext, overrides: dict[str, Any] | None) -> Opener:
    """Opens the tokenizer with some keys of its config overridden; with None by the class that reads `tokenizer.json`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # heavy

    def opened(subject: Subject) -> Any:
        folder = tokenizer_folder(subject)
        with tokenizer_failures("opening it"), quiet_transformers(), private_modules():
            if overrides is None:
                return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            trusted = context.subject.trust_remote_code
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True, **overrides)

    return opened
