"""Two ways in which a loop trains what it means to leave alone, or leaves alone what it means to train with it.

**Frozen parameters that move.** An optimizer steps whatever has a gradient. A parameter that was frozen after its last backward pass keeps that gradient,
or one of zeros (`zero_grad(set_to_none=False)`); no backward pass writes it any more, and momentum and weight decay move the parameter.

**A tied pair that is two tensors.** Where the config ties input and output embedding and a new layer was put in place of one, a step of the one
leaves the other as it was, and a copy that is saved and loaded again has one of the two in both places.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.training_watch.alarms import Alarm

FROZEN, UNTIED = "frozen", "untied"
SAMPLE = 4096
"""Elements of a frozen parameter that are compared with what they were."""


class Frozen:
    """Looks at the frozen parameters that an optimizer holds with a gradient; where there are none, no kernel runs.

    Attributes:
        model: the plain one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Nothing was seen yet."""
        self.model = model
        self._gradients: dict[int, Tensor] = {}
        self._suspected: list[tuple[str, Tensor, Tensor]] = []

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step.

        A gradient that is what it was one step before was left over. One that a script writes itself, as evolution strategies do, is another each time.
        """
        self._suspected = []
        kept = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
        kept = [p for p in kept if p.grad is not None and not hasattr(p, "_local_tensor")]
        names = {id(p): name for name, p in self.model.named_parameters()} if kept else {}
        for parameter in (p for p in kept if id(p) in names):
            gradient, earlier = _sample(parameter.grad), self._gradients.get(id(parameter))
            self._gradients[id(parameter)] = gradient
            if earlier is not None and torch.equal(gradient, earlier):
                self._suspected.append((names[id(parameter)], parameter, _sample(parameter)))

    def moved(self, step: int) -> Alarm | None:
        """The alarm of those that its step moved, None where it moved none."""
        names = tuple(name for name, p, old in self._suspected if not torch.equal(_sample(p), old))
        self._suspected = []
        if not names:
            return None
        text = f"{len(names)} frozen parameter{'s move' if names[1:] else ' moves'} by a gradient from before, as no backward pass clears it (set it to None, or make the optimizer after freezing)"
        facts = {"frozen parameters that move": len(names)}
        return Alarm(step=step, kind=FROZEN, bad=True, text=text, cause="wrong-gradient", facts=facts, parameters=names)


def _sample(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].clone()


def untied(step: int, model: Any, trained: Collection[int]) -> Alarm | None:
    """The alarm of input and output embeddings that the config ties, that are two tensors, and of which one is trained; None elsewhere.

    An adapter that saves one of them keeps it, and loses it only when it is merged: that is a warning.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return None
    pair = [getattr(layer, "weight", None) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    names = {id(p): name for name, p in model.named_parameters()}
    if any(id(weight) not in names for weight in pair) or pair[0] is pair[1]:
        return None
    ours = [names[id(weight)] for weight in pair if id(weight) in trained]
    others = [names[id(weight)] for weight in pair if id(weight) not in trained]
    if len(ours) != 1:
        return None
    adapter = hasattr(model, "peft_config")
    after = "merged, one of them is lost" if adapter else "saved and loaded again, one of them is lost"
    text = f"the config ties {ours[0]} and {others[0]}, they are two tensors, and only the first is trained: {after}"
    return Alarm(
        step=step, kind=UNTIED, bad=not adapter, text=text, cause="untied-weights", parameters=(*ours, *others)
    )
