"""What does the watch add to a training step, and what do other ways to look for NaN add?

`pytest -p no:numerics_suite numerics_suite/suite/bench_watch.py -s`, with the extra `test` installed. Each round takes one step in each way, one after
the other in turning order, and each way's ratio to the bare step of its own round is kept: whatever else the machine does meanwhile, it does to
both. The median of these ratios is told, in seconds of the clock and, on a CPU, in seconds of this process's own work, which neighbours on
the machine do not lengthen; the latter are held to the limit. Ways that nobody is held to take part in every sixth round.

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
from numerics_suite.watching.session import Watch, WatchSettings

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = int(os.environ.get("NUMERICS_BENCH_ROUNDS", "30"))
DEVICE = accelerator() or CPU
MOST_RATIO = 1.02 if DEVICE == CPU else 1.01
EVERY_PARAMETERS = WatchSettings().every_parameters
NEVER = 10**9
CLOCKS = {"clock": time.perf_counter, **({"work": time.process_time} if DEVICE == CPU else {})}
HELD = "work" if DEVICE == CPU else "clock"
HIDDEN, LAYERS, VOCABULARY, ROWS, COLUMNS = 512, 8, 32_000, 4, 128


@dataclass(slots=True)
class Bench:
    """A GLM and its optimizer, trained on by every way in turn."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Tensor
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
            synchronize(DEVICE)
            begun = {clock: now() for clock, now in CLOCKS.items()}
            self.step(clip=clip)
            synchronize(DEVICE)
            for clock, now in CLOCKS.items():
                self.seconds.setdefault((clock, name), {})[number] = now() - begun[clock]

    def ratio(self, clock: str, name: str, to: str = "bare") -> float:
        """Median over the rounds of a way's seconds over another's of the same round."""
        mine, other = self.seconds[(clock, name)], self.seconds[(clock, to)]
        return statistics.median(mine[number] / other[number] for number in mine if number in other)


def make_bench() -> Bench:
    """The model of the acceptance: hidden size 512, 8 layers, 32,000 words, batches of 4 × 128."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    config = GlmConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GlmForCausalLM(config).to(DEVICE).train()
    batch = torch.randint(1, VOCABULARY, (ROWS, COLUMNS), device=DEVICE)
    return Bench(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5), batch=batch)


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


def measure() -> dict[str, float]:
    """Take the rounds and give the ratios, `amortised` among them, and the bare step's median seconds."""
    bench = make_bench()
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
    for number in range(-1, ROUNDS):
        ways = held + (others if number % 6 == 5 else [])
        turn = number % len(ways)
        for name, way, clip in (*ways[turn:], *ways[:turn]):
            bench.time(name, number, way, clip=clip)
    for taken in bench.seconds.values():
        taken.pop(-1, None)  # the first makes the optimizer's states, and each watch looks at the parameters
    names = [name for name, _, _ in (*held, *others)]
    return {f"{clock}: {name}": value for clock in CLOCKS for name, value in _ratios(bench, clock, names).items()}


def _ratios(bench: Bench, clock: str, names: list[str]) -> dict[str, float]:
    found = {name: bench.ratio(clock, name) for name in names if name != "bare" and (clock, name) in bench.seconds}
    if "watch, no clipping" in found:
        found["watch, no clipping"] = bench.ratio(clock, "watch, no clipping", "bare, no clipping")
    found["amortised"] = found["watch"] + (found["watch, parameters in each step"] - found["watch"]) / EVERY_PARAMETERS
    found["seconds of a bare step"] = statistics.median(bench.seconds[(clock, "bare")].values())
    return found


def test_watch(benchmark: BenchmarkFixture) -> None:
    """The amortised ratio is held to its limit; the others are in the benchmark's extra info."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # detect_anomaly's own, which says that it is slow
        found = benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(found)
    print(f"\n{DEVICE}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))  # noqa: T201
    assert found[f"{HELD}: amortised"] <= MOST_RATIO
