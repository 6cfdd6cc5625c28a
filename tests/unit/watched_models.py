"""Small models to watch, each with one place that can go wrong, and loops that know nothing of the watch."""

from __future__ import annotations

import torch
from torch import nn

VOCAB = 1000


class Decoder(nn.Module):
    """Two feed-forward layers between an embedding and a head; `broken` computes sqrt(0), whose derivative is infinite."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.lm_head = nn.Linear(32, VOCAB)
        self.to(dtype)

    def forward(self, input_ids, labels=None, scale=1.0):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.lm_head(hidden) * scale
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return out


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.broken = False

    def forward(self, hidden):
        inner = self.down(torch.nn.functional.silu(self.up(self.norm(hidden))))
        if self.broken:
            inner = inner + (inner * 0).sqrt()
        return hidden + inner


def ids(seed, rows=4, columns=8):
    return torch.randint(0, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps, *, clip=1.0, before=None, start=1):
    """A plain loop; `before(step)` may break something."""
    for step in range(start, start + steps):
        if before is not None:
            before(step)
        batch = ids(step)
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch)["loss"]
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


class Loud(Decoder):
    """A loss that is multiplied: of one batch, or of all."""

    def __init__(self, batch, factor=1e18):
        super().__init__()
        self.batch, self.factor = batch, factor

    def forward(self, input_ids, labels=None):
        out = super().forward(input_ids, labels)
        if self.batch is None or torch.equal(input_ids, self.batch):
            out["loss"] = out["loss"] * self.factor
        return out
