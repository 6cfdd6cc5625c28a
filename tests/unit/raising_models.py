"""Models whose own code raises, in the calls that each documents or in those that only a check makes."""

from __future__ import annotations

import torch
from torch import nn
from unit.same_defects import Layer, Model, batch


class Raises(Model):
    """Its forward pass names an attribute that is not there."""

    def forward(self, input_ids, labels, attention_mask=None):
        self.cache.update(input_ids)
        return super().forward(input_ids, labels, attention_mask)


def always():
    return Raises(), batch()


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context, value):
        return value.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient[:, :, ["a"]]


class Backward(Layer):
    def forward(self, hidden):
        return InBackward.apply(super().forward(hidden))


def in_training_only():
    return Model(Backward), batch()


class Memory(Layer):
    def forward(self, hidden):
        message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes."
        raise RuntimeError(message)


def out_of_memory():
    return Model(Memory), batch()


class NoKernel(Layer):
    def forward(self, hidden):
        message = "\"addmm_impl_cpu_\" not implemented for 'Half'"
        raise RuntimeError(message)


def without_a_kernel():
    return Model(NoKernel), batch()


class Hooked(Layer):
    """Its code looks at how it is called: as a check does, it raises; as a user does, it computes."""

    def forward(self, hidden):
        if self._forward_hooks:
            message = "no hooks, please"
            raise TypeError(message)
        return super().forward(hidden)


def under_hooks_only():
    return Model(Hooked), batch()


class Two(Model):
    """One defect in the forward pass and another in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, labels, attention_mask=None):
        if torch.is_grad_enabled():
            return {"logits": self.nothing}
        return {"logits": self.embed(input_ids)["logits"]}


def two():
    return Two(), batch()
