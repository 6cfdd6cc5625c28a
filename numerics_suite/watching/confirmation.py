"""Whether parameters without a gradient are a mistake or meant so: the kept steps are taken again, and `train.updates` asked."""

from __future__ import annotations

from dataclasses import replace

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.diagnosing.consequences import NO_RUN
from numerics_suite.diagnosing.remedy_trials import ask_once
from numerics_suite.watching.alarms import Alarm
from numerics_suite.watching.caught_step import undisturbed
from numerics_suite.watching.diagnosis import Scene
from numerics_suite.watching.updates import unreached


def confirmed(alarm: Alarm, scene: Scene) -> Alarm | None:
    """The alarm with those parameters that the loss depends on all the same; None where it depends on none.

    A pooler that nothing reads, an expert that no token went to, the part for pictures in a batch of text get no gradient by design. Where
    the steps cannot be taken again the alarm is a warning, which says what was seen.

    Args:
        alarm: of kind `unreached`.
        scene: what a replay needs.
    """
    why = "the batches are no longer at hand" if scene.replay else "processes share the model"
    with undisturbed():
        for start in scene.starts:
            try:
                answer = ask_once("train.updates", scene.caught(start))
            except (NumericsSuiteError, *NO_RUN) as error:
                why = " ".join(str(error).split())
                continue
            named = {name for breach in answer.breaches for name in breach.measurement.parameters}
            kept = [name for name in alarm.parameters if name in named]
            return unreached(alarm.step, kept, int(alarm.facts["parameters of the optimizer"])) if kept else None
    text = f"{alarm.text}, first {alarm.parameters[0]}; whether that is meant so could not be found out: {why}"
    return replace(alarm, bad=False, text=text)
