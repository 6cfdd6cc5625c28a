"""Models with a defect each that the mutants' catalogue has not, for `factory:unit.script_models:…`; each is `sound` with one change.

Nothing here imports the suite, so a reproducer can call it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mutants.editing import other_loss, overridden
from torch import nn

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
NARROW = (torch.bfloat16, torch.float16)


def sound(name: str = "glm-tiny") -> Any:
    """Nothing is wrong."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FIXTURES / name, attn_implementation="eager").float()


def _with(path: str, forward: Any) -> nn.Module:
    model = sound()
    overridden(path, forward=forward)(model)
    return model


def narrow_ids_shifted() -> nn.Module:
    """Ids that are not int64 are taken for their neighbours."""
    return _with("model.embed_tokens", lambda own, self, ids: own(self, ids.long() + (ids.dtype != torch.int64)))


def ids_rounded_inside() -> nn.Module:
    """Integer ids pass through bfloat16; floating ones are refused."""

    def rounded(own: Any, self: Any, ids: Any) -> Any:
        return own(self, ids if ids.is_floating_point() else ids.to(torch.bfloat16).long().clamp(max=767))

    return _with("model.embed_tokens", rounded)


def rows_alone_coarse() -> nn.Module:
    """In 16 bits a row alone gets another answer."""

    def coarse(own: Any, self: Any, x: Any) -> Any:
        return own(self, x) * (1.25 if len(x) == 1 and x.dtype in NARROW else 1.0)

    return _with("model.layers.1.mlp", coarse)


def packed_rows_coarse() -> nn.Module:
    """In 16 bits rows without a mask get another answer."""

    def coarse(own: Any, self: Any, *args: Any, **given: Any) -> Any:
        self.layers[1].mlp.coarse = given.get("attention_mask") is None
        return own(self, *args, **given)

    def scaled(own: Any, self: Any, x: Any) -> Any:
        return own(self, x) * (1.25 if self.coarse and x.dtype in NARROW else 1.0)

    model = _with("model.layers.1.mlp", scaled)
    model.model.layers[1].mlp.coarse = False
    overridden("model", forward=coarse)(model)
    return model


def odd_widths_coarse() -> nn.Module:
    """In 16 bits rows of odd width get another answer."""

    def coarse(own: Any, self: Any, x: Any) -> Any:
        return own(self, x) * (1.25 if x.shape[1] % 2 and x.dtype in NARROW else 1.0)

    return _with("model.layers.1.mlp", coarse)


def futures_coarse() -> nn.Module:
    """In 16 bits the last token moves the answers before it."""

    def coarse(own: Any, self: Any, x: Any) -> Any:
        output = own(self, x)
        return output * (1 + 0.5 * (x[:, -1:, :1] > 0).to(x.dtype)) if x.dtype in NARROW else output

    return _with("model.layers.1.mlp", coarse)


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch's batched product, a quarter too large in 16 bits."""
    exact = (left.double()[:, :, :, None] * right.double()[:, None]).sum(dim=2)
    return exact.to(left.dtype) * (1.25 if left.dtype in NARROW else 1.0)


def attention_kernel_coarse() -> nn.Module:
    """The kernel of eager attention's products is at fault; the program is right."""

    def coarse(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("bmm", _products, "CPU")
            return own(self, *args, **kwargs)

    return _with("model.layers.1.self_attn", coarse)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch's product, a quarter too large in 16 bits."""
    return torch.bmm(left[None], right[None])[0] * (1.25 if left.dtype in NARROW else 1.0)


def product_kernel_coarse() -> nn.Module:
    """The kernel of the head's product is at fault, so every gradient is."""

    def coarse(own: Any, self: Any, x: Any) -> Any:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("mm", _product, "CPU")
            return own(self, x)

    return _with("lm_head", coarse)


def loss_forgotten() -> nn.Module:
    """Labels are taken and no loss is given."""
    return _with("", lambda own, self, *args, labels=None, **kwargs: own(self, *args, **kwargs))


def loss_with_a_constant() -> nn.Module:
    """The number of rows is added to the loss: its gradient is right, and it is no mean."""
    model = sound()
    other_loss(lambda own, **given: own(**given) + 0.1 * len(given["logits"]))(model)
    return model


def weight_narrowed_by_a_step() -> nn.Module:
    """The forward pass leaves a weight in bfloat16."""

    def narrowed(own: Any, self: Any, x: Any) -> Any:
        output = own(self, x)
        self.down_proj.weight.data = self.down_proj.weight.data.to(torch.bfloat16)
        return output

    return _with("model.layers.1.mlp", narrowed)


def gradient_lost_in_16_bits() -> nn.Module:
    """In 16 bits the gradient of a branch is cut."""
    return _with(
        "model.layers.1.mlp", lambda own, self, x: own(self, x).detach() if x.dtype in NARROW else own(self, x)
    )


def embedding_coarse() -> nn.Module:
    """In 16 bits looking up a row rounds it."""
    return _with(
        "model.embed_tokens",
        lambda own, self, ids: own(self, ids) * (1 + 2.0**-5) if self.weight.dtype in NARROW else own(self, ids),
    )


def untied() -> nn.Module:
    """The config ties both embeddings and the model holds two tensors."""
    model = sound()
    model.config.tie_word_embeddings = True
    return model
