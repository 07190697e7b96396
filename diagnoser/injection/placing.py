"""Where in a model a mistake can be made.

An operator finds its places by what modules hold (`weigh`, `residual`, a norm), never by the name
of a model, so that it applies to an architecture it was not written for. Local places are the
first, the middle and the last of their kind, in the order of definition, and all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

from torch import nn

from diagnoser.injection.operator import Place
from diagnoser.injection.training import TARGETS, Settings, Training
from diagnoser.injection.weighing import visible
from diagnoser.types import Component
from diagnoser.vocabulary import MODEL

Places = Callable[[Training], tuple[Place, ...]]

WHOLE_MODEL: Final = (Place(MODEL, (MODEL,)),)
SCORING: Final = ("query", "key", "attention_projection", "attention_context")
ATTENDING: Final = (*SCORING, "value", "attention_output")
PADDING: Final = 0  # the token that stands where there is none


def anywhere(_: Training) -> tuple[Place, ...]:
    """The whole model, whatever it is."""
    return WHOLE_MODEL


def where(holds: Callable[[Settings], bool]) -> Places:
    """The whole model, where its settings fulfil a condition."""
    return lambda training: WHOLE_MODEL if holds(training.settings) else ()


def attention_paths(training: Training) -> tuple[str, ...]:
    """Paths of the attention modules, in the order of definition."""
    return tuple(
        path for path, module in training.model.named_modules() if hasattr(module, "weigh")
    )


def block_paths(training: Training) -> tuple[str, ...]:
    """Paths of the blocks, the modules that hold attention; the model itself is none."""
    parents = (path.rpartition(".")[0] for path in attention_paths(training))
    return tuple(dict.fromkeys(parent for parent in parents if parent))


def components_in(
    components: Sequence[Component], module: str, kinds: Sequence[str] = (), *, whole: bool = False
) -> tuple[Component, ...]:
    """Returns the components below a module.

    Args:
        components: Those of the model.
        module: Module path.
        kinds: Kinds to keep; none: all.
        whole: Also those that share a parameter with one that is kept (fused projections).
    """
    below = [c for c in components if c.name.startswith(f"{module}.")]
    kept = [c for c in below if not kinds or c.kind in kinds]
    if whole:
        names = {part.parameter for c in kept for part in c.parts}
        kept = [c for c in below if any(part.parameter in names for part in c.parts)]
    return tuple(kept)


def spread(candidates: Sequence[Place]) -> tuple[Place, ...]:
    """Names places first, middle (of three or more) and last, and adds all of them (of two)."""
    count = len(candidates)
    if not count:
        return ()
    chosen = {"first": candidates[0]}
    if count > 2:
        chosen["middle"] = candidates[count // 2]
    if count > 1:
        chosen["last"] = candidates[-1]
        chosen["all"] = Place(
            "all",
            tuple(name for place in candidates for name in place.components),
            tuple(path for place in candidates for path in place.modules),
        )
    return tuple(Place(name, at.components, at.modules) for name, at in chosen.items())


def attentions(
    kinds: Sequence[str] = (),
    *,
    whole: bool = False,
    suits: Callable[[nn.Module], bool] = lambda _: True,
) -> Places:
    """Attention modules that suit and have components of the kinds (none named: all kinds).

    What a diagnosis may name is a component of the kinds, or the attention module.
    """

    def find(training: Training) -> tuple[Place, ...]:
        found, of_model = [], training.components
        for path in attention_paths(training):
            components = components_in(of_model, path, kinds or ATTENDING, whole=whole)
            if components and suits(training.model.get_submodule(path)):
                names = tuple(component.name for component in components)
                found.append(Place("", (*names, path), (path,)))
        return spread(found)

    return find


def blocks(kinds: Sequence[str], suits: Callable[[nn.Module], bool] = lambda _: True) -> Places:
    """Blocks that suit and have components of the kinds."""

    def find(training: Training) -> tuple[Place, ...]:
        found, of_model = [], training.components
        for path in block_paths(training):
            components = components_in(of_model, path, kinds)
            if components and suits(training.model.get_submodule(path)):
                names = tuple(component.name for component in components)
                found.append(Place("", (*names, path), (path,)))
        return spread(found)

    return find


def mask_names(training: Training, *, causal: bool | None = None) -> tuple[str, ...]:
    """Names of the model's masks, of a causal one or another where that is asked."""
    return tuple(
        name
        for name, held in vars(training.model).items()
        if isinstance(held, functools.partial)
        and held.func is visible
        and causal in (None, held.keywords["causal"])
    )


def only_causal(training: Training) -> bool:
    """Whether the model has masks and all are causal, so that nothing sees a later position."""
    causal = mask_names(training, causal=True)
    return bool(causal) and causal == mask_names(training)


def masks(*, causal: bool | None = None, padded: bool = False) -> Places:
    """The whole model, where it has such a mask and, if asked, its samples are padded."""

    def find(training: Training) -> tuple[Place, ...]:
        if not mask_names(training, causal=causal) or (padded and not pads(training)):
            return ()
        everywhere = tuple(attention_paths(training))
        return (Place(MODEL, (MODEL, *everywhere)),)

    return find


def pads(training: Training) -> bool:
    """Whether some training samples hold padding."""
    train = training.subject.data().train
    return "tokens" in train and bool((train["tokens"] == PADDING).any())


def classifies(training: Training) -> tuple[Place, ...]:
    """The whole model, where its targets are classes."""
    targets = training.subject.data().train[TARGETS]
    return () if targets.is_floating_point() else WHOLE_MODEL
