"""Splits models into named components, each with a kind.

A component is what is diagnosed: one projection, one recurrent layer, one norm. Every element of
every parameter belongs to exactly one component, the first that is met in the order of definition
(the order of ``named_modules()``); so tied parameters and repeated modules count once.

`sites` walks through a model, `spelling` reads names and shapes, `kinds` holds the table of
recognisers: a new kind is a new entry there. `heads` cuts further, on request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from diagnoser.components.heads import by_head, head_of
from diagnoser.components.kinds import Piece, recognise
from diagnoser.components.sites import Site, sites
from diagnoser.types import Component, Part
from diagnoser.vocabulary import MODEL

__all__ = ["free_component", "head_of", "layers_of", "parameters_of", "split_components"]


def split_components(
    models: Mapping[str, nn.Module], *, heads: bool = False
) -> tuple[Component, ...]:
    """Splits one or several models into components, in the order of definition.

    Args:
        models: root modules by name. With several, the name and a colon come before every name,
            except where the name is empty.
        heads: whether query, key and value projections are cut by head (``q_lin[head=3]``).

    Returns:
        Components with unique names; together they cover each parameter element exactly once.
        Parameters of lazy modules are left out until they are initialised.
    """
    components: list[Component] = []
    taken = {MODEL}
    seen: set[int] = set()
    for prefix, root in _prefixed(models):
        for site in sites(root, seen):
            pieces = recognise(site)
            if heads:
                pieces = tuple(cut for piece in pieces for cut in by_head(piece, site))
            for piece in pieces:
                path = ".".join(site.path) + piece.suffix
                name = _unused(
                    prefix + (path.removeprefix(".") or type(site.module).__name__), taken
                )
                layer = _layer(site, piece)
                components.append(
                    Component(
                        name=name,
                        kind=piece.kind,
                        layer=prefix + layer if layer not in ("", MODEL) else name,
                        order=len(components),
                        parts=tuple(
                            replace(part, parameter=prefix + site.location + part.parameter)
                            for part in piece.parts
                        ),
                        elements=sum(_elements(part, site) for part in piece.parts),
                    )
                )
    return tuple(components)


def parameters_of(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Returns all initialised parameters under the names `Part.parameter` uses, tied ones once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, root in _prefixed(models):
        for name, parameter in root.named_parameters():
            if id(parameter) not in seen and not is_lazy(parameter):
                seen.add(id(parameter))
                found[prefix + name] = parameter
    return found


def layers_of(components: Sequence[Component]) -> tuple[Component, ...]:
    """Returns the layers that hold at least two components, as components of kind ``other``.

    A layer whose name is already that of a component is left out, so that names stay unique.
    """
    groups: dict[str, list[Component]] = {}
    for component in components:
        groups.setdefault(component.layer, []).append(component)
    names = {component.name for component in components}
    return tuple(
        Component(
            name=layer,
            kind="other",
            layer=layer,
            order=group[0].order,
            parts=tuple(part for component in group for part in component.parts),
            elements=sum(component.elements for component in group),
        )
        for layer, group in groups.items()
        if len(group) >= 2 and layer not in names
    )


def free_component(name: str, tensor: Tensor, order: int = 0) -> Component:
    """Returns the component of a tensor that an optimizer holds and no module does.

    Args:
        name: such as ``param_groups[0][1]``; it is the parameter's name as well.
        tensor: the tensor, of any shape.
        order: the position after the components of the models.
    """
    return Component(name, "other", name, order, (Part(name),), tensor.numel())


def _prefixed(models: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    several = len(models) > 1
    return [(f"{name}:" if several and name else "", root) for name, root in models.items()]


def _layer(site: Site, piece: Piece) -> str:
    """Returns the path of the block a piece is reported with; empty for the root."""
    attends = piece.kind in ("query", "key", "value") or piece.kind.startswith("attention_")
    if attends and site.attention is not None:
        return ".".join(site.path[: site.attention])
    return ".".join(site.path if piece.suffix.startswith(".") else site.path[:-1])


def _elements(part: Part, site: Site) -> int:
    tensor = site.own[part.parameter]
    if part.dim is None:
        return tensor.numel()
    return tensor.numel() // tensor.shape[part.dim] * part.length


def _unused(name: str, taken: set[str]) -> str:
    """Returns the name, numbered if it was given before, and adds it to ``taken``."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    taken.add(unique)
    return unique
