"""What a run says of its time: before it begins, while it goes on, and what it is at."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numerics_suite.cli.main import main
from numerics_suite.core import progress
from numerics_suite.core.records import Cell, Subject
from numerics_suite.core.registry import own_check_ids
from numerics_suite.devices.speed import Speed, measure_speed
from numerics_suite.reports.plan import readable_seconds
from numerics_suite.reports.terminal import Terminal
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects import memory
from numerics_suite.suite import pace as pace_module
from numerics_suite.suite.expected_time import (
    BESIDES_PRODUCTS,
    READ_BYTES_PER_S,
    check_seconds,
    dtypes_of,
    expected_seconds,
    pass_seconds,
    run_seconds,
)
from numerics_suite.suite.pace import Pace
from numerics_suite.suite.planning import Question, SuitePlan, make_plan
from numerics_suite.suite.session import SuiteSession

COSTS = Path(pace_module.__file__).with_name("check_costs.json")
SPEED = Speed(products={"float64": 1e9, "bfloat16": 4e9}, widening_s=1e-9, op_s=1e-6)
CELL = Cell(subject="m", precision="bf16", attn="sdpa", device="cpu", task="causal-lm")


def subject(layers: int = 4, parameters: int = 1_000_000, **config: Any) -> Subject:
    sizes = {"hidden_size": 100, "num_hidden_layers": layers, "vocab_size": 1000, **config}
    return Subject(
        id="m",
        source="./m",
        kind="directory",
        task="causal-lm",
        family="glm4",
        parameters=parameters,
        config=sizes,
    )


def test_every_check_that_runs_a_model_has_its_costs() -> None:
    table = json.loads(COSTS.read_text(encoding="utf-8"))
    assert set(table) == {check for check in own_check_ids() if not check.startswith("baseline.")}
    assert all(len(values) == 3 for row in table.values() for values in row.values())


def test_a_pass_is_the_products_of_its_weights_and_tokens() -> None:
    one = pass_seconds(subject(), CELL, 4 * 64, SPEED)
    products = 2 * (1_000_000 - 100 * 1000) * 4 * 64  # all weights but the embedding, at every token of the batch
    assert one.narrow == pytest.approx(BESIDES_PRODUCTS * products / 4e9)
    assert one.wide == pytest.approx(BESIDES_PRODUCTS * products / 1e9 + 1e-3)
    tied = pass_seconds(subject(tie_word_embeddings=True), CELL, 4 * 64, SPEED)
    assert tied.narrow == pytest.approx(one.narrow * 10 / 9), "a tied embedding is the output layer too"
    assert pass_seconds(subject(layers=9), CELL, 4 * 64, SPEED).ops == pytest.approx(2 * one.ops)
    assert pass_seconds(subject(), CELL, 8 * 64, SPEED).narrow == pytest.approx(2 * one.narrow)


def test_more_examples_and_more_steps_take_longer_where_a_check_has_some() -> None:
    one = pass_seconds(subject(), CELL, 4 * 64, SPEED)

    def of(check: str, **changes: Any) -> float:
        return check_seconds(Question(check=check, cell=CELL), one, Settings(**changes))

    assert of("forward.cache", max_examples=20) > 1.8 * of("forward.cache", max_examples=10)
    assert of("train.clip", steps=50) > 5 * of("train.clip", steps=5)
    assert of("reference.local", max_examples=20) == of("reference.local", max_examples=10)
    assert of("acme.law") > 0, "a check of another package"


def test_a_plan_that_is_skipped_takes_no_time_and_workers_share_it() -> None:
    settings = Settings(subjects=("fixture:glm4-tiny",), precision=("fp16", "bf16"), attn=("sdpa",), device="cpu")
    plan = make_plan(settings)
    speed = Speed(products={"float64": 1e9, "float16": 1e8, "bfloat16": 1e9}, widening_s=1e-9, op_s=1e-6)
    assert set(dtypes_of(plan)) == set(speed.products)
    found = expected_seconds(plan, settings, speed)
    assert set(found) == {question.id for question in plan.questions}
    assert found["train.clip/glm4-tiny/fp16/sdpa/cpu"] == 0.0
    assert found["forward.cache/glm4-tiny/fp16/sdpa/cpu"] > found["forward.cache/glm4-tiny/bf16/sdpa/cpu"] > 0
    assert run_seconds({"a": 3.0, "b": 1.0}, 0) == 4.0


def test_a_device_is_measured_in_a_moment() -> None:
    begun = time.process_time()
    speed = measure_speed("cpu", ("float64", "bfloat16"))
    assert time.process_time() - begun < 2.0
    assert all(rate > 1e7 for rate in speed.products.values())
    assert 0 < speed.op_s < 1e-2


def test_the_list_states_the_time_and_loads_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from numerics_suite.engine import cell_context

    monkeypatch.setattr(cell_context, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments = ("--precision", "bf16", "--attn", "eager,sdpa", "--list", "--json", str(tmp_path / "plan.json"))
    assert main(["check", "fixture:glm4-tiny", *arguments]) == 0
    out = capsys.readouterr().out
    assert "memory     time" in out
    assert "on an idle machine; nothing was run" in out
    planned = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["planned"]
    assert all(row["seconds"] > 0 for row in planned)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.2, "<1 s"), (41.4, "41 s"), (99.0, "99 s"), (126.0, "2.1 min"), (1800.0, "30 min"), (9000.0, "2.5 h"), (4e5, "111 h")],
)  # fmt: skip
def test_seconds_are_readable(seconds: float | None, text: str) -> None:
    assert readable_seconds(seconds) == text


def test_a_time_limit_below_the_smallest_cell_says_what_would_be_enough(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--precision", "fp32", "--attn", "sdpa", "--checks", "load.*,forward.cache", "-n", "0")
    assert main(["check", "fixture:glm4-tiny", *arguments, "--max-time", "0.000001"]) == 5
    note = next(line for line in capsys.readouterr().out.splitlines() if "--max-time" in line)
    assert "8 checks were not begun; the smallest cell is expected to take" in note


# --- while it goes on ---


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def expected(cells: int) -> dict[str, float]:
    return {
        f"{check}/{cell}": cost
        for cell in range(cells)
        for check, cost in (("load.finite", 1.0), ("forward.cache", 9.0))
    }


def test_what_is_left_follows_what_the_same_check_took(clock: Clock) -> None:
    pace = Pace(expected(3))
    assert pace.left() == pytest.approx(30.0)
    pace.answered("load.finite/0", 1.0)
    pace.answered("forward.cache/0", 90.0)
    assert pace.left() == pytest.approx(2 * 1.0 + 2 * 90.0)
    pace.answered("forward.cache/of-an-earlier-run", 1000.0)
    assert pace.left() == pytest.approx(182.0)


def test_one_cheap_check_does_not_decide_alone(clock: Clock) -> None:
    pace = Pace({"load.finite/0": 0.01, "forward.cache/0": 99.99})
    pace.answered("load.finite/0", 1.0)  # a hundred times as long as expected: the import of a library
    left = pace.left()
    assert 99.0 < left < 200.0


def test_workers_share_what_is_left_as_far_as_they_really_do(clock: Clock) -> None:
    pace = Pace(expected(4), workers=2)
    assert pace.left() == pytest.approx(20.0)
    clock.now += 10.0
    pace.answered("forward.cache/0", 9.0)
    pace.answered("load.finite/0", 1.0)
    assert pace.left() == pytest.approx(30.0), "two workers that share one core are as fast as one"


def test_every_process_tells_what_it_is_at(tmp_path: Path) -> None:
    progress.begin("forward.cache", "m/bf16/sdpa/cpu")
    assert [str(one) for one in progress.at_work()] == ["forward.cache"]
    progress.batch(3, 10)
    assert [str(one) for one in progress.at_work()] == ["forward.cache, batch 3 of 10"]
    progress.batch(12, 10)
    assert [str(one) for one in progress.at_work()] == ["forward.cache, batch 12, making it smaller"]
    progress.tell_in(tmp_path)
    try:
        progress.begin("load.finite", "m/fp32/sdpa/cpu")
        (own,) = tmp_path.glob("*.json")
        (tmp_path / "another.json").write_text(own.read_text().replace("load.finite", "train.clip"))
        (tmp_path / "torn.json").write_text('{"check": ')
        assert {str(one) for one in progress.at_work(tmp_path)} == {"load.finite", "train.clip"}
    finally:
        progress.tell_in(None)
        progress.end()
    assert progress.at_work() == ()


def test_a_check_tells_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = progress.batch

    def noted(number: int, of: int) -> None:
        real(number, of)
        seen.extend(str(one) for one in progress.at_work())

    monkeypatch.setattr(progress, "batch", noted)
    settings = Settings(
        subjects=("fixture:glm4-tiny",), precision=("fp32",), attn=("sdpa",), checks=("forward.finite",), max_examples=3, device="cpu"
    )  # fmt: skip
    session = SuiteSession(settings)
    (question,) = session.plan.questions
    assert session.answer(question)[0].status == "passed"
    assert seen == [f"forward.finite, batch {number} of 3" for number in (1, 2, 3)]
    assert progress.at_work() == ()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_check_batch_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    terminal = Terminal(stream=screen)
    work = [progress.AtWork(check="forward.cache", cell="m", batch=3, of=10)]
    terminal.follow(40, lambda: work, lambda: 126.0)
    terminal.stop()
    assert "forward.cache, batch 3 of 10" in screen.getvalue()
    assert "2.1 min left" in screen.getvalue()
    assert "0/40" in screen.getvalue()


# --- against the clock ---


@pytest.mark.slow
def test_the_costs_are_those_of_todays_checks() -> None:
    """Where this fails, a check runs more or less than it did: python tools/measure_costs.py."""
    import importlib.util
    import sys

    path = Path(__file__).resolve().parents[2] / "tools" / "measure_costs.py"
    spec = importlib.util.spec_from_file_location("measure_costs", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["measure_costs"] = tool
    spec.loader.exec_module(tool)
    now, held = tool.table(), json.loads(COSTS.read_text(encoding="utf-8"))

    def total(table: dict[str, dict[str, list[float]]], kind: str) -> float:
        return sum(max(row[kind][0] + 10 * row[kind][1] + 5 * row[kind][2], 0.0) for row in table.values())

    for kind in ("ops", "narrow", "wide"):
        assert total(now, kind) == pytest.approx(total(held, kind), rel=0.1), kind
    for kind in ("planned", "kept"):
        sums = [[sum(row[kind][place] for row in table.values()) for place in range(3)] for table in (now, held)]
        assert sums[0] == pytest.approx(sums[1], rel=0.1), kind


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cell_takes_what_was_expected_within_a_factor_of_two(tmp_path: Path, precision: str) -> None:
    """In CPU time of one thread, which does not depend on what else the machine does."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from numerics_suite.subjects.fixtures import fixture_path

    folder = Path(shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 2048}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    settings = Settings(
        subjects=(str(folder),), precision=(precision,), attn=("sdpa",), skip=("baseline.*",), device="cpu"
    )
    session = SuiteSession(settings)
    expected = sum(expected_seconds(session.plan, settings, measure_speed("cpu", dtypes_of(session.plan))).values())
    begun = time.process_time()
    for question in session.plan.questions:
        assert session.answer(question)[0].status in {"passed", "skipped"}
    took = time.process_time() - begun
    assert took / 2 < expected < took * 2, (expected, took)


def test_checks_of_gradients_that_do_not_fit_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(subject(parameters=2 * 10**9), path=Path("m"), stored_dtype="bfloat16")
    checks = ("reference.gradient", "train.accumulation", "forward.finite", "reference.oracle")
    plan = SuitePlan(
        device="cpu",
        subjects={"m": large},
        cells=(CELL,),
        questions=tuple(Question(check=name, cell=CELL) for name in checks),
    )
    for free, refused in ((10**12, False), (10**9, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        found = expected_seconds(plan, Settings(), SPEED)
        assert (found[f"reference.gradient/{CELL.id}"] == 0) is refused
        assert (found[f"train.accumulation/{CELL.id}"] == 0) is refused
        assert found[f"reference.oracle/{CELL.id}"] > 0


def test_weights_that_do_not_stay_in_memory_are_read_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(subject(parameters=2 * 10**9), path=Path("m"), stored_dtype="bfloat16")
    found = []
    for free in (10**12, 4 * 10**9):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        found.append(pass_seconds(large, CELL, 4 * 64, SPEED))
    held, read = found
    assert read.narrow - held.narrow == pytest.approx(4 * 10**9 / READ_BYTES_PER_S)
    assert read.wide - held.wide == pytest.approx(4 * 10**9 / READ_BYTES_PER_S)
    assert read.ops == held.ops
