"""TensorBoard: a ``SummaryWriter`` of torch or of tensorboardX that the script has built."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from typing import Any, Final

from diagnoser.trackers.tracker import PREFIX, Said, Tracker

MODULES: Final = ("torch.utils.tensorboard.writer", "tensorboardX.writer")


def find() -> Any:
    """Looks through all objects, once or a few times in a run: that takes a tenth of a second.

    Of several writers that are open, the one whose directory comes first in the alphabet.
    """
    kinds = tuple(
        kind
        for name in MODULES
        if isinstance(kind := getattr(sys.modules.get(name), "SummaryWriter", None), type)
    )
    # By type(): some objects raise when they are asked for their class.
    writers = [o for o in gc.get_objects() if issubclass(type(o), kinds)]
    return min(filter(is_open, writers), key=_directory, default=None)


def _directory(writer: Any) -> str:
    return str(getattr(writer, "log_dir", None) or getattr(writer, "logdir", ""))


def is_open(writer: Any) -> bool:
    """Whether it was not closed."""
    return getattr(writer, "file_writer", None) is not None


def scalars(writer: Any, step: int, values: Mapping[str, float]) -> None:
    """Adds one point a tag."""
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def findings(writer: Any, step: int, said: Said) -> None:
    """Adds a text; a writer that was closed opens a file more for it, and is closed again."""
    closed = not is_open(writer)
    writer.add_text(f"{PREFIX}/findings", said.markdown(), step)
    if closed:
        writer.close()
    else:
        writer.flush()


TRACKER: Final = Tracker("TensorBoard", MODULES, find, is_open, scalars, findings, costly=True)
