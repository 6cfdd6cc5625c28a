"""What config.json would have to say for the installed release to build the model that the file means.

Values are never invented: a key that the release does not read is replaced by one that it reads, a size that the file lacks or has wrong is
read off the stored tensors. Where the file contradicts itself, or the release has no such key, the reason says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from numerics_suite.checks.load.config import DEFINING
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.text import listed

Raw = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

SYNONYMS = (
    ("head_dim", "kv_channels"),
    ("num_hidden_layers", "num_layers"),
    ("intermediate_size", "ffn_hidden_size"),
    ("vocab_size", "padded_vocab_size"),
    ("rms_norm_eps", "layernorm_epsilon"),
    ("num_key_value_heads", "multi_query_group_num"),
    ("attention_bias", "add_qkv_bias"),
    ("max_position_embeddings", "seq_length"),
    ("dtype", "torch_dtype"),
)
"""Keys of one meaning and one value: GLM-4 as its own code has it and as transformers has it, and the dtype before 4.56 and since."""

OF_ROPE = ("rope_parameters", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_ratio")
READ_BY_DEFINITION = frozenset(OF_ROPE) - {"rope_ratio"}
"""The definitions read either layout of these, so they stay as the user wrote them when answers are compared with the file's definition."""

CHATGLM_BASE, CHATGLM_FRACTION = 10_000.0, 0.5
"""`rope_ratio` multiplies this base; GLM-4's own code always turns half of a head. Source: its `modeling_chatglm.py` (2024)."""

EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight")
DOUBLED, SINGLE = ("gate_up_proj.weight", "dense_h_to_4h.weight"), ("mlp.gate_proj.weight",)
"""Gate and up as one matrix of twice the rows, or the gate alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """Another config.json of the same meaning.

    Attributes:
        meaning: what answers are compared with: the user's own keys where the definition reads them, else the new ones.
        written: the keys that are new or changed.
        left: reasons why more could not be said.
    """

    config: Mapping[str, Any]
    meaning: Mapping[str, Any]
    written: Mapping[str, Any]
    dropped: tuple[str, ...]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a user does: `with rope_ratio 50.0 in place of rope_parameters`."""
        said = ", ".join(f"{key} {value}" for key, value in self.written.items())
        gone = ", ".join(self.dropped)
        return f"with {said}{' in place of ' if gone else ''}{gone}" if said else f"without {gone}"


@dataclass(slots=True, kw_only=True)
class _Draft:
    raw: Raw
    known: set[str]
    config: dict[str, Any] = field(init=False)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the file as it is."""
        self.config = dict(self.raw)

    def done(self) -> Rewriting:
        """The rewriting; NotApplicableError with the reasons where nothing could be said otherwise."""
        written = {key: value for key, value in self.config.items() if key not in self.raw or self.raw[key] != value}
        dropped = tuple(key for key in self.raw if key not in self.config)
        if not written and not dropped:
            reason = (
                "; ".join(self.left) or "no key of config.json is at odds with the stored tensors or with this release"
            )
            raise NotApplicableError(reason)
        own = {key: self.raw[key] for key in READ_BY_DEFINITION if key in self.raw}
        meaning = {key: value for key, value in self.config.items() if key not in READ_BY_DEFINITION}
        return Rewriting(
            config=self.config, meaning=meaning | own, written=written, dropped=dropped, left=tuple(self.left)
        )

    def rename(self, key: str) -> None:
        """Say one key under the name that is read."""
        names = next((names for names in SYNONYMS if key in names), ())
        read = next((name for name in names if name in self.known), None)
        if key in self.known:
            self.left.append(f"this transformers reads {key} and builds another value all the same")
        elif read is None:
            self.left.append(f"this transformers has no word for {key}")
        elif self.config.get(read) is not None and self.config[read] != self.raw[key]:
            self.left.append(_contradiction(f"{read} {self.config[read]}", f"{key} {self.raw[key]}"))
        else:
            self.config[read] = self.config.pop(key)

    def rope(self) -> None:
        """Say the rotary section in the layout that is read."""
        try:
            written = _rope_words(_rope_values(self.raw), self.known)
        except NotApplicableError as error:
            self.left.append(str(error))
            return
        for key in OF_ROPE:
            self.config.pop(key, None)
        self.config |= written


def in_words_that_are_read(raw: Raw, known: set[str], keys: Iterable[str]) -> Rewriting:
    """The file with these keys said in words that the release reads.

    Args:
        raw: config.json.
        known: keys that the release reads for this class.
        keys: those that it does not read, or reads otherwise.

    Raises:
        NotApplicableError: it has no word for any of them, or the file contradicts itself.
    """
    draft = _Draft(raw=raw, known=known)
    keys = tuple(keys)
    if set(keys) & set(OF_ROPE):
        draft.rope()
    for key in keys:
        if key not in OF_ROPE and key in raw:
            draft.rename(key)
    return draft.done()


def of_stored_sizes(raw: Raw, known: set[str], built: object, stored: Shapes) -> Rewriting:
    """The file with the sizes that the stored tensors have, where the model was built with others.

    Raises:
        NotApplicableError: no size of the config is at odds with the tensors, or the tensors do not say which one is.
    """
    draft = _Draft(raw=raw, known=known)
    for key in ignored(raw, known):
        if key not in OF_ROPE:
            draft.rename(key)
    for key, size in _sizes(draft.config, built, stored).items():
        if key in known and draft.config.get(key, getattr(built, key, None)) != size:
            draft.config[key] = size
    return draft.done()


def of_dtype(raw: Raw, dtype: str, key: str) -> Rewriting:
    """The file with the dtype that was asked for: code that builds in the config's dtype ignores any other.

    Args:
        raw: config.json.
        dtype: asked for, as torch names it.
        key: under which this release says it, where the file does not say it yet.

    Raises:
        NotApplicableError: the file says so already.
    """
    draft = _Draft(raw=raw, known=set())
    for name in [name for name in ("dtype", "torch_dtype") if name in raw] or [key]:
        draft.config[name] = dtype
    return draft.done()


def tied_as_stored(raw: Raw, stored: Shapes, *, head: str, equal: bool) -> Rewriting:
    """The file with `tie_word_embeddings` as the stored tensors have it.

    Raises:
        NotApplicableError: the file says so already, so what is wrong is the class.
    """
    tied = head not in stored or equal
    draft = _Draft(raw=raw, known=set())
    if bool(raw.get("tie_word_embeddings", False)) != tied:
        draft.config["tie_word_embeddings"] = tied
    return draft.done()


def ignored(raw: Raw, known: set[str]) -> tuple[str, ...]:
    """Keys of the file that define what is computed and that the release does not read."""
    return tuple(key for key in raw if key in DEFINING and key not in known and raw[key] is not None)


def _contradiction(one: str, other: str) -> str:
    return f"config.json says {one} and {other}; which of them the weights were trained with, it does not say"


def _rope_values(raw: Raw) -> dict[str, Any]:
    """The rotary section of either layout as one, with `rope_type` where it is scaled.

    Raises:
        NotApplicableError: two places say different things, or each type of layer has a section of its own.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, key, value in _said_of_rope(raw):
        if isinstance(value, Mapping):
            reason = f"{place} has a section for each type of layer, for which no other layout has a word"
            raise NotApplicableError(reason)
        if values.setdefault(key, value) != value:
            raise NotApplicableError(_contradiction(f"{key} {values[key]} ({places[key]})", f"{value} ({place})"))
        places.setdefault(key, place)
    return values


def _said_of_rope(raw: Raw) -> Iterator[tuple[str, str, Any]]:
    """Place in the file, key and value of everything that it says of the rotary table."""
    for key in ("rope_theta", "partial_rotary_factor"):
        if raw.get(key) is not None:
            yield key, key, raw[key]
    if isinstance(raw.get("rope_ratio"), (int, float)):
        yield "rope_ratio", "rope_theta", CHATGLM_BASE * raw["rope_ratio"]
    for section in ("rope_parameters", "rope_scaling"):
        for key, value in (raw.get(section) or {}).items():
            if value is not None:
                yield section, "rope_type" if key == "type" else key, value


def _rope_words(values: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The rotary section in the keys that are read.

    Raises:
        NotApplicableError: there is no key for a part of it.
    """
    rest = {key: value for key, value in values.items() if key not in {"rope_theta", "partial_rotary_factor"}}
    scaled = rest if rest.get("rope_type", "default") != "default" else {}
    if "rope_ratio" in known:
        if scaled or values.get("partial_rotary_factor", CHATGLM_FRACTION) != CHATGLM_FRACTION:
            reason = f"rope_ratio has no word for {listed(tuple(scaled) or ('partial_rotary_factor',), 3)}"
            raise NotApplicableError(reason)
        return {"rope_ratio": values.get("rope_theta", CHATGLM_BASE) / CHATGLM_BASE}
    if "rope_parameters" in known:
        return {"rope_parameters": {"rope_type": "default", **values}}
    words = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if key in values}
    words |= {"rope_scaling": scaled} if scaled else {}
    lacking = tuple(key for key in words if key not in known)
    if lacking:
        reason = f"this transformers has no word for {listed(lacking, 3)}"
        raise NotApplicableError(reason)
    return words


def _sizes(config: Raw, built: object, stored: Shapes) -> dict[str, int]:
    """What the stored tensors say of the config's sizes, under each name that it may have."""

    def shape(*endings: str) -> tuple[int, ...] | None:
        return next((stored[name] for name in sorted(stored) if name.endswith(endings)), None)

    def said(key: str) -> Any:
        return config.get(key, getattr(built, key, None))

    sizes: dict[str, int] = {}
    if (embedding := shape(*EMBEDDINGS)) is not None:
        sizes |= {"vocab_size": embedding[0], "padded_vocab_size": embedding[0], "hidden_size": embedding[1]}
    for endings, share in ((DOUBLED, 2), (SINGLE, 1)):
        if (gate := shape(*endings)) is not None:
            sizes |= {"intermediate_size": gate[0] // share, "ffn_hidden_size": gate[0] // share}
    query, key = shape("q_proj.weight"), shape("k_proj.weight")
    heads = said("num_attention_heads")
    # Rows of the queries are heads times their size: only one that the file itself does not name can be told from the other.
    if query and key and config.get("head_dim") is None and isinstance(heads, int) and query[0] % heads == 0:
        size = query[0] // heads
        sizes |= {"head_dim": size, "num_key_value_heads": key[0] // size}
    return sizes
