"""What asks for a sample at once: a loss far outside its own band, or a second moment that lags.

Everything is measured against the run's own recent past, so the unit of the loss and the size of
the model do not matter. A trigger only brings a measurement forward; whether something is wrong is
for the rules to say.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from diagnoser.types import Measurement
from diagnoser.vocabulary import MODEL

BAND = 30  # losses that the band is made of
LEAST_LOSSES = 12  # before them there is no band
SPREADS = 6.0  # robust standard deviations above the median
REACH = 3.0  # times as far above the median as any loss of the band: heavy tails are no spikes
LEAST_SPREAD = 0.01  # of the median's size: a loss that hardly moves has no band
MAD_TO_STD = 1.4826  # of a normal distribution

RATIOS = 8  # samples that a component's usual moment ratio is taken from
LEAST_RATIOS = 4
RATIO_RISE = 4.0  # times its own median, and
RATIO_ABOVE = 2.0  # times the largest of them
LEAST_RATIO = 2.0  # a second moment that lags by less than this makes no step of unusual length


@dataclass(frozen=True, slots=True)
class Trigger:
    """Why a sample is taken out of turn.

    ``value`` is what was seen, ``usual`` the median of what came before, ``times`` how far outside:
    robust standard deviations for a loss, a factor for a moment ratio; NaN where that means
    nothing.
    """

    kind: str  # loss_spike, non_finite_loss, moment_ratio
    step: int
    component: str
    value: float
    usual: float
    times: float

    @property
    def message(self) -> str:
        """One line for the log."""
        match self.kind:
            case "loss_spike":
                return (
                    f"the loss is {self.value:.3g} after {self.usual:.3g}: "
                    f"{self.times:.0f} times its usual spread"
                )
            case "moment_ratio":
                return (
                    f"{self.component}: the gradient is {self.value:.2g} times what the optimizer "
                    f"expects, {self.times:.1f} times as much as before"
                )
            case _:
                return "the loss is not finite"


class LossBand:
    """The recent losses of a run: their median and how far they lie from it.

    A loss is a spike when it lies `SPREADS` robust standard deviations (1.4826 times the median
    absolute deviation; Rousseeuw and Croux 1993) above the median of the last `BAND` losses, and
    `REACH` times as far as the highest of them. The second condition is what keeps skewed and
    heavy-tailed losses silent. A falling loss widens its own band: while it falls fast only a loss
    above all recent ones counts.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=BAND)
        self._finite = True

    def judge(self, step: int, loss: float) -> Trigger | None:
        """Returns a trigger if ``loss`` is outside the band, and makes it a part of the band.

        Of a row of losses that are not finite only the first one is a trigger.
        """
        if not math.isfinite(loss):
            first, self._finite = self._finite, False
            if not first:
                return None
            return Trigger("non_finite_loss", step, MODEL, loss, self._median(), math.nan)
        self._finite = True
        found = self._spike(step, loss)
        self._losses.append(loss)
        return found

    def _median(self) -> float:
        return statistics.median(self._losses) if self._losses else math.nan

    def _spike(self, step: int, loss: float) -> Trigger | None:
        losses = self._losses
        if len(losses) < LEAST_LOSSES:
            return None
        highest = max(losses)
        if loss <= highest:  # nearly every step ends here
            return None
        median = statistics.median(losses)
        spread = MAD_TO_STD * statistics.median(abs(value - median) for value in losses)
        spread = max(spread, LEAST_SPREAD * abs(median))
        excess = loss - median
        if excess <= SPREADS * spread or excess <= REACH * (highest - median):
            return None
        times = excess / spread if spread > 0 else math.inf
        return Trigger("loss_spike", step, MODEL, loss, median, times)


class MomentRatios:
    """Every component's earlier `moment_ratio`: RMS of gradient over Adam's second moment.

    It rises one to eight steps before a loss spike (Wortsman et al. 2023, 2304.13013, section 3.4).
    Components differ (a seldom used row of an embedding always lags), so each is compared with
    itself.
    """

    def __init__(self) -> None:
        self._earlier: dict[str, deque[float]] = {}

    def judge(self, step: int, rows: Iterable[Measurement]) -> Trigger | None:
        """Returns a trigger for the component whose ratio has risen most, if one has risen far."""
        found: Trigger | None = None
        for row in rows:
            value = row.estimate.value
            if row.quantity != "moment_ratio" or not math.isfinite(value):
                continue
            earlier = self._earlier.setdefault(row.component, deque(maxlen=RATIOS))
            if len(earlier) >= LEAST_RATIOS:
                usual = statistics.median(earlier)
                limit = max(RATIO_RISE * usual, RATIO_ABOVE * max(earlier), LEAST_RATIO)
                times = value / usual if usual > 0 else math.inf
                if value > limit and (found is None or times > found.times):
                    found = Trigger("moment_ratio", step, row.component, value, usual, times)
            earlier.append(value)
        return found
