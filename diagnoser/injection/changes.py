"""The ways in which operators change a training: its settings, its weights, what modules hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.components import parameters_of
from diagnoser.injection.operator import Change, Place, Remedy, Values
from diagnoser.injection.placing import components_in, mask_names, only_causal
from diagnoser.injection.training import Settings, Training
from diagnoser.types import Part
from diagnoser.vocabulary import MODEL

Fill = Callable[[Tensor, Values], object]  # changes a tensor in place


def settings_change(
    *fields: str, to: Callable[[Settings, Place, Values], Mapping[str, Any]]
) -> Change:
    """Sets fields of the settings."""

    def apply(training: Training, place: Place, values: Values, _: torch.Generator) -> None:
        training.settings = replace(training.settings, **to(training.settings, place, values))

    def touches(_: Training, __: Place) -> tuple[str, ...]:
        return tuple(f"settings.{field}" for field in fields)

    return Change("settings", apply, touches)


def local_components(place: Place) -> tuple[str, ...]:
    """The components of a place without the modules that hold them."""
    return tuple(name for name in place.components if name not in place.modules)


def weights_change(kinds: Sequence[str], fill: Fill, *, biases: bool = True) -> Change:
    """Changes the weights of the components of some kinds, in the modules of the place."""

    def apply(training: Training, place: Place, values: Values, _: torch.Generator) -> None:
        named = parameters_of({MODEL: training.model})
        with torch.no_grad():
            for part in _parts(training, place, kinds):
                if biases or named[part.parameter].ndim > 1:
                    fill(part.view(named[part.parameter]), values)

    return Change("model", apply, functools.partial(_weights_touched, kinds=kinds))


def multiply(tensor: Tensor, values: Values) -> None:
    """Multiplies by the severity's ``gain``."""
    tensor.mul_(values["gain"])


def clear(tensor: Tensor, _: Values) -> None:
    """Sets to zero."""
    tensor.zero_()


def reinitialize(kinds: Sequence[str]) -> Remedy:
    """Draws the weights anew, as the model's author does, from the operator's own numbers."""

    def apply(training: Training, place: Place, _: Values, generator: torch.Generator) -> None:
        named = parameters_of({MODEL: training.model})
        drawn = parameters_of({MODEL: fresh_model(training, generator)})
        with torch.no_grad():
            for part in _parts(training, place, kinds):
                part.view(named[part.parameter]).copy_(part.view(drawn[part.parameter]))

    touches = functools.partial(_weights_touched, kinds=kinds)
    return Remedy("reinitialize", Change("model", apply, touches))


def fresh_model(training: Training, generator: torch.Generator) -> nn.Module:
    """Builds the model once more, and leaves torch's random numbers as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return training.subject.build(training.settings)


def weigh_change(options: Callable[[Any, Values], Mapping[str, Any]]) -> Change:
    """Sets options of `weigh`, made of the attention module and the severity, at the place."""

    def apply(training: Training, place: Place, values: Values, _: torch.Generator) -> None:
        for path in place.modules:
            module: Any = training.model.get_submodule(path)
            module.weigh = functools.partial(module.weigh, **options(module, values))

    return Change("model", apply, held("weigh"))


def visible_change(
    options: Mapping[str, Any], *, causal: bool | None = None, leak: bool = False
) -> Change:
    """Sets options of the model's masks.

    Args:
        options: See `visible`; a severity's values come on top.
        causal: Which masks: the causal ones, the others, or (None) all.
        leak: Whether it lets a position see later ones where a mask is causal; there it is undone
            for scoring, or a model that reads its targets would seem to be a good one.
    """

    def apply(training: Training, _: Place, values: Values, __: torch.Generator) -> None:
        for name in mask_names(training, causal=causal):
            right = getattr(training.model, name)
            setattr(training.model, name, functools.partial(right, **{**options, **values}))
            if leak and right.keywords["causal"]:
                training.corrections.append(functools.partial(setattr, training.model, name, right))

    return Change("model", apply, functools.partial(_masks_touched, causal=causal))


def restore_masks() -> Change:
    """Gives the model the masks back that its author had it hold."""

    def apply(training: Training, _: Place, __: Values, generator: torch.Generator) -> None:
        right = fresh_model(training, generator)
        for name in mask_names(training):
            setattr(training.model, name, getattr(right, name))

    return Change("model", apply, _masks_touched)


def attribute_change(
    attribute: str, make: Callable[[Any, Values], Any], *, leak: bool = False
) -> Change:
    """Replaces what the modules of the place hold under a name; ``make`` is given a module.

    ``leak`` as in `visible_change`, for models whose masks are all causal.
    """

    def apply(training: Training, place: Place, values: Values, _: torch.Generator) -> None:
        for path in place.modules:
            module = training.model.get_submodule(path)
            if leak and only_causal(training):
                right = getattr(module, attribute)
                training.corrections.append(functools.partial(setattr, module, attribute, right))
            setattr(module, attribute, make(module, values))

    return Change("model", apply, held(attribute))


def restore(name: str, attribute: str) -> Remedy:
    """Gives the modules of the place back what their author had them hold under a name."""

    def apply(training: Training, place: Place, _: Values, generator: torch.Generator) -> None:
        right = fresh_model(training, generator)
        for path in place.modules:
            module = training.model.get_submodule(path)
            setattr(module, attribute, getattr(right.get_submodule(path), attribute))

    return Remedy(name, Change("model", apply, held(attribute)))


def held(attribute: str) -> Callable[[Training, Place], tuple[str, ...]]:
    """What modules of the place hold under a name, as `checking.snapshot` calls it.

    One pattern covers a function and a module (with what that holds in turn).
    """
    return lambda _, place: tuple(f"*.{path}.{attribute}*" for path in place.modules)


def tie(training: Training, module: str, to: str) -> None:
    """Gives a module the parameters of another one of the same shape."""
    source = training.model.get_submodule(to)
    for name, parameter in list(source.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        target = training.model.get_submodule(module).get_submodule(owner)
        setattr(target, leaf, parameter)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def rebuild(training: Training, path: str) -> None:
    """Makes a module anew with the same numbers, as moving or preparing a model may."""
    set_module(training.model, path, copy.deepcopy(training.model.get_submodule(path)))


def _masks_touched(training: Training, _: Place, *, causal: bool | None = None) -> tuple[str, ...]:
    return tuple(f"call.{name}" for name in mask_names(training, causal=causal))


def _parts(training: Training, place: Place, kinds: Sequence[str]) -> list[Part]:
    components = training.components
    return [
        part
        for module in place.modules
        for component in components_in(components, module, kinds)
        for part in component.parts
    ]


def _weights_touched(training: Training, place: Place, *, kinds: Sequence[str]) -> tuple[str, ...]:
    """One pattern a module, for a bias that is zero already does not change."""
    parents = (part.parameter.rpartition(".")[0] for part in _parts(training, place, kinds))
    return tuple(f"parameter.{parent}.*" for parent in dict.fromkeys(parents))
