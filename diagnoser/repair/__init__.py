"""Repairs of a training that goes on: one action a function, and what takes them back.

`ACTIONS` is the table of all, by the names of `vocabulary.REPAIRS`. `learning_rate` holds what
changes how steps are made, `weights` what changes tensors and groups, `snapshot` the state that a
trial begins with and is put back to, `live` the training as all of them see it. Which action is
tried when, and what is kept, is decided elsewhere (`diagnoser.repair_loop`).
"""

from diagnoser.repair.applying import ACTIONS, OF_OPTIMIZERS, Applied, apply
from diagnoser.repair.live import Live, schedules_of
from diagnoser.repair.snapshot import Snapshot

__all__ = ["ACTIONS", "OF_OPTIMIZERS", "Applied", "Live", "Snapshot", "apply", "schedules_of"]
