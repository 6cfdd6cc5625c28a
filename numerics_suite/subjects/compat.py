"""Everything that differs between the releases of transformers, 4.46 and newer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

Release = tuple[int, ...]

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
_MAPPING_NAMES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
SEEING = frozenset({"glm4v", "glm4v_moe", "glm46v", "glm_ocr"})
"""Multimodal models of the GLM line: they are judged on batches of text, which reach all but their vision part."""

IMAGE_TEXT = "AutoModelForImageTextToText"
DTYPE_RENAMED: Release = (4, 56)
ATTENTION_BY_FUNCTION: Release = (4, 48)


@cache
def version() -> str:
    """The installed transformers, such as `5.23.0`."""
    import transformers  # heavy

    return str(transformers.__version__)


@cache
def release() -> Release:
    """The installed transformers as numbers: `(5, 23, 0)`."""
    return tuple(int(part) for part in re.findall(r"\d+", version())[:3])


def packs_by_positions() -> bool:
    """Whether this release builds the masks of packed rows from `position_ids` that restart: from 4.53.1 on."""
    try:
        from transformers import masking_utils  # heavy
    except ImportError:
        return False
    return hasattr(masking_utils, "find_packed_sequence_indices")


def dtype_keyword() -> str:
    """The keyword of `from_pretrained` for the dtype."""
    return "dtype" if release() >= DTYPE_RENAMED else "torch_dtype"


def auto_class_name(task: str, model_type: object = None) -> str:
    """`AutoModelForCausalLM` and so on, as in a config's `auto_map`.

    Args:
        task: of the subject.
        model_type: of its config: a multimodal model has a separate class for language.
    """
    return IMAGE_TEXT if task == "causal-lm" and model_type in SEEING else _AUTO_CLASSES[task]


def auto_class(task: str, model_type: object = None) -> Any:
    """The Auto class of a task; as :func:`auto_class_name`."""
    import transformers  # heavy

    return getattr(transformers, auto_class_name(task, model_type))


def knows_model_type(model_type: str) -> bool:
    """Whether this release, or code that registered itself with it, has a config class of that type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # heavy

    return model_type in CONFIG_MAPPING


def knows_architecture(name: str) -> bool:
    """Whether this release has a class of that name; imports no model."""
    return name in _class_names()


def class_of(name: object) -> Any:
    """The class of that name that this release has; None where it has none."""
    import transformers  # heavy

    return getattr(transformers, str(name), None)


@cache
def _class_names() -> frozenset[str]:
    import transformers  # heavy

    return frozenset(dir(transformers))  # half a second, so once


def model_class_name(model_type: str, task: str) -> str | None:
    """The class that this release would build, None where it has none for the task."""
    from transformers.models.auto import modeling_auto  # heavy

    seeing = task == "causal-lm" and model_type in SEEING
    mapping = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES" if seeing else _MAPPING_NAMES[task]
    names: Mapping[str, Any] = getattr(modeling_auto, mapping)
    found = names.get(model_type)
    if found is None:
        return _registered_class(model_type, task)
    return str(found[0] if isinstance(found, (tuple, list)) else found)


def _registered_class(model_type: str, task: str) -> str | None:
    """The class that the user's own code registered for a config class of that type."""
    mapping = auto_class(task)._model_mapping  # noqa: SLF001  # the only register of them
    extra = getattr(mapping, "_extra_content", {})
    return next((model.__name__ for config, model in extra.items() if config.model_type == model_type), None)


def is_language_model(module: Any) -> bool:
    """Whether a module has the surface of a model of transformers (peft's wrappers have it too)."""
    return hasattr(module, "get_input_embeddings") and hasattr(getattr(module, "config", None), "to_dict")


def config_values(model: Any) -> dict[str, Any]:
    """The keys of a model's config, with those of its language part, if any, instead.

    Args:
        model: of transformers; a multimodal one keeps vocabulary and lengths in `text_config`.
    """
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    whole: dict[str, Any] = config.to_dict()
    return whole if text is config else {**whole, **text.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingInfo:
    """What `from_pretrained` says about names; sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def loading_info(info: Mapping[str, Any]) -> LoadingInfo:
    """Read the second result of `from_pretrained(output_loading_info=True)`.

    Args:
        info: lists in 4.x, sets in 5.x; a mismatch is `(name, stored shape, built shape)`.
    """

    def names(key: str) -> tuple[str, ...]:
        found = info.get(key) or ()
        return tuple(sorted(item if isinstance(item, str) else str(item[0]) for item in found))

    return LoadingInfo(
        missing=names("missing_keys"), unexpected=names("unexpected_keys"), mismatched=names("mismatched_keys")
    )


def attention_of(model: nn.Module) -> str:
    """The attention implementation that a model computes with; `default` where it has no such switch."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "default")


def use_plain_experts(model: nn.Module) -> None:
    """Make a mixture of experts compute one expert at a time: grouped products have no float64 kernel.

    Args:
        model: changed in place; releases before 5.0 always do, and have no switch.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) not in (None, "eager"):
            config._experts_implementation_internal = "eager"  # type: ignore[union-attr]  # noqa: SLF001


def set_attention(model: Any, attn: str) -> None:
    """Switch the attention of a model that is already built.

    Args:
        model: a `PreTrainedModel`.
        attn: the implementation.

    Raises:
        UnsupportedError: this class or this release cannot.
    """
    kind, had = type(model).__name__, attention_of(model)
    if had == attn:
        return
    if release() < ATTENTION_BY_FUNCTION:
        message = f"under transformers {version()} a built {kind} keeps the attention it was built with ({had})"
        raise UnsupportedError(message)
    # Before 4.53 the declaration is `_supports_sdpa`, `_supports_flash_attn_2`, `_supports_flex_attn`.
    flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}.get(attn)
    if flag and not getattr(model, flag, True):
        message = f"{kind} declares no support for {attn} attention"
        raise UnsupportedError(message)
    try:
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attn)
        else:
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "_attn_implementation"):
                    module.config._attn_implementation = attn  # noqa: SLF001  # what the later method does
    except (ValueError, ImportError) as error:
        message = f"{kind} cannot use {attn} attention: {first_line(error)}"
        raise UnsupportedError(message) from error
    if attention_of(model) != attn:
        message = f"{kind} cannot use {attn} attention; it stays with {attention_of(model)}"
        raise UnsupportedError(message)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which in a wrapped error names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- config keys ---------------------------------------------------------------------------------------------------

_ALWAYS = frozenset({"model_type", "auto_map", "architectures", "transformers_version", "torch_dtype", "_name_or_path"})
_ALWAYS |= {"tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Keys that the Auto classes, `from_pretrained`, `tie_weights` and generation read of any config, declared or not."""

_READS = re.compile(r"kwargs\.(?:pop|get|setdefault)\(\s*[\"'](\w+)[\"']")
_ASKS = re.compile(r"(?<!\w)config\.(\w+)|getattr\((?:self\.)?config, [\"'](\w+)[\"']")
_BASES = ("PretrainedConfig", "PreTrainedConfig")
_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})


def known_config_keys(config_class: type) -> set[str]:
    """Keys of `config.json` that this release reads for this config class.

    Any other key becomes an attribute that nothing reads: it is silently ignored.

    Args:
        config_class: a `PretrainedConfig` class of transformers or of remote code.
    """
    return set(_known_config_keys(config_class))


@cache
def _known_config_keys(config_class: type) -> frozenset[str]:
    keys = set(_ALWAYS)
    for cls in config_class.__mro__:
        if cls is object or cls.__name__.endswith("Mixin"):
            continue
        # The base class looks at the rope keys only to move them into `rope_parameters`, where there is one.
        keys |= _declared(cls) - (_ROPE_KEYS if cls.__name__ in _BASES else set())
    keys |= _asked_by_model(config_class)
    # From 5.0 on any class with `rope_parameters` takes the older keys and moves them into it.
    if hasattr(config_class, "convert_rope_params_to_dict") and "rope_parameters" in keys:
        keys |= _ROPE_KEYS
    mapped: Mapping[str, str] = getattr(config_class, "attribute_map", {})
    keys |= {alias for alias, name in mapped.items() if name in keys}
    return frozenset(keys)


def _declared(cls: type) -> set[str]:
    """Fields, parameters, and keys taken out of `kwargs` where a config of this class is made."""
    # `ClassVar` facts about the class (`model_type`, `base_model_tp_plan`) are no keys; under `from __future__ import
    # annotations` they are text.
    keys = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    for method in ("__init__", "__post_init__"):
        function = cls.__dict__.get(method)
        if function is None:
            continue
        function = inspect.unwrap(function)
        keys |= {name for name, parameter in inspect.signature(function).parameters.items() if _is_named(parameter)}
        keys |= set(_READS.findall(_source(function)))
    keys |= {name for name, value in vars(cls).items() if isinstance(value, property) and value.fset is not None}
    return keys - {"self"}


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made by a decorator: it has no lines of its own
        return ""


def _asked_by_model(config_class: type) -> set[str]:
    """Config keys read by the modelling file beside the config's file, and by the shared rotary code if used."""
    try:
        path = Path(inspect.getfile(config_class))
    except (OSError, TypeError):
        return set()
    text = _text(path.with_name(path.name.replace("configuration_", "modeling_")))
    if "ROPE_INIT_FUNCTIONS" in text:
        import transformers  # heavy

        text += _text(Path(transformers.__path__[0]) / "modeling_rope_utils.py")
    return {one or other for one, other in _ASKS.findall(text)}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
