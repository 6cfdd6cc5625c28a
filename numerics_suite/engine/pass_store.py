"""The cached results of a cell's passes: each is computed once and shared by the checks that read it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from numerics_suite.subjects.memory import KEPT_BYTES


class PassStore:
    """The most recently read results by pass, within a limit on bytes.

    A pass is a condition (true float64, rounded, the cell's own precision) over one batch. An answer is read as float64, and
    held in a narrower dtype where that holds the same numbers: the answer of a bfloat16 run takes a quarter of the
    memory. Results over the batches that every check examines are evicted last.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        """Nothing is held yet.

        Args:
            most_bytes: of all results together; a single one is held whatever its size.
        """
        self.most_bytes = most_bytes
        self._held: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lasting: set[Hashable] = set()

    def __len__(self) -> int:
        """How many answers are held."""
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        """Whether the answer of that pass is held."""
        return key in self._held

    @property
    def nbytes(self) -> int:
        """Bytes of the answers that are held."""
        return sum(answer.nbytes for answer in self._held.values())

    def read(
        self,
        key: Hashable,
        compute: Callable[[], Tensor],
        held_in: torch.dtype = torch.float64,
        *,
        lasting: bool = False,
    ) -> Tensor:
        """The answer of a pass, float64 on the CPU.

        Args:
            key: of the pass: its condition and :func:`~numerics_suite.engine.digests.batch_key` of its batch.
            compute: runs it, if it is not held.
            held_in: dtype in which it is held if every number of it survives that.
            lasting: many checks read it.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key].double()
        answer = compute().detach().cpu()
        self._held[key] = _narrowed(answer, held_in)
        if lasting:
            self._lasting.add(key)
        while len(self._held) > 1 and self.nbytes > self.most_bytes:
            # The new one is itself evicted if all others are read more often.
            oldest = next(each for each in self._held if each not in self._lasting or self._lasting >= set(self._held))
            del self._held[oldest]
        return answer.double()

    def clear(self) -> None:
        """Drop every answer."""
        self._held.clear()
        self._lasting.clear()


def _narrowed(answer: Tensor, dtype: torch.dtype) -> Tensor:
    if answer.dtype == dtype:
        return answer
    narrow = answer.to(dtype)
    # NaN is not equal to itself: an answer that holds one stays as it is, bit for bit.
    return narrow if torch.equal(narrow.to(answer.dtype), answer) else answer
