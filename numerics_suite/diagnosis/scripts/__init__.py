"""What a reproducer is written from: one file for each group of checks, and the parts that they share."""

from __future__ import annotations

from collections.abc import Mapping

from numerics_suite.diagnosis.scripts.definition import ORACLE
from numerics_suite.diagnosis.scripts.forward import FORWARD
from numerics_suite.diagnosis.scripts.inputs import INPUTS
from numerics_suite.diagnosis.scripts.laws import LAWS
from numerics_suite.diagnosis.scripts.load import LOAD
from numerics_suite.diagnosis.scripts.reference import REFERENCE
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.diagnosis.scripts.train import TRAIN
from numerics_suite.diagnosis.scripts.train_twins import TRAIN_TWINS
from numerics_suite.diagnosis.scripts.trainer import TRAINER

__all__ = ["BODIES", "SYMPTOM", "WITHOUT", "Body", "ScriptContext"]

BODIES: Mapping[tuple[str, str], Body] = {
    **LOAD,
    **INPUTS,
    **FORWARD,
    **LAWS,
    **TRAIN,
    **TRAIN_TWINS,
    **TRAINER,
    **REFERENCE,
    **ORACLE,
}
"""By check and measurement: what runs the model and asserts."""

WITHOUT: Mapping[str, str] = {
    "baseline": "the other side of the comparison is a recorded baseline, which torch and transformers alone cannot read",
    "load.complete lost-head": "an adapter is loaded by peft, and what is missing in its file is told by the finding",
}
"""Groups of checks, and measurements (`CHECK MEASUREMENT`), that get no script, and why."""
