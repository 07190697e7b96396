"""diagnoser: finds out why a PyTorch training run goes wrong.

`watch` goes around a training loop in code, `train_with_repairs` runs one and mends it; the command
``diagnoser run SCRIPT`` does both to an unmodified script. Everything else is reached through its
module; importing this package alone brings no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnoser.session import Watch, watch
    from diagnoser.training import train_with_repairs

__version__ = "0.1.0"
__all__ = ["Watch", "__version__", "train_with_repairs", "watch"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and with it torch, when that is done first (PEP 562)."""
    if name in ("Watch", "watch"):
        from diagnoser import session

        return getattr(session, name)
    if name == "train_with_repairs":
        from diagnoser import training

        return training.train_with_repairs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
