"""The model that the files of this folder are about."""

import torch
from torch import nn

INPUT = torch.linspace(-1, 1, 12).view(3, 4)


class Small(nn.Module):
    """Two layers; the logarithm of a negative number is NaN."""

    def __init__(self, *, logarithm=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.logarithm = nn.Linear(4, 8), nn.Linear(8, 2), logarithm

    def forward(self, input):
        logits = self.head(self.first(input))
        return logits.log() if self.logarithm else logits


class Broken(Small):
    def __init__(self):
        super().__init__(logarithm=True)


def whole():
    return Small(), {"input": INPUT}


def broken():
    return Broken(), {"input": INPUT}
