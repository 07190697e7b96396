r"""Products where nothing can be differentiated twice: checked central differences of gradients.

.. math:: H v \approx D(h) = \frac{g(\theta + h v) - g(\theta - h v)}{2 h}

Only first derivatives are needed, so this works with every kernel, wrapper and compiler; the price
is a step length. Too long a step meets higher derivatives (an error of order :math:`h^2`), too
short a one meets the rounding of the gradient (of order :math:`\varepsilon / h`), and between the
two a fixed length can be wrong by several hundred percent in float32. So every product is taken at
two lengths, :math:`h` and :math:`h / 4`. Their disagreement is the stated error; where it is large,
other lengths are tried, and where none will do, there is no product: a network with kinks (ReLU)
may have none in float32, where every step that rises above rounding crosses some. From the two,
:math:`(16\, D(h/4) - D(h)) / 15` is free of the error of order :math:`h^2` (Richardson 1911).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnoser.curvature.hessian import check_loss, lowest_precision
from diagnoser.curvature.operator import Operator, trained
from diagnoser.curvature.random_states import RandomStates
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

STEPS = tuple(4.0e-3 / 4.0**k for k in range(13))  # |h v| as a share of the parameters it moves
STEPS_ABOVE_ROUNDING = 6  # of them, the most that make sense in less than float64
FIRST_PAIR = 1  # 1e-3 and 2.5e-4, good for most models in float32
GOOD = 0.01  # a disagreement below which no other length is tried
MARGIN = 1.25  # of the stated error: extrapolating enlarges rounding, by 16/15 and a little
TOLERANCE = 0.05  # a disagreement above which there is no product
SMALLEST_ELEMENT = 0.01  # what a parameter that starts at zero counts as, root mean square


class CentralDifference(Operator):
    """The Hessian of a loss that can be computed again, by differences of its gradient.

    While a product is taken, the parameters are moved and the loss is computed; afterwards they
    are copied back, bit for bit, also after an exception, and random streams stand where they
    stood. Every evaluation draws the same random numbers. Parameters are moved through ``.data``,
    so a live graph that saved them survives. What else a forward pass changes (statistics of batch
    norm in training mode) is for the caller to hold. A product costs four gradients, and more
    where the step has to be searched for.

    Args:
        losses: Computes the scalar loss, always on the same samples; or several (chunks of a probe
            set), whose mean is meant.
        parameters: Name to leaf tensor. A tensor under two names counts once, under the first.
        scale: What the loss is multiplied by (a gradient scaler); all results are divided by it.
        tolerance: The largest disagreement of two step lengths that is let pass, relative.

    Raises:
        MeasurementError: From the constructor, when the loss has no graph or is not a scalar; from
            a product, when it is not finite or no two step lengths agree.
    """

    method = "central difference"

    def __init__(
        self,
        losses: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
        parameters: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        tolerance: float = TOLERANCE,
    ) -> None:
        self._losses = (losses,) if callable(losses) else tuple(losses)
        if not self._losses:
            raise MeasurementError("no loss to differentiate; give at least one")
        self.parameters = trained(parameters)
        self._scale = scale
        self._tolerance = tolerance
        self._random = RandomStates.now()
        self._record = _Record(pair=FIRST_PAIR)
        with self._random.replayed(), torch.enable_grad():
            first = self._losses[0]()
        check_loss(first)
        self.dtype = lowest_precision(first, self.parameters.values())
        self._steps = STEPS if self.dtype == "float64" else STEPS[:STEPS_ABOVE_ROUNDING]
        self._padding = _padding_rows(first, self.parameters)

    @property
    def relative_error(self) -> float:
        """See `Operator`: the worst accepted disagreement, which bounds the error from above.

        For a product that vanishes within rounding, it is relative to what the Hessian makes of a
        random vector of the same length.
        """
        return self._record.error

    @property
    def chunks(self) -> tuple[CentralDifference, ...]:
        """See `Operator`; they share the step length that was found to be good."""
        if len(self._losses) == 1:
            return (self,)
        return tuple(self._with_losses((loss,)) for loss in self._losses)

    def _with_losses(self, losses: tuple[Callable[[], Tensor], ...]) -> CentralDifference:
        part = copy.copy(self)  # with the same record
        part._losses = losses
        return part

    @property
    def loss(self) -> float:
        """See `Operator`; computed anew each time."""
        total = 0.0
        with self._random.replayed(), torch.no_grad():
            for loss in self._losses:
                self._random.restore()
                total += float(loss())
        return total / (self._scale * len(self._losses))

    @property
    def gradient(self) -> dict[str, Tensor]:
        """See `Operator`; computed anew each time."""
        names = list(self.parameters)
        with self._random.replayed():
            return self._sum([self._gradient(names)], names, 1.0)

    def release(self) -> None:
        """Drops the losses; no product can be taken afterwards."""
        self._losses = ()

    def _multiply(
        self, weights: Sequence[tuple[Part, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        direction: dict[str, Tensor] = {}
        for part, weight in weights:
            whole = direction.setdefault(
                part.parameter, torch.zeros_like(self._parameter(part), requires_grad=False)
            )
            part.view(whole).add_(weight.detach().to(whole))
        for name in direction.keys() & self._padding.keys():
            direction[name][self._padding[name]] = 0.0
        length = _norm(direction)
        if length == 0.0 or not names:
            return self._sum([], names, 1.0)
        found, disagreement = self._best(direction, length, names)
        disagreement *= MARGIN
        size = _norm(found)
        if disagreement > self._tolerance * size:
            # Nothing but rounding may be left of a product, as with the bias of a key.
            size = max(size, self._typical_stretch() * length)
        error = disagreement / size if size > 0.0 else 0.0
        if error > self._tolerance:
            first, *others = direction
            where = f"{first} and {len(others)} more" if others else first
            raise MeasurementError(
                f"central differences along {where} disagree by {error:.0%} at best, at "
                f"{len(self._steps)} step lengths in {self.dtype} (rounding, or kinks as of ReLU); "
                "measure in float64, or with operations that have a second derivative"
            )
        self._record.error = max(self._record.error, error)
        return self._sum([found], names, 1.0)

    def _best(
        self, direction: dict[str, Tensor], length: float, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], float]:
        """Returns the product by the two step lengths that agree best, and their disagreement."""
        moved = [self.parameters[name] for name in direction]
        size = max(
            _norm({n: self.parameters[n] for n in direction}),
            SMALLEST_ELEMENT * math.sqrt(sum(p.numel() for p in moved)),
        )
        differences: dict[int, dict[str, Tensor]] = {}

        def at(k: int) -> dict[str, Tensor]:
            if k not in differences:
                differences[k] = self._difference(direction, self._steps[k] * size / length, names)
            return differences[k]

        best, least, chosen = None, math.inf, self._record.pair
        for k in _nearest_first(self._record.pair, len(self._steps) - 1):
            disagreement = _norm(_combine(at(k), 1.0, at(k + 1), -1.0))
            if best is None or disagreement < least:
                best, least, chosen = _combine(at(k + 1), 16 / 15, at(k), -1 / 15), disagreement, k
            if least <= GOOD * _norm(best):
                break
        assert best is not None
        self._record.pair = chosen
        return best, least

    def _difference(
        self, direction: dict[str, Tensor], h: float, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns D(h), and leaves parameters and random streams as they were."""
        saved = {name: self.parameters[name].detach().clone() for name in direction}

        def at(step: float) -> dict[str, Tensor]:
            for name, start in saved.items():
                self.parameters[name].data.copy_(start).add_(direction[name], alpha=step)
            return self._gradient(names)

        try:
            with self._random.replayed():
                found = _combine(at(h), 0.5 / h, at(-h), -0.5 / h)
        finally:
            for name, start in saved.items():
                self.parameters[name].data.copy_(start)
        if not math.isfinite(_norm(found)):
            raise MeasurementError(
                "a difference of gradients is not finite; look for NaN or Inf in loss and gradient"
            )
        return found

    def _gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns the gradient of the mean loss; left out where no loss depends on a parameter."""
        if not self._losses:
            raise MeasurementError("this operator was released; build a new one")
        inputs = [self.parameters[name] for name in names]
        factor = 1.0 / (self._scale * len(self._losses))
        mean: dict[str, Tensor] = {}
        for loss in self._losses:
            self._random.restore()
            with torch.enable_grad():
                value = loss()
                check_loss(value)
                found = torch.autograd.grad(value, inputs, allow_unused=True)
            for name, g in zip(names, found, strict=True):
                if g is not None:
                    dense = g if g.layout == torch.strided else g.to_dense()
                    mean[name] = mean[name] + dense * factor if name in mean else dense * factor
        return mean

    def _typical_stretch(self) -> float:
        """Returns |H z| / |z| for random signs z, the root mean square eigenvalue or so."""
        if self._record.stretch is None:
            generator = torch.Generator().manual_seed(0)
            signs = {
                name: (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p)
                for name, p in self.parameters.items()
            }
            length = _norm(signs)
            found, disagreement = self._best(signs, length, list(self.parameters))
            self._record.stretch = max(_norm(found) - disagreement, 0.0) / length
        return self._record.stretch


@dataclass(slots=True, eq=False)
class _Record:
    """What was learnt from earlier products of an operator and its chunks."""

    pair: int  # the first of two step lengths that agreed
    error: float = 0.0
    stretch: float | None = None


def _padding_rows(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the row of each table of embeddings that its gradient leaves out: for padding.

    Training never moves such a row, although the loss may depend on it; so no product may, either.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    rows: dict[str, set[int]] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        row = int(getattr(node, "_saved_padding_idx", -1))
        for following, _ in node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None:
                rows.setdefault(name, set()).add(row if row < parameters[name].shape[0] else -1)
            elif following is not None:
                waiting.append(following)
    return {name: min(found) for name, found in rows.items() if len(found) == 1 and min(found) >= 0}


def _nearest_first(start: int, count: int) -> list[int]:
    """Returns 0 ... count - 1 by distance from ``start``, the larger first."""
    return sorted(range(count), key=lambda k: (abs(k - start), -k))


def _combine(
    a: Mapping[str, Tensor], alpha: float, b: Mapping[str, Tensor], beta: float
) -> dict[str, Tensor]:
    """Returns alpha a + beta b; left out counts as zero."""
    found = {name: alpha * tensor for name, tensor in a.items()}
    for name, tensor in b.items():
        found[name] = found[name] + beta * tensor if name in found else beta * tensor
    return found


def _norm(vector: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach())) for t in vector.values()))
