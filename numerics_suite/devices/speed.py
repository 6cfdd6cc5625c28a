"""Speed of a device in the suite's work: matrix products, widening of weights, calls of small ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from numerics_suite.devices.host_copy import synchronize
from numerics_suite.devices.kinds import CPU, kind_of, parts_of

TOKENS, WIDTH = 256, 512
"""Shape of the products: a training batch of the defaults; wider layers are within 10 % of it."""
ELEMENTS = 2**21
CALLS = 200
REPEATS = 3
LONGEST = 0.25
"""Seconds after which a product is not repeated: CPUs without instructions for float16 take that long for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The best of a few measurements of a device.

    Attributes:
        products: floating operations in a second, by dtype as torch names it.
        widening_s: seconds to make one element float64.
        op_s: seconds of a small op that a dispatch mode watches, as the references watch all of them.
    """

    products: Mapping[str, float]
    widening_s: float
    op_s: float


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def measure_speed(device: str, dtypes: Iterable[str]) -> Speed:
    """Measure a device for less than a second; nothing is loaded.

    Args:
        device: of the cells; of several, the first one.
        dtypes: of products, as torch names them.
    """
    place = parts_of(device)[0]
    products = {}
    for name in dict.fromkeys(dtypes):
        rows = torch.ones(TOKENS, WIDTH, dtype=getattr(torch, name), device=place)
        weight = torch.ones(WIDTH, WIDTH, dtype=getattr(torch, name), device=place)
        seconds = _best(place, lambda rows=rows, weight=weight: rows @ weight.t())  # type: ignore[misc]
        products[name] = 2 * TOKENS * WIDTH * WIDTH / seconds
    narrow = torch.ones(ELEMENTS, dtype=torch.bfloat16, device=place)
    small = torch.ones(8, device=place)

    def calls() -> None:
        for _ in range(CALLS):
            small + small

    with _Watched():  # type: ignore[no-untyped-call]
        op = _best(place, calls) / CALLS
    return Speed(products=products, widening_s=_best(place, narrow.double) / ELEMENTS, op_s=op)


def _best(device: str, run: Callable[[], object]) -> float:
    """Seconds of the fastest run; the first one, which loads kernels, does not count."""
    run()
    synchronize(device)
    on_cpu = kind_of(device) == CPU
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < LONGEST:
        begun, used = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        elapsed = time.perf_counter() - begun
        # Other programs affect wall time; the threads' CPU time measures the CPU.
        times.append(min(elapsed, (time.process_time() - used) / torch.get_num_threads()) if on_cpu else elapsed)
    return max(min(times), 1e-9)
