"""diagnoser: finds out why a PyTorch training run goes wrong.

`watch` goes around a training loop in code, `train_with_repairs` runs one and mends it; the command
``diagnoser run SCRIPT`` does both to an unmodified script. Everything else is reached through its
module; importing this package alone brings no torch.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from diagnoser.session import Watch, watch
    from diagnoser.training import train_with_repairs

__version__ = "0.1.0"
__all__ = ["Watch", "__version__", "train_with_repairs", "watch"]

_ROOMS: Final = {
    "Watch": "diagnoser.session",
    "watch": "diagnoser.session",
    "train_with_repairs": "diagnoser.training",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and with it torch, when that is done first (PEP 562)."""
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stood = random.getstate()  # rich draws from it where it is imported
    try:
        return getattr(importlib.import_module(room), name)
    finally:
        random.setstate(stood)
