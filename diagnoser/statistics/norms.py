"""Norms and inner products per component, from lists of tensors shaped like the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagnoser.types import Component, Part

Array = NDArray[np.float64]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PartList:
    """The parts of all components in one list, and which component each belongs to."""

    parts: tuple[Part, ...]
    owner: NDArray[np.intp]  # (parts,) index of the component
    components: int

    @classmethod
    def of(cls, components: Sequence[Component]) -> PartList:
        """Flattens the parts of ``components``, in order."""
        pairs = [(part, i) for i, component in enumerate(components) for part in component.parts]
        return cls(
            tuple(part for part, _ in pairs),
            np.array([i for _, i in pairs], dtype=np.intp),
            len(components),
        )

    def select(self, *tensors: Tensors) -> tuple[NDArray[np.intp], list[list[Tensor]]]:
        """Returns owners and views of the parts that every mapping has a tensor for."""
        kept = [i for i, part in enumerate(self.parts) if all(part.parameter in t for t in tensors)]
        views = [
            [self.parts[i].view(_dense(t[self.parts[i].parameter])) for i in kept] for t in tensors
        ]
        return self.owner[kept], views

    def add_up(self, owners: NDArray[np.intp], values: Array) -> Array:
        """Sums (parts,) values into (components,), NaN where a component has no part at all."""
        total = np.full(self.components, np.nan)
        total[owners] = 0.0
        np.add.at(total, owners, values)
        return total


@torch.no_grad()
def norms(parts: PartList, tensors: Tensors) -> Array:
    """Euclidean norm of every component's share of ``tensors``; (components,)."""
    owners, (views,) = parts.select(tensors)
    if not views:
        return np.full(parts.components, np.nan)
    squares = _read(torch._foreach_norm(views)) ** 2
    return np.sqrt(parts.add_up(owners, squares))


@torch.no_grad()
def sums(parts: PartList, tensors: Tensors) -> Array:
    """Sum of the entries of every component's share of ``tensors``; (components,)."""
    owners, (views,) = parts.select(tensors)
    if not views:
        return np.full(parts.components, np.nan)
    return parts.add_up(owners, _read([view.sum() for view in views]))


def counts(parts: PartList, tensors: Tensors) -> Array:
    """Number of entries of every component's share of ``tensors``; (components,)."""
    owners, (views,) = parts.select(tensors)
    return parts.add_up(owners, np.array([view.numel() for view in views], dtype=np.float64))


@torch.no_grad()
def non_finite_counts(parts: PartList, tensors: Tensors) -> Array:
    """How many entries are NaN or infinite, per component; (components,)."""
    owners, (views,) = parts.select(tensors)
    if not views:
        return np.full(parts.components, np.nan)
    suspect = np.flatnonzero(~np.isfinite(_read(torch._foreach_norm(views))))
    counts = np.zeros(len(views))
    if len(suspect):
        counts[suspect] = _read([(~views[i].isfinite()).sum() for i in suspect])
    return parts.add_up(owners, counts)


@torch.no_grad()
def inner_products(parts: PartList, left: Tensors, right: Tensors) -> Array:
    """Inner product of every component's shares of two sets of tensors; (components,)."""
    owners, (a, b) = parts.select(left, right)
    if not a:
        return np.full(parts.components, np.nan)
    return parts.add_up(owners, _read([p.sum() for p in torch._foreach_mul(a, b)]))


@torch.no_grad()
def cosines(parts: PartList, left: Tensors, right: Tensors) -> Array:
    """Cosine of the angle between two vectors, per component; NaN where one of them is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine: Array = inner_products(parts, left, right) / (
            norms(parts, left) * norms(parts, right)
        )
    return np.where(np.isfinite(cosine), cosine, np.nan)


@torch.no_grad()
def nonzero_shares(parts: PartList, tensors: Tensors) -> Array:
    """Share of entries that are not exactly zero, per component; (components,)."""
    owners, (views,) = parts.select(tensors)
    if not views:
        return np.full(parts.components, np.nan)
    counts = _read([torch.count_nonzero(view) for view in views])
    sizes = np.array([view.numel() for view in views], dtype=np.float64)
    return parts.add_up(owners, counts) / parts.add_up(owners, sizes)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _read(scalars: Sequence[Tensor]) -> Array:
    """Brings 0-d tensors to the host in one transfer (one a device where there are several)."""
    if len({scalar.device for scalar in scalars}) == 1:
        return torch.stack([s.double() for s in scalars]).cpu().numpy()
    return np.array([float(s) for s in scalars])
