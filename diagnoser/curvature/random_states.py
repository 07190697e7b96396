"""The random streams a computation draws from, so that it can be run again on the same numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RandomStates:
    """Where torch (CPU and CUDA), Python's `random` and numpy, if it is loaded, stood."""

    _cpu: Tensor
    _cuda: list[Tensor] | None
    _python: Any
    _numpy: Any

    @classmethod
    def now(cls) -> RandomStates:
        """Returns the present states; nothing is drawn."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Puts the streams back to where they stood."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, everything draws what it drew from here on; afterwards as if nothing had."""
        present = RandomStates.now()
        self.restore()
        try:
            yield
        finally:
            present.restore()
