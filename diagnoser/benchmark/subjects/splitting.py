"""Keeps held-out samples out of the training samples where a draw may repeat itself."""

from __future__ import annotations

import torch

from diagnoser.injection.training import TARGETS, Batch, Data


def apart(train: Batch, held_out: Batch) -> Data:
    """Leaves out the training samples whose inputs are those of a held-out sample."""
    known = set(_inputs(held_out))
    kept = torch.tensor([sample not in known for sample in _inputs(train)])
    return Data(train={name: tensor[kept] for name, tensor in train.items()}, held_out=held_out)


def _inputs(batch: Batch) -> list[bytes]:
    """Returns the bytes of every sample's inputs."""
    columns = [tensor.flatten(1).numpy() for name, tensor in batch.items() if name != TARGETS]
    rows = range(len(batch[TARGETS]))
    return [b"".join(column[row].tobytes() for column in columns) for row in rows]
