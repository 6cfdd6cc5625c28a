"""Every check of every family's tiny checkpoint, under whichever transformers is installed: no finding, no error.

`KNOWN` holds the findings that are true: what that release itself does, with the place that shows it.
"""

from __future__ import annotations

import pytest
from families.checkpoints import FAMILIES, build, missing_in_release
from packaging.specifiers import SpecifierSet

from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession

KNOWN = {
    # modeling_bamba.py: without position_ids every step of decoding begins at position 0 again.
    ("bamba", "forward.cache"): ">=5",
    # The softcap of the attention's logits is given to sdpa, which has none.
    ("gemma2", "forward.attention"): "<5",
    # A_log is made in float32, and stays so whatever dtype is asked for.
    ("mamba", "load.dtype"): "<5",
    # A batch of one row is taken for one without padding: `attention_mask.shape[0] > 1`.
    ("mamba2", "forward.padding"): "<5",
}
HALF_IN_FLOAT32 = {"xlnet"}
"""Their attention is made in float32 and stays so, and the first product with a half-precision input raises."""


def unexpected(name: str, folder: str, precision: str) -> tuple[dict[str, str], int, list[str]]:
    """What is neither passed, nor skipped with a reason, nor known; how many passed; and faults of the installed training stack."""
    import transformers

    settings = Settings(
        subjects=(folder,),
        precision=(precision,),
        attn=("eager", "sdpa"),
        device="cpu",
        max_examples=3,
        seq_len=12,
        diagnose=False,
        origins={"precision": "command line"},
    )
    session = SuiteSession(settings)
    found, passed, stack = {}, 0, []
    for question in session.plan.questions:
        result = session.answer(question)[0]
        passed += result.status == "passed"
        if result.check == "train.trainer" and result.status == "accepted":
            stack.append(result.finding.title)
            continue
        known = KNOWN.get((name, question.check))
        if known is not None and result.status == "failed" and transformers.__version__ in SpecifierSet(known):
            continue
        if result.status not in {"passed", "skipped"} or (result.status == "skipped" and not result.reason):
            title = result.finding.title if result.finding else result.reason
            found[f"{question.check}/{question.cell.attn}"] = f"{result.status}: {title}"
    return found, passed, stack


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_checkpoint_stays_clean(tmp_path, name, precision, record_property):
    if missing_in_release(name):
        pytest.skip("the installed transformers lacks the family")
    if precision == "bf16" and name in HALF_IN_FLOAT32:
        pytest.skip("the class cannot run in this precision")
    found, passed, stack = unexpected(name, build(name, tmp_path), precision)
    record_property("faults of the installed training stack", stack)
    assert found == {}
    assert passed > 20
