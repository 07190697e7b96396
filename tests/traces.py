"""Everything that a training leaves behind, as one digest: the same bits give the same."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Trace:
    """What a training leaves behind."""

    values: list[Any] = field(default_factory=list)  # losses, counters, evaluations
    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def built(self, *things: Any) -> None:
        for thing in things:
            (self.modules if isinstance(thing, nn.Module) else self.optimizers).append(thing)

    def digest(self) -> str:
        found: list[Any] = [self.values, self.tensors, [t.grad for t in self.tensors]]
        for root in self.modules:
            found.append(root.state_dict())
            found += [parameter.grad for parameter in root.parameters()]
            for module in root.modules():
                hooks = [k for k, v in vars(module).items() if "hooks" in k and v]
                plain = [(k, v) for k, v in vars(module).items() if isinstance(v, bool | int)]
                found += [sorted(hooks), sorted(plain), sorted(vars(module))]
            found += [len(p._backward_hooks or ()) for p in root.parameters()]
        found += [optimizer.state_dict() for optimizer in self.optimizers]
        found += [torch.get_rng_state(), np.random.get_state(), random.getstate()]
        sha = hashlib.sha256()
        _feed(sha, found)
        return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        dense = value.detach().to_dense().contiguous().reshape(-1).view(torch.uint8)
        sha.update(f"{value.dtype}{value.shape}{value.layout}{value.requires_grad}".encode())
        sha.update(dense.numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            sha.update(repr(key).encode())
            _feed(sha, item)
    elif isinstance(value, list | tuple):
        sha.update(f"{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())
