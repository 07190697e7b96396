"""What counts as a step, and which backwards are parts of its gradient.

A step ends with the last backward before the next one's first, so that accumulation, several losses
and several optimizers fall into place: once an optimizer has stepped, the next backward begins
another. Where there is no optimizer, and parameters are changed by hand, cleared gradients tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnoser.monitor.shards import local

TELLING = 3  # parameters whose gradients are followed


class Steps:
    """Counts the steps of one training.

    Attributes:
        number: Of the running step.
        backwards: Those of it so far; where a closure evaluates its loss again they are no more.
        parts: Of these, those before any optimizer has stepped: its gradient is their sum.
        again: Whether the last backward was of a loss that a closure evaluated again.
        stepped: The optimizers that have stepped in it, by identity.
        backwards_before: What the step before had.
        parts_before: The same; 1 before there is one.
    """

    def __init__(self) -> None:
        self.number = 0
        self.backwards = self.parts = 0
        self.backwards_before = self.parts_before = 1
        self.again = False
        self.stepped: set[int] = set()
        self._stepped_before: set[int] = set()
        self._steps_of: dict[int, int] = {}  # by optimizer
        self._in_step = False  # of an optimizer; a closure may run whole backwards inside it
        self._left: list[tuple[Tensor, int, int]] = []  # gradients behind the last backward

    @property
    def is_first(self) -> bool:
        """Whether the last backward is the first of its step."""
        return self.backwards == 1 and not self.again

    @property
    def is_complete(self) -> bool:
        """Whether all optimizers that made the last step have made this one, too."""
        return self.stepped >= self._stepped_before

    @property
    def made(self) -> int:
        """How many steps an optimizer has made, the running one included."""
        return self.number + bool(self.stepped)

    @property
    def optimizers(self) -> int:
        """How many optimizers have ever stepped."""
        return len(self._steps_of)

    @property
    def have_one_loss(self) -> bool:
        """Whether several optimizers have all stepped on the one backward of this step."""
        return self.backwards == 1 and len(self.stepped) == self.optimizers > 1

    def is_over(self, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
        """Whether the backward that is about to begin belongs to the next step.

        Args:
            optimizers: All there are, whether or not they have stepped.
        """
        if self.backwards == 0:
            return False
        if self._steps_of:
            return max(self._steps_of.values()) > self.number
        return not any(True for _ in optimizers) and self._were_cleared()

    def end(self) -> None:
        """Ends the running step."""
        self.backwards_before, self.backwards = self.backwards, 0
        self.parts_before, self.parts = max(self.parts, 1), 0
        self._stepped_before, self.stepped = self.stepped, set()
        self._left = []
        self.number += 1

    def begin_backward(self) -> None:
        """Counts a backward."""
        inside = self._in_step and self.backwards > 0
        self.again = inside and (self.again or self._were_touched())
        self.backwards += not self.again
        self.parts += not self.again and not self.stepped

    @property
    def follows_gradients(self) -> bool:
        """Whether `end_backward` is of any use now."""
        return self._in_step or not self._steps_of

    def end_backward(self, parameters: Iterable[Tensor]) -> None:
        """Notes the gradients that a backward has left."""
        left = ((p, id(p.grad), p.grad._version) for p in parameters if p.grad is not None)
        self._left = [each for each, _ in zip(left, range(TELLING), strict=False)]

    def begin(self) -> None:
        """An optimizer's step begins."""
        self._in_step, self.again = True, False

    def made_by(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step was made, or left out by a gradient scaler."""
        self._in_step = False
        key = id(optimizer)
        # One that appears or comes back late (a second phase, the next fold) counts from here.
        back = key in self.stepped
        self._steps_of[key] = self.number + 1 if back else self._steps_of.get(key, self.number) + 1
        self.stepped.add(key)

    def _were_cleared(self) -> bool:
        """Whether the gradients that the last backward left are gone, replaced or zero.

        Nothing is computed where they are gone or were written to. Only where nothing shows, as
        after ``p.grad.data.zero_()``, are the values read.
        """
        if self._were_touched():
            return True
        return not any(bool(local(p.grad).any()) for p, _, _ in self._left if p.grad is not None)

    def _were_touched(self) -> bool:
        """The same, as far as it shows without reading any."""
        return any(
            p.grad is None or id(p.grad) != gradient or p.grad._version != version
            for p, gradient, version in self._left
        )
