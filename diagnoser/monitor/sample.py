"""One sample: what is measured over two neighbouring steps, as measurement rows.

First step: graph reading (attention, loss), gradients, weights, curvature along the step that the
optimizer is about to make, and the update it then made. Second step: gradient cosine, whether the
gradients of the first were cleared, and curvature where the step could not be told in advance (then
along the update of the first). All rows carry the first step's number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagnoser.curvature import (
    Ends,
    Hessian,
    Operator,
    RowCurvature,
    batch_error,
    block_trace,
    coupling_matrix,
    coupling_norm,
    coupling_norms,
    extreme_eigenvalues,
    forms_along,
    forms_of,
    precondition,
    row_curvature,
    sharded_row_curvature,
)
from diagnoser.monitor.shards import local
from diagnoser.monitor.subject import StepRule, Subject
from diagnoser.runlog import SHARD
from diagnoser.statistics import (
    GraphReading,
    cosines,
    counts,
    inner_products,
    non_finite_counts,
    nonzero_shares,
    norms,
    sums,
)
from diagnoser.types import Component, Estimate, Measurement
from diagnoser.vocabulary import MODEL

Array = NDArray[np.float64]


COUPLING_COLUMNS = 8  # products a component, half of them with its leading Ritz vectors
FRESH_STEPS = 3  # since the ends of a block were found: near enough to start from them
GOOD_PREDICTION = 0.99  # cosine between the predicted and the real step


@dataclass(frozen=True, eq=False)
class Along:
    """Curvature along a step, before it is known whether the step is made like that."""

    direction: dict[str, Tensor]
    rows: RowCurvature
    descent: Array  # g_i'd_i, (components,)
    loss: float
    metric: Mapping[str, float] | None = None  # see `Sample._step_metric`


class KnownEnds:
    """What the ends of blocks were lately: vectors to start the next search from.

    They are worth it for `FRESH_STEPS` only: ten steps later 1.8 % of the ends found from them are
    off by more than 5 %, of those from random starts 0.1 % (benchmarks/lanczos_stopping.py).
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, bool], tuple[int, Tensor]] = {}

    def start(self, key: tuple[str, bool], step: int, size: int) -> Tensor | None:
        """Returns a start for a block of ``size`` elements, or None if nothing fresh is known."""
        at, start = self._found.pop(key, (-FRESH_STEPS - 1, None))
        fresh = start is not None and step - at <= FRESH_STEPS and start.numel() == size
        return start if fresh else None

    def learn(self, key: tuple[str, bool], step: int, ends: Ends) -> None:
        """Keeps what was found, and lets go of what is too old to be used."""
        self._found = {k: v for k, v in self._found.items() if step - v[0] <= FRESH_STEPS}
        self._found[key] = (step, ends.warm_start)


@dataclass
class Sample:
    """The state of a sample between its two steps, and the rows found so far."""

    step: int
    subject: Subject
    rows: list[Measurement] = field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, Tensor] = field(default_factory=dict)  # parameters before the step
    gradient: dict[str, Tensor] = field(default_factory=dict)  # of the first step, unclipped
    passing: dict[str, Tensor] = field(default_factory=dict)  # of the running step, gone after it
    factor: float | None = 0.0  # of the classification losses of the first step, if all are such
    reached: set[str] = field(default_factory=set)  # parameters that the loss depends on
    update: dict[str, Tensor] = field(default_factory=dict)
    rules: dict[str, StepRule] = field(default_factory=dict)
    along: Along | None = None
    place: str = ""  # where curvature is measured, see `_estimate`
    curved: bool = False  # curvature along the coming step was measured
    several: bool = False  # a step has several losses, and not each reaches everything
    blocks_read: bool = False  # all curvature was measured that is not along a step
    left_gradients: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, quantity: str, value: float, **errors: object) -> None:
        """Adds a quantity of the whole run."""
        self.rows.append(Measurement(self.step, quantity, MODEL, Estimate(value, **errors)))  # type: ignore[arg-type]

    def components(self, quantity: str, values: Array) -> None:
        """Adds a quantity of every component; what could not be measured (NaN) is left out."""
        self.rows += [
            Measurement(self.step, quantity, name, Estimate(float(value)))
            for name, value in zip(self.subject.names, values, strict=True)
            if not math.isnan(value)
        ]

    def elements(self, quantity: str, values: Array, count: Array | None = None) -> None:
        """Adds a quantity of the elements of every component.

        Of sharded parameters only those on this rank are known: then it is logged as one of a shard
        with the number of elements behind it, NaN included, for `runlog.ranks` to put together;
        and one of the model, which says that this was all that the rank has of it.
        """
        if not self.subject.sharded:
            self.components(quantity, values)
            return
        sizes = np.nan_to_num(self.subject.elements if count is None else count).tolist()
        found = [*zip(self.subject.names, values.tolist(), sizes, strict=True), (MODEL, 1.0, 1.0)]
        self.rows += [
            Measurement(self.step, SHARD + quantity, name, Estimate(value, samples=int(size)))
            for name, value, size in found
            if size > 0
        ]

    def _forget(self, quantities: Collection[str]) -> None:
        """Takes back rows that are about to be read again."""
        self.rows = [r for r in self.rows if r.quantity.removeprefix(SHARD) not in quantities]

    # -- first step ------------------------------------------------------------------------------

    def read_graph(self, reading: GraphReading) -> None:
        """Adds what the graph shows of the loss and of every attention."""
        names = self.subject.name_of
        self.reached = {names[id(p)] for p in reading.parameters if id(p) in names}
        if reading.loss is not None and reading.loss.is_whole:
            self.run("classes", float(reading.loss.classes))
        self.run("probabilities_into_loss", float(reading.probabilities_into_loss is not None))
        merged: dict[str, list[tuple[float, float, float]]] = {}
        by_head: dict[str, list[float]] = {}
        for attention in reading.attention:
            heads = self.subject.query_heads(attention.parameters)
            for name, own in zip(heads, attention.entropy_by_head, strict=False):
                by_head.setdefault(name, []).append(own)
            layer = self.subject.layer_of(attention.parameters)
            if layer is not None:
                merged.setdefault(layer, []).append(
                    (attention.entropy, attention.largest_logit, attention.empty_rows)
                )
        for layer, found in merged.items():
            entropy, logit, empty = np.array(found).T
            for quantity, value in (
                ("attention_entropy", entropy.mean()),
                ("attention_logit", logit.max()),
                ("empty_rows", empty.max()),
            ):
                if not math.isnan(value):
                    estimate = Estimate(float(value))
                    self.rows.append(Measurement(self.step, quantity, layer, estimate))
        entropies = [float(np.mean(by_head.get(name, math.nan))) for name in self.subject.names]
        self.components("head_entropy", np.array(entropies))
        self._read_inputs(reading)

    def _read_inputs(self, reading: GraphReading) -> None:
        """Adds what the weights of each component multiply."""
        names = self.subject.name_of
        found = {names[id(i.parameter)]: i for i in reading.inputs if id(i.parameter) in names}
        own = [
            next((found[part.parameter] for part in c.parts if part.parameter in found), None)
            for c in self.subject.components
        ]
        for quantity in ("scale", "similarity", "zero_share"):
            values = [math.nan if i is None else getattr(i, quantity) for i in own]
            self.components(f"input_{quantity}", np.array(values))

    def read_passing(self, optimizer: torch.optim.Optimizer, *, keep: bool) -> None:
        """Keeps the gradients of an optimizer that steps, and clears, inside of a backward."""
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = self.subject.name_of.get(id(parameter))
            if name is not None and parameter.grad is not None:
                self.passing[name] = local(parameter.grad).detach().clone()
                if keep:
                    self.before[name] = local(parameter).detach().clone()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last backward, by parameter; of shards those on this rank."""
        return {**self.passing, **self.subject.gradients()}

    def read_gradients(
        self, *, keep: bool, scale: float = 1.0, stepped: Collection[str] = ()
    ) -> None:
        """Reads the gradients that the backward has just left, before anything clips them.

        Args:
            keep: Also for what the second step compares with, and for the update.
            scale: What a gradient scaler has multiplied them by.
            stepped: Parameters that were stepped before this backward, of another loss: theirs are
                those that were read then.
        """
        subject, parts = self.subject, self.subject.parts
        gradients = self.gradients()
        gradients |= {n: self.gradient[n] for n in stepped if n in self.gradient}
        size = norms(parts, gradients) / scale
        self._forget(_GRADIENT_QUANTITIES)
        self.components("reached", subject.shares(dict.fromkeys(gradients, True)))
        self.elements("gradient_norm", np.where(np.isfinite(size), size, np.nan))
        self.elements(
            "zero_share", 1.0 - nonzero_shares(parts, gradients), counts(parts, gradients)
        )
        self.elements("non_finite_gradient", non_finite_counts(parts, gradients))
        if keep:
            self.gradient = {n: g.detach().clone() for n, g in gradients.items()}
            # Once a step: another optimizer may have stepped before a second backward.
            missing = {n: p for n, p in subject.weights().items() if n not in self.before}
            self.before |= {n: p.clone() for n, p in missing.items()}

    def read_weights(self) -> None:
        """Reads weight norms and scale, and what may be trained."""
        subject, weights = self.subject, self.subject.weights()
        size = norms(subject.parts, weights)
        self.elements("weight_norm", np.where(np.isfinite(size), size, np.nan))
        self.elements("non_finite_weight", non_finite_counts(subject.parts, weights))
        self.elements("weight_scale", subject.weight_scale(size))
        trainable = {n: p.requires_grad for n, p in subject.parameters.items()}
        self.components("trainable", subject.shares(trainable))

    def read_update(
        self, rules: Mapping[str, StepRule], optimized: Mapping[str, bool] | None
    ) -> None:
        """Reads what the step changed, and how the optimizers take their steps.

        Called after every optimizer's step, each time for all that has changed since the backward.
        """
        subject, parts = self.subject, self.subject.parts
        self._forget(_UPDATE_QUANTITIES)
        if optimized is not None:
            self.components("optimized", subject.shares(optimized))
        if not self.before:
            return
        weights = subject.weights()
        self.update = {n: weights[n] - old for n, old in self.before.items()}
        self.rules = dict(rules)
        size, before = norms(parts, self.update), norms(parts, self.before)
        self.elements("update_norm", np.where(np.isfinite(size), size, np.nan))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(before > 0, size / before, np.nan)
        if not subject.sharded:  # of shards it follows from the norms
            self.components("update_ratio", np.where(np.isfinite(ratio), ratio, np.nan))
        rates = {n: rule.learning_rate for n, rule in rules.items()}
        self.components("learning_rate", subject.per_component(rates))
        factors = {n: rule.rate_factor for n, rule in rules.items()}
        if any(factor != 1.0 for factor in factors.values()):
            self.components("rate_factor", subject.per_component(factors))
        self.elements("moment_ratio", *self._moment_ratio())

    def read_lost_updates(self, rounded: Collection[str]) -> None:
        """Share of elements of some parameters with a gradient that the step left as they were."""
        self._forget({"lost_updates"})
        stuck = {
            name: ((self.gradient[name] != 0) & (update == 0)).float()
            for name, update in self.update.items()
            if name in rounded and name in self.gradient
        }
        if stuck:
            parts = self.subject.parts
            self.elements("lost_updates", nonzero_shares(parts, stuck), counts(parts, stuck))

    def skip_update(self) -> None:
        """Drops what a scaler's step that was not made, and is to be taken smaller, has left."""
        self._forget(_GRADIENT_QUANTITIES)
        self.gradient, self.before = {}, {}

    def settle_update(self, *, as_expected: bool = True) -> None:
        """Ends the first step: every optimizer has stepped.

        Curvature along a predicted step is rescaled to the step made, or given up where that went
        another way: the next step then measures it along this one.

        Args:
            as_expected: The step had as many backwards as the curvature was measured for.
        """
        self.before, self.passing = {}, {}
        if self.along is None:
            return
        parts, predicted = self.subject.parts, self.along.direction
        both = float(np.nansum(inner_products(parts, self.update, predicted)))
        made = float(np.nansum(inner_products(parts, self.update, self.update)))
        square = float(np.nansum(inner_products(parts, predicted, predicted)))
        alike = both > GOOD_PREDICTION * math.sqrt(made * square)
        if as_expected and made > 0 and square > 0 and alike:
            self.run("predicted_update_cosine", both / math.sqrt(made * square))
            self.add_curvature(both / square)
        else:
            self.along, self.curved = None, False

    def _moment_ratio(self) -> tuple[Array, Array]:
        """Root mean square of gradient over Adam's second moment: sqrt(mean(g^2 / v_hat)).

        And the number of entries of each mean. Far above 1 where the running average lags behind a
        sudden gradient (Wortsman et al. 2023, 2304.13013, section 3.4; Bai et al. 2025,
        2506.04805). Entries without any second moment (never a gradient) are left out.
        """
        ratios: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        gradients = self.gradients()
        for name, rule in self.rules.items():
            gradient = gradients.get(name)
            if rule.second_moment is None or gradient is None:
                continue
            known = rule.second_moment > rule.eps**2
            counts[name] = known.float()
            dense = gradient.detach().to_dense()
            ratios[name] = torch.where(known, dense * dense / rule.second_moment, 0.0)
        if not ratios:
            none = np.full(len(self.subject.components), np.nan)
            return none, none
        total, count = sums(self.subject.parts, ratios), sums(self.subject.parts, counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.where(count > 0, total / count, np.nan)), count

    # -- second step -----------------------------------------------------------------------------

    def read_cosine(self) -> None:
        """Cosine of this step's gradient to the first step's, per component and for the model."""
        both = self.reached & self.gradient.keys()  # of others an older one may still stand
        shared = {n: g.detach() for n, g in self.gradients().items() if n in both}
        if shared and self.subject.sharded:
            self._forget({"gradient_product", "next_gradient_norm"})
            parts = self.subject.parts
            self.elements("gradient_product", inner_products(parts, shared, self.gradient))
            self.elements("next_gradient_norm", norms(parts, shared))
        elif shared:
            self.components("gradient_cosine", cosines(self.subject.parts, shared, self.gradient))
        if shared:  # else they come with a later backward of the step
            self.gradient = {}

    def measurable(self, hessian: Operator) -> list[Component]:
        """The components all of whose parts the Hessian has (frozen ones are left out).

        Of several losses it is the first one's: what that does not reach is left out, too.
        """
        known = hessian.parameters.keys() & self.reached if self.several else hessian.parameters
        return [
            component
            for component in self.subject.components
            if all(part.parameter in known for part in component.parts)
        ]

    def read_curvature(self, hessian: Operator, direction: Mapping[str, Tensor]) -> None:
        """Takes the product of the Hessian with a step: second and first order of its effect.

        The rows are made by `add_curvature`, when it is known how the step really came out.
        """
        components = self.measurable(hessian)
        along = row_curvature(hessian, direction, components)
        descent = inner_products(self.subject.parts, hessian.gradient, direction)
        self.along = Along(dict(direction), along, descent, hessian.loss)

    def add_curvature(self, scale: float = 1.0) -> None:
        """Adds curvature along the step; ``scale`` is how long it was against the direction.

        ``update_curvature``: d_i'(Hd)_i in units of the loss. ``update_curvature_share``: half of
        it over the loss, what curvature adds to the loss in one step. ``step_descent``: g'd, what
        the gradient adds; ``step_loss``: the loss that both are of. ``overshoot``: half of d'Hd
        over |g'd|: above 1 the quadratic model says that the step raises the loss although the
        gradient says it falls. ``step_sharpness``: learning rate times curvature along the step
        over what the optimizer's stability allows, d_i'(Hd)_i / (d_i'P_i d_i / learning rate) *
        factor (see `StepRule`); above 1 the step diverges along its own direction.
        """
        if self.along is None:
            return
        found, self.along = self.along, None
        metric = self._step_metric(found.direction) if found.metric is None else found.metric
        estimates = {**found.rows.components, MODEL: found.rows.total}
        self.run("step_loss", found.loss)
        for name, estimate in estimates.items():
            square = scale * scale
            self._estimate("update_curvature", name, estimate, square)
            if found.loss > 0:
                share = 0.5 * square / found.loss
                self._estimate("update_curvature_share", name, estimate, share)
            if metric.get(name, math.nan) > 0:
                self._estimate("step_sharpness", name, estimate, 1 / metric[name])
        descent = float(np.nansum(found.descent))
        if descent:
            self.run("step_descent", scale * descent)
            self._estimate("overshoot", MODEL, found.rows.total, 0.5 * scale / abs(descent))

    def read_sharded_curvature(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Measures curvature along the step that was made, where parameters are sharded.

        All ranks must come here; see `curvature.sharded`.
        """
        subject = self.subject
        trained = {n: p for n, p in subject.parameters.items() if p.requires_grad}
        direction = {n: d for n, d in self.update.items() if n in trained}
        weighted = self._preconditioned(direction)
        found = sharded_row_curvature(
            losses, trained, subject.weights(), direction, weighted, subject.held
        )
        metric = {n: m for n, m in found.metric.items() if m > 0}
        if weighted.keys() == direction.keys():
            metric[MODEL] = sum(found.metric.values())
        self.place, self.curved = "probe", True
        self.along = Along(direction, found.rows, np.array(found.descent), found.loss, metric)
        self.add_curvature()

    def read_gradient_curvature(self, hessian: Operator) -> None:
        """Curvature along the gradient, g_i'(Hg)_i / g_i'g_i, from one product."""
        gradient = hessian.gradient
        components = self.measurable(hessian)
        along = row_curvature(hessian, gradient, components)
        squares = norms(self.subject.parts, gradient) ** 2
        index = {name: i for i, name in enumerate(self.subject.names)}
        for component in components:
            square = float(squares[index[component.name]])
            if square > 0:
                estimate = along.components[component.name]
                self._estimate("gradient_curvature", component.name, estimate, 1 / square)

    def _step_metric(self, direction: Mapping[str, Tensor]) -> dict[str, float]:
        """D'Pd / (learning rate * factor), per component and in all; NaN where it is not known."""
        weighted = self._preconditioned(direction)
        if not weighted:
            return {}
        values = inner_products(self.subject.parts, direction, weighted)
        metric = dict(zip(self.subject.names, values.tolist(), strict=True))
        if weighted.keys() == direction.keys():
            metric[MODEL] = float(np.nansum(values))
        return metric

    def _preconditioned(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``P d / (learning rate * factor)`` of the parameters of which P is known."""
        weighted: dict[str, Tensor] = {}
        for name, rule in self.rules.items():
            rate = rule.learning_rate * rule.factor
            if name in direction and rate > 0:
                weighted[name] = direction[name] * rule.preconditioner() / rate
        return weighted

    def read_spectrum(
        self,
        hessian: Operator,
        components: Sequence[Component],
        generator: torch.Generator,
        products: int = 12,
        known: KnownEnds | None = None,
    ) -> dict[str, Tensor]:
        """Trace and both ends of the spectrum of the diagonal blocks of some components.

        ``step_lambda`` is learning rate times the largest eigenvalue, preconditioned as the
        optimizer steps, over what its stability allows: beyond 1 the quadratic model diverges.
        At most ``products`` products are taken for each of the three. Where the samples of the
        loss can be told apart, each has an error for other samples, too. Ends that ``known`` has
        of a few steps ago are where the search starts.

        Returns:
            By component, the leading Ritz vectors (rows) that coupling norms may begin with.
        """
        known = known if known is not None else KnownEnds()
        leading: dict[str, Tensor] = {}
        forms = forms_of(hessian, generator) if isinstance(hessian, Hessian) else None
        for component in components:
            block, name = component.parts, component.name
            covered = forms is not None and all(f.covers(block, generator) for f in forms)
            own = forms if covered else None
            ends = self._ends(hessian, component, generator, products, known)
            leading[name] = ends.dominant(COUPLING_COLUMNS // 2)
            for quantity, end, vector in (
                ("lambda_max", ends.lambda_max, ends.vector_max),
                ("lambda_min", ends.lambda_min, ends.vector_min),
            ):
                if own is not None:
                    spread = batch_error(forms_along(hessian, block, vector, own))
                    end = replace(end, batch_std_error=spread)  # noqa: PLW2901 - completed
                self._estimate(quantity, name, end)
            # The trace on the vectors found so far is known: only the rest needs random ones.
            trace = block_trace(
                hessian,
                block,
                generator,
                forms=own,
                basis=ends.basis,
                inside=ends.inside,
                max_products=products,
            )
            self._estimate("trace", name, trace)
            rules = [self.rules.get(part.parameter) for part in block]
            rule = rules[0]
            if rule is None or None in rules:
                continue
            if rule.second_moment is not None:
                ends = self._ends(
                    hessian, component, generator, products, known, preconditioned=True
                )
            factor = rule.learning_rate * rule.factor
            self._estimate("step_lambda", name, ends.lambda_max, factor)
        return leading

    def _ends(
        self,
        hessian: Operator,
        component: Component,
        generator: torch.Generator,
        products: int,
        known: KnownEnds,
        *,
        preconditioned: bool = False,
    ) -> Ends:
        block = component.parts
        size = hessian.size(block)
        like = hessian.parameters[block[0].parameter]
        product: Callable[[Tensor], Tensor] = functools.partial(hessian.block_product, block)
        if preconditioned:
            diagonal, left_out = [], []
            for part in block:
                rule, parameter = self.rules[part.parameter], hessian.parameters[part.parameter]
                assert rule.second_moment is not None
                diagonal.append(part.view(rule.preconditioner().expand_as(parameter)).reshape(-1))
                # Where there was hardly ever a gradient, P is all epsilon and means nothing.
                left_out.append(part.view(rule.second_moment <= rule.eps**2).reshape(-1))
            product, size = precondition(product, torch.cat(diagonal), torch.cat(left_out))
        key = (component.name, preconditioned)
        ends = extreme_eigenvalues(
            product,
            size,
            generator,
            max_steps=products,
            start=known.start(key, self.step, size),
            dtype=like.dtype,
            device=like.device,
        )
        known.learn(key, self.step, ends)
        return ends

    def read_coupling_norms(
        self, hessian: Operator, component: Component, generator: torch.Generator
    ) -> None:
        """Adds the norm of the cross block of one component with every other.

        ``coupling_norm``: over all directions, while ``coupling`` is along the step. In units of
        the loss over squared parameters (see `curvature.coupling`).
        """
        components = self.measurable(hessian)
        order = {each.name: i for i, each in enumerate(components)}
        others = [other for other in components if other.name != component.name]
        found = coupling_norm(hessian, component.parts, others, generator)
        for name, estimate in found.items():
            a, b = sorted((component.name, name), key=order.__getitem__)
            self._estimate("coupling_norm", a, estimate, other=b)

    def read_all_coupling_norms(
        self, hessian: Operator, generator: torch.Generator, bases: Mapping[str, Tensor]
    ) -> None:
        """Adds the norms of the cross blocks of all pairs; ``bases`` as `read_spectrum` gives."""
        components = self.measurable(hessian)
        norms_of = coupling_norms(
            hessian, components, generator, bases=bases, columns=COUPLING_COLUMNS
        )
        for (a, b), estimate in norms_of.items():
            self._estimate("coupling_norm", a, estimate, other=b)

    def read_interaction(self, hessian: Operator, direction: Mapping[str, Tensor]) -> None:
        """Signed coupling d_i'H_ij d_j of all pairs along a step, and its bounded share.

        It takes the place of that along a step that was expected and then not made.
        """
        self.rows = [row for row in self.rows if row.quantity not in _INTERACTION_QUANTITIES]
        components = self.measurable(hessian)
        coupling = coupling_matrix(hessian, direction, components)
        for i, a in enumerate(coupling.names):
            for j in range(i + 1, len(coupling.names)):
                b = coupling.names[j]
                for quantity, table in (
                    ("coupling", coupling.values),
                    ("coupling_share", coupling.shares),
                ):
                    self._estimate(quantity, a, table[i][j], other=b)
            self._estimate("block_curvature", a, coupling.values[i][i])

    def _estimate(
        self,
        quantity: str,
        component: str,
        estimate: Estimate,
        factor: float = 1.0,
        other: str | None = None,
    ) -> None:
        """Adds a number of curvature; its method: where, by which products, which estimator."""
        if not math.isfinite(estimate.value * factor):
            return

        def times(error: float | None) -> float | None:
            return None if error is None else abs(factor) * error

        scaled = Estimate(
            estimate.value * factor,
            times(estimate.std_error),
            times(estimate.batch_std_error),
            estimate.samples,
            self.place if estimate.method == "exact" else f"{self.place}, {estimate.method}",
            estimate.dtype,
        )
        self.rows.append(Measurement(self.step, quantity, component, scaled, other))


_INTERACTION_QUANTITIES = {"coupling", "coupling_share", "block_curvature"}
_GRADIENT_QUANTITIES = {"reached", "gradient_norm", "zero_share", "non_finite_gradient"}
_UPDATE_QUANTITIES = {
    "optimized", "update_norm", "update_ratio", "learning_rate", "rate_factor", "moment_ratio",
    "optimizers", "shared_loss", "skipped_for_good",
}  # fmt: skip
