"""A model's own rotary frequencies, which some scalings change with the length of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from numerics_suite.engine.calls import call_model
from numerics_suite.engine.reference_ops import preserved
from numerics_suite.engine.true_fp64 import run_true_fp64

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from numerics_suite.engine.runner import Runner


def rotary_table(model: nn.Module) -> tuple[str, Tensor] | None:
    """Name and values of the model's rotary frequencies as it holds them now, a copy on the CPU; None without any."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            return name, buffer.detach().cpu().clone()
    return None


def reads_table(model: nn.Module) -> bool:
    """Whether the forward pass computes with the frequencies that the model holds.

    ChatGLM's published code keeps such a buffer and never reads it: it computes the table again in each call. The
    classes of transformers read theirs; any other is watched through one true fp64 run of one row of three tokens.
    """
    held = rotary_table(model)
    if held is None or type(owner := model.get_submodule(held[0].rpartition(".")[0])).__module__.startswith(
        "transformers."
    ):
        return held is not None
    watch = _Reads(owner)

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        with watch:
            call_model(model, tensors)
        return {}

    # Three tokens: position 0 is turned by angle 0 whatever the frequencies are.
    ids = torch.ones(1, 3, dtype=torch.long)
    run_true_fp64(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, call=call)
    return watch.found


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records whether an op reads a module's frequencies, under any attribute that holds them."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner, self.found = owner, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        held = {**vars(self.owner), **dict(self.owner.named_buffers())}
        # Compared by storage and not by identity: `inv_freq[None, :, None]` is another tensor over the same memory,
        # and the published code may keep an alias of the buffer in an attribute.
        storages = {
            value.untyped_storage().data_ptr()
            for name, value in held.items()
            if "inv_freq" in name and isinstance(value, torch.Tensor)
        }
        taken = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self.found = self.found or any(leaf.untyped_storage().data_ptr() in storages for leaf in taken)
        return func(*args, **(kwargs or {}))


def longest_of_one_table(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that LongRoPE turns with its short factors; None for a config without it.

    One token more changes the frequencies of every position before it, in the cache too: laws of rows, padding and
    decoding hold only on one side of this length. (NTK-aware `dynamic` scaling changes at `max_position_embeddings`.)
    """
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if section.get("rope_type", section.get("type")) != "longrope":
        return None
    length = config.get("original_max_position_embeddings") or section.get("original_max_position_embeddings")
    return length if isinstance(length, int) else None


def table_at_length(runner: Runner, length: int) -> Tensor | None:
    """The frequencies, `[pairs]`, that the model turns the last position of a sequence of that length with.

    Only the rotary embedding runs, so the length may be any. The model is left as it was: transformers remembers the
    longest sequence it has seen.
    """
    held = rotary_table(runner.model)
    if held is None:
        return None
    module = runner.model.get_submodule(held[0].rpartition(".")[0])
    parameter = next(runner.model.parameters())
    states = torch.zeros(1, 1, 1, dtype=parameter.dtype)  # of which only dtype and device are read
    with preserved(module):
        runner.submodule(module, states, torch.tensor([[length - 1]]))
        found = rotary_table(module)
    return None if found is None else found[1]
