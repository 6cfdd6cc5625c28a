"""Faults that releases of the training stack have, and that no checkpoint and no setting cures: such a finding is accepted.

`train.trainer` judges the installed packages. What it finds here was measured (docs/training-stack.md has the table): it is shown with its
reason and does not fail a gate that no change could make pass. A fault that is not in the table, or not in that release, fails.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from numerics_suite.core.records import Finding

FAULT_OF: Final = "fault of "
"""How the evidence of `train.trainer` names the fault of each way that failed: `fault of accumulation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFault:
    """One fault of released packages.

    Attributes:
        fault: `KIND at MODULE.CLASS.FUNCTION`, a glob.
        transformers: the releases in which it was measured, a specifier.
    """

    fault: str
    transformers: str
    reason: str


KNOWN_FAULTS: Final = (
    KnownFault(
        fault="undivided-sum at transformers.trainer.Trainer.training_step",
        transformers=">=4.46.0,<4.48",
        reason="known in transformers 4.46.0 to 4.47.1: the Trainer adds up the micro-batches' means undivided where it hands the class no "
        "num_items_in_batch; without accumulation it trains as it should",
    ),
    KnownFault(
        fault="ignored-count at transformers.*For*Classification.forward",
        transformers=">=4.54,<=5.24.0",
        reason="known in transformers 4.54 to 5.24.0: the classifier takes num_items_in_batch and does not use it, so that the "
        "Trainer adds up the micro-batches' gradients undivided; without accumulation it trains as it should",
    ),
    KnownFault(
        fault="divided-twice at transformers.trainer.Trainer.create_accelerator_and_postprocess",
        transformers=">=5.2.0,<5.5",
        reason="known in transformers 5.2.0 to 5.4.0: the Trainer has accelerate divide each micro-batch's loss by their number too, which the class has divided "
        "by num_items_in_batch; without accumulation it trains as it should",
    ),
    KnownFault(
        fault="miscount of * at transformers.trainer.Trainer.get_batch_samples",
        transformers=">=4.46.2,<5.10",
        reason="known in transformers 4.46.2 to 5.9: the Trainer counts the first label of each row, which nothing predicts; the gradient is "
        "too small by one label in a row where prompts are not masked",
    ),
    KnownFault(
        fault="miscount of *LMHeadModel at transformers.trainer.Trainer.get_batch_samples",
        transformers=">=5.10,<=5.24.0",
        reason="known in transformers 5.10 to 5.24.0: the Trainer tells by the class's loss type whether labels are shifted, classes named LMHeadModel have none, and "
        "the first label of each row is counted",
    ),
    KnownFault(
        fault="smoothed-means at transformers.trainer_pt_utils.LabelSmoother.__call__",
        transformers=">=4.46.0,<5.15",
        reason="known in transformers 4.46.0 to 5.14.1: under label smoothing the Trainer adds up the means of the micro-batches; without "
        "accumulation it trains as it should",
    ),
    KnownFault(
        fault="cache-on at transformers.trainer.Trainer.compute_loss",
        transformers=">=4.53,<5",
        reason="known in transformers 4.53 to 4.57: the Trainer leaves the cache on, and rows packed by a padding-free collator see each other "
        "but under flash attention; use_cache=False in the model's config keeps them apart",
    ),
    KnownFault(
        fault="unshifted-labels at transformers.trainer.Trainer.compute_loss",
        transformers=">=4.46.0,<=5.24.0",
        reason="known in transformers 4.46.0 to 5.24.0: under label smoothing the Trainer shifts labels for its own causal classes alone, and a "
        "class from a checkpoint's folder learns each token from itself; give such a model a compute_loss_func",
    ),
    KnownFault(
        fault="no-count at *",
        transformers=">=4.46.0,<=5.24.0",
        reason="known of classes whose forward takes no num_items_in_batch, with every release: the Trainer averages the micro-batches' means, so that "
        "a label in a short micro-batch weighs more",
    ),
)


def reason_to_accept(check: str, finding: Finding, transformers_version: str) -> str | None:
    """Why the finding is accepted, None unless each of its faults is known in the installed release."""
    if check != "train.trainer":
        return None
    faults = [str(value) for name, value in finding.evidence.items() if name.startswith(FAULT_OF)]
    reasons = [_known(fault, transformers_version) for fault in faults]
    if not faults or None in reasons:
        return None
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def _known(fault: str, transformers_version: str) -> str | None:
    return next(
        (
            known.reason
            for known in KNOWN_FAULTS
            if fnmatch.fnmatchcase(fault, known.fault)
            and SpecifierSet(known.transformers).contains(transformers_version, prereleases=True)
        ),
        None,
    )
