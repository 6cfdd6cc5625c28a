"""Writes docs/versions.md from the JSON of `numerics-suite matrix`: what changed in transformers, each change with its proof.

python tools/versions_table.py MATRIX.json [MATRIX.json ...] --write docs/versions.md

Several files are runs that must agree: other tasks, or other seeds of one. A change without a proof below is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Why a change is real.

    Attributes:
        version: the first tested release that has it.
        kind: as `matrix` says.
        word: part of what the change's details say; empty for any.
        task: that it is seen in; empty for any.
        what: in a few words.
        why: what both releases' code say.
    """

    version: str
    kind: str
    word: str = ""
    task: str = ""
    what: str
    why: str


PROOFS = (
    Proof(
        version="4.48.3",
        kind="contract",
        word="DynamicCache",
        what="the cache that comes back is a `DynamicCache`, no longer a tuple",
        why="`models/glm/modeling_glm.py` up to 4.47 ends its forward pass with `next_cache.to_legacy_cache()` where it was given no "
        "`Cache`; 4.48 has neither that nor `return_legacy_cache`.",
    ),
    Proof(
        version="4.49.0",
        kind="rounding",
        task="causal-lm",
        what="the loss differs in the last bit of float32",
        why="`loss/loss_utils.py: ForCausalLMLoss` shifted by cutting the last logit of each row; from 4.49 it pads the labels with "
        "`ignore_index`, so the same terms are summed in another order. `fixed_cross_entropy` is the same.",
    ),
    Proof(
        version="4.52.4",
        kind="contract",
        word="num_logits_to_keep",
        task="causal-lm",
        what="`num_logits_to_keep` is no longer an argument",
        why='4.49 to 4.51 translate it by `deprecate_kwarg("num_logits_to_keep", version="4.50", new_name="logits_to_keep")`; 4.52 has '
        "no such decorator, and `**kwargs` swallows the name: all logits come back without a word.",
    ),
    Proof(
        version="5.0.0",
        kind="contract",
        word="dtype",
        what="`from_pretrained` without a dtype gives the stored dtype, no longer float32",
        why='`modeling_utils.py: from_pretrained` of 5.0 says `if dtype is None: dtype = "auto"`; 4.57 leaves None, which is float32.',
    ),
    Proof(
        version="5.4.0",
        kind="contract",
        word="cache_position",
        task="causal-lm",
        what="`cache_position` is no longer an argument",
        why="`models/glm/modeling_glm.py` and `models/glm4/modeling_glm4.py` name it in 5.3 and nowhere in 5.4.",
    ),
    Proof(
        version="5.8.1",
        kind="changed",
        task="sequence-classification",
        what="a new classification head stays uninitialised in bf16 and fp16",
        why="`modeling_utils.py: _init_weights` of 5.8 says `init.normal_(module.weight.float(), …)`, which fills a float32 copy of a weight in 16 bits; 5.7 says "
        "`init.normal_(module.weight, …)`. `load.head-init` fails with `uninitialised-parameters`, `score.weight`, from 5.8.0 on.",
    ),
    Proof(
        version="5.8.1",
        kind="contract",
        word="head",
        task="sequence-classification",
        what="the new head has neither mean nor spread: it is NaN under poison",
        why="The same defect, seen in the contract.",
    ),
    Proof(
        version="5.9.0",
        kind="changed",
        task="sequence-classification",
        what="the new head is initialised again",
        why="5.9 initialises `module.weight` itself again; the answers are 5.7's to the bit.",
    ),
    Proof(
        version="5.9.0",
        kind="contract",
        word="head",
        task="sequence-classification",
        what="the new head has the mean and spread of 5.7 again",
        why="The same repair, seen in the contract.",
    ),
    Proof(
        version="5.23.0",
        kind="rounding",
        task="causal-lm",
        what="cached decoding with sdpa rounds otherwise",
        why="`integrations/sdpa_attention.py` of 5.23 packs the query heads of a group into one call where there is a single query token "
        "(`pack_gqa`), in place of repeating keys and values.",
    ),
)


def proof_of(version: str, change: Mapping[str, Any]) -> Proof | None:
    """The proof of a change, None without one."""
    details = json.dumps(change.get("details", ""), ensure_ascii=False)
    return next(
        (
            proof
            for proof in PROOFS
            if proof.version == version
            and proof.kind == change["kind"]
            and proof.word in details
            and proof.task in {"", change["task"]}
        ),
        None,
    )


def rows_of(files: Sequence[Path]) -> tuple[list[str], list[str], set[Proof]]:
    """Rows of the table, changes without a proof, and the proofs that were met."""
    found: dict[tuple[str, str, str], set[str]] = {}
    unproved, met, versions = [], set(), []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            version = cell["transformers"]
            versions += [version] if version not in versions else []
            if cell["status"] in {"error", "unsupported"}:
                unproved.append(f"{file}: {version} {cell['status']}: {cell['reason']}")
            for change in cell["changes"]:
                if change["against"] == "baseline":
                    continue
                proof = proof_of(version, change)
                if proof is None:
                    unproved.append(f"{file}: {version} {change}")
                    continue
                met.add(proof)
                found.setdefault((version, change["kind"], proof.what), set()).add(
                    f"{change['subject']} ({change['task']})"
                )
    rows = ["| transformers | kind | change | seen in | proof |", "|---|---|---|---|---|"]
    for (version, kind, what), where in sorted(found.items(), key=lambda item: Version(item[0][0])):
        proof = next(proof for proof in PROOFS if (proof.version, proof.kind, proof.what) == (version, kind, what))
        rows.append(f"| {version} | `{kind}` | {what} | {', '.join(sorted(where))} | {proof.why} |")
    rows += ["", f"Everything else is identical to the bit over {len(versions)} releases: {', '.join(versions)}."]
    return rows, unproved, met


def main() -> int:
    """Write the table, or say what has no proof."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    rows, unproved, met = rows_of(given.files)
    for line in unproved:
        print(f"without a proof: {line}")
    for proof in PROOFS:
        if proof not in met:
            print(f"proved and not seen: {proof.version} {proof.kind}: {proof.what}")
    if given.write is None:
        print("\n".join(rows))
    else:
        text = given.write.read_text(encoding="utf-8")
        begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
        given.write.write_text(f"{text[:begin]}\n" + "\n".join(rows) + f"\n{text[end:]}", encoding="utf-8")
    return 1 if unproved else 0


if __name__ == "__main__":
    sys.exit(main())
