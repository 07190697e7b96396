"""Lightning: ``Trainer(callbacks=[DiagnoserCallback()])``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from diagnoser.integrations.attached import Attached

# The package exists under two names, whose classes are not the same.
_OLD = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
Callback: Any = importlib.import_module(
    "pytorch_lightning" if _OLD else "lightning.pytorch"
).Callback


class DiagnoserCallback(Callback):  # type: ignore[misc]  # known only when it runs
    """Watches ``Trainer.fit`` of Lightning and diagnoses its training.

    Lightning runs forward and backward inside of the optimizer's step; gradients are read at the
    backward, before clipping. Of several ranks each is watched, and rank 0 speaks.

    Args:
        verbose: Print findings as they appear, and the diagnosis at the end, to stderr.
        options: Of `diagnoser.watch`: ``out``, ``overhead``, ``rules``, ``repair`` and so on.

    Attributes:
        attached: With ``diagnosis`` and ``watch`` of the last training.
    """

    def __init__(self, *, verbose: bool = True, **options: Any) -> None:
        self.attached = Attached(verbose=verbose, **options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to watch."""
        del trainer
        self.attached.begin(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the log, diagnoses, and writes the report."""
        del trainer, pl_module
        self.attached.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the log of a training that did not come to its end."""
        del trainer, pl_module, exception
        self.attached.end(failed=True)
