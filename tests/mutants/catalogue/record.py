"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mutants.catalogue.causes import CAUSES
from mutants.editing import Patch

ORACLE = "reference.oracle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One defect in one place of a model.

    Attributes:
        id: unique, lower case with hyphens.
        family: the fixture's family.
        apply: changes a freshly loaded model.
        expected_checks: at least one of them must fail; the cheapest first.
        why: the mistake in the words of somebody who could make it.
        task: of the fixture.
        precision: of the cell.
        attn: of the cell.
        module_pattern: matches the whole of the module's name that a finding must give; None where no module is at
            fault (a loss) or where none is named, which `why` then says.
        equivalent: nothing that a user could measure changes; `why` says why.
        kind: of change that a baseline of the clean model should show. By one rule, whatever is measured: `changed` where the
            mistake makes another function of it when every cast is lifted; `worse` where it only rounds more; `rounding` where
            only the order of a sum changes; `contract` where the function stays and what is taken, returned or held changes.
    """

    id: str
    family: Literal["glm", "glm4", "chatglm"]
    apply: Patch
    expected_checks: tuple[str, ...]
    why: str
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    precision: str = "fp32"
    attn: str = "eager"
    module_pattern: str | None = None
    equivalent: bool = False
    kind: Literal["changed", "worse", "rounding", "contract"] = "changed"

    @property
    def fixture(self) -> str:
        """Name of the shipped checkpoint that it is made of."""
        return f"{self.family}-tiny" + ("-classifier" if self.task == "sequence-classification" else "")

    @property
    def causes(self) -> tuple[str, ...]:
        """The causes that are right, the most specific first; none for an equivalent mutant.

        By one rule, from what the mistake is and not from what a check says of it. A law that it breaks by construction gives
        the first (a mask that shows the future: `future-leak`); a mistake in one attention implementation only is an
        `attention-mismatch` too. Whatever changes the function of the forward pass is a `semantic-error` as well. A mistake in
        the loss is `wrong-loss`; in the backward pass alone `wrong-gradient`, and `dead-gradient` where a path is cut.
        One that only rounds is a `low-precision-section`, or `kernel-accuracy` where the program is right and its kernel is not.
        A table that a cast rounds is a `rounded-buffer`. A weight in the wrong place is `lost-weights`; an answer that changes from call to call is `nondeterminism`.
        """
        return CAUSES.get(self.id, ())
