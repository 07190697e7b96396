"""What a repair changes of an optimizer's step, while that step is made and at no other time.

A training script owns its optimizer's groups: schedules set learning rates there, checkpoints hold
them, logs print them. An *adjustment* is therefore never written into them. Right before a step
every group is replaced by copies that differ in what was adjusted (a group is split where only some
of its parameters are concerned), right behind it the script's own groups stand there again. So a
schedule that overwrites a learning rate is composed with and not fought, the number of groups that
it knows stays what it was, and the optimizer's state, which is kept by parameter, is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Group = dict[str, Any]
Options = Mapping[str, Any]


def _no_options(_: Options) -> Options:
    return {}


def _nothing(*_: object) -> None:
    return


@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """Something that is other during an optimizer's steps.

    Attributes:
        parameters: Identities of the parameters that it concerns; None: all of the optimizer's.
        options: Given a group as the script has it, the options that are other in the step.
        before: Called with the optimizer before each step, when gradients are complete.
        after: Called behind each step.
    """

    parameters: Collection[int] | None
    options: Callable[[Options], Options] = _no_options
    before: Callable[[torch.optim.Optimizer], None] = _nothing
    after: Callable[[], None] = _nothing

    def concerns(self, parameter: object) -> bool:
        """Whether it is about this parameter."""
        return self.parameters is None or id(parameter) in self.parameters


@dataclass(slots=True)
class _Standing:
    """An optimizer's adjustments, and during a step the script's own groups."""

    adjustments: list[Adjustment]
    active: list[Adjustment] = field(default_factory=list)  # of the step that is being made
    own: list[Group] | None = None
    split: list[tuple[Group, Group]] | None = None  # (a copy, the group it is of)


_STANDING: WeakKeyDictionary[torch.optim.Optimizer, _Standing] = WeakKeyDictionary()
_HOOKS: list[Any] = []


def adjust(optimizer: torch.optim.Optimizer, adjustment: Adjustment) -> Callable[[], None]:
    """Adjusts every step of ``optimizer`` from now on.

    Returns:
        What takes the adjustment away again; calling it twice does nothing more.
    """
    standing = _STANDING.setdefault(optimizer, _Standing([]))
    standing.adjustments.append(adjustment)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before))
        _HOOKS.append(register_optimizer_step_post_hook(_after))

    def remove() -> None:
        if adjustment not in standing.adjustments:
            return
        _put_back(optimizer, standing)
        standing.adjustments.remove(adjustment)
        if not standing.adjustments:
            _STANDING.pop(optimizer, None)
        if not _STANDING:
            while _HOOKS:
                _HOOKS.pop().remove()

    return remove


def groups_of_step(optimizer: torch.optim.Optimizer) -> list[Group]:
    """Returns the groups as the next step uses them; in a step, as this one does."""
    standing = _STANDING.get(optimizer)
    if standing is None or standing.own is not None:
        return optimizer.param_groups
    return [group for group, _ in _split(optimizer.param_groups, standing.adjustments)]


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Puts the script's own groups back at the end of a step, before other hooks on it do."""
    standing = _STANDING.get(optimizer)
    if standing is not None:
        _put_back(optimizer, standing)


def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    standing = _STANDING.get(optimizer)
    if standing is None:
        return
    _put_back(optimizer, standing)  # a step that raised left its groups behind
    standing.active = list(standing.adjustments)
    for adjustment in standing.active:
        adjustment.before(optimizer)
    standing.split = _split(optimizer.param_groups, standing.adjustments)
    standing.own = list(optimizer.param_groups)
    optimizer.param_groups[:] = [group for group, _ in standing.split]


def _after(optimizer: torch.optim.Optimizer, *_: object) -> None:
    standing = _STANDING.get(optimizer)
    if standing is None:
        return
    _put_back(optimizer, standing)
    active, standing.active = standing.active, []
    for adjustment in active:
        adjustment.after()


def _split(groups: list[Group], adjustments: list[Adjustment]) -> list[tuple[Group, Group]]:
    """Returns each group in the parts that are adjusted alike, with the group it is a part of."""
    parts: list[tuple[Group, Group]] = []
    for group in groups:
        alike: dict[tuple[int, ...], list[Any]] = {}
        for parameter in group["params"]:
            key = tuple(i for i, a in enumerate(adjustments) if a.concerns(parameter))
            alike.setdefault(key, []).append(parameter)
        if set(alike) <= {()}:
            parts.append((group, group))
            continue
        for key, parameters in alike.items():
            part = {**group, "params": parameters}
            for i in key:
                part |= adjustments[i].options(part)
            parts.append((part, group))
    return parts


def _put_back(optimizer: torch.optim.Optimizer, standing: _Standing) -> None:
    """Puts the script's groups back, with what the optimizer itself wrote into the copies."""
    if standing.own is None or standing.split is None:
        return
    adjusted = {"params"}
    for _, group in standing.split:
        for adjustment in standing.adjustments:
            adjusted |= set(adjustment.options(group))
    for part, group in standing.split:
        if part is not group:
            group |= {key: value for key, value in part.items() if key not in adjusted}
    optimizer.param_groups[:] = standing.own
    standing.own = standing.split = None
