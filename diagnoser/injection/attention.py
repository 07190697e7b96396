"""Mistakes of attention: scale and softmax, how q, k and v are wired, masks, and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from diagnoser.injection.changes import (
    attribute_change,
    clear,
    multiply,
    reinitialize,
    restore,
    restore_masks,
    tie,
    visible_change,
    weigh_change,
    weights_change,
)
from diagnoser.injection.operator import Change, Operator, Place, Remedy, Values
from diagnoser.injection.placing import (
    SCORING,
    Places,
    attention_paths,
    attentions,
    components_in,
    masks,
    only_causal,
    spread,
)
from diagnoser.injection.training import Training
from diagnoser.vocabulary import MODEL

Split = Callable[[Tensor, int], Tensor]


class DroppedScores:
    """`weigh` with dropout on its scores, as active as the module that it belongs to is."""

    def __init__(self, module: nn.Module, weigh: Callable[..., Tensor], share: float) -> None:
        self.module, self.weigh, self.share = module, weigh, share
        self.__qualname__ = f"DroppedScores({share})"

    def __call__(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """As `weigh`."""
        return self.weigh(scores, visible, score_dropout=self.share, training=self.module.training)


def shared_heads(tensor: Tensor, heads: int, *, split: Split, groups: int) -> Tensor:
    """Splits heads, and has those of a group look alike: (batch, heads, length, width)."""
    apart = split(tensor, heads)
    size = heads // groups
    return apart[:, torch.arange(heads) // size * size]


def viewed_heads(tensor: Tensor, heads: int) -> Tensor:
    """Cuts (batch, length, width) into heads without a transpose, so that places get mixed."""
    return tensor.reshape(len(tensor), heads, tensor.shape[1], -1)


def _scale(module: Any) -> float:
    return float(module.weigh.keywords["scale"])


def _scales(module: nn.Module) -> bool:
    """Whether scores are scaled at all; additive attention does not."""
    return _scale(module) != 1.0


def _several_heads(module: nn.Module) -> bool:
    return _scales(module) and int(getattr(module, "heads", 1)) > 1


def _splits(module: nn.Module) -> bool:
    return hasattr(module, "split_heads") and _several_heads(module)


def _drop_scores(module: Any, values: Values) -> DroppedScores:
    return DroppedScores(module, module.weigh, values["share"])


def _share_heads(module: Any, values: Values) -> Split:
    groups = max(module.heads // 2, 1) if values["groups"] == "half" else 1
    return functools.partial(shared_heads, split=module.split_heads, groups=groups)


def _query_and_key(training: Training, path: str) -> tuple[str, str] | None:
    """Paths of the query and the key of an attention module; none where they are one module."""
    queries = components_in(training.components, path, ("query",))
    keys = components_in(training.components, path, ("key",))
    if not queries or not keys or any(p.dim is not None for c in queries for p in c.parts):
        return None
    return queries[0].name, keys[0].name


def _apart(training: Training) -> tuple[Place, ...]:
    found = []
    for path in attention_paths(training):
        pair = _query_and_key(training, path)
        if pair is not None:
            found.append(Place("", (*pair, path), (path,)))
    return spread(found)


def _tie_query_and_key(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    for path in place.modules:
        pair = _query_and_key(training, path)
        if pair is not None:
            query, key = pair
            tie(training, key, query)


def _tied_keys(training: Training, place: Place) -> tuple[str, ...]:
    pairs = [_query_and_key(training, path) for path in place.modules]
    return tuple(
        f"{what}.{pair[1]}.*"
        for pair in pairs
        if pair is not None
        for what in ("parameter", "tied")
    )


def _layers_alike(training: Training) -> tuple[Place, ...]:
    """Pairs of neighbours, as ``first`` and ``last``, the two ends as ``middle``, and all."""
    paths = attention_paths(training)
    if len(paths) < 2 or len({_shapes(training, path) for path in paths}) > 1:
        return ()
    chosen = {"first": paths[:2]}
    if len(paths) > 2:
        chosen |= {"middle": (paths[0], paths[-1]), "last": paths[-2:], "all": paths}
    return tuple(
        Place(
            name,
            (*(c.name for path in tied for c in components_in(training.components, path)), *tied),
            tied,
        )
        for name, tied in chosen.items()
    )


def _shapes(training: Training, path: str) -> tuple[tuple[str, torch.Size], ...]:
    module = training.model.get_submodule(path)
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())


def _tie_layers(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    first, *others = place.modules
    for path in others:
        tie(training, path, first)


def _tied_layers(_: Training, place: Place) -> tuple[str, ...]:
    return tuple(f"{what}.{path}.*" for path in place.modules[1:] for what in ("parameter", "tied"))


def _positions(training: Training) -> tuple[str, ...]:
    """Components that hold positions: the model's own, or an embedding named after them."""
    named = tuple(
        c.name for c in training.components if c.name.split(".")[-1].startswith("position")
    )
    return named if hasattr(training.model, "position_scale") or named else ()


def _positioned(training: Training) -> tuple[Place, ...]:
    """The whole model, where it adds positions to the states."""
    names = _positions(training)
    if not names and not hasattr(training.model, "position_scale"):
        return ()
    return (Place(MODEL, (MODEL, *names), names),)


def _needs_positions(training: Training) -> tuple[Place, ...]:
    """As `_positioned`, unless every mask is causal: such a model can count without them."""
    return () if only_causal(training) else _positioned(training)


def _without_positions(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    _multiply_positions(training, place, 0.0)


def _strong_positions(training: Training, place: Place, values: Values, _: torch.Generator) -> None:
    _multiply_positions(training, place, values["factor"])


def _multiply_positions(training: Training, place: Place, factor: float) -> None:
    model: Any = training.model
    if hasattr(model, "position_scale"):
        model.position_scale *= factor
        return
    for name in place.modules:  # an embedding inside of somebody else's model
        for parameter in training.parameters(name):
            with torch.no_grad():
                parameter.mul_(factor)
            if not factor:
                parameter.requires_grad_(False)


def _scaled_positions(training: Training, place: Place) -> tuple[str, ...]:
    if hasattr(training.model, "position_scale"):
        return ("call.position_scale",)
    return tuple(f"parameter.{name}.*" for name in place.modules)


def _removed_positions(training: Training, place: Place) -> tuple[str, ...]:
    frozen = () if hasattr(training.model, "position_scale") else place.modules
    return (*_scaled_positions(training, place), *(f"requires_grad.{name}.*" for name in frozen))


def _rotary(training: Training) -> tuple[Place, ...]:
    turned = tuple(
        path
        for path in attention_paths(training)
        if hasattr(training.model.get_submodule(path), "inverse_frequencies")
    )
    return (Place("all", (MODEL, *turned), turned),) if turned else ()


def _do_not_turn(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    for path in place.modules:
        training.model.get_buffer(f"{path}.inverse_frequencies").zero_()


def _frequencies(_: Training, place: Place) -> tuple[str, ...]:
    return tuple(f"buffer.{path}.inverse_frequencies" for path in place.modules)


def _decoding_blocks(training: Training) -> frozenset[str]:
    """Paths of the blocks with an attention whose mask hides all later positions."""
    masks_of: dict[str, Tensor] = {}

    def spy(path: str, right: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def weigh(scores: Tensor, visible: Tensor | None) -> Tensor:
            if visible is not None:
                masks_of[path] = visible
            return right(scores, visible)

        return weigh

    held: dict[str, Any] = {p: training.model.get_submodule(p) for p in attention_paths(training)}
    right = {path: module.weigh for path, module in held.items()}
    for path, module in held.items():
        module.weigh = spy(path, module.weigh)
    try:
        few = {name: tensor[:2] for name, tensor in training.subject.data().train.items()}
        with torch.no_grad():
            training.subject.predict(training.model, few)
    finally:
        for path, module in held.items():
            module.weigh = right[path]
    return frozenset(
        path.rpartition(".")[0]
        for path, mask in masks_of.items()
        if mask.shape[-2] == mask.shape[-1] > 1 and not bool(mask.triu(1).any())
    )


def _undoable(find: Places) -> Places:
    """Places where a leak of later positions can be undone for scoring, or is none.

    That is everywhere in a model without causal masks and in one with nothing else. Where there is
    a decoder beside an encoder it is in the encoder: what mixes the positions of the decoder, in
    its attention to itself or to the encoder, is not undone.
    """

    def found(training: Training) -> tuple[Place, ...]:
        candidates = find(training)
        if not candidates or only_causal(training) or not masks(causal=True)(training):
            return candidates
        decoding = _decoding_blocks(training)
        return tuple(
            place
            for place in candidates
            if decoding.isdisjoint(path.rpartition(".")[0] for path in place.modules)
        )

    return found


def _padding_matters(training: Training) -> tuple[Place, ...]:
    """The whole model, where padding could be seen: before a causal mask it always comes later."""
    return () if only_causal(training) else masks(padded=True)(training)


def _plain_encoder(training: Training) -> tuple[Place, ...]:
    return () if masks(causal=True)(training) else masks(causal=False)(training)


def _over(axis: int) -> Change:
    """The softmax over another axis; with a causal mask that lets later positions through."""
    return attribute_change(
        "weigh", lambda module, _: functools.partial(module.weigh, axis=axis), leak=True
    )


MASKED: Final = masks()


def _of_mask(
    id: str,
    name: str,
    summary: str,
    options: Mapping[str, Any],
    *,
    places: Places = MASKED,
    causal: bool | None = None,
    faults: tuple[str, ...] = ("program_defect",),
    remedies: tuple[Remedy, ...] = (),
    leak: bool = False,
    gradients: Literal["Y", "P", "N"] = "N",
) -> Operator:
    """A mistake in the model's masks, at one severity."""
    return Operator(
        id=id,
        name=name,
        summary=summary,
        change=visible_change(options, causal=causal, leak=leak),
        places=places,
        severities={"high": {}},
        faults=faults,
        causes=("attention_mask",),
        remedies=remedies,
        gradients=gradients,
        attention="Y",
    )


SCALE: Final[tuple[Operator, ...]] = (
    Operator(
        id="S1",
        name="no-scale",
        summary="Attention scores are not divided by the root of the head's width.",
        change=weigh_change(lambda module, values: {"scale": _scale(module) ** values["power"]}),
        places=attentions(SCORING, suits=_scales),
        severities={"high": {"power": 0.0}, "extreme": {"power": -1.0}},
        faults=("attention_entropy_collapse", "attention_logit_growth"),
        causes=("attention_scale",),
        remedies=(restore("temper_attention", "weigh"),),
        defect=False,
        gradients="P",
        attention="Y",
        curvature="P",
    ),
    Operator(
        id="S2",
        name="scale-of-model-width",
        summary="Attention scores are divided by the root of the model's width, not the head's.",
        change=weigh_change(
            lambda module, _: {"scale": _scale(module) * float(module.heads) ** -0.5}
        ),
        places=attentions(SCORING, suits=_several_heads),
        severities={"high": {}},
        faults=("uniform_attention",),
        causes=("attention_scale",),
        defect=False,
        attention="Y",
    ),
    Operator(
        id="S3",
        name="scale-twice",
        summary="Attention scores are scaled in two places.",
        change=weigh_change(lambda module, _: {"scale": _scale(module) ** 2}),
        places=attentions(SCORING, suits=_scales),
        severities={"high": {}},
        faults=("uniform_attention",),
        causes=("attention_scale",),
        defect=False,
        attention="Y",
    ),
    Operator(
        id="S4",
        name="scale-after-softmax",
        summary="The scale multiplies the attention weights and not the scores.",
        change=weigh_change(lambda module, _: {"scale": 1.0, "scale_afterwards": _scale(module)}),
        places=attentions(SCORING, suits=_scales),
        severities={"high": {}},
        faults=("program_defect", "attention_entropy_collapse"),
        causes=("attention_scale",),
        attention="Y",
    ),
    Operator(
        id="S5",
        name="temperature-too-small",
        summary="Attention scores are divided by a temperature far below one.",
        change=weigh_change(
            lambda module, values: {"scale": _scale(module) / values["temperature"]}
        ),
        places=attentions(SCORING),
        severities={
            "low": {"temperature": 0.2},
            "mid": {"temperature": 0.05},
            "high": {"temperature": 0.01},
            "extreme": {"temperature": 0.002},
        },
        faults=("attention_entropy_collapse", "attention_logit_growth", "vanishing_gradient"),
        causes=("attention_scale",),
        remedies=(restore("temper_attention", "weigh"),),
        defect=False,
        gradients="P",
        attention="Y",
        curvature="+",
    ),
    Operator(
        id="S6a",
        name="softmax-over-queries",
        summary="The softmax runs over the queries, so that columns sum to one.",
        change=_over(-2),
        places=_undoable(attentions(SCORING)),
        severities={"high": {}},
        faults=("program_defect", "uniform_attention", "target_leak"),
        causes=("softmax_axis",),
        attention="Y",
    ),
    Operator(
        id="S6b",
        name="softmax-over-heads",
        summary="The softmax runs over the heads.",
        change=_over(-3),
        places=_undoable(attentions(SCORING, suits=_several_heads)),
        severities={"high": {}},
        faults=("program_defect", "uniform_attention", "target_leak"),
        causes=("softmax_axis",),
        attention="Y",
    ),
    Operator(
        id="S7",
        name="dropout-before-softmax",
        summary="Dropout sets attention scores to zero, before the softmax and not after it.",
        change=attribute_change("weigh", _drop_scores),
        places=attentions(SCORING),
        severities={
            "low": {"share": 0.1},
            "mid": {"share": 0.3},
            "high": {"share": 0.5},
            "extreme": {"share": 0.9},
        },
        faults=("program_defect", "oscillating_loss"),
        causes=("attention_wiring",),
        gradients="P",
        attention="P",
    ),
)

WIRING: Final[tuple[Operator, ...]] = (
    Operator(
        id="Q1",
        name="scores-start-large",
        summary="The weights that score attention start many times too large.",
        change=weights_change(SCORING, multiply),
        places=attentions(SCORING),
        severities={
            "low": {"gain": 4.0},
            "mid": {"gain": 12.0},
            "high": {"gain": 40.0},
            "extreme": {"gain": 200.0},
        },
        faults=("attention_entropy_collapse", "attention_logit_growth", "sharpness_instability"),
        causes=("initialization",),
        remedies=(
            reinitialize(SCORING),
            Remedy(
                "temper_attention",
                weigh_change(
                    lambda module, values: {"scale": _scale(module) / values["gain"] ** 2}
                ),
            ),
        ),
        defect=False,
        gradients="P",
        attention="Y",
        curvature="+",
    ),
    Operator(
        id="Q2",
        name="query-and-key-zero",
        summary="Both factors of the attention scores start at zero and stay at that saddle.",
        change=weights_change(SCORING, clear),
        places=attentions(SCORING),
        severities={"high": {}},
        faults=("concave_region", "dead_component", "uniform_attention"),
        causes=("initialization",),
        remedies=(reinitialize(SCORING),),
        gradients="N",
        attention="Y",
        curvature="+",
    ),
    Operator(
        id="Q3",
        name="value-and-output-zero",
        summary="Both factors of what attention adds start at zero and stay at that saddle.",
        change=weights_change(("value", "attention_output"), clear),
        places=attentions(("value", "attention_output")),
        severities={"high": {}},
        faults=("concave_region", "dead_component"),
        causes=("initialization",),
        remedies=(reinitialize(("value", "attention_output")),),
        gradients="N",
        curvature="+",
    ),
    Operator(
        id="Q4",
        name="query-is-key",
        summary="Query and key share one weight unintentionally.",
        change=Change("model", _tie_query_and_key, _tied_keys),
        places=_apart,
        severities={"high": {}},
        faults=("coupled_components", "program_defect"),
        causes=("attention_wiring",),
        attention="P",
        curvature="+",
    ),
    Operator(
        id="Q5",
        name="heads-alike",
        summary="Several heads use the projections of one.",
        change=attribute_change("split_heads", _share_heads),
        places=attentions(suits=_splits),
        severities={"mid": {"groups": "half"}, "high": {"groups": "all"}},
        faults=("program_defect",),
        causes=("attention_wiring",),
        attention="Y",
        curvature="P",
    ),
    Operator(
        id="Q6",
        name="heads-viewed",
        summary="Heads are cut by a view without the transpose, which mixes places.",
        change=attribute_change("split_heads", lambda _, __: viewed_heads, leak=True),
        places=_undoable(attentions(suits=_splits)),
        severities={"high": {}},
        faults=("program_defect",),
        causes=("attention_wiring",),
        attention="N",
    ),
    Operator(
        id="Q8",
        name="layers-alike",
        summary="The attention of several layers shares its weights unintentionally.",
        change=Change("model", _tie_layers, _tied_layers),
        places=_layers_alike,
        severities={"high": {}},
        faults=("coupled_components", "program_defect"),
        causes=("attention_wiring",),
        gradients="P",
        curvature="+",
    ),
)

MASKS: Final[tuple[Operator, ...]] = (
    _of_mask(
        "M1",
        "padding-seen",
        "Padding is not hidden from attention.",
        {"padding": False},
        places=_padding_matters,
    ),
    _of_mask(
        "M2",
        "mask-inverted",
        "What may be seen and what may not change places in the mask.",
        {"inverted": True},
        leak=True,
        faults=("program_defect", "target_leak"),
        gradients="P",
    ),
    _of_mask(
        "M3",
        "mask-on-queries",
        "The padding mask is laid on the queries and not on the keys.",
        {"padding_axis": -2},
        places=_padding_matters,
    ),
    _of_mask(
        "M4",
        "mask-empty",
        "The mask hides everything from everybody.",
        {"nothing": True},
        leak=True,
        faults=("program_defect", "uniform_attention"),
        remedies=(Remedy("fix_attention_mask", restore_masks()),),
    ),
    Operator(
        id="M5",
        name="causal-leak",
        summary="The causal mask lets a position see later ones, its target among them.",
        change=visible_change({}, causal=True, leak=True),
        places=masks(causal=True),
        severities={"low": {"ahead": 1}, "mid": {"ahead": 3}, "high": {"ahead": 10_000}},
        faults=("target_leak", "program_defect"),
        causes=("attention_mask",),
        attention="Y",
    ),
    _of_mask(
        "M6",
        "causal-encoder",
        "An encoder has a causal mask, and sees half of its context.",
        {"causal": True},
        places=_plain_encoder,
        causal=False,
    ),
)

POSITIONS: Final[tuple[Operator, ...]] = (
    Operator(
        id="P1",
        name="no-positions",
        summary="Positions are not added to the states of a model that needs them.",
        change=Change("model", _without_positions, _removed_positions),
        places=_needs_positions,
        severities={"high": {}},
        faults=("program_defect", "slow_convergence"),
        causes=("positional_encoding",),
        attention="N",
    ),
    Operator(
        id="P2",
        name="positions-too-strong",
        summary="Positions are many times as large as what they are added to.",
        change=Change("model", _strong_positions, _scaled_positions),
        places=_positioned,
        severities={
            "mid": {"factor": 10.0},
            "high": {"factor": 30.0},
            "extreme": {"factor": 100.0},
        },
        faults=("attention_logit_growth", "attention_entropy_collapse"),
        causes=("positional_encoding",),
        defect=False,
        gradients="P",
        attention="Y",
        curvature="P",
    ),
    Operator(
        id="P3",
        name="rotary-zero",
        summary="The buffer of rotary frequencies is zero, so that nothing is turned.",
        change=Change("model", _do_not_turn, _frequencies),
        places=_rotary,
        severities={"high": {}},
        faults=("program_defect", "slow_convergence"),
        causes=("positional_encoding",),
        attention="N",
    ),
)

ATTENTION: Final = (*SCALE, *WIRING, *MASKS, *POSITIONS)
