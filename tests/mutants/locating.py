"""What the suite, `detect_anomaly` and `DebugUnderflowOverflow` each name on defects that make a value non-finite.

python tests/mutants/locating.py [--only PATTERN] [--write docs/locating.md]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import io
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent.parent):
    sys.path.insert(0, str(folder))

from mutants.locating_defects import DEFECTS, Defect, line_of  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What one tool says of one defect; None where it says nothing of that kind."""

    module: str | None = None
    op: str | None = None
    source: str | None = None
    cause: str | None = None
    backward: bool | None = None
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One defect and what each tool names."""

    defect: Defect
    line: str | None
    ours: Named
    anomaly: Named
    debug: Named

    @property
    def module_right(self) -> bool:
        """Whether the suite names the module."""
        return _same_module(self.ours.module, self.defect.module)

    @property
    def op_right(self) -> bool:
        """Whether the suite names the op and its pass."""
        return self.ours.op in self.defect.ops and self.ours.backward == self.defect.backward

    @property
    def line_right(self) -> bool:
        """Whether the suite names the source line."""
        return self.ours.source == self.line

    @property
    def cause_right(self) -> bool:
        """Whether the suite names the cause."""
        return self.ours.cause in self.defect.causes

    @property
    def anomaly_right(self) -> bool:
        """Whether detect_anomaly names the node and the line; a forward defect's line alone is enough."""
        op = self.defect.backward is False or self.anomaly.op in self.defect.nodes
        return op and self.anomaly.source is not None and self.anomaly.source == self._forward_line()

    def _forward_line(self) -> str | None:
        """A hand-written backward is called for by a forward line, which is all that detect_anomaly can know."""
        return self.line

    @property
    def debug_right(self) -> bool:
        """Whether DebugUnderflowOverflow names the module."""
        return self.debug.module is not None and _same_module(self.debug.module, self.defect.module)


def _same_module(named: str | None, wanted: str | None) -> bool:
    return wanted is not None and (named or "") == wanted


def session_of(defect: Defect, folder: Path) -> Any:
    """The suite's session over the defect, on one cell and one check."""
    from mutants.driver import MutantSession

    return MutantSession(replace(settings_for(defect, folder), checks=(defect.check,)), defect.apply)


def settings_for(defect: Defect, folder: Path) -> Any:
    """The command line's settings for the defect's cell, with every check.

    Args:
        defect: which.
        folder: for a copy of the checkpoint where its config is changed.
    """
    from numerics_suite.settings.tree import Settings
    from numerics_suite.subjects.fixtures import fixture_path

    source = f"fixture:{defect.fixture}"
    if defect.config:
        # A name of its own: transformers keeps remote code in memory by the folder's name.
        place = folder / f"{defect.id}-checkpoint"
        shutil.copytree(fixture_path(defect.fixture), place)
        config = json.loads((place / "config.json").read_text(encoding="utf-8")) | defect.config
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        source = str(place)
    return Settings(
        subjects=(source,),
        precision=(defect.precision,),
        attn=(defect.attn,),
        trust_remote_code=True,
        device="cpu",
        origins={"precision": "command line"},
        **defect.settings,
    )


def expected_line(defect: Defect) -> str | None:
    """`file.py:123` of the line at fault."""
    from numerics_suite.subjects.fixtures import fixture_path

    if defect.text is None:
        return None
    file = Path(fixture_path(defect.fixture)) / defect.file
    if defect.file == Path(DEFECTS_FILE).name:
        file = Path(DEFECTS_FILE)
    elif not file.exists():
        family = defect.file.removeprefix("modeling_").removesuffix(".py")
        found = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
        assert found is not None
        assert found.origin is not None
        file = Path(found.origin)
    return f"{defect.file}:{line_of(defect, file)}"


DEFECTS_FILE = str(HERE / "locating_defects.py")


def named_by_us(session: Any) -> Named:
    """The suite's finding."""
    from mutants.driver import answers, describe, failures

    results = list(answers(session))
    failed = failures(results)
    if not failed or failed[0].finding is None:
        return Named(said=describe(results))
    found = failed[0].finding
    return Named(
        module=found.module,
        op=found.op,
        source=found.source,
        cause=found.cause,
        backward=found.evidence.get("pass") == "backward",
        said=", ".join(f"{name} {value}" for name, value in found.evidence.items()),
    )


def _training_inputs(session: Any) -> tuple[Any, Mapping[str, Any], Any]:
    context = session.context(session.plan.cells[0])
    return context, dict(context.training_batch.tensors), context.copy_model()


def named_by_anomaly(session: Any) -> Named:
    """What `torch.autograd.detect_anomaly` says of one step, with the loss scale where the precision has one."""
    import torch

    from numerics_suite.engine.calls import call_model
    from numerics_suite.engine.runner import forward_pass

    context, tensors, model = _training_inputs(session)
    scale = 65536.0 if context.recipe.loss_scaling else 1.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly():
                with forward_pass(context.condition):
                    loss = call_model(model, tensors).loss
                (loss * scale).backward()
        except RuntimeError as error:
            match = re.search(r"Function '(\w+?)' returned nan", str(error))
            if match is None:
                return Named(said=str(error).splitlines()[0])
            return Named(op=match.group(1), source=_last_line(said), backward=True, said=str(error).splitlines()[0])
    return Named(said="nothing")


def _last_line(said: Iterable[Any]) -> str | None:
    """The innermost line of the printed traceback that is not torch's."""
    text = "\n".join(str(item.message) for item in said if "Traceback of forward call" in str(item.message))
    frames = re.findall(r'File "([^"]+)", line (\d+), in', text)
    own = [(Path(file).name, number) for file, number in frames if "/torch/" not in file]
    own = [frame for frame in own if frame[0] != "editing.py"]
    return ":".join(own[-1]) if own else None


def named_by_debug(session: Any) -> Named:
    """What transformers' `DebugUnderflowOverflow` says of one step: the module of the last frame that it prints."""
    from transformers.debug_utils import DebugUnderflowOverflow

    from numerics_suite.engine.calls import call_model
    from numerics_suite.engine.runner import forward_pass

    context, tensors, model = _training_inputs(session)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            watcher = DebugUnderflowOverflow(model)
            with forward_pass(context.condition):
                call_model(model, tensors).loss.backward()
        except ValueError as error:
            if "inf/nan detected" not in str(error):
                return Named(said=f"{type(error).__name__}: {error}"[:100])
            frames = re.findall(r"^ {17} (\S*) (\w+)$", printed.getvalue(), flags=re.MULTILINE)
            return Named(module=frames[-1][0] if frames else None, said="inf/nan detected")
        except Exception as error:  # noqa: BLE001 - what it says is what is measured
            return Named(said=f"{type(error).__name__}: {str(error).splitlines()[0]}"[:100])
        del watcher
    return Named(said="nothing")


def row_of(defect: Defect, *, others: bool = True) -> Row:
    """One defect asked of every tool.

    Args:
        defect: which.
        others: ask the two other tools too.
    """
    import torch

    from numerics_suite.suite import driver

    torch.set_num_threads(1)
    kept, driver.SHRINKS = driver.SHRINKS, 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            session = session_of(defect, Path(folder))
            ours = named_by_us(session)
            anomaly = named_by_anomaly(session) if others else Named()
            debug = named_by_debug(session) if others else Named()
    finally:
        driver.SHRINKS = kept
    return Row(defect=defect, line=expected_line(defect), ours=ours, anomaly=anomaly, debug=debug)


def _share(rights: list[bool]) -> str:
    return f"{sum(rights)} of {len(rights)} ({100 * sum(rights) / max(len(rights), 1):.0f} %)"


def shares(rows: list[Row]) -> dict[str, str]:
    """How often each tool is right, over the defects that have such an answer."""
    placed = [row for row in rows if row.defect.module is not None]
    lines = [row for row in rows if row.line is not None]
    return {
        "module right (numerics-suite)": _share([row.module_right for row in placed]),
        "op and pass right (numerics-suite)": _share([row.op_right for row in rows if row.defect.ops]),
        "source line right (numerics-suite)": _share([row.line_right for row in lines]),
        "cause right (numerics-suite)": _share([row.cause_right for row in rows]),
        "line right (detect_anomaly; with the op, where the defect is in the backward pass)": _share(
            [row.anomaly_right for row in lines]
        ),
        "module right (DebugUnderflowOverflow)": _share([row.debug_right for row in placed]),
    }


def _cell(text: str | None, *, right: bool) -> str:
    return f"{'✓' if right else '✗'} {f'`{text}`' if text else '–'}"


def page(rows: list[Row]) -> str:
    """The whole page."""
    import torch
    import transformers

    refused = sum("not implemented for 'Bool'" in row.debug.said for row in rows)
    lines = [
        "# Where a value stops being finite: what each tool names",
        "",
        "Each defect makes one value non-finite in a shipped checkpoint's model; what a right answer is follows from what was",
        f"changed (`tests/mutants/locating_defects.py`). Measured with transformers {transformers.__version__} and torch",
        f"{torch.__version__.partition('+')[0]} on CPU; written by `python tests/mutants/locating.py --write docs/locating.md`.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in shares(rows).items()),
        "",
        "`torch.autograd.detect_anomaly` watches the backward pass for NaN: on a forward defect it names the op of the loss at which the",
        "NaN enters the backward pass, and of an infinity or of the optimizer's step it says nothing. `DebugUnderflowOverflow` looks at",
        "the modules' positional inputs and outputs in the forward pass, so it knows no op, no line, no backward pass and no loss. It names",
        "the first module that returns after meeting a bad value: a child that is handed one returns before the parent that made it.",
        f"On {refused} of the defects it stops with an error instead, because chatglm hands its blocks a boolean mask.",
        "",
        "Read the figures for what they are: the catalogue and the locator were written side by side. On its first run the locator was",
        "wrong on two of them (a NaN that is thrown away, and the cause of a huge learning rate), and was repaired. They show what it was",
        "made to see, not its recall on defects that it has not met.",
        "",
        "| defect | where | pass | right module | numerics-suite: module | op | line | cause | detect_anomaly: op, line | DebugUnderflowOverflow: module |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        "Softmax over a fully masked row is an eager defect only: since torch 2.5 `scaled_dot_product_attention` gives zeros for a row",
        "without an allowed key, with a boolean mask and an additive one, forward and backward.",
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    defect, ours = row.defect, row.ours
    where = f"{defect.fixture}, {defect.precision}, {defect.attn}"
    side = "backward" if defect.backward else "forward"
    wanted = "–" if defect.module is None else f"`{defect.module}`" if defect.module else "the model"
    anomaly = " ".join(part for part in (row.anomaly.op, row.anomaly.source) if part)
    cells = [
        f"`{defect.id}`: {defect.why}",
        where,
        side,
        wanted,
        "–" if defect.module is None else _cell(ours.module or "the model", right=row.module_right),
        _cell(ours.op, right=row.op_right) if defect.ops else "–",
        _cell(ours.source, right=row.line_right) if row.line else "–",
        _cell(ours.cause, right=row.cause_right),
        _cell(anomaly, right=row.anomaly_right) if row.line else "–",
        "–" if defect.module is None else _cell(row.debug.module or row.debug.said, right=row.debug_right),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print what is wrong and the shares, and write the page where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = []
    for defect in DEFECTS:
        if not fnmatch.fnmatchcase(defect.id, options.only):
            continue
        row = row_of(defect)
        rows.append(row)
        right = {
            "module": row.module_right or defect.module is None,
            "op": row.op_right or not defect.ops,
            "line": row.line_right or row.line is None,
            "cause": row.cause_right,
        }
        wrong = [name for name, good in right.items() if not good]
        print(f"{defect.id}: {'WRONG ' + ', '.join(wrong) if wrong else 'right'}", flush=True)  # noqa: T201 - a script
        if wrong:
            print(f"   wanted {defect.module} {defect.ops} {row.line} {defect.causes}\n   named {row.ours}", flush=True)  # noqa: T201 - a script
        print(f"   anomaly {row.anomaly}\n   debug {row.debug}", flush=True)  # noqa: T201 - a script
    for name, value in shares(rows).items():
        print(f"{name}: {value}")  # noqa: T201 - as above
    if options.write:
        options.write.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
