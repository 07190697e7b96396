r"""The trace of a block by whichever estimator is cheapest for it.

Three are compared by a pilot, in products to a given error:

* **per sample**: one random vector a sample (`per_sample`), variance :math:`\sum_n \sigma_n^2`;
* **deflated**: with *Q* the Ritz basis of a Lanczos run that both ends of the spectrum need anyway,
  :math:`\operatorname{tr} H = \operatorname{tr} Q^\top H Q + \mathbb{E}[z^\top P H P z]`, with
  :math:`P = I - Q Q^\top` (the idea of Hutch++, Meyer et al. 2021, with a Krylov basis), variance
  at most :math:`2 \|P H P\|_F^2`;
* **plain**: one random vector for all samples (Hutchinson 1990), variance at most
  :math:`2 \|H\|_F^2`.

A vector a sample wins by :math:`N \|H_b\|^2 / \overline{\|H_{n,b}\|^2}`, which is large where the
samples disagree; deflation wins where few directions carry the block.

Two errors, kept apart. ``std_error``: what the random vectors leave open about *these* samples,
from repetitions (within each sample, so that two repetitions of N samples have N degrees of
freedom). ``batch_std_error``: what other samples would have given, from the spread between samples
without the part that the random vectors have in it; the two together (`math.hypot`) are the error
of the value as an estimate for the population.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diagnoser.curvature.hessian import Block, Hessian
from diagnoser.curvature.per_sample import RandomSigns, SampleForms
from diagnoser.curvature.trace import DECISION, exact_trace, random_signs
from diagnoser.types import Estimate

_PILOT = 4  # plain products that tell the variance of a vector for all samples
_LEAST = 8  # plain products before the spread between them is an error
_COST = 1.2  # of a product with a vector a sample, in plain products (benchmarks/curvature_cost.py)


@dataclass(frozen=True, slots=True)
class Aim:
    """When a trace is known well enough.

    Attributes:
        relative_error: Standard error over the larger of |trace| and the block's Frobenius norm.
        threshold: Instead: enough that the value is above or below this, beyond doubt.
        max_products: The largest number of products a chunk, the pilot included.
    """

    relative_error: float = 0.05
    threshold: float | None = None
    max_products: int = 32

    def met(self, value: float, error: float, norm: float) -> bool:
        """Whether a value with this standard error answers the question."""
        if not math.isfinite(error):
            return False
        if self.threshold is not None:
            return abs(value - self.threshold) > DECISION * error
        return error <= self.relative_error * max(abs(value), norm)


def block_trace(
    hessian: Hessian,
    block: Block,
    generator: torch.Generator,
    *,
    forms: Sequence[SampleForms] | None = None,
    basis: Tensor | None = None,
    inside: float | None = None,
    aim: Aim | None = None,
    method: Literal["per_sample", "plain"] | None = None,
) -> Estimate:
    """Returns the trace of a diagonal block, by the estimator that the pilot favours.

    Args:
        hessian: The operator.
        block: The parts to restrict it to.
        generator: Source of the random vectors.
        forms: Per-sample forms, one a chunk, that cover the block (`SampleForms.covers`).
        basis: (k, size) orthonormal rows, such as the Ritz basis of a Lanczos run on the block.
        inside: The trace on the basis, if it is known (the sum of its Ritz values); else it is
            measured by a product a row, as with several chunks.
        aim: When to stop; ``Aim()`` if left out.
        method: Forces an estimator instead of choosing.
    """
    aim = aim or Aim()
    size = hessian.size(block)
    if size <= aim.max_products:
        return exact_trace(hessian, block, size)
    samples = _PerSample(hessian, block, generator, forms) if forms else None
    plain = _Plain(hessian, block, generator, basis, inside)
    if samples is not None and method != "plain":
        samples.add(2)
        if method is None and not aim.met(samples.value, samples.error, 0.0):
            plain.add(_PILOT)
            if samples.variance * _COST > plain.variance:
                samples = None
        if samples is not None:
            while (
                not aim.met(samples.value, samples.error, plain.norm)
                and samples.rounds + plain.count < aim.max_products
            ):
                samples.add(1)
            return samples.estimate()
    spent = 2 if forms and method != "plain" else 0
    plain.add(max(min(_LEAST, aim.max_products - spent) - plain.count, 0))
    while (
        not aim.met(plain.value, plain.error, plain.norm) and plain.count + spent < aim.max_products
    ):
        plain.add(1)
    return plain.estimate()


class _PerSample:
    """Rounds with a random vector a sample; everything in the unit of the whole loss."""

    def __init__(
        self,
        hessian: Hessian,
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
    def error(self) -> float:
        return math.sqrt(self.variance / self.rounds)

    def estimate(self) -> Estimate:
        means = self._table.mean(0)
        count = means.numel()
        return Estimate(
            value=self.value,
            std_error=self.error,
            batch_std_error=math.sqrt(max(count * float(means.var()) - self.error**2, 0.0)),
            samples=count,
            method="per-sample",
            dtype=self._hessian.dtype,
        )


class _Plain:
    """Products with a random vector for all samples, on the complement of a basis."""

    def __init__(
        self,
        hessian: Hessian,
        block: Block,
        generator: torch.Generator,
        basis: Tensor | None,
        inside: float | None,
    ) -> None:
        self._hessian, self._block, self._generator = hessian, block, generator
        self._basis, self._known = basis, inside
        self._values: list[Tensor] = []  # (chunks,) a product
        self._squares: list[float] = []
        self._inside: Tensor | None = None  # (chunks,) the trace on the basis

    def add(self, count: int) -> None:
        size, like = self._hessian.size(self._block), self._hessian.like(self._block)
        if count > 0 and self._inside is None:
            self._measure_inside()
        for _ in range(count):
            z = self._outside(random_signs(size, self._generator, like))
            products = [c.block_product(self._block, z) for c in self._hessian.chunks]
            self._values.append(torch.stack([(z * p).sum(dtype=torch.float64) for p in products]))
            mean = self._outside(torch.stack(products).mean(0))
            self._squares.append(float(mean.double().square().sum()))

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
        """Of one product's value, an upper bound from the norms of few products."""
        return 2.0 * sum(self._squares) / len(self._squares)

    @property
    def norm(self) -> float:
        """The Frobenius norm of what is left outside the basis."""
        return math.sqrt(sum(self._squares) / len(self._squares)) if self._squares else 0.0

    @property
    def error(self) -> float:
        if self.count < 2:
            return math.nan
        return float(torch.stack(self._values).mean(1).std()) / math.sqrt(self.count)

    def estimate(self) -> Estimate:
        assert self._inside is not None
        chunks = torch.stack(self._values).mean(0) + self._inside
        several = chunks.numel() > 1
        return Estimate(
            value=float(chunks.mean()),
            std_error=self.error,
            batch_std_error=float(chunks.std()) / math.sqrt(chunks.numel()) if several else None,
            samples=self.count,
            method="hutchinson" if self._basis is None else "deflated hutchinson",
            dtype=self._hessian.dtype,
        )
