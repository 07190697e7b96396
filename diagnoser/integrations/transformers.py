"""`transformers.Trainer`: ``Trainer(..., callbacks=[DiagnoserCallback()])``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diagnoser.integrations.attached import Attached


class DiagnoserCallback(TrainerCallback):
    """Watches a `transformers.Trainer` and diagnoses its training.

    Losses and gradients are read at the backward itself: before clipping, and whatever the trainer
    makes of a NaN in its own log. Of several ranks each is watched, and rank 0 speaks.

    Args:
        verbose: Print findings as they appear, and the diagnosis at the end, to stderr.
        options: Of `diagnoser.watch`: ``out``, ``overhead``, ``rules``, ``repair`` and so on.

    Attributes:
        attached: With ``diagnosis`` and ``watch`` of the last training.
    """

    def __init__(self, *, verbose: bool = True, **options: Any) -> None:
        self.attached = Attached(verbose=verbose, **options)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begins to watch."""
        del args, state, control, kwargs
        if model is not None:
            self.attached.begin(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ends the log, diagnoses, and writes the report."""
        del args, state, control, kwargs
        self.attached.end()
