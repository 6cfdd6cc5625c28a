"""What does the watch add to a training step, and what do other ways to look for NaN add?

`pytest -p no:numerics_suite benchmarks/bench_watch.py -s`, with the extra `test` installed. Each round takes one step in each way, one after
the other in turning order, and each way's ratio to the bare step of its own round is kept: whatever else the machine does meanwhile, it does to
both. The median of these ratios is told, in seconds of the clock and, on a CPU, in seconds of this process's own work, which neighbours on
the machine do not lengthen; the latter must stay below the limit. Ways without a limit take part in every sixth round.

A step that also looks at the parameters is timed as a way of its own; the amortised ratio is the plain one and a twentieth of the difference.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.device import accelerator
from numerics_suite.devices.host_copy import synchronize
from numerics_suite.devices.kinds import CPU
from numerics_suite.training_watch.session import Watch
from numerics_suite.training_watch.watch_settings import WatchSettings

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = int(os.environ.get("NUMERICS_BENCH_ROUNDS", "30"))
EVERY_PARAMETERS = WatchSettings().every_parameters
NEVER = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the model and its batch are.

    Attributes:
        hidden: hidden size; heads have `head_dim` each.
        layers: blocks.
        intermediate: width of the MLP.
        heads: of queries; keys and values have 2.
        head_dim: size of a head.
        vocabulary: words.
        rows: of a batch.
        columns: tokens of a row.
        dtype: of the parameters.
    """

    hidden: int = 512
    layers: int = 8
    intermediate: int = 1408
    heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32_000
    rows: int = 4
    columns: int = 128
    dtype: torch.dtype = torch.float32


ACCEPTANCE = Scale()
"""The model of the acceptance, which one CPU trains in seconds a step."""

BILLION = Scale(hidden=2048, layers=16, intermediate=8192, heads=16, head_dim=128, columns=1024, dtype=torch.bfloat16)
"""1.1 billion parameters: on a GPU the steps of a small model wait for Python, and any look at them is a large share."""

TINY = Scale(hidden=64, layers=2, intermediate=128, heads=2, head_dim=32, vocabulary=256, rows=2, columns=16)
"""Shows that the benchmark runs; its ratios mean nothing."""


def clocks(device: str) -> dict[str, Callable[[], float]]:
    """The clocks that are read, by name; a process waits for an accelerator without working itself."""
    return {"clock": time.perf_counter, **({"work": time.process_time} if device == CPU else {})}


def held_clock(device: str) -> str:
    """The clock whose ratio must stay below the limit."""
    return "work" if device == CPU else "clock"


def most_ratio(device: str) -> float:
    """The most that the amortised ratio may be."""
    return 1.02 if device == CPU else 1.01


@dataclass(slots=True)
class Bench:
    """A GLM and its optimizer, trained on by every way in turn."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Tensor
    device: str
    seconds: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def step(self, *, clip: bool) -> None:
        """One step of a plain loop."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def time(self, name: str, number: int, way: Callable[[], AbstractContextManager[object]], *, clip: bool) -> None:
        """Take a step in a way; what it costs to enter and leave the way is not counted."""
        with way():
            read = clocks(self.device)
            synchronize(self.device)
            begun = {clock: now() for clock, now in read.items()}
            self.step(clip=clip)
            synchronize(self.device)
            for clock, now in read.items():
                self.seconds.setdefault((clock, name), {})[number] = now() - begun[clock]

    def ratio(self, clock: str, name: str, to: str = "bare") -> float:
        """Median over the rounds of a way's seconds over another's of the same round."""
        mine, other = self.seconds[(clock, name)], self.seconds[(clock, to)]
        return statistics.median(mine[number] / other[number] for number in mine if number in other)


def make_bench(scale: Scale, device: str) -> Bench:
    """A GLM of that size on the device, with a batch of random words."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    config = GlmConfig(
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        vocab_size=scale.vocabulary,
        intermediate_size=scale.intermediate,
        num_attention_heads=scale.heads,
        num_key_value_heads=2,
        head_dim=scale.head_dim,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):  # a billion parameters are drawn there in a blink, and on the CPU in many seconds
        model = GlmForCausalLM(config).to(scale.dtype).train()
        batch = torch.randint(1, scale.vocabulary, (scale.rows, scale.columns))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return Bench(model=model, optimizer=optimizer, batch=batch, device=device)


@contextlib.contextmanager
def isfinite_hooks(model: nn.Module) -> Iterator[None]:
    """What people write first: every module's output is asked, and waited for."""

    def look(module: nn.Module, _args: object, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise FloatingPointError(type(module).__name__)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def debug_underflow_overflow(model: nn.Module) -> Iterator[None]:
    """The one of transformers, whose hooks have no way off."""
    from transformers.debug_utils import DebugUnderflowOverflow

    kept = [(module, module._forward_hooks.copy()) for module in model.modules()]  # noqa: SLF001 - see above
    DebugUnderflowOverflow(model)
    try:
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks  # noqa: SLF001 - as above


def measure(scale: Scale = ACCEPTANCE, device: str | None = None, rounds: int = ROUNDS) -> dict[str, float]:
    """Take the rounds and give the ratios, `amortised` among them, and the bare step's median seconds.

    Args:
        scale: of the model.
        device: where it is trained; None for the accelerator, or the CPU where there is none.
        rounds: at least 6, so that the ways without a limit take part in one.
    """
    bench = make_bench(scale, device or accelerator() or CPU)
    model = bench.model
    plain = Watch(model, bench.optimizer, settings=WatchSettings(every_parameters=NEVER))
    every = Watch(model, bench.optimizer, settings=WatchSettings(every_parameters=1))
    unclipped = Watch(model, bench.optimizer, settings=WatchSettings(every_parameters=NEVER))
    held: list[tuple[str, Callable[[], AbstractContextManager[object]], bool]] = [
        ("bare", contextlib.nullcontext, True),
        ("watch", lambda: plain, True),
        ("watch, parameters in each step", lambda: every, True),
    ]
    others: list[tuple[str, Callable[[], AbstractContextManager[object]], bool]] = [
        ("bare, no clipping", contextlib.nullcontext, False),
        ("watch, no clipping", lambda: unclipped, False),
        ("detect_anomaly", torch.autograd.detect_anomaly, True),
        ("DebugUnderflowOverflow", lambda: debug_underflow_overflow(model), True),
        ("isfinite hooks", lambda: isfinite_hooks(model), True),
    ]
    for number in range(-1, rounds):
        ways = held + (others if number % 6 == 5 else [])
        turn = number % len(ways)
        for name, way, clip in (*ways[turn:], *ways[:turn]):
            bench.time(name, number, way, clip=clip)
    for taken in bench.seconds.values():
        taken.pop(-1, None)  # the first makes the optimizer's states, and each watch looks at the parameters
    names = [name for name, _, _ in (*held, *others)]
    return {
        f"{clock}: {name}": value
        for clock in clocks(bench.device)
        for name, value in _ratios(bench, clock, names).items()
    }


def _ratios(bench: Bench, clock: str, names: list[str]) -> dict[str, float]:
    found = {name: bench.ratio(clock, name) for name in names if name != "bare" and (clock, name) in bench.seconds}
    if "watch, no clipping" in found:
        found["watch, no clipping"] = bench.ratio(clock, "watch, no clipping", "bare, no clipping")
    found["amortised"] = found["watch"] + (found["watch, parameters in each step"] - found["watch"]) / EVERY_PARAMETERS
    found["seconds of a bare step"] = statistics.median(bench.seconds[(clock, "bare")].values())
    return found


def test_watch(benchmark: BenchmarkFixture) -> None:
    """The amortised ratio must stay below its limit; the others are in the benchmark's extra info."""
    device = accelerator() or CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # detect_anomaly's own, which says that it is slow
        found = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(found)
    print(f"\n{device}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert found[f"{held_clock(device)}: amortised"] <= most_ratio(device)
