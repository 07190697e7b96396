"""diagnoser: finds out why a PyTorch training run goes wrong.

`watch` goes around a training loop in code; the command ``diagnoser run SCRIPT`` does the same to
an unmodified script. Everything else is reached through its module; importing this package alone
brings no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnoser.session import Watch, watch

__version__ = "0.1.0"
__all__ = ["Watch", "__version__", "watch"]


def __getattr__(name: str) -> Any:
    """Imports `watch` and `Watch`, and with them torch, when they are first asked for (PEP 562)."""
    if name in ("Watch", "watch"):
        from diagnoser import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
