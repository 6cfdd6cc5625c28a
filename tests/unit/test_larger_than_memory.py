"""A model that is larger than memory: what runs is read from its files, and what does not fit says so with its bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from numerics_suite.core.errors import CheckError, NotApplicableError
from numerics_suite.core.registry import get_check
from numerics_suite.engine import room, true_fp64
from numerics_suite.engine import scope as scopes
from numerics_suite.engine.rounded_reference import run_rounded
from numerics_suite.engine.runner import Runner
from numerics_suite.observations.finiteness import nan_count
from numerics_suite.observations.roundoff import GradientComparison, gradient_errors
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects import files, memory
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.load import load
from numerics_suite.subjects.resolve import resolve
from numerics_suite.suite.driver import ask
from numerics_suite.suite.run import planned
from numerics_suite.suite.session import SuiteSession

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
FREE = 1_000_000
"""Bytes free where memory is said to be short: less than the float64 gradients of a tiny fixture take."""


@pytest.fixture(scope="module")
def writer() -> Any:
    """fixtures/nine_billion.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("nine_billion", ROOT / "fixtures" / "nine_billion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is short, whatever this machine has."""
    monkeypatch.setattr(room, "SMALL", 0)
    for module in (room, scopes):
        monkeypatch.setattr(module, "free_bytes", lambda _: FREE)


def session(**settings: Any) -> SuiteSession:
    made = SuiteSession(
        Settings(
            **{
                "subjects": ("fixture:glm4-tiny",),
                "precision": ("bf16",),
                "attn": ("sdpa",),
                "device": "cpu",
                "steps": 1,
                "max_examples": 1,
                **settings,
            }
        )
    )
    made.tries_remedies = False
    return made


def answers(made: SuiteSession, *checks: str) -> dict[str, Any]:
    return {q.check: made.answer(q)[0] for q in made.plan.questions if q.check in checks}


# --- what does not fit -------------------------------------------------------------------------------------------------


def test_gradients_that_do_not_fit_are_skipped_with_their_bytes_and_the_other_checks_answer(short: None) -> None:
    made = session()
    gradients = ("reference.gradient", "train.accumulation", "train.checkpointing")
    found = answers(made, "forward.finite", "reference.end-to-end", "reference.oracle", *gradients)
    trained = sum(p.numel() for p in made.context(made.plan.cells[0]).model.parameters())
    assert {found[name].status for name in gradients} == {"skipped"}
    for name, sets in zip(gradients, (0.5, 1, 1), strict=True):
        assert f"would take {int(8 * trained * sets)} bytes, {FREE} bytes free" in (found[name].reason or "")
    assert {name: found[name].status for name in found if name not in gradients} == {
        "forward.finite": "passed",
        "reference.end-to-end": "passed",
        "reference.oracle": "passed",
    }


def test_the_definition_is_compared_without_gradients_and_says_so(short: None) -> None:
    found = answers(session(), "reference.oracle")["reference.oracle"]
    assert found.status == "passed"
    assert (found.reason or "").startswith("gradients not compared: out of memory on cpu: float64 gradients of ")
    assert "true-gradient" not in found.measurements
    assert found.measurements["true-logits"] <= 1e-10


def test_with_room_the_gradients_are_compared() -> None:
    found = answers(session(), "reference.oracle")["reference.oracle"]
    assert (found.status, found.reason) == ("passed", None)
    assert "true-gradient" in found.measurements


def test_a_wrong_answer_is_found_where_gradients_do_not_fit(short: None) -> None:
    made = session()
    context = made.context(made.plan.cells[0])
    with torch.no_grad():
        context.model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1.5)
    outcome = ask(get_check("reference.oracle"), context, seed=0)
    assert [breach.measurement.name for breach in outcome.breaches][:1] == ["true-logits"]


def test_gradients_are_compared_as_blocks_complete_where_all_of_them_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = ("reference.gradient", "reference.oracle", "train.accumulation", "train.checkpointing")
    whole = answers(session(), *checks)
    made = session()
    model = made.context(made.plan.cells[0]).model
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(true_fp64, "STREAM_ABOVE_BYTES", 0)
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "free_bytes", lambda _: 1.2 * 8 * count / memory.USABLE)  # one set in float64 and not two
    passed_on: list[str] = []
    compare = GradientComparison.add

    def counted(self: GradientComparison, name: str, got: Any, want: Any) -> None:
        passed_on.append(name)
        compare(self, name, got, want)

    monkeypatch.setattr(GradientComparison, "add", counted)
    streamed = answers(made, *checks)
    assert {name: answer.status for name, answer in streamed.items()} == dict.fromkeys(checks, "passed")
    assert len(passed_on) == 2 * len(list(model.parameters()))  # the definition, and all ways at once
    # Of `reference.gradient` not even one set: the true ones come one by one beside two in bfloat16.
    monkeypatch.setattr(room, "free_bytes", lambda _: 0.7 * 8 * count / memory.USABLE)
    streams: list[bool] = []
    run = Runner.true_fp64
    monkeypatch.setattr(Runner, "true_fp64", lambda *a, **k: streams.append(k.get("stream", False)) or run(*a, **k))
    streamed |= answers(session(), checks[0])
    assert streams == [True]
    for name in checks:
        for key, value in whole[name].measurements.items():
            assert streamed[name].measurements[key] == pytest.approx(value, rel=1e-6, abs=1e-10), (name, key)


def test_compared_one_by_one_gradients_err_as_they_do_together() -> None:
    torch.manual_seed(0)
    want = {name: torch.randn(5, 7, dtype=torch.float64) for name in "abc"} | {
        "cancelled": torch.full((3,), 1e-14, dtype=torch.float64),
        "gone": torch.ones(2, dtype=torch.float64),
    }
    got = {name: value.clone() for name, value in want.items() if name != "gone"}
    got["b"] *= 1.5
    got["c"][0, 0] = float("nan")
    compared = GradientComparison()
    for name, value in want.items():
        compared.add(name, got.get(name), value)
    assert compared.errors() == pytest.approx(gradient_errors(got, want), nan_ok=True)
    assert compared.errors()["b"] == pytest.approx(0.5)
    assert compared.lost == ["gone"]
    assert compared.wrong(1e-10) == ["b", "c", "gone"]
    along, squares = (sum(float((each[name] * want[name]).sum()) for name in "ab") for each in (got, want))
    assert compared.projection("ab") == pytest.approx(along / squares)


@pytest.mark.parametrize("run", ["true fp64", "rounded", "own"])
def test_no_backward_pass_begins_whose_gradients_do_not_fit(
    short: None, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session()
    context = made.context(made.plan.cells[0])
    tensors = context.gradient_batch.tensors
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    ways = {
        "true fp64": lambda: context.runner.true_fp64(tensors, gradients=True),
        "rounded": lambda: context.runner.rounded(tensors, gradients=True),
        "own": lambda: context.runner.gradients(tensors),
    }
    with pytest.raises(
        NotApplicableError, match=r"out of memory on cpu: (float64 )?gradients of [\d,]+ parameters would take"
    ):
        ways[run]()
    # Gradients that are handed on as blocks complete need room for one block.
    monkeypatch.setattr(room, "free_bytes", lambda _: 3 * FREE)
    seen: list[str] = []
    context.runner.true_fp64(tensors, gradients=True, stream=True, on_gradient=lambda name, _: seen.append(name))
    assert len(seen) == len(list(context.model.parameters()))


def test_a_precision_other_than_the_stored_one_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = resolve(str(fixture_path("glm4-tiny")))
    assert subject.parameters is not None
    each = memory.block_parameters(subject)
    outside = subject.parameters - memory.layer_count(subject) * each
    for fits in (1, 2):
        free = int((outside + (fits + 0.5) * each) * 4 / memory.USABLE)
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        monkeypatch.setattr(memory, "swap_bytes", lambda: 0)
        if 4 * subject.parameters <= free:
            continue
        with pytest.raises(CheckError) as raised:
            load(subject, dtype="float32", attn="sdpa")
        text = str(raised.value)
        assert f"bytes asked for the weights in float32, {free} bytes free" in text
        assert "as they are stored, in bfloat16, they are read from disk: --precision bf16" in text
        assert f"--layers first:{fits} checks the first {fits} of its {memory.layer_count(subject)} layers" in text


def test_a_single_block_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    made = session()
    found = answers(made, "forward.finite", "reference.oracle")
    context = made.context(made.plan.cells[0])
    block = 8 * sum(p.numel() for p in context.model.get_submodule("model.layers.0").parameters())
    assert found["forward.finite"].status == "passed"
    assert (found["reference.oracle"].status, found["reference.oracle"].reason) == (
        "skipped",
        f"out of memory on cpu: one block of the model in float64 (model.layers.0) would take {block} bytes, 1000 bytes free",
    )
    with pytest.raises(NotApplicableError, match=rf"\(model\.layers\.0\) would take {2 * block} bytes"):
        context.runner.true_fp64(
            context.gradient_batch.tensors, gradients=True, stream=True, on_gradient=lambda _name, _gradient: None
        )


def test_a_model_that_does_not_fit_on_the_disk_twice_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    made = session()
    model = made.context(made.plan.cells[0]).model
    needed = 2 * sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    found = answers(made, "load.roundtrip")["load.roundtrip"]
    assert found.status == "skipped"
    assert f"would take {needed} bytes in {tempfile.gettempdir()}, {needed - 1} bytes free" in (found.reason or "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert answers(made, "load.roundtrip")["load.roundtrip"].status == "passed"


# --- what is trained ---------------------------------------------------------------------------------------------------


def test_the_largest_scope_that_fits_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = resolve(str(fixture_path("glm4-tiny")))
    needed = {
        name: memory.training_bytes(subject, "bfloat16", name, batch=4, seq=64) for name in ("full", "last:1", "head")
    }
    assert needed["full"] > needed["last:1"] > needed["head"]
    for name, size in needed.items():
        monkeypatch.setattr(scopes, "free_bytes", lambda _, size=size: size / memory.USABLE + 1)
        assert scopes.choose_scope(subject, "bf16", "cpu", rows=4, length=64) == name
    # In another dtype than the stored one the model itself takes memory too.
    monkeypatch.setattr(scopes, "free_bytes", lambda _: needed["full"] / memory.USABLE + 1)
    assert scopes.choose_scope(subject, "amp-bf16", "cpu", rows=4, length=64) != "full"


def test_a_run_that_trains_a_part_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = resolve(str(fixture_path("glm4-tiny")))
    size = memory.training_bytes(subject, "bfloat16", "last:1", batch=4, seq=64)
    monkeypatch.setattr(scopes, "free_bytes", lambda _: size / memory.USABLE + 1)
    found = answers(session(), "train.finite", "train.labels")
    assert found["train.finite"].reason == (
        "--train-scope auto: last:1 was trained, since all parameters do not fit in memory"
    )
    assert found["train.labels"].reason is None  # which trains nothing


def test_training_that_does_not_fit_is_skipped_with_its_bytes(short: None) -> None:
    found = answers(session(train_scope="full"), "train.finite", "train.clip", "train.labels")
    assert found["train.labels"].status == "passed"
    for name in ("train.finite", "train.clip"):
        assert found[name].status == "skipped"
        assert "parameters (--train-scope full) would take" in (found[name].reason or "")
        assert f"{FREE} bytes free" in (found[name].reason or "")


def test_what_is_not_trained_shares_the_memory_of_the_cells_model() -> None:
    made = session(train_scope="last:1")
    context = made.context(made.plan.cells[0])
    own = {name: p.data_ptr() for name, p in context.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in context.model.named_parameters()}
    trainer = context.trainer(context.request.plan)
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.data_ptr() == own[name]) is not parameter.requires_grad, name
    trainer.run()
    assert all(torch.equal(value, context.model.get_parameter(name)) for name, value in before.items())
    assert all(p.requires_grad for p in context.model.parameters())
    whole = context.copy_model()
    assert not {p.data_ptr() for p in whole.parameters()} & set(own.values())


# --- no whole copies ---------------------------------------------------------------------------------------------------


def test_a_large_weight_is_rounded_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made = session()
    context = made.context(made.plan.cells[0])
    tensors = {"input_ids": context.training_batch.tensors["input_ids"]}
    whole = run_rounded(context.model, tensors).outputs["logits"]
    pieces: list[Any] = []
    multiply = true_fp64.multiply_in_chunks
    monkeypatch.setattr(true_fp64, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(
        "numerics_suite.engine.rounded_reference.multiply_in_chunks",
        lambda *given: pieces.append(made := multiply(*given)) or made,
    )
    assert torch.equal(run_rounded(context.model, tensors).outputs["logits"], whole)
    assert sum(piece is not None for piece in pieces) > 10


def test_nan_is_counted_in_every_kind_of_tensor() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), float("nan")])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64):
        assert nan_count(values.to(dtype)) == 2
    assert nan_count(torch.tensor([float("inf"), -float("inf")])) == nan_count(torch.empty(0)) == 0
    assert nan_count(torch.tensor([1, 2])) == 0


# --- the shape of GLM-4 9B ---------------------------------------------------------------------------------------------

SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


def test_the_checkpoint_by_formula_is_a_clean_one(writer: Any, tmp_path: Path) -> None:
    count = writer.write_checkpoint(tmp_path / "small", shape=SMALL_SHAPE, shard_bytes=20_000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    made = session(subjects=(str(tmp_path / "small"),))
    assert made.plan.subjects["small"].parameters == count
    found = answers(
        made, "load.complete", "load.finite", "load.config", "load.tied", "forward.finite", "reference.oracle"
    )
    assert {answer.status for answer in found.values()} == {"passed"}, found


def test_the_shape_is_that_of_glm_4_9b(writer: Any) -> None:
    total = sum(torch.Size(shape).numel() for _, shape in writer.tensor_shapes(writer.SHAPE))
    assert total == 9_400_094_720
    assert writer.config(writer.SHAPE)["architectures"] == ["Glm4ForCausalLM"]


class PeakMemory:
    """The largest RssAnon of a process and those below it, sampled: `ru_maxrss` counts pages of mapped files, which the system may take back."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.process, self.anonymous, self.mapped = process, 0, 0

    def _below(self, pid: int) -> Iterator[int]:
        yield pid
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text(encoding="ascii").split():
                yield from self._below(int(child))

    def sample(self) -> None:
        anonymous = mapped = 0
        try:
            for pid in list(self._below(self.process.pid)):
                lines = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
                )
                anonymous += int(lines["RssAnon"].split()[0]) * 1024
                mapped += int(lines["RssFile"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return  # it has just ended
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)

    def watch(self) -> None:
        while self.process.poll() is None:
            self.sample()
            time.sleep(0.02)  # a gradient of a small model is there for less than a second


def _checked(folder: Path, work: Path, *arguments: str) -> tuple[int, dict[str, Any], PeakMemory]:
    command = [
        sys.executable,
        "-m",
        "numerics_suite",
        "check",
        str(folder),
        "--json",
        str(work / "out.json"),
        "-n",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, *arguments], cwd=work, env=environment, stdout=subprocess.DEVNULL)
    peak = PeakMemory(process)
    watcher = threading.Thread(target=peak.watch, daemon=True)
    watcher.start()
    status = process.wait()
    watcher.join(timeout=5)
    return status, json.loads((work / "out.json").read_text(encoding="utf-8")), peak


def _stated(folder: Path, *arguments: str) -> int:
    """Bytes that `--list` says of the one cell."""
    command = [sys.executable, "-m", "numerics_suite", "check", str(folder), *arguments, "--list", "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=True)
    (row,) = json.loads(said.stdout)["planned"]
    size: int = row["bytes"]
    return size


WIDE_SHAPE = {**SMALL_SHAPE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 20_000}
"""12 million parameters, whose gradients, and answers of 20,000 words, take more memory than the process does without them."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory from mapped")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--precision", "bf16"), id="trains, mapped"),
        pytest.param(("--precision", "fp32"), id="trains"),
        pytest.param(
            ("--precision", "bf16", "--checks", "load.*,forward.*,reference.end-to-end"), id="forward, mapped"
        ),
        pytest.param(("--precision", "bf16", "--checks", "load.complete,load.finite"), id="loads"),
    ],
)
def test_the_stated_memory_is_that_of_the_cell(writer: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    folder = tmp_path / "wide"
    writer.write_checkpoint(folder, shape=WIDE_SHAPE)
    arguments = (*arguments, "--attn", "sdpa", "--skip", "train.trainer", "--steps", "2")
    stated = _stated(folder, *arguments)
    status, _, peak = _checked(folder, tmp_path, *arguments)
    assert status == 0
    assert 0.8 * peak.anonymous <= stated <= 1.2 * peak.anonymous, (stated, peak.anonymous)


def test_a_list_reads_no_weights(writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a 9B checkpoint is 19 GB read from disk."""
    folder = tmp_path / "small"
    writer.write_checkpoint(folder, shape=SMALL_SHAPE)
    monkeypatch.setattr(files, "sha256_of", lambda file: pytest.fail(f"{file} was read"))
    settings = Settings(subjects=(str(folder),), precision=("bf16",), attn=("sdpa",), device="cpu", list_only=True)
    (row,), _ = planned(settings)
    assert row.bytes
    with pytest.raises(pytest.fail.Exception, match="was read"):
        SuiteSession(replace(settings, list_only=False)).prepare()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory from mapped")
def test_a_forward_cell_of_the_whole_shape_runs_within_20_gb(writer: Any, tmp_path: Path) -> None:
    """18.8 GB of weights, read from disk; `load.roundtrip` is left out, which would write them twice more."""
    folder = tmp_path / "nine"
    try:
        before = PeakMemory(subprocess.Popen([sys.executable, str(ROOT / "fixtures" / "nine_billion.py"), str(folder)]))
        before.watch()
        assert before.process.returncode == 0
        assert before.anonymous < 2 * GB
        asked = (
            *("--precision", "bf16", "--attn", "sdpa", "--effort", "quick", "--batch-size", "2", "--seq-len", "8"),
            *("--checks", "load.*,forward.finite,reference.end-to-end,reference.gradient", "--skip", "load.roundtrip"),
        )
        stated = _stated(folder, *asked)
        status, found, peak = _checked(folder, tmp_path, *asked)
    finally:
        for file in folder.glob("*.safetensors"):
            file.unlink()
    statuses = {check["check"]: check["status"] for check in found["checks"]}
    assert status == 0, found
    assert found["complete"]
    assert statuses.pop("reference.gradient") == "skipped"
    assert "bytes free" in next(c["reason"] for c in found["checks"] if c["check"] == "reference.gradient")
    assert set(statuses.values()) == {"passed"}, statuses
    assert len(statuses) == 8
    assert 0.8 * peak.anonymous <= stated <= 1.2 * peak.anonymous, (stated, peak.anonymous, peak.mapped)
