"""Each mutant of the catalogue as a user's own function: `factory:mutants.factories:ID`, hyphens as underscores.

`clean_FIXTURE` is the model without a defect. Nothing here imports the suite, so a reproducer can call it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mutants.catalogue import MUTANTS

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
BY_NAME = {mutant.id.replace("-", "_"): mutant for mutant in MUTANTS}


def clean(name: str, attn: str = "eager") -> Any:
    """A shipped checkpoint's model in float32, as a user's own code would make it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if name.endswith("classifier") else AutoModelForCausalLM
    return auto.from_pretrained(FIXTURES / name, attn_implementation=attn, trust_remote_code="chatglm" in name).float()


def __getattr__(name: str) -> Callable[[], nn.Module]:
    if name.startswith("clean_"):
        return lambda: clean(name.removeprefix("clean_").replace("_", "-"))
    if name not in BY_NAME:
        raise AttributeError(name)
    mutant = BY_NAME[name]

    def make() -> nn.Module:
        model = clean(mutant.fixture, mutant.attn)
        mutant.apply(model)
        return model

    return make
