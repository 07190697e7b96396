r"""Both ends of the spectrum of a symmetric operator by the Lanczos process.

From a start :math:`q_1`, :math:`\beta_k q_{k+1} = A q_k - \alpha_k q_k - \beta_{k-1} q_{k-1}`, made
orthogonal to all earlier vectors (Lanczos 1950; full reorthogonalisation: Paige 1971, Parlett 1980,
The symmetric eigenvalue problem, chapter 13). An eigenpair :math:`(\vartheta, s)` of the
tridiagonal :math:`T` gives the Ritz pair :math:`(\vartheta, Q s)`, and some eigenvalue of *A* lies
within its residual

.. math:: |\lambda - \vartheta| \le \|A Q s - \vartheta Q s\| = \beta_k |s_k|

which is reported as ``std_error``. That eigenvalue is not always the outermost one: a start that
has little of the end's vector looks converged to the next one for a while. How little it would have
to be is known. Let :math:`p_j` be the Lanczos polynomials, :math:`q_{j+1} = p_j(A) q_1`. For an
eigenvector *u* of :math:`\lambda`, :math:`q_{j+1}^\top u = p_j(\lambda)\, q_1^\top u`, and as
the squares of these sum to at most one,

.. math:: (q_1^\top u)^2 \sum_{j=0}^{k} p_j(\lambda)^2 \le 1

For a random start, :math:`|q_1^\top u| \le \delta` has at most the chance
:math:`\delta \sqrt{2 n / \pi}`. Beyond the Ritz values the sum grows, so where it passes
:math:`1 / \delta^2` there is a bound on the spectrum that holds but for that chance, at every step
and so also at the step at which one chooses to stop (van Dorsselaer, Hochstenbach and van der Vorst
2000, Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos
method). `Ends.lower` and `Ends.upper` are these bounds.

The process stops when two things hold for both ends: the error that the residual r and the gap to
the next Ritz value suggest, :math:`r^2 / gap` (Kato 1949, Temple 1928; an estimate here, since the
gap is one between Ritz values), is small, and an eigenvalue further out than a margin would need a
chance below ``risk``. The margin is 5 % of the largest magnitude from a random start. A warm start
is believed more: there the margin is the largest magnitude itself, and the chance is that of the
random share that is mixed in.

What that costs, and how often an end is wrong by more than 5 % of the largest magnitude, was
measured on every block of a tiny transformer and a tiny HAN that had no part in the choice of the
rule (``benchmarks/lanczos_stopping.py``). By default: 8.4 products, 0.1 % of the ends wrong; not
before 8 steps: 9.0 products, 0.1 % of the ends wrong; with a margin of 0.1: 7.7 products,
0.3 % of the ends wrong. (PyHessian's power iteration 7.8 for one end.) Warm, 1, 3 and 10
optimizer steps later: 4.3, 4.8 and 5.8 products, 0.0 %, 0.0 % and 1.8 % of the ends wrong. A
start by several vectors is their sum: expanding them one by one (Rayleigh-Ritz on all of them, then
on residuals) took more products for the same error when the rule was chosen.

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
from diagnoser.curvature.operator import Block, Operator
from diagnoser.errors import MeasurementError
from diagnoser.types import Estimate

Product = Callable[[Tensor], Tensor]
"""A symmetric operator on flat tensors, such as a Hessian's block product."""

EXTREMES = 3  # eigenvalues of largest magnitude that a run reports beside both ends
_NOVELTY = 0.3  # random share of a warm start: a direction that has become extreme is not missed
_MARGIN = 0.05  # of the largest magnitude: how far out an end may lie unseen (but for the risk)
_WARM_MARGIN = 1.0  # the same from a warm start
_HALVINGS = 20  # of the interval in which a bound is looked for
_ENDLESS = 1e100  # a growth that no chance survives; far from overflow


@dataclass(frozen=True, slots=True)
class Ends:
    """What one Lanczos run on an operator found.

    Attributes:
        lambda_min: The smallest eigenvalue (algebraic); its ``std_error`` is the residual, within
            which lies some eigenvalue, not surely the end (that is what ``lower`` is for).
        lambda_max: The largest.
        extreme: Those of largest magnitude, largest first: at most three, and fewer where the run
            had fewer steps.
        lower: No eigenvalue lies below this, but for a chance of ``risk``; likewise
        upper: none above. From a warm start the chance is that of its random share.
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
    lower: float
    upper: float
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
    min_steps: int = 2,
    tolerance: float = 0.01,
    margin: float | None = None,
    risk: float = 0.05,
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
        tolerance: Stops when the errors of both ends, as r^2 / gap estimates them, are at most this
            share of the largest eigenvalue magnitude; 0 uses all steps.
        margin: Share of the largest magnitude by which an end may lie further out unseen, but for
            the risk; None: 0.05 from a random start, 1.0 from a warm one.
        risk: The chance, for each end, that an eigenvalue beyond the margin went unseen; also that
            of the bounds. Smaller costs more steps.
        start: (n,) a vector near the wanted ends (`Ends.warm_start`), or (k, n) vectors, such as
            `Ends.dominant`, whose sum is taken; a random share is mixed in.
        dtype: Of the vectors; inner products and T are float64.
        device: Of the vectors.

    Raises:
        MeasurementError: When there are no rows, the start is none, or a product is not finite.
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
    if margin is None:
        margin = _MARGIN if start is None else _WARM_MARGIN
    ritz = process.run(lambda r: _ends_found(r, tolerance, margin, risk))
    low, high = ritz.estimate(0), ritz.estimate(-1)
    return Ends(
        lambda_min=low,
        lambda_max=high,
        extreme=tuple(ritz.estimate(i) for i in ritz.by_magnitude(EXTREMES)),
        lower=ritz.bound(0, risk),
        upper=ritz.bound(-1, risk),
        vector_min=ritz.vector(0),
        vector_max=ritz.vector(-1),
        basis=ritz.basis,
        inside=math.fsum(ritz.values),
        ritz_values=torch.tensor(ritz.values, dtype=torch.float64),
        weights=ritz.weights,
        products=ritz.products,
    )


def block_eigenvalues(
    hessian: Operator,
    block: Block,
    generator: torch.Generator,
    *,
    max_steps: int = 16,
    min_steps: int = 2,
    tolerance: float = 0.01,
    margin: float | None = None,
    risk: float = 0.05,
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
        margin=margin,
        risk=risk,
        start=start,
        dtype=like.dtype,
        device=like.device,
    )
    # What products by differences are wrong by, at most (Weyl).
    doubt = hessian.relative_error * float(ends.ritz_values.abs().max())

    def of_operator(estimate: Estimate) -> Estimate:
        assert estimate.std_error is not None
        error = math.hypot(estimate.std_error, doubt)
        return replace(estimate, std_error=error, dtype=hessian.dtype)

    low, high = of_operator(ends.lambda_min), of_operator(ends.lambda_max)
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
    extreme = tuple(of_operator(e) for e in ends.extreme)
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
    Krylov space meets it once. Stops when all residuals are at most ``tolerance`` of the largest
    magnitude; other arguments as for `extreme_eigenvalues`.
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
    alphas: list[float]  # of the current Krylov sequence
    betas: list[float]  # the same; the last one leads out of the basis
    broken: bool  # the last one is rounding: nothing leads out
    fresh: float  # random share of the sequence's start

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

    def temple(self, i: int) -> float:
        """The error of an end, 0 or -1, as residual and gap suggest; the residual without a gap."""
        inner = 1 if i == 0 else -2
        residual = self.residuals[i]
        if len(self.values) < 3:  # the next value is the other end
            return residual
        gap = abs(self.values[i] - self.values[inner]) - self.residuals[inner]
        return min(residual, residual * (residual / gap)) if gap > 0 else residual

    def unseen(self, x: float) -> float:
        """The chance of a start to which an eigenvalue at or beyond ``x`` would not have shown."""
        if self.complete or self.broken:
            return 0.0
        grown = _growth(self.alphas, self.betas, x)
        return math.sqrt(2 * self.basis.shape[1] / math.pi / grown) / self.fresh

    def bound(self, i: int, risk: float) -> float:
        """How far the spectrum reaches beyond an end, 0 or -1, but for a chance of ``risk``."""
        outwards = -1.0 if i == 0 else 1.0
        if self.complete or self.broken:
            return self.values[i] + outwards * self.residuals[i]
        inner, outer = 0.0, max(abs(self.values[0]), abs(self.values[-1]), self.betas[-1])
        while self.unseen(self.values[i] + outwards * outer) > risk:
            inner, outer = outer, 2.0 * outer
        for _ in range(_HALVINGS):
            middle = (inner + outer) / 2
            if self.unseen(self.values[i] + outwards * middle) > risk:
                inner = middle
            else:
                outer = middle
        return self.values[i] + outwards * outer

    def by_magnitude(self, count: int) -> list[int]:
        order = sorted(range(len(self.values)), key=lambda i: -abs(self.values[i]))
        return order[:count]


def _converged(ritz: _Ritz, tolerance: float, wanted: list[int]) -> bool:
    scale = max(abs(ritz.values[0]), abs(ritz.values[-1]))
    return ritz.settled and all(ritz.residuals[i] <= tolerance * scale for i in wanted)


def _ends_found(ritz: _Ritz, tolerance: float, margin: float, risk: float) -> bool:
    low, high = ritz.values[0], ritz.values[-1]
    scale = max(abs(low), abs(high))
    return (
        ritz.settled
        and max(ritz.temple(0), ritz.temple(-1)) <= tolerance * scale
        and max(ritz.unseen(low - margin * scale), ritz.unseen(high + margin * scale)) <= risk
    )


def _growth(alphas: list[float], betas: list[float], x: float) -> float:
    """Returns the sum of the squares of the Lanczos polynomials at ``x``."""
    before, now, total, beta = 0.0, 1.0, 1.0, 0.0
    for a, b in zip(alphas, betas, strict=True):
        before, now, beta = now, ((x - a) * now - beta * before) / b, b
        total += now * now
        if total > _ENDLESS:
            return math.inf
    return total


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
            ritz = self._ritz(alphas, betas, beta, begun, settled=settled, broken=broken)
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
        rows = self._start.to(self._basis).reshape(-1, self._start.shape[-1])
        if rows.shape[1] != self._dimension:
            raise MeasurementError(
                f"a start of shape {tuple(self._start.shape)} for {self._dimension} rows; "
                "give vectors of that many elements"
            )
        start = rows.sum(0)
        size = float(torch.linalg.vector_norm(start, dtype=torch.float64))
        if not (math.isfinite(size) and size > 0.0):
            raise MeasurementError("the start of an eigenvalue run is zero or not finite; leave it")
        return _unit(start / size + _NOVELTY * fresh)

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
        self,
        alphas: list[float],
        betas: list[float],
        beta: float,
        begun: int,
        *,
        settled: bool,
        broken: bool,
    ) -> _Ritz:
        T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.tensor(betas, dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, weights = torch.linalg.eigh(T)
        steps = len(alphas)
        warm = self._start is not None and begun == 0
        return _Ritz(
            values=values.tolist(),
            residuals=(beta * weights[-1].abs()).tolist(),
            weights=weights,
            basis=self._basis[:steps],
            complete=steps == self._dimension,
            settled=settled,
            alphas=alphas[begun:],
            betas=[*betas[begun:], beta],
            broken=broken,
            # The norm of a start and its random share is at most the sum of theirs.
            fresh=_NOVELTY / (1.0 + _NOVELTY) if warm else 1.0,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def _unit(v: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v)
    return v / norm
