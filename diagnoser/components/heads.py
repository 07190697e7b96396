"""Cuts query, key and value projections by attention head, on request.

Taken for granted is the layout of every model in common use: the outputs of a projection are those
of head 0, then those of head 1, and so on. Nothing on a module says otherwise; where a model
interleaves its heads, what stands under one head is a mixture of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from diagnoser.components.kinds import Piece
from diagnoser.components.sites import Site
from diagnoser.components.spelling import QKV, fused_roles, linear_shape, role
from diagnoser.types import Part

# How modules and their configurations call the number of heads ...
_COUNTS: Final = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "h")
# ... and that of key and value where several queries share one (Ainslie et al. 2023).
_SHARED: Final = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_HEAD = re.compile(r"\[head=([0-9]+)\]$")


def head_of(name: str) -> int | None:
    """Returns which head a component is, by its name.

    >>> head_of("layers.0.attn.q_lin[head=3]"), head_of("layers.0.attn.q_lin")
    (3, None)
    """
    match = _HEAD.search(name)
    return int(match[1]) if match else None


def by_head(piece: Piece, site: Site) -> tuple[Piece, ...]:
    """Returns one piece a head of a query, key or value projection; other pieces as they are.

    A projection stays whole where the number of heads is not said by the block or its
    configuration, or where its outputs do not come out even.
    """
    if piece.kind not in QKV or not _makes_heads(piece, site):
        return (piece,)
    heads = number_of_heads(site, shared=piece.kind != "query")
    lengths = {_length(part, site) for part in piece.parts}
    width, rest = divmod(max(lengths), heads or 1)
    if heads < 2 or len(lengths) != 1 or rest:  # packed weights have other lengths than biases
        return (piece,)
    return tuple(
        Piece(
            piece.kind,
            tuple(_head(part, site, width, head) for part in piece.parts),
            f"{piece.suffix}[head={head}]",
        )
        for head in range(heads)
    )


def number_of_heads(site: Site, *, shared: bool = False) -> int:
    """Returns how many heads the attention around a site has; 0 where nothing says it.

    Args:
        site: A module inside an attention block.
        shared: Those of key and value, which may be fewer.
    """
    around = site.modules[site.attention :][::-1]  # from the module itself up to the block
    if shared and (few := _said(around, _SHARED)):
        return few
    return _said(around, _COUNTS)


def _said(modules: Sequence[nn.Module], names: Sequence[str]) -> int:
    """Returns the first whole number under one of the names; 0 for none."""
    for module in modules:
        own = vars(module)  # not getattr, which may run the user's code
        for holder in (own, getattr(own.get("config"), "__dict__", {})):
            for name in names:
                if type(holder.get(name)) is int and holder[name] > 0:
                    return int(holder[name])
    return 0


def _makes_heads(piece: Piece, site: Site) -> bool:
    """Whether a piece makes queries, keys or values itself; the halves of LoRA do not."""
    if site.attention is None:
        return False
    if isinstance(site.module, nn.MultiheadAttention):
        return True
    return linear_shape(site.module) is not None and (
        role(site.name) == piece.kind or piece.kind in fused_roles(site.name)
    )


def _outputs(part: Part, site: Site) -> int:
    """Returns the dimension of a parameter that is that of the outputs."""
    tensor, shape = site.own[part.parameter], linear_shape(site.module)
    return tensor.dim() - 1 if shape is not None and not shape[2] else 0


def _length(part: Part, site: Site) -> int:
    if part.dim is not None:
        return part.length
    return int(site.own[part.parameter].shape[_outputs(part, site)])


def _head(part: Part, site: Site, width: int, head: int) -> Part:
    dim = _outputs(part, site) if part.dim is None else part.dim
    return replace(part, dim=dim, start=part.start + head * width, length=width)
