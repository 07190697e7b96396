"""Healthy trainings that look strange: no tool may call them faulty.

``HC2`` are other recipes, as good as the first; ``HC3`` trains at the edge of what is healthy;
``HC4`` does something odd for which there are good reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from diagnoser.injection.changes import (
    clear,
    multiply,
    set_module,
    settings_change,
    weigh_change,
    weights_change,
)
from diagnoser.injection.operator import Change, Operator, Place, Values
from diagnoser.injection.placing import (
    WHOLE_MODEL,
    Places,
    anywhere,
    attention_paths,
    block_paths,
    classifies,
    components_in,
    only_causal,
    where,
)
from diagnoser.injection.training import TARGETS, Settings, Training
from diagnoser.vocabulary import MODEL

Set = Literal["HC2", "HC3", "HC4"]

FEW, GENTLE = 512, 0.1  # samples of full-batch gradient descent, and its learning rate
RARE = 5  # one of so many samples of the rare class is kept


class ScaledLinear(nn.Linear):
    """A linear map with a factor on what it gives."""

    def __init__(self, linear: nn.Linear, factor: float) -> None:
        super().__init__(1, 1, bias=linear.bias is not None)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return super().forward(input) * self.factor


def _control(
    id: str, control_set: Set, name: str, summary: str, change: Change, places: Places = anywhere
) -> Operator:
    return Operator(
        id=id,
        name=name,
        summary=summary,
        change=change,
        places=places,
        severities={"high": {}},
        defect=False,
        control_set=control_set,
    )


def _set(**values: Any) -> Change:
    return settings_change(*values, to=lambda _, __, ___: values)


def _times(field: str, factor: float, kind: Callable[[float], float] = float) -> Change:
    return settings_change(
        field, to=lambda settings, _, __: {field: kind(getattr(settings, field) * factor)}
    )


def _tiny_batch(settings: Settings, _: Place, __: Values) -> Mapping[str, Any]:
    rate = 0.5 * settings.learning_rate
    return {"batch_size": 4, "steps": 8 * settings.steps, "learning_rate": rate}


def _wider(sign: int) -> Change:
    """Two more or fewer for each head, so that halves stay whole."""
    return settings_change(
        "width",
        to=lambda settings, _, __: {"width": settings.width + sign * 2 * settings.heads},
    )


def _scale_matrices(factor: float) -> Change:
    def apply(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
        with torch.no_grad():
            for _name, parameter in _matrices(training):
                parameter.mul_(factor)

    def touches(training: Training, _: Place) -> tuple[str, ...]:
        return tuple(f"parameter.{name}" for name, _parameter in _matrices(training))

    return Change("model", apply, touches)


def _matrices(training: Training) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in training.model.named_parameters() if p.ndim > 1]


def _full_batch(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    training.settings = replace(
        training.settings,
        optimizer="sgd",
        momentum=0.0,
        batch_size=FEW,
        learning_rate=GENTLE,
    )
    train = {name: tensor[:FEW] for name, tensor in training.data.train.items()}
    training.data = replace(training.data, train=train)


def _full_batch_touches(_: Training, __: Place) -> tuple[str, ...]:
    fields = ("optimizer", "momentum", "batch_size", "learning_rate")
    return (*(f"settings.{field}" for field in fields), "data.train.*")


def _scale_of(module: Any) -> float:
    return float(module.weigh.keywords["scale"])


def _apart(training: Training) -> tuple[Place, ...]:
    """All attention whose query and key are linear maps of their own, and which scales scores."""
    found = [
        path
        for path in _scaled_attention(training)
        if all(
            len(parts := components_in(training.components, path, (kind,))) == 1
            and isinstance(training.model.get_submodule(parts[0].name.split("[")[0]), nn.Linear)
            and "[" not in parts[0].name
            for kind in ("query", "key")
        )
    ]
    return (Place("all", (MODEL,), tuple(found)),) if found else ()


def _scaled_attention(training: Training) -> tuple[str, ...]:
    return tuple(
        path
        for path in attention_paths(training)
        if _scale_of(training.model.get_submodule(path)) != 1.0
    )


def _scaled(training: Training) -> tuple[Place, ...]:
    found = _scaled_attention(training)
    return (Place("all", (MODEL,), found),) if found else ()


def _scale_inside(powers: Mapping[str, float]) -> Change:
    """Scales query or key (by a power of the scale each) and no longer their product."""

    def apply(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
        for path in place.modules:
            module: Any = training.model.get_submodule(path)
            scale = _scale_of(module)
            for kind, power in powers.items():
                name = components_in(training.components, path, (kind,))[0].name
                linear = training.model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                set_module(training.model, name, ScaledLinear(linear, scale**power))
        weigh_change(lambda _, __: {"scale": 1.0}).apply(training, place, {}, _no_numbers())

    def touches(training: Training, place: Place) -> tuple[str, ...]:
        found = []
        for path in place.modules:
            found.append(f"call.{path}.weigh")
            for kind in powers:
                name = components_in(training.components, path, (kind,))[0].name
                found += [f"module.{name}", f"call.{name}.factor"]
        return tuple(found)

    return Change("model", apply, touches)


def _scale_in_weights(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    for path in place.modules:
        module: Any = training.model.get_submodule(path)
        one = Place("", (), (path,))
        weights_change(("query",), multiply).apply(
            training, one, {"gain": _scale_of(module)}, _no_numbers()
        )
    weigh_change(lambda _, __: {"scale": 1.0}).apply(training, place, {}, _no_numbers())


def _scale_in_weights_touches(training: Training, place: Place) -> tuple[str, ...]:
    queries = weights_change(("query",), multiply).touches(training, place)
    return (*queries, *(f"call.{path}.weigh" for path in place.modules))


def _no_numbers() -> torch.Generator:
    return torch.Generator()


def _attention_outputs(training: Training) -> tuple[Place, ...]:
    paths = tuple(
        path
        for path in attention_paths(training)
        if components_in(training.components, path, ("attention_output",))
    )
    return (Place("all", (MODEL,), paths),) if paths else ()


def _norms(training: Training) -> tuple[Place, ...]:
    paths = tuple(
        path
        for path in block_paths(training)
        if components_in(training.components, path, ("norm",))
    )
    return (Place("all", (MODEL,), paths),) if paths else ()


def _embeddings(training: Training) -> tuple[Place, ...]:
    """What tokens, pixels and positions become states with."""
    names = tuple(
        c.name
        for c in training.components
        if c.kind == "embedding" or c.name in ("embedding", "stem")
    )
    return (Place(MODEL, (MODEL,), names),) if names else ()


def _tieable(training: Training) -> tuple[Place, ...]:
    embedding = getattr(training.model, "embedding", None)
    head = getattr(training.model, "head", None)
    fits = (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and embedding.weight.shape == head.weight.shape
    )
    return WHOLE_MODEL if fits else ()


def _tie_head(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    model: Any = training.model
    model.head.weight = model.embedding.weight


def _one_class_each(training: Training) -> tuple[Place, ...]:
    return classifies(training) if training.subject.data().train[TARGETS].ndim == 1 else ()


def _imbalance(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    """Keeps one of `RARE` training samples of the last class."""
    train = training.data.train
    rare = train[TARGETS] == train[TARGETS].max()
    kept = ~rare | (rare.cumsum(0) % RARE == 0)
    chosen = {name: tensor[kept] for name, tensor in train.items()}
    training.data = replace(training.data, train=chosen)


def _counts_without_positions(training: Training) -> tuple[Place, ...]:
    """A decoder: with causal masks alone, a model can count without positions."""
    adds = hasattr(training.model, "position_scale")
    return WHOLE_MODEL if adds and only_causal(training) else ()


def _no_positions(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    model: Any = training.model
    model.position_scale = 0.0


def _names(*names: str) -> Callable[[Training, Place], tuple[str, ...]]:
    return lambda _, __: names


def _layered(training: Training) -> tuple[Place, ...]:
    return WHOLE_MODEL if block_paths(training) else ()


RECIPES: Final[tuple[Operator, ...]] = (
    _control(
        "R1", "HC2", "half-learning-rate", "Half the learning rate.", _times("learning_rate", 0.5)
    ),
    _control(
        "R2",
        "HC2",
        "double-learning-rate",
        "Twice the learning rate.",
        _times("learning_rate", 2.0),
    ),
    _control("R3", "HC2", "half-batch", "Half the batch.", _times("batch_size", 0.5, int)),
    _control("R4", "HC2", "double-batch", "Twice the batch.", _times("batch_size", 2.0, int)),
    _control(
        "R5",
        "HC2",
        "no-weight-decay",
        "No weight decay.",
        _set(weight_decay=0.0),
        where(lambda settings: settings.weight_decay != 0.0),
    ),
    _control(
        "R6",
        "HC2",
        "some-weight-decay",
        "A weight decay of 0.05.",
        _set(weight_decay=0.05),
        where(lambda s: s.optimizer == "adamw" and s.weight_decay != 0.05),
    ),
    _control(
        "R7",
        "HC2",
        "deeper",
        "One more block.",
        settings_change("depth", to=lambda settings, _, __: {"depth": settings.depth + 1}),
        _layered,
    ),
    _control("R8", "HC2", "narrower", "A smaller width.", _wider(-1)),
    _control("R9", "HC2", "wider", "A larger width.", _wider(1)),
    _control(
        "R10",
        "HC2",
        "smaller-start",
        "Initial weights of 0.8 times the size.",
        _scale_matrices(0.8),
    ),
    _control(
        "R11", "HC2", "larger-start", "Initial weights of 1.2 times the size.", _scale_matrices(1.2)
    ),
)

EDGES: Final[tuple[Operator, ...]] = (
    _control(
        "G1", "HC3", "largest-learning-rate", "About the largest learning rate that does no harm.",
        _times("learning_rate", 2.5),
    ),
    _control(
        "G2", "HC3", "full-batch-descent", "Gradient descent on all of a few samples.",
        Change("data", _full_batch, _full_batch_touches),
        where(lambda settings: settings.optimizer != "sgd"),
    ),
    _control(
        "G3", "HC3", "long-tail", "Half as long again, with a tail of tiny learning rates.",
        _times("steps", 1.5, int), where(lambda settings: settings.schedule == "cosine"),
    ),
    _control(
        "G4", "HC3", "no-schedule", "A constant learning rate after the warmup.",
        _set(schedule="constant"), where(lambda settings: settings.schedule == "cosine"),
    ),
)  # fmt: skip

ODDITIES: Final[tuple[Operator, ...]] = (
    _control(
        "V1", "HC4", "scale-on-both", "Query and key are scaled, each by the root of the scale.",
        _scale_inside({"query": 0.5, "key": 0.5}), _apart,
    ),
    _control(
        "V2", "HC4", "scale-on-query", "The query is scaled, before the product.",
        _scale_inside({"query": 1.0}), _apart,
    ),
    _control(
        "V3", "HC4", "scale-in-weights", "Scores are not scaled; the query starts smaller (T5).",
        Change("model", _scale_in_weights, _scale_in_weights_touches), _scaled,
    ),
    _control(
        "V4", "HC4", "zero-attention-output", "The output of attention starts at zero (Fixup).",
        weights_change(("attention_output",), clear), _attention_outputs,
    ),
    _control(
        "V5", "HC4", "frozen-embedding", "Embeddings are frozen on purpose.",
        settings_change("frozen", to=lambda _, place, __: {"frozen": place.modules}), _embeddings,
    ),
    _control(
        "V6", "HC4", "tied-head", "The head has the weights of the embedding.",
        Change("model", _tie_head, _names("parameter.head.weight", "tied.head.weight")), _tieable,
    ),
    _control(
        "V7", "HC4", "label-smoothing", "Labels are smoothed by 0.1.",
        _set(label_smoothing=0.1), classifies,
    ),
    _control(
        "V8", "HC4", "tiny-batch", "Batches of four samples, in more and smaller steps.",
        settings_change("batch_size", "steps", "learning_rate", to=_tiny_batch),
    ),
    _control("V9", "HC4", "dropout", "A dropout of 0.1.", _set(dropout=0.1)),
    _control(
        "V10", "HC4", "rare-class", "One class is rare in training.",
        Change("data", _imbalance, _names("data.train.*")), _one_class_each,
    ),
    _control(
        "V11", "HC4", "norms-below-one", "The gains of norms start at 0.9.",
        weights_change(("norm",), lambda tensor, _: tensor.mul_(0.9)), _norms,
    ),
    _control(
        "V12", "HC4", "no-positions-decoder", "A decoder without positions (Haviv et al. 2022).",
        Change("model", _no_positions, _names("call.position_scale")), _counts_without_positions,
    ),
)  # fmt: skip

ALL_CONTROLS: Final = (*RECIPES, *EDGES, *ODDITIES)
