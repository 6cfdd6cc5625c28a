"""What lies in the folder in which a page's commands are run, before the first of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docs.pages import ROOT

FIXTURES = ROOT / "fixtures"

SMALL = """\
[tool.numerics-suite]
subjects = ["./my-checkpoint"]
precision = ["bf16"]
attn = ["sdpa"]
checks = ["load.complete", "baseline.semantics"]
max-examples = 1
steps = 2
diagnose = false
workers = "0"
"""
"""Keeps a command short that names no checks; what a command says itself is over this."""

TRAINING = '''\
"""A training script that knows nothing of the suite."""

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("my-checkpoint")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
ids = torch.arange(32).view(2, 16)
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
'''

NAMES = """\
import torch
from transformers import AutoModelForCausalLM

import numerics_suite

model = AutoModelForCausalLM.from_pretrained("my-checkpoint")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
ids = torch.arange(32).view(2, 16)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
loader = [batch]
"""
"""What a fragment of Python on a page may take for given: the names that every training loop has."""

FROM_NOTHING = ("docs/tutorial.md",)
"""Pages that begin on a machine with nothing on it."""


def shortened(section: str) -> str:
    """A page's own settings with those of :data:`SMALL` that it leaves open.

    Args:
        section: a pyproject.toml that a page shows.
    """
    stated = {line.partition(" = ")[0] for line in section.splitlines()}
    head, *rest = SMALL.splitlines()
    added = "\n".join(line for line in rest if line.partition(" = ")[0] not in stated)
    return section.replace(head, f"{head}\n{added}")


@contextmanager
def plain_settings(folder: Path) -> Iterator[None]:
    """Without the settings that keep a command short: what a page shows is what its reader will see.

    Args:
        folder: of a page.
    """
    file, aside = folder / "pyproject.toml", folder / "aside.toml"
    ours = file.is_file() and file.read_text(encoding="utf-8") == SMALL
    if ours:
        file.rename(aside)
    try:
        yield
    finally:
        if ours:
            aside.rename(file)


def prepare(page: str, folder: Path) -> None:
    """Fill the folder of a page.

    Args:
        page: its path from the repository's root.
        folder: an empty one.
    """
    if page in FROM_NOTHING:
        return
    shutil.copytree(FIXTURES / "glm4-tiny", folder / "my-checkpoint")
    texts = (FIXTURES / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "mine.jsonl").write_text("\n".join(texts[:6]) + "\n", encoding="utf-8")
    (folder / "pyproject.toml").write_text(SMALL, encoding="utf-8")
    (folder / "train.py").write_text(TRAINING, encoding="utf-8")
