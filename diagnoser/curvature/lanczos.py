r"""Both ends of the spectrum of a symmetric operator by the Lanczos process.

From a start :math:`q_1`, :math:`\beta_k q_{k+1} = A q_k - \alpha_k q_k - \beta_{k-1} q_{k-1}`, made
orthogonal to all earlier vectors (Lanczos 1950; full reorthogonalisation: Paige 1971, Parlett 1980,
The symmetric eigenvalue problem, chapter 13). An eigenpair :math:`(\vartheta, s)` of the
tridiagonal :math:`T` gives the Ritz pair :math:`(\vartheta, Q s)`, and some eigenvalue of *A* lies
within its residual

.. math:: |\lambda - \vartheta| \le \|A Q s - \vartheta Q s\| = \beta_k |s_k|

which is reported as the error. That eigenvalue is not always the outermost one: a start that has
little of the end's vector looks converged to the next one for a while. Over every block of a tiny
transformer and a tiny HAN, 30 starts each, stopping at residuals of 5 % of the norm left 4.5 % of
the ends wrong by more than 5 %; at 2 %, 0.8 %; at 2 % and not before 8 steps, none (6.8 products a
block instead of 4.4). These are the defaults.

When the process ends early in an invariant subspace, it starts again in a random direction
orthogonal to it, so that an end in another subspace is not missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnoser.curvature.batches import estimates_over_chunks
from diagnoser.curvature.hessian import Block, Hessian
from diagnoser.errors import MeasurementError
from diagnoser.types import Estimate

Product = Callable[[Tensor], Tensor]
"""A symmetric operator on flat tensors, such as a Hessian's block product."""

EXTREMES = 3  # eigenvalues of largest magnitude that a run reports beside both ends
_NOVELTY = 0.1  # random share of a warm start: a direction that has become extreme is not missed


@dataclass(frozen=True, slots=True)
class Ends:
    """What one Lanczos run on an operator found.

    Attributes:
        lambda_min: The smallest eigenvalue (algebraic).
        lambda_max: The largest.
        extreme: Those of largest magnitude, largest first: at most three, and fewer where the run
            had fewer steps.
        vector_min: (n,) the unit Ritz vector of the smallest.
        vector_max: (n,) that of the largest.
        basis: (products, n) the orthonormal Krylov basis, and
        inside: the operator's trace on it; both for `block_trace.block_trace` (deflation).
        ritz_values: (products,) in rising order, float64.
        weights: (products, products) float64, column k makes Ritz vector k of the basis.
        products: How many products were taken.
    """

    lambda_min: Estimate
    lambda_max: Estimate
    extreme: tuple[Estimate, ...]
    vector_min: Tensor
    vector_max: Tensor
    basis: Tensor
    inside: float
    ritz_values: Tensor
    weights: Tensor
    products: int

    def dominant(self, count: int) -> Tensor:
        """Returns the Ritz vectors of largest magnitude: (count or fewer, n) orthonormal rows.

        They are what `coupling.coupling_norms` takes as the basis of a block.
        """
        largest = self.ritz_values.abs().argsort(descending=True)[:count]
        return self.weights[:, largest].T.to(self.basis) @ self.basis

    @property
    def warm_start(self) -> Tensor:
        """What to give as ``start`` when a similar operator is measured next."""
        return self.vector_min + self.vector_max


def extreme_eigenvalues(
    product: Product,
    dimension: int,
    generator: torch.Generator,
    *,
    max_steps: int = 16,
    min_steps: int = 8,
    tolerance: float = 0.02,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Ends:
    """Returns lambda_min and lambda_max of a symmetric operator.

    Args:
        product: Maps a flat tensor of ``dimension`` elements to the operator's product with it.
        dimension: Number of rows.
        generator: Source of the start and of restarts.
        max_steps: The largest number of products.
        min_steps: The smallest, unless the process breaks down before.
        tolerance: Stops when the residuals of both ends are at most this share of the largest
            eigenvalue magnitude; 0 uses all steps.
        start: A vector near the wanted ends (`Ends.warm_start`); a random share is mixed in.
        dtype: Of the vectors; inner products and T are float64.
        device: Of the vectors.

    Raises:
        MeasurementError: When there are no rows, or a product is not finite.
    """
    process = _Process(
        product,
        dimension,
        generator=generator,
        max_steps=max_steps,
        min_steps=min_steps,
        start=start,
        dtype=dtype,
        device=device,
    )
    ritz = process.run(lambda r: _converged(r, tolerance, [0, -1]))
    low, high = ritz.estimate(0), ritz.estimate(-1)
    return Ends(
        lambda_min=low,
        lambda_max=high,
        extreme=tuple(ritz.estimate(i) for i in ritz.by_magnitude(EXTREMES)),
        vector_min=ritz.vector(0),
        vector_max=ritz.vector(-1),
        basis=ritz.basis,
        inside=math.fsum(ritz.values),
        ritz_values=torch.tensor(ritz.values, dtype=torch.float64),
        weights=ritz.weights,
        products=ritz.products,
    )


def block_eigenvalues(
    hessian: Hessian,
    block: Block,
    generator: torch.Generator,
    *,
    max_steps: int = 16,
    min_steps: int = 8,
    tolerance: float = 0.02,
    start: Tensor | None = None,
) -> Ends:
    r"""Returns both ends of a diagonal block of the Hessian; arguments as `extreme_eigenvalues`.

    With at least two chunks, ``batch_std_error`` is the standard error of the mean of
    :math:`u^\top H_c u` over the chunks, *u* the Ritz vector: to first order the chunks' part in
    the eigenvalue. It does not cover the bias of extremes: the fewer samples, the further both ends
    lie apart.
    """
    like = hessian.like(block)
    ends = extreme_eigenvalues(
        lambda v: hessian.block_product(block, v),
        hessian.size(block),
        generator,
        max_steps=max_steps,
        min_steps=min_steps,
        tolerance=tolerance,
        start=start,
        dtype=like.dtype,
        device=like.device,
    )
    low = replace(ends.lambda_min, dtype=hessian.dtype)
    high = replace(ends.lambda_max, dtype=hessian.dtype)
    if len(hessian.chunks) > 1:
        vectors = (ends.vector_min, ends.vector_max)
        table = torch.stack(
            [
                torch.stack([_dot(u, chunk.block_product(block, u)) for u in vectors])
                for chunk in hessian.chunks
            ]
        )
        spread_low, spread_high = (e.batch_std_error for e in estimates_over_chunks(table))
        low = replace(low, batch_std_error=spread_low)
        high = replace(high, batch_std_error=spread_high)
    extreme = tuple(replace(e, dtype=hessian.dtype) for e in ends.extreme)
    return replace(ends, lambda_min=low, lambda_max=high, extreme=extreme)


def largest_eigenvalues(
    product: Product,
    dimension: int,
    generator: torch.Generator,
    *,
    count: int = 1,
    max_steps: int = 24,
    min_steps: int = 8,
    tolerance: float = 0.02,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Estimate, ...]:
    """Returns the ``count`` eigenvalues of largest magnitude, largest first (lambda_extreme).

    Fewer are returned when the process took fewer steps. A multiple eigenvalue counts once, since a
    Krylov space meets it once. Arguments as for `extreme_eigenvalues`.
    """
    process = _Process(
        product,
        dimension,
        generator=generator,
        max_steps=max_steps,
        min_steps=min_steps,
        start=start,
        dtype=dtype,
        device=device,
    )
    ritz = process.run(
        lambda r: r.products >= count and _converged(r, tolerance, r.by_magnitude(count))
    )
    return tuple(ritz.estimate(i) for i in ritz.by_magnitude(count))


def precondition(
    product: Product, diagonal: Tensor, left_out: Tensor | None = None
) -> tuple[Product, int]:
    r"""Returns the operator :math:`D^{-1/2} A D^{-1/2}` and its dimension.

    With *D* the preconditioner of an adaptive optimizer, the largest eigenvalue times the step size
    is what must stay below the optimizer's bound (Cohen et al. 2022, Adaptive gradient methods at
    the edge of stability, section 3).

    Args:
        product: The operator A on flat tensors.
        diagonal: (n,) the positive diagonal of D.
        left_out: (n,) booleans, true where rows and columns are left out, as where Adam's second
            moment is (almost) zero; vectors of the result have only the other elements.

    Raises:
        MeasurementError: When a kept element of the diagonal is not positive and finite.
    """
    kept = torch.ones_like(diagonal, dtype=torch.bool) if left_out is None else ~left_out
    index = kept.nonzero().squeeze(1)
    root = diagonal[index].rsqrt()
    if not bool((root.isfinite() & (root > 0)).all()):
        raise MeasurementError(
            "the preconditioner has elements that are not positive and finite; leave them out"
        )

    def preconditioned(v: Tensor) -> Tensor:
        full = torch.zeros(diagonal.numel(), dtype=v.dtype, device=v.device)
        full[index] = v * root.to(v)
        return product(full)[index] * root.to(v)

    return preconditioned, index.numel()


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz values in rising order, their residuals, and what their vectors are made of."""

    values: list[float]
    residuals: list[float]
    weights: Tensor  # (steps, steps) float64, a column a Ritz value
    basis: Tensor  # (steps, dimension)
    complete: bool  # the basis spans the whole space
    settled: bool  # the current Krylov sequence has seen enough to be judged

    @property
    def products(self) -> int:
        return len(self.values)

    def estimate(self, i: int) -> Estimate:
        return Estimate(
            value=self.values[i],
            std_error=0.0 if self.complete else self.residuals[i],
            samples=self.products,
            method="exact" if self.complete else "lanczos",
            dtype=str(self.basis.dtype).removeprefix("torch."),
        )

    def vector(self, i: int) -> Tensor:
        return _unit(self.weights[:, i].to(self.basis) @ self.basis)

    def by_magnitude(self, count: int) -> list[int]:
        order = sorted(range(len(self.values)), key=lambda i: -abs(self.values[i]))
        return order[:count]


def _converged(ritz: _Ritz, tolerance: float, wanted: list[int]) -> bool:
    scale = max(abs(ritz.values[0]), abs(ritz.values[-1]))
    return ritz.settled and all(ritz.residuals[i] <= tolerance * scale for i in wanted)


class _Process:
    """The Lanczos process with full reorthogonalisation and restarts after breakdown."""

    def __init__(
        self,
        product: Product,
        dimension: int,
        *,
        generator: torch.Generator,
        max_steps: int,
        min_steps: int,
        start: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if dimension < 1 or max_steps < 1:
            raise MeasurementError(
                f"no eigenvalues of {dimension} rows in {max_steps} steps; both must be positive"
            )
        self._product = product
        self._generator = generator
        self._steps = min(max_steps, dimension)
        self._least = min_steps
        self._dimension = dimension
        self._basis = torch.empty(self._steps, dimension, dtype=dtype, device=device)
        self._start = start

    def run(self, done: Callable[[_Ritz], bool]) -> _Ritz:
        """Takes steps until ``done`` with the Ritz pairs, or until they are used up."""
        alphas: list[float] = []
        betas: list[float] = []  # betas[k] couples step k with step k + 1; 0.0 at a restart
        largest = 0.0  # of all |alpha| and beta: the operator's size, as far as seen
        begun = 0  # the step at which the current Krylov sequence started
        self._basis[0] = self._first()
        for k in range(self._steps):
            w = self._product(self._basis[k]).to(self._basis)
            alpha = _dot(self._basis[k], w)
            w = self._orthogonal(w, k + 1)
            norm = torch.linalg.vector_norm(w, dtype=torch.float64)
            a, beta = torch.stack([alpha, norm]).tolist()
            if not (math.isfinite(a) and math.isfinite(beta)):
                raise MeasurementError(
                    "a Hessian product is not finite; look for NaN or Inf in loss and gradient"
                )
            alphas.append(a)
            largest = max(largest, abs(a), beta)
            # Below this, w is rounding: the subspace found is invariant. A random start meets every
            # eigenspace, so a breakdown after a restart too means that nothing is left to find.
            broken = beta <= 32.0 * self._eps * largest
            settled = begun > 0 if broken else k > begun and k + 1 >= self._least
            ritz = self._ritz(alphas, betas, beta, settled=settled)
            if k + 1 == self._steps or done(ritz):
                break
            betas.append(0.0 if broken else beta)
            if broken:
                begun = k + 1
                self._basis[k + 1] = self._random_outside(k + 1)
            else:
                self._basis[k + 1] = w / norm.to(w)
        return ritz

    @property
    def _eps(self) -> float:
        return float(torch.finfo(self._basis.dtype).eps)

    def _first(self) -> Tensor:
        fresh = self._random()
        if self._start is None:
            return fresh
        start = self._start.to(self._basis)
        return _unit(_unit(start) + _NOVELTY * fresh)

    def _random(self) -> Tensor:
        draw = torch.randn(
            self._dimension, generator=self._generator, device=self._generator.device
        )
        return _unit(draw.to(self._basis))

    def _random_outside(self, count: int) -> Tensor:
        w = _unit(self._orthogonal(self._random(), count))
        return _unit(self._orthogonal(w, count))

    def _orthogonal(self, w: Tensor, count: int) -> Tensor:
        """Returns ``w`` without its components along the first ``count`` basis vectors."""
        Q = self._basis[:count]
        for _ in range(2):  # twice is enough (Parlett 1980, section 6.9)
            w = w - (Q @ w) @ Q
        return w

    def _ritz(
        self, alphas: list[float], betas: list[float], beta: float, *, settled: bool
    ) -> _Ritz:
        T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.tensor(betas, dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, weights = torch.linalg.eigh(T)
        steps = len(alphas)
        return _Ritz(
            values=values.tolist(),
            residuals=(beta * weights[-1].abs()).tolist(),
            weights=weights,
            basis=self._basis[:steps],
            complete=steps == self._dimension,
            settled=settled,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def _unit(v: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v)
    return v / norm
