"""The parts of the study: each makes one row of results for one model and one seed.

``measured``: a training as it is, measured at three checkpoints (the paper's Tables 1 and 2 and
Fig. 2). ``perturbed``: from the middle of the training on, as it is and with noise added to one
layer (section 2.5). ``intervention``: the same with one noise, and the learning rate lowered for
the coupled group, for others, or as the repair loop decides (3.2). ``propagation``: a component is
disturbed, and every other one looked at some steps later.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.forked import answers
from benchmarks.study import measure
from benchmarks.study.measure import Row, number
from benchmarks.study.settings import Setting, Training
from diagnoser.components import split_components
from diagnoser.curvature import Operator, coupling_norm
from diagnoser.session import Watch
from diagnoser.types import Component

CHECKPOINTS: Final = (0.1, 0.5, 1.0)  # shares of the training
NOISE_OF_INTERVENTION: Final = 0.3
SLOWER: Final = 0.1  # what the intervention multiplies a learning rate by
LATER: Final = 20  # steps between a disturbance and what is seen of it
RELATIVE_NOISE: Final = 0.5  # of a component's root mean square weight, where it is disturbed
SOURCES: Final = 6  # components that are disturbed
SKETCH: Final = 64  # numbers that tell a vector
LOOP: Final = "repair loop"
ARMS: Final = ("undisturbed", "nothing", "group", "random", "all", LOOP)


def measured(setting: Setting, seed: int) -> Row:
    """Trains once; measures curvature and coupling at the checkpoints, the landscape at the end."""
    training = setting.start(seed)
    names = [*setting.matrices, *setting.layers]
    checkpoints, changed = [], list[float]()
    for at, share in enumerate(CHECKPOINTS):
        changed += _train(training, round(share * training.steps))
        checkpoints.append(
            {
                "step": training.made,
                "accuracy": training.accuracy(),
                "curvature": measure.curvature(training, setting, names, seed),
                "pyhessian": measure.by_pyhessian(
                    training, setting, names if at in setting.asked_of_pyhessian else [], seed
                ),
                "coupling": measure.couplings(training, setting, setting.pairs, seed),
                "gradient_norms": measure.gradient_norms(training, setting, names),
            }
        )
    landscape = [
        row for name in setting.pictured for row in measure.landscape(training, setting, name, seed)
    ]
    return {"checkpoints": checkpoints, "landscape": landscape, "changed_by_epoch": changed}


def perturbed(setting: Setting, seed: int) -> Row:
    """Trains to the middle; from there on as it is, and with noise in one layer.

    One arm goes on in another order of the batches: what differs there differs by chance.
    """
    training = setting.start(seed)
    training.until(training.steps // 2)
    layers = setting.disturbed
    arms: list[tuple[str, float]] = [("none", 0.0), ("another order", 0.0)]
    arms += [(layer, alpha) for layer in layers for alpha in setting.noise]

    def work(arm: tuple[str, float]) -> Row:
        layer, alpha = arm
        if layer in layers:
            measure.disturb(training, setting.block(layer), alpha, seed)
        elif layer != "none":
            training.reorder(seed)
        names = [layer] if layer in layers else layers
        before = measure.state(training, setting, names, seed)
        changed = _train(training, training.steps)
        after = measure.state(training, setting, names, seed)
        return {
            "right_after": before,
            "at_the_end": after,
            "changed_by_epoch": changed,
            **_outcome(training),
        }

    return {"arms": _forked(arms, work, lambda arm: {"layer": arm[0], "alpha": arm[1]})}


def intervention(setting: Setting, seed: int) -> Row:
    """Disturbs the group that the paper slows down, and slows it, others, all or nothing."""
    training = setting.start(seed)
    training.until(training.steps // 2)

    def work(arm: str) -> Row:
        if arm == LOOP:
            return _by_repair_loop(setting, seed)
        if arm != "undisturbed":
            measure.disturb(training, _lowered(setting), NOISE_OF_INTERVENTION, seed)
        training.slowed = dict.fromkeys(_slowed(arm, training, setting, seed), SLOWER)
        changed = _train(training, training.steps)
        return {
            "slowed": list(training.slowed) if arm == "random" else None,
            "coupling": measure.couplings(
                training, setting, setting.pairs_of(setting.lowered), seed
            ),
            "changed_by_epoch": changed,
            **_outcome(training),
        }

    return {"arms": _forked(ARMS, work, lambda arm: {"arm": arm})}


def propagation(setting: Setting, seed: int) -> Row:
    """Disturbs one component after another; what is seen in every other one some steps later."""
    training = setting.start(seed)
    training.until(training.steps // 2)
    named = dict(training.model.named_parameters())
    components = [
        c
        for c in split_components({"model": training.model})
        if all(named[part.parameter].requires_grad for part in c.parts)
    ]
    sources = _sources(components)[:SOURCES]
    predicted = _predictors(training, setting, components, sources, seed)

    def work(source: str) -> Row:
        if source:
            at = next(c for c in components if c.name == source)
            _disturb_relative(training, at, seed)
        training.until(training.made + LATER)
        gradients, outputs = _seen(training, components)
        return {
            "gradients": {n: g.tolist() for n, g in gradients.items()},
            "outputs": {n: o.tolist() for n, o in outputs.items()},
        }

    found = dict(answers(["", *sources], work, 1))
    problems = [row["problem"] for row in found.values() if "problem" in row]
    if problems:
        raise RuntimeError(problems[0])
    twin = found.pop("")
    return {
        "pairs": [
            {
                "source": source,
                "target": target,
                "gradient": _changed(row["gradients"], twin["gradients"], target),
                "relative_gradient": _relative(row["gradients"], twin["gradients"], target),
                "output": _relative(row["outputs"], twin["outputs"], target),
                **predicted[source][target],
            }
            for source, row in found.items()
            for target in (c.name for c in components if c.name != source)
        ]
    }


PARTS: Final[Mapping[str, Callable[..., Row]]] = {
    "measured": measured,
    "perturbed": perturbed,
    "intervention": intervention,
    "propagation": propagation,
}


def _forked(
    arms: Sequence[Any], work: Callable[[Any], Row], name: Callable[[Any], Row]
) -> list[Row]:
    """Makes each arm in a fork; adds how many predictions differ from the first arm's."""
    found = dict(answers(list(arms), work, 1))
    for arm, row in found.items():
        if "problem" in row:
            raise RuntimeError(f"{arm}: {row['problem']}")
    usual = torch.tensor(found[arms[0]]["predictions"])
    return [
        {
            **name(arm),
            **{k: v for k, v in found[arm].items() if k != "predictions"},
            "variability": _differ(torch.tensor(found[arm]["predictions"]), usual),
        }
        for arm in arms
    ]


def _train(training: Training, step: int) -> list[float]:
    """Trains up to a step; returns what share of predictions each epoch on the way changed."""
    changed, last = [], training.predictions()
    while training.made < step:
        training.until(min(step, (training.made // training.per_epoch + 1) * training.per_epoch))
        if training.made % training.per_epoch == 0:
            now = training.predictions()
            changed.append(_differ(now, last))
            last = now
    return changed


def _outcome(training: Training) -> Row:
    predictions = training.predictions()
    return {
        "accuracy": float((predictions == training.held_out[1]).double().mean()),
        "predictions": predictions.tolist(),
    }


def _differ(a: Tensor, b: Tensor) -> float:
    return float((a != b).double().mean())


def _lowered(setting: Setting) -> tuple[str, ...]:
    return tuple(name for group in setting.lowered for name in setting.block(group))


def _slowed(arm: str, training: Training, setting: Setting, seed: int) -> Sequence[str]:
    """Returns the parameters that an arm slows down."""
    trained = {n: p for n, p in training.model.named_parameters() if p.requires_grad}
    lowered = _lowered(setting)
    if arm == "group":
        return lowered
    if arm == "all":
        return tuple(trained)
    if arm == "random":  # others, until they hold as many elements
        wanted = sum(trained[name].numel() for name in lowered)
        others = [n for n in trained if n not in lowered and trained[n].numel() <= wanted]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        chosen: list[str] = []
        for i in order.tolist():
            if sum(trained[name].numel() for name in chosen) >= wanted:
                break
            chosen.append(others[i])
        return chosen
    return ()


def _by_repair_loop(setting: Setting, seed: int) -> Row:
    """The whole training under the repair loop, disturbed in the middle like the others."""
    training = setting.start(seed)
    middle = training.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "run", repair="apply")
        with watch:
            training.until(middle)
            measure.disturb(training, _lowered(setting), NOISE_OF_INTERVENTION, seed)
            changed = _train(training, training.steps)
        diagnosis = watch.diagnose(write=False)
    return {
        "verdict": diagnosis.verdict,
        "causes": [[c.cause, c.component] for c in diagnosis.causes[:3]],
        "kept": [
            [a.name for a in attempt.actions] for attempt in diagnosis.repairs if attempt.kept
        ],
        "tried": len(diagnosis.repairs),
        "coupling": measure.couplings(training, setting, setting.pairs_of(setting.lowered), seed),
        "changed_by_epoch": changed,
        **_outcome(training),
    }


def _sources(components: Sequence[Component]) -> list[str]:
    """Components of attention, spread over the model: query, value or projection of each block."""
    kinds = ("query", "value", "attention_projection", "attention_context")
    found = [c.name for c in components if c.kind in kinds]
    return found[:: max(1, len(found) // 6)]


@torch.no_grad()
def _disturb_relative(training: Training, component: Component, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    named = dict(training.model.named_parameters())
    for part in component.parts:
        tensor = part.view(named[part.parameter])
        scale = RELATIVE_NOISE * tensor.square().mean().sqrt()
        tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def _seen(
    training: Training, components: Sequence[Component]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns each component's gradient on the probe, and what its module gives for it.

    Both are told by `SKETCH` random projections, the same for all arms: relative distances of
    vectors survive them, and a row stays small.
    """
    gradients = measure.gradients_of(training)
    found = {
        c.name: _sketch(torch.cat([p.view(gradients[p.parameter]).flatten() for p in c.parts]))
        for c in components
    }
    modules = dict(training.model.named_modules())
    outputs: dict[str, Tensor] = {}
    handles = []
    for c in components:
        module = modules.get(c.parts[0].parameter.rpartition(".")[0])
        if module is None or not c.parts[0].parameter.startswith(c.name):
            continue

        def seen(_m: Any, _i: Any, out: Any, name: str = c.name) -> None:
            out = out[0] if isinstance(out, tuple) else out
            data = out.data if hasattr(out, "batch_sizes") else out  # a packed sequence
            outputs[name] = _sketch(data.detach().flatten())

        handles.append(module.register_forward_hook(seen))
    try:
        with measure.evaluating(training.model), torch.no_grad():
            training.loss(training.model, training.probe)
    finally:
        for handle in handles:
            handle.remove()
    return found, outputs


def _sketch(vector: Tensor) -> Tensor:
    """Returns random sums of a vector's elements: a Johnson-Lindenstrauss projection by signs."""
    generator = torch.Generator().manual_seed(vector.numel())
    size = vector.numel()
    bucket = torch.randint(SKETCH, (size,), generator=generator)
    sign = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return torch.zeros(SKETCH, dtype=torch.float64).index_add_(0, bucket, sign * vector.double())


def _changed(
    now: Mapping[str, list[float]], usual: Mapping[str, list[float]], name: str
) -> float | str | None:
    """Returns how far a sketch is from its twin's; None where there is none."""
    if name not in now or name not in usual:
        return None
    return number(float((torch.tensor(now[name]) - torch.tensor(usual[name])).norm()))


def _relative(
    now: Mapping[str, list[float]], usual: Mapping[str, list[float]], name: str
) -> float | str | None:
    """The same as a share of the twin's length."""
    changed = _changed(now, usual, name)
    size = float(torch.tensor(usual.get(name, [0.0])).norm())
    return changed / size if isinstance(changed, float) and size > 0 else None


def _predictors(
    training: Training,
    setting: Setting,
    components: Sequence[Component],
    sources: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Row]]:
    """Returns, before anything is disturbed, what may tell how far a disturbance reaches."""
    gradients = measure.gradients_of(training)
    norms = {
        c.name: math.sqrt(
            sum(float(p.view(gradients[p.parameter]).square().sum()) for p in c.parts)
        )
        for c in components
    }
    depths = measure.depths_of(training)
    depth = {c.name: min(depths[part.parameter] for part in c.parts) for c in components}
    named = {c.name: c for c in components}

    def work(operator: Operator) -> dict[str, dict[str, Row]]:
        generator = torch.Generator().manual_seed(seed)
        gradient = operator.gradient
        rows = {}
        for source in sources:
            parts = named[source].parts
            others = [c for c in components if c.name != source]
            norms_of = coupling_norm(
                operator, parts, others, generator, max_columns=setting.columns
            )
            along = operator.column(parts, gradient)
            rows[source] = {
                other.name: {
                    "coupling": number(norms_of[other.name].value),
                    "along_gradients": number(_inner(operator, other, gradient, along)),
                    "distance": abs(depth[source] - depth[other.name]),
                    "gradient_norm": number(norms[other.name]),
                }
                for other in others
            }
        return rows

    with measure.evaluating(training.model):
        return measure.probe_of(training).measure(work)


def _inner(
    operator: Operator, component: Component, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> float:
    return abs(float(operator.flatten(component.parts, a) @ operator.flatten(component.parts, b)))
