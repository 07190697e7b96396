"""What a repair changes of an optimizer's step, while that step is made and at no other time.

A training script owns its optimizer's groups: schedules set learning rates there, checkpoints hold
them, logs print them. An *adjustment* is therefore never written into them. Right before a step
every group is replaced by copies that differ in what was adjusted (a group is split where only some
of its parameters are concerned), right behind it the script's own groups stand there again. So a
schedule that overwrites a learning rate is composed with and not fought, the number of groups that
it knows stays what it was, and the optimizer's state, which is kept by parameter, is not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple
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
        before: Called with the optimizer before each step, when gradients are complete: where the
            step is given a closure that makes them, behind each call of it.
        after: Called behind each step.
        counts: What these functions count; it is put back with the training, see `hold`.
    """

    parameters: Collection[int] | None
    options: Callable[[Options], Options] = _no_options
    before: Callable[[torch.optim.Optimizer], None] = _nothing
    after: Callable[[], None] = _nothing
    counts: list[int] = field(default_factory=list)

    def concerns(self, parameter: object) -> bool:
        """Whether it is about this parameter."""
        return self.parameters is None or id(parameter) in self.parameters


class _Piece(NamedTuple):
    """What a step has in the place of a group, or of some of its parameters."""

    used: Group
    own: Group
    made: Group  # what was in it before the step


@dataclass(slots=True)
class _Standing:
    """An optimizer's adjustments, and during a step the script's own groups."""

    adjustments: list[Adjustment]
    own: list[Group] | None = None
    split: list[_Piece] | None = None
    in_force: tuple[Adjustment, ...] = ()  # in this step; one that is made in it is for the next
    inner: int = 0  # steps within the step: an optimizer's that calls the one it is derived from


_STANDING: WeakKeyDictionary[torch.optim.Optimizer, _Standing] = WeakKeyDictionary()
_HOOKS: list[Any] = []
_STEP = torch.optim.Optimizer.profile_hook_step(_nothing).__code__  # of every step with hooks


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
        if adjustment in standing.adjustments:
            _put_back(optimizer, standing)
            standing.adjustments.remove(adjustment)
            if not standing.adjustments:
                _STANDING.pop(optimizer, None)
        if not _STANDING and next(_steps(), None) is None:  # torch goes through its hooks in one
            while _HOOKS:
                _HOOKS.pop().remove()

    return remove


def groups_of_step(optimizer: torch.optim.Optimizer) -> list[Group]:
    """Returns the groups as the next step uses them; in a step, as this one does."""
    standing = _STANDING.get(optimizer)
    if standing is None or standing.own is not None:
        return optimizer.param_groups
    return [piece.used for piece in _split(optimizer.param_groups, standing.adjustments)]


def own_rates(optimizer: torch.optim.Optimizer) -> dict[int, float] | None:
    """Returns the script's own learning rates by parameter; None: nothing is adjusted."""
    standing = _STANDING.get(optimizer)
    if standing is None:
        return None
    groups = optimizer.param_groups if standing.own is None else standing.own
    return {id(p): float(group["lr"]) for group in groups if "lr" in group for p in group["params"]}


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Puts the script's own groups back at the end of a step, before other hooks on it do."""
    standing = _STANDING.get(optimizer)
    if standing is not None:
        _put_back(optimizer, standing)


def hold(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns what puts the counts of an optimizer's adjustments back to what they are now."""
    standing = _STANDING.get(optimizer)
    adjustments = standing.adjustments if standing is not None else []
    held = [(adjustment, list(adjustment.counts)) for adjustment in adjustments]

    def put_back() -> None:
        for adjustment, counts in held:
            adjustment.counts[:] = counts

    return put_back


def _before(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    standing = _STANDING.get(optimizer)
    if standing is None:
        return None
    if standing.own is not None:
        if sum(stepping is optimizer for stepping in _steps()) > 1:
            standing.inner += 1
            return None
        _put_back(optimizer, standing)  # a step that raised left its groups behind

    def complete() -> None:
        for adjustment in standing.in_force:
            adjustment.before(optimizer)

    standing.inner = 0
    standing.in_force = tuple(standing.adjustments)
    given = _with_closure(args, kwargs, complete)
    if given is None:
        complete()
    standing.split = _split(optimizer.param_groups, standing.adjustments)
    standing.own = list(optimizer.param_groups)
    optimizer.param_groups[:] = [piece.used for piece in standing.split]
    return given


def _after(optimizer: torch.optim.Optimizer, *_: object) -> None:
    standing = _STANDING.get(optimizer)
    if standing is None:
        return
    if standing.inner:
        standing.inner -= 1
        return
    _put_back(optimizer, standing)
    for adjustment in standing.in_force:
        adjustment.after()
    standing.in_force = ()


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns a step's arguments with ``then`` behind its closure, None where it has none."""
    closure = kwargs.get("closure") if len(args) < 2 else args[1]
    if not callable(closure):
        return None

    def closed() -> Any:
        result = closure()
        then()
        return result

    if len(args) < 2:
        return args, {**kwargs, "closure": closed}
    return (args[0], closed, *args[2:]), kwargs


def _steps() -> Iterator[object]:
    """Yields the optimizers that are making a step at this moment, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _split(groups: list[Group], adjustments: list[Adjustment]) -> list[_Piece]:
    """Returns each group in the parts that are adjusted alike."""
    pieces: list[_Piece] = []
    for group in groups:
        changing = [a for a in adjustments if a.options(group)]
        alike: dict[tuple[bool, ...], list[Any]] = {}
        for parameter in group["params"]:
            alike.setdefault(tuple(a.concerns(parameter) for a in changing), []).append(parameter)
        if not any(map(any, alike)):
            pieces.append(_Piece(group, group, group))
            continue
        for key, parameters in alike.items():
            part = {**group, "params": parameters}
            for adjustment, concerned in zip(changing, key, strict=True):
                if concerned:
                    part |= adjustment.options(part)
            pieces.append(_Piece(part, group, dict(part)))
    return pieces


def _put_back(optimizer: torch.optim.Optimizer, standing: _Standing) -> None:
    """Puts the script's groups back, with what the optimizer itself wrote into the copies.

    What it wrote over an adjusted option is adjusted itself, and is not kept.
    """
    if standing.own is None or standing.split is None:
        return
    for used, own, made in standing.split:
        if used is own:
            continue
        for key, value in used.items():
            if key not in made or (value is not made[key] and made[key] is own.get(key)):
                own[key] = value
    optimizer.param_groups[:] = standing.own
    standing.own = standing.split = None
