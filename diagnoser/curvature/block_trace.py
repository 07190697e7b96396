r"""The trace of a block by whichever estimator is cheapest for it.

Three are compared by a pilot, in products to a given error:

* **per sample**: one random vector a sample (`per_sample`), variance :math:`\sum_n \sigma_n^2`;
* **deflated**: with *Q* the Ritz basis of a Lanczos run that both ends of the spectrum need anyway,
  :math:`\operatorname{tr} H = \operatorname{tr} Q^\top H Q + \mathbb{E}[z^\top P H P z]`, with
  :math:`P = I - Q Q^\top` (the idea of Hutch++, Meyer et al. 2021, with a Krylov basis), variance
  at most :math:`2 \|P H P\|_F^2`;
* **plain**: one random vector for all samples (Hutchinson 1990), variance at most
  :math:`2 \|H\|_F^2`.

A vector a sample wins by :math:`N \|H_b\|^2 / \overline{\|H_{n,b}\|^2}`, which is N where the
samples agree and one where they cancel; deflation wins where few directions carry the block.

Two errors, kept apart. ``std_error``: what the random vectors leave open about *these* samples. By
vectors a sample, it comes from repetitions within each sample, so that two repetitions of N samples
have about N degrees of freedom. By vectors for all, with :math:`y = z \odot H z`,

.. math:: \operatorname{Var}(z^\top H z) = 2 \sum_{k \ne l} H_{kl}^2
   = 2 \sum_k \operatorname{Var}(y_k)

which a few products tell far better than the spread of their few values does. ``batch_std_error``:
what other samples would have given, from the spread between samples without the part that the
random vectors have in it; the two together (`math.hypot`) are the error of the value as an estimate
for the population. Both are widened by Student's quantile where they rest on little, so that 1.96
of them cover the truth in 95 % of cases (``benchmarks/trace_coverage.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diagnoser.curvature.batches import estimates_over_chunks
from diagnoser.curvature.decision import Question, decided
from diagnoser.curvature.operator import Block, Operator
from diagnoser.curvature.per_sample import Direction, RandomSigns, SampleForms
from diagnoser.types import Estimate

_PILOT = 4  # plain products that tell the variance of a vector for all samples
_LEAST = 6  # plain products before their error is trusted
_COST = 1.2  # of a product with a vector a sample, in plain products (benchmarks/curvature_cost.py)


FIVE_PERCENT = Question.within(0.05)


def block_trace(
    hessian: Operator,
    block: Block,
    generator: torch.Generator,
    *,
    forms: Sequence[SampleForms] | None = None,
    basis: Tensor | None = None,
    inside: float | None = None,
    question: Question = FIVE_PERCENT,
    max_products: int = 32,
    method: Literal["per_sample", "plain"] | None = None,
) -> Estimate:
    """Returns the trace of a diagonal block, by the estimator that the pilot favours.

    It stops when the question is decided (`decision.decided`) or products are used up; which of the
    two, `decision.answer` tells from the value and its ``std_error``, with infinitely many degrees
    of freedom since that is widened already.

    Args:
        hessian: The operator.
        block: The parts to restrict it to.
        generator: Source of the random vectors.
        forms: Per-sample forms, one a chunk, that cover the block (`SampleForms.covers`).
        basis: (k, size) orthonormal rows, such as the Ritz basis of a Lanczos run on the block.
        inside: The trace on the basis, if it is known (the sum of its Ritz values); else it is
            measured by a product a row, as with several chunks.
        question: When to stop. A relative error is one of the larger of |trace| and the block's
            Frobenius norm (or the question's floor, if that is larger).
        max_products: The largest number of products a chunk, the pilot included; a block of no more
            elements is summed exactly, by unit vectors.
        method: Forces an estimator instead of choosing.
    """
    size = hessian.size(block)
    samples = None
    if forms and method != "plain":
        samples = _PerSample(hessian, block, generator, forms)
        if size > min(_PILOT, max_products):  # else exact, for less
            samples.add(2)
            if _met(question, samples.value, samples.error, 0.0):
                return samples.estimate()
    spent = samples.rounds if samples else 0
    if size <= max_products - spent:
        return samples.exact(size) if samples else exact_trace(hessian, block, size)
    plain = _Plain(hessian, block, generator, basis, inside)
    if samples is not None:
        if method is None:
            plain.add(_PILOT)
        if method == "per_sample" or samples.variance * _COST <= plain.variance:
            while (
                not _met(question, samples.value, samples.error, plain.norm)
                and samples.rounds + plain.count < max_products
            ):
                samples.add(1)
            return samples.estimate()
    plain.add(max(min(_LEAST, max_products - spent) - plain.count, 0))
    while (
        not _met(question, plain.value, plain.error, plain.norm)
        and plain.count + spent < max_products
    ):
        plain.add(1)
    return plain.estimate(samples)


def _met(question: Question, value: float, error: float, norm: float) -> bool:
    if question.relative_error is not None:
        question = replace(question, floor=max(question.floor or 0.0, norm))
    return decided(value, error, math.inf, question)


def exact_trace(hessian: Operator, block: Block, size: int) -> Estimate:
    """Returns the trace of a block of ``size`` elements from as many products with unit vectors."""
    like = hessian.like(block)
    diagonals: list[Tensor] = []
    for k in range(size):
        unit = torch.zeros(size, dtype=like.dtype, device=like.device)
        unit[k] = 1.0
        rows = [chunk.block_product(block, unit)[k] for chunk in hessian.chunks]
        diagonals.append(torch.stack(rows).to(torch.float64))
    table = torch.stack(diagonals).sum(0).unsqueeze(1)
    error = hessian.relative_error * float(table.abs().mean())
    return estimates_over_chunks(table, std_errors=[error], samples=size, dtype=hessian.dtype)[0]


def random_signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Returns ``size`` independent random signs, of ``like``'s type and device."""
    bits = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
    return (2 * bits - 1).to(like)


@dataclass(frozen=True, slots=True)
class _Variance:
    """A squared standard error as it was estimated, and the variance of that estimate."""

    value: float
    doubt: float

    def __add__(self, other: _Variance) -> _Variance:
        return _Variance(self.value + other.value, self.doubt + other.doubt)

    def without(self, other: _Variance) -> _Variance:
        """Returns what is left without a part, at least zero; with its own doubt only.

        With the part's doubt, too, intervals were too wide: 98 % (benchmarks/trace_coverage.py).
        """
        return _Variance(max(self.value - other.value, 0.0), self.doubt)

    @property
    def widened(self) -> float:
        """The square of the standard error, 1.96 of which are 95 % in spite of the doubt.

        By the degrees of freedom that give the same doubt (Satterthwaite 1946).
        """
        if self.doubt <= 0.0 or self.value <= 0.0:
            return self.value
        return self.value * _student(max(2.0 * self.value**2 / self.doubt, 1.0)) ** 2


def _student(freedom: float) -> float:
    """Returns Student's 97.5 % quantile over the normal one (Abramowitz and Stegun, 26.7.5)."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return 1.0 + (first + (second + third / freedom) / freedom) / freedom / z


def _batch_error(probes: _Variance, whole: _Variance) -> float:
    """Returns the batch's error that makes the whole right together with that of the probes."""
    return math.sqrt(max(whole.widened - probes.widened, 0.0))


class _PerSample:
    """Rounds with a random vector a sample; everything in the unit of the whole loss."""

    def __init__(
        self,
        hessian: Operator,
        block: Block,
        generator: torch.Generator,
        forms: Sequence[SampleForms],
    ) -> None:
        self._hessian, self._block, self._generator, self._forms = hessian, block, generator, forms
        self._found: list[Tensor] = []  # (samples,) a round

    def add(self, rounds: int) -> None:
        for _ in range(rounds):
            self._found.append(
                torch.cat(
                    [
                        form.forms(
                            self._block, RandomSigns(self._hessian, self._block, self._generator)
                        )
                        for form in self._forms
                    ]
                )
                / len(self._forms)
            )

    def exact(self, size: int) -> Estimate:
        """Returns the exact trace, from a unit vector an element; the batch's error is of it."""
        self._found = []
        total = sum(
            torch.cat([form.forms(self._block, self._unit(k)) for form in self._forms])
            for k in range(size)
        )
        assert isinstance(total, Tensor)
        self._found.append(total / len(self._forms))
        return self.estimate("exact")

    def _unit(self, k: int) -> Direction:
        vector = {
            part.parameter: torch.zeros_like(self._hessian.parameters[part.parameter])
            for part in self._block
        }
        for part in self._block:
            view = part.view(vector[part.parameter])
            if 0 <= k < view.numel():
                view[tuple(torch.unravel_index(torch.tensor(k), view.shape))] = 1.0
            k -= view.numel()
        return Direction(self._block, vector)

    @property
    def rounds(self) -> int:
        return len(self._found)

    @property
    def _table(self) -> Tensor:
        return torch.stack(self._found)

    @property
    def value(self) -> float:
        return float(self._table.sum(1).mean())

    @property
    def variance(self) -> float:
        """Of one round's value, by the spread between rounds within each sample."""
        return float(self._table.var(0).sum())

    @property
    def probes(self) -> _Variance:
        """Of the value, as far as the random vectors are to blame."""
        if self.rounds < 2:
            return _Variance(0.0, 0.0)  # exact
        spread = self._table.var(0) / self.rounds
        # As if normal; or by the spread over samples, where few of them make up the whole.
        doubt = 2.0 / (self.rounds + 1) * float(spread.square().sum())
        if len(spread) > 2:
            doubt = max(doubt, len(spread) * float(spread.var()))
        return _Variance(float(spread.sum()), doubt)

    @property
    def whole(self) -> _Variance | None:
        """Of the value as one for other samples, too; None if there are too few to tell."""
        means = self._table.mean(0)
        count = means.numel()
        if count < 3:
            return None
        square = (means - means.mean()).square()
        return _Variance(count / (count - 1) * float(square.sum()), count * float(square.var()))

    @property
    def batch(self) -> _Variance | None:
        """Of the value, as far as the samples are; None if there are too few to tell."""
        return None if self.whole is None else self.whole.without(self.probes)

    @property
    def error(self) -> float:
        return math.sqrt(self.probes.widened)

    def estimate(self, method: str = "per-sample") -> Estimate:
        return Estimate(
            value=self.value,
            std_error=self.error,
            batch_std_error=None if self.whole is None else _batch_error(self.probes, self.whole),
            samples=self._found[0].numel(),
            method=method,
            dtype=self._hessian.dtype,
        )


class _Plain:
    """Products with a random vector for all samples, on the complement of a basis."""

    def __init__(
        self,
        hessian: Operator,
        block: Block,
        generator: torch.Generator,
        basis: Tensor | None,
        inside: float | None,
    ) -> None:
        self._hessian, self._block, self._generator = hessian, block, generator
        self._basis, self._known = basis, inside
        self._values: list[Tensor] = []  # (chunks,) a product
        self._squares: list[float] = []
        self._diagonal: Tensor | None = None  # mean of z * Hz
        self._spreads: list[float] = []  # squared distances from it, in expectation the variance
        self._inside: Tensor | None = None  # (chunks,) the trace on the basis

    def add(self, count: int) -> None:
        size, like = self._hessian.size(self._block), self._hessian.like(self._block)
        if count > 0 and self._inside is None:
            self._measure_inside()
        for _ in range(count):
            signs = random_signs(size, self._generator, like)
            z = self._outside(signs)
            products = [c.block_product(self._block, z) for c in self._hessian.chunks]
            self._values.append(torch.stack([(z * p).sum(dtype=torch.float64) for p in products]))
            mean = self._outside(torch.stack(products).mean(0))
            self._squares.append(float(mean.square().sum(dtype=torch.float64)))
            self._learn(signs * mean)

    def _learn(self, y: Tensor) -> None:
        """Takes a product into the variance of the elements of z * Hz (Welford 1962)."""
        if self._diagonal is None:
            self._diagonal = y.clone()
            return
        difference = y - self._diagonal
        share = 1.0 / self.count
        self._spreads.append((1.0 - share) * float(difference.square().sum(dtype=torch.float64)))
        self._diagonal += share * difference

    def _measure_inside(self) -> None:
        chunks = self._hessian.chunks
        self._inside = torch.zeros(len(chunks), dtype=torch.float64)
        if self._basis is None:
            return
        if len(chunks) == 1 and self._known is not None:
            self._inside += self._known
            return
        traces = []
        for chunk in chunks:
            images = torch.stack([chunk.block_product(self._block, q) for q in self._basis])
            traces.append((images * self._basis).sum(dtype=torch.float64))
        self._inside = torch.stack(traces)

    def _outside(self, v: Tensor) -> Tensor:
        if self._basis is None:
            return v
        return v - self._basis.T @ (self._basis @ v)

    @property
    def count(self) -> int:
        return len(self._values)

    @property
    def value(self) -> float:
        assert self._inside is not None
        return float((torch.stack(self._values).mean(0) + self._inside).mean())

    @property
    def variance(self) -> float:
        """Of one product's value."""
        return 2.0 * sum(self._spreads) / len(self._spreads) if self._spreads else math.nan

    @property
    def probes(self) -> _Variance:
        """Of the value, as far as the random vectors are to blame; unknown after one product."""
        if not self._spreads:
            return _Variance(math.nan, math.nan)
        spreads = torch.tensor(self._spreads, dtype=torch.float64) * 2.0 / self.count
        # One imagined product more, of a block of rank one: few may look alike by chance.
        around = (spreads - spreads.mean()).square().sum() + 2.0 * spreads.mean().square()
        return _Variance(float(spreads.mean()), float(around) / spreads.numel() ** 2)

    @property
    def norm(self) -> float:
        """The Frobenius norm of what is left outside the basis."""
        return math.sqrt(sum(self._squares) / len(self._squares)) if self._squares else 0.0

    @property
    def error(self) -> float:
        systematic = self._hessian.relative_error * abs(self.value)
        return math.hypot(math.sqrt(self.probes.widened), systematic)

    @property
    def batch(self) -> _Variance | None:
        """Of the value, by the spread between chunks, without the random vectors' part in it."""
        table = torch.stack(self._values)
        products, chunks = table.shape
        if chunks < 2:
            return None
        assert self._inside is not None
        whole = float((table.mean(0) + self._inside).var()) / chunks
        found = _Variance(whole, 2.0 * whole**2 / (chunks - 1))
        if products < 2:
            return found
        rest = table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()
        freedom = (products - 1) * (chunks - 1)
        mixed = float(rest.square().sum()) / freedom / (products * chunks)
        return found.without(_Variance(mixed, 2.0 * mixed**2 / freedom))

    def estimate(self, samples: _PerSample | None) -> Estimate:
        """Returns the value; the batch's error by rounds with a vector a sample, if there are."""
        batch = samples.batch if samples is not None and samples.rounds else self.batch
        return Estimate(
            value=self.value,
            std_error=self.error,
            batch_std_error=None
            if batch is None
            else _batch_error(self.probes, self.probes + batch),
            samples=self.count,
            method="hutchinson" if self._basis is None else "deflated hutchinson",
            dtype=self._hessian.dtype,
        )
