"""Which readings are bad, and which say that they soon will be; plain numbers, no tensors.

Every limit is a constant with the reason for its value beneath it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from numerics_suite.checks.train.amp import LOST_SCALE
from numerics_suite.engine.reproduce_step import least_rise
from numerics_suite.training_watch.alarms import Alarm, Reading

HALVED = "loss-scale-halving"
"""Kind of the alarm of a loss scale that was halved too often in a row."""

HEADROOM_BITS = 3.0
"""Warn when logits are within 8 times of the largest number of their dtype.

The softmax needs no more than differences of about 100, so logits of a sane classifier leave float16 (largest 65,504) more
than 9 bits. At 3 bits one step that doubles three factors of a product (norm weight, hidden state, head) is an overflow.
"""

HEADROOM_WINDOW = 16
"""Steps whose trend is extended: if the room shrinks over 16 steps at a pace that ends it within the next 16, warn."""

HEADROOM_TREND_BITS = 6.0
"""Above 6 bits (logits below 1/64 of the range) a trend is no danger yet: early training moves logits by orders of magnitude."""

HALVINGS_AT_START = 8
"""The most halvings in a row before the first step that fits. GradScaler starts at 2^16 and halves until the scaled gradients fit float16, whose largest number is just below 2^16.

A gradient element of a sane loss is below 2^8, which fits after 8 halvings; the ninth in a row says
that an element is larger than 256, or is not finite at any scale.
"""

HALVINGS_TO_ONE = 17
"""Halvings that take torch's first scale, 65,536, below 1. A scaler that has skipped as many steps in a row and whose scale is more than
half of what it was searches no more: its backoff is 1 or nearly, it is made anew in each step, or the loop sets its scale."""

HALVINGS_LATER = 3
"""The most after a step that fitted: growth by 2 each 2,000 steps explains one, the noise of a batch two more; the fourth in a row says that
the gradient grew eightfold over one that just fitted."""

NORM_WINDOW = 128
NORM_WARM_UP = 32
NORM_QUANTILE = 0.99
NORM_FACTOR = 10.0
"""Warn when a gradient norm is beyond 10 times the running 0.99 quantile of the last 128.

To exceed that quantile is no sign: it happens in 1 of 100 steps. SGD needs gradient noise of finite variance; with a tail as heavy as
a power law of index 3, 10 times the quantile is exceeded in 0.01 · 10⁻³ = 1 of 100,000 steps. Norms below the median of the first
32 steps are never a danger, however small the later ones became: that is where training began.
"""

UPDATE_RATIO = 0.1
"""Warn when one step moves the sampled weights by more than a tenth of their length: ten such steps replace the model.

The usual advice is 1e-3. Adam's first step moves each weight by the learning rate: 1e-3 against weights of root mean square 0.02 is 0.05,
so a clean start stays below.
"""


ROSE = "loss-rose"
"""Kind of the alarm of a loss that stays far above where training began."""

RISEN_FOR, RISEN_AT_MOST = 4, 16
"""Steps in a row for which it must have: half of all steps so far, within these bounds. Of n losses that are drawn alike, the last half lies above all of
the first in one of C(n, n/2) cases, which is 1 of 70 at 8; the rest is found out by a replay, which asks again when twice as many steps are over."""


class Judge:
    """Keeps the little history that the early warnings need and turns readings into alarms.

    An early warning is given once for each rise: it is armed again when its figure was fine for a step.
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.norms: deque[float] = deque(maxlen=NORM_WINDOW)
        self.first_norms: list[float] = []
        self.room: deque[float] = deque(maxlen=HEADROOM_WINDOW)
        self.scale: float | None = None
        self.halvings = 0
        self.skips = 0
        self.skipped_from = math.nan
        self.fitted = False
        self.began = math.nan
        self.risen_since = 0
        self.asked_at = 0
        self._raised: set[str] = set()

    def judge(self, reading: Reading) -> Iterator[Alarm]:
        """The alarms of one reading, the bad ones first."""
        bad = list(self._bad(reading))
        yield from bad
        if bad:
            return
        yield from self._headroom(reading)
        yield from self._norm(reading)
        yield from self._update(reading)
        yield from self._scale(reading)
        yield from self._skipped(reading)
        yield from self._rose(reading)

    def _bad(self, reading: Reading) -> Iterator[Alarm]:
        for name, kind, plural in (
            ("logits", "logits", "the logits are"),
            ("loss", "loss", "the loss is"),
            ("gradient norm", "gradient", "the gradient norm is"),
            ("parameter norm", "parameter", "the parameters are"),
        ):
            if kind == "gradient" and reading.scaled:
                continue
            for index, value in enumerate(reading.values.get(name, ())):
                if not math.isfinite(value):
                    facts = {name: value} | ({"forward pass": index + 1} if index else {})
                    yield Alarm(step=reading.step, kind=kind, bad=True, text=f"{plural} not finite", facts=facts)
                    break

    def _once(self, alarm: Alarm, *, wrong: bool) -> Iterator[Alarm]:
        if not wrong:
            self._raised.discard(alarm.kind)
        elif alarm.kind not in self._raised:
            self._raised.add(alarm.kind)
            yield alarm

    def _headroom(self, reading: Reading) -> Iterator[Alarm]:
        largest = max(reading.values.get("logits", ()), default=0.0)
        if largest <= 0 or not math.isfinite(reading.limit):
            return
        bits = math.log2(reading.limit) - math.log2(largest)
        self.room.append(bits)
        pace = slope(self.room) if len(self.room) == HEADROOM_WINDOW else 0.0
        ending = bits < HEADROOM_TREND_BITS and bits + pace * HEADROOM_WINDOW <= 0
        text = f"the logits reach {largest:.4g}, {bits:.1f} bits below the largest number of their dtype"
        facts = {"headroom in bits": bits, "bits per step": pace, "largest logit": largest}
        alarm = Alarm(step=reading.step, kind="headroom", bad=False, text=text, cause="overflow", facts=facts)
        yield from self._once(alarm, wrong=bits < HEADROOM_BITS or ending)

    def _norm(self, reading: Reading) -> Iterator[Alarm]:
        for value in reading.values.get("gradient norm", ()):
            if not math.isfinite(value):
                continue
            if len(self.first_norms) < NORM_WARM_UP:
                self.first_norms.append(value)
            else:
                usual, began = quantile(self.norms, NORM_QUANTILE), quantile(self.first_norms, 0.5)
                text = (
                    f"the gradient norm {value:.4g} is {value / max(usual, 1e-300):.0f} times its running 0.99 quantile"
                )
                facts = {"gradient norm": value, "running 0.99 quantile": usual, "limit in quantiles": NORM_FACTOR}
                alarm = Alarm(
                    step=reading.step, kind="gradient-norm", bad=False, text=text, cause="divergence", facts=facts
                )
                yield from self._once(alarm, wrong=value > max(NORM_FACTOR * usual, began))
            self.norms.append(value)

    def _update(self, reading: Reading) -> Iterator[Alarm]:
        for value in reading.values.get("update ratio", ()):
            if not math.isfinite(value):
                continue
            text = f"one step moved the weights by {value:.2g} of their length"
            facts = {"update-to-weight ratio": value, "allowed": UPDATE_RATIO}
            alarm = Alarm(step=reading.step, kind="update-ratio", bad=False, text=text, cause="divergence", facts=facts)
            yield from self._once(alarm, wrong=value > UPDATE_RATIO)

    def _scale(self, reading: Reading) -> Iterator[Alarm]:
        for value in reading.values.get("loss scale", ()):
            before, self.scale = self.scale, value
            if before is None:
                continue
            self.halvings = self.halvings + 1 if value < before else 0
            self.fitted = self.fitted or value >= before
            yield from self._halved(reading.step, value)

    def _rose(self, reading: Reading) -> Iterator[Alarm]:
        losses = reading.values.get("loss", ())
        if not losses:
            return
        loss = min(losses)
        if reading.step <= 1:  # of several passes the largest: the batches of one step differ
            self.began = max((*losses, *filter(math.isfinite, [self.began])))
        high = loss > self.began + least_rise(self.began)
        self.risen_since = (self.risen_since or reading.step) if high else 0
        risen = reading.step - self.risen_since + 1 if self.risen_since else 0
        enough = min(max(RISEN_FOR, math.ceil(reading.step / 2)), RISEN_AT_MOST)
        if risen >= enough and reading.step >= 2 * self.asked_at:
            self.asked_at = reading.step
            text = f"the loss is {loss:.4g} and began at {self.began:.4g}; it has been as high for {risen} steps"
            facts = {"loss": loss, "first loss": self.began, "steps": risen}
            yield Alarm(step=reading.step, kind=ROSE, bad=False, text=text, cause="divergence", facts=facts)

    def _skipped(self, reading: Reading) -> Iterator[Alarm]:
        for skipped in reading.values.get("skipped step", ()):
            if skipped and not self.skips:
                self.skipped_from = self.scale or math.nan
            self.skips = self.skips + 1 if skipped else 0
            scale = self.scale or math.nan
            if self.skips == HALVINGS_TO_ONE and scale > self.skipped_from / 2:
                text = f"the GradScaler skips every step: {self.skips} in a row, and its scale stays at {scale:.4g}"
                facts = {"loss scale": scale, "steps skipped in a row": self.skips}
                yield Alarm(
                    step=reading.step, kind="loss-scale", bad=True, text=text, cause="loss-scaling", facts=facts
                )

    def _halved(self, step: int, value: float) -> Iterator[Alarm]:
        allowed = HALVINGS_LATER if self.fitted else HALVINGS_AT_START
        facts = {"loss scale": value, "halvings in a row": self.halvings, "allowed in a row": allowed}
        if self.halvings and value < LOST_SCALE:
            text = f"the GradScaler skips every step: after {self.halvings} halvings in a row its scale is {value:g}, below 1"
            yield Alarm(step=step, kind="loss-scale", bad=True, text=text, cause="loss-scaling", facts=facts)
            return
        text = f"the loss scale was halved {self.halvings} times in a row, to {value:g}"
        alarm = Alarm(step=step, kind=HALVED, bad=False, text=text, cause="loss-scaling", facts=facts)
        yield from self._once(alarm, wrong=self.halvings > allowed)


def quantile(values: Sequence[float] | deque[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def slope(values: Sequence[float] | deque[float]) -> float:
    """Least-squares change per step of equally spaced values."""
    count = len(values)
    middle, mean = (count - 1) / 2, math.fsum(values) / count
    spread = math.fsum((index - middle) ** 2 for index in range(count))
    return math.fsum((index - middle) * (value - mean) for index, value in enumerate(values)) / spread
