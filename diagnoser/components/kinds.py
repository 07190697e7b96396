"""Says what kind of component a module is, and where a fused one is to be cut.

The first function of `RECOGNISERS` that answers decides. To add a kind, put it into
`vocabulary.KINDS`, write a function from a `Site` to its `Piece` values, empty when it is not
responsible (most are one line with `_whole`), and place it in the table before anything more
general. Names are trusted only where the surroundings agree: a Linear called ``value`` is a value
projection inside an attention block and a plain layer elsewhere.

Left whole on purpose: ``query_key_value`` (GPT-NeoX, BLOOM, Falcon), whose rows are interleaved by
head in some models and not in others, which nothing on the module tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from diagnoser.components.sites import Site, is_additive
from diagnoser.components.spelling import (
    CONVOLUTIONS,
    QKV,
    fused_roles,
    is_vector,
    linear_shape,
    makes_scores,
    role,
    says_attention,
    says_context,
    says_embedding,
    says_norm,
    says_output,
    words,
)
from diagnoser.types import Part

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Piece:
    """A component to be: its parts name parameters within the module."""

    kind: str
    parts: tuple[Part, ...]
    suffix: str = ""  # what the component's name has beyond the module's path


Recogniser = Callable[[Site], tuple[Piece, ...]]


def recognise(site: Site) -> tuple[Piece, ...]:
    """Returns the pieces of a site; together they cover its own parameters exactly once."""
    return next(pieces for recogniser in RECOGNISERS if (pieces := recogniser(site)))


def _whole(kind: str, site: Site) -> tuple[Piece, ...]:
    return (Piece(kind, tuple(Part(name) for name in site.own)),)


def multihead_attention(site: Site) -> tuple[Piece, ...]:
    """``in_proj[query|key|value]`` of nn.MultiheadAttention, fused or (other kdim) separate."""
    if not isinstance(site.module, nn.MultiheadAttention):
        return ()
    width = site.module.embed_dim
    rest = dict(site.own)
    pieces = []
    for index, kind in enumerate(QKV):
        parts = []
        for name in site.own:
            if name in (f"{kind[0]}_proj_weight", f"bias_{kind[0]}"):
                parts.append(Part(name))
            elif name in ("in_proj_weight", "in_proj_bias"):
                parts.append(Part(name, 0, index * width, width))
        if parts:
            pieces.append(Piece(kind, tuple(parts), f".in_proj[{kind}]"))
        for part in parts:
            rest.pop(part.parameter, None)
    return (*pieces, *bare(replace(site, own=rest)))


def recurrent(site: Site) -> tuple[Piece, ...]:
    """nn.RNN, nn.LSTM, nn.GRU and their cells: one component a module."""
    is_one = isinstance(site.module, nn.RNNBase | nn.RNNCellBase)
    return _whole("recurrent", site) if is_one else ()


def embedding(site: Site) -> tuple[Piece, ...]:
    """nn.Embedding and nn.EmbeddingBag."""
    is_one = isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
    return _whole("embedding", site) if is_one else ()


def norm(site: Site) -> tuple[Piece, ...]:
    """LayerNorm, BatchNorm, GroupNorm, RMSNorm and every class called a norm."""
    return _whole("norm", site) if says_norm(type(site.module).__name__) else ()


def fused_projection(site: Site) -> tuple[Piece, ...]:
    """Slices of one linear map that makes two or three of query, key and value."""
    shape = linear_shape(site.module)
    if shape is None or site.block is None:
        return ()
    kinds = fused_roles(site.name)
    if site.name == "c_attn":  # GPT-2's cross-attention has its query apart, in q_attn
        apart = {role(name) for name in site.block._modules}
        kinds = tuple(kind for kind in kinds if kind not in apart)
    _, width, out_first = shape
    dims = {name: 0 if out_first else tensor.dim() - 1 for name, tensor in site.own.items()}
    lengths = _fused_lengths(site.block, kinds, width)
    # Originals of a parametrization, or packed 4-bit weights, may be laid out in another way.
    if not lengths or any(site.own[name].shape[dim] != width for name, dim in dims.items()):
        return ()
    pieces, start = [], 0
    for kind, length in zip(kinds, lengths, strict=True):
        parts = tuple(Part(name, dim, start, length) for name, dim in dims.items())
        pieces.append(Piece(kind, parts, f"[{kind}]"))
        start += length
    return tuple(pieces)


def _fused_lengths(block: nn.Module, kinds: Sequence[str], width: int) -> list[int]:
    """Returns how many outputs each kind has; empty if they do not come out even.

    With fewer heads for key and value than for query (Ainslie et al. 2023, grouped queries), the
    query is as wide as what the block's output projection takes in; key and value share the rest.
    """
    if len(kinds) < 2:
        return []
    query = rest = width // len(kinds)
    if "query" in kinds:
        for name, module in block.named_modules():
            shape = linear_shape(module)
            if shape is not None and says_output(name.rpartition(".")[2]):
                grouped = (width - shape[0]) // (len(kinds) - 1)
                if grouped > 0 and shape[0] % grouped == 0:
                    query, rest = shape[0], grouped
    lengths = [query if kind == "query" else rest for kind in kinds]
    return lengths if sum(lengths) == width else []


def attention_context(site: Site) -> tuple[Piece, ...]:
    """The linear map to one score of an additive attention (Yang et al. 2016, eq. 6)."""
    between = site.path[site.attention : -1]  # an adapter of rank one in q_proj makes no scores
    says = (site.block is not None or says_attention(site.name)) and not any(map(role, between))
    return _whole("attention_context", site) if says and makes_scores(site.module) else ()


def attention_role(site: Site) -> tuple[Piece, ...]:
    """Query, key, value, output and projection of an attention block, by the names people give.

    All names from the module up to the block count: ``to_out.0``, ``q_proj.lora_A.default``. Three
    or four in a list are query, key, value and output (the Annotated Transformer).
    """
    if site.attention is None or linear_shape(site.module) is None:
        return ()
    inside = site.path[site.attention :][::-1]
    kind = next(filter(None, map(role, inside)), None)
    if kind is None and inside:
        parent = site.modules[-2]
        if isinstance(parent, nn.ModuleList) and len(parent) in (3, 4):
            kind = (*QKV, "attention_output")[int(site.name)]
        elif is_additive(site.block):
            kind = "attention_projection"
        elif any(map(says_output, inside)):
            kind = "attention_output"
    return _whole(kind, site) if kind else ()


def attention_projection(site: Site) -> tuple[Piece, ...]:
    """A linear map that is itself called an attention and stands outside an attention block."""
    says = site.block is None and says_attention(site.name)
    return _whole("attention_projection", site) if says and linear_shape(site.module) else ()


def convolution(site: Site) -> tuple[Piece, ...]:
    """Convolutions and transposed convolutions."""
    is_one = isinstance(site.module, (*CONVOLUTIONS, *_TRANSPOSED))
    return _whole("convolution", site) if is_one else ()


def head(site: Site) -> tuple[Piece, ...]:
    """The linear map a model ends with, and those that are called a head or classifier."""
    if site.block is not None or linear_shape(site.module) is None:
        return ()
    named = any(words(segment) & {"head", "classifier"} for segment in site.path)
    named = named or site.name in ("score", "logits") or site.path == ("fc",)
    return _whole("head", site) if named or site.final else ()


def feed_forward(site: Site) -> tuple[Piece, ...]:
    """Every other linear map outside an attention block."""
    is_one = site.block is None and linear_shape(site.module) is not None
    return _whole("feed_forward", site) if is_one else ()


def bare(site: Site) -> tuple[Piece, ...]:
    """Parameters of a module that is none of the above: latents, class tokens, gains, ``W_Q``.

    One component each if the module holds other modules or is an attention block, else one in all.
    """
    holds = any(name != "parametrizations" for name in site.module._modules)
    if holds or site.module is site.block:
        return tuple(Piece(_bare_kind(site, name), (Part(name),), f".{name}") for name in site.own)
    names = (*site.own, site.name, type(site.module).__name__)
    says = linear_shape(site.module) is None and any(map(says_embedding, names))
    return _whole("embedding" if says else "other", site)


def _bare_kind(site: Site, name: str) -> str:
    if says_embedding(name):
        return "embedding"
    if site.module is not site.block:
        return "other"
    if says_context(name) and is_vector(site.own[name]):
        return "attention_context"
    if kind := role(name):
        return kind
    if is_additive(site.block):
        return "attention_projection"
    return "attention_output" if says_output(name) else "other"


RECOGNISERS: tuple[Recogniser, ...] = (
    multihead_attention,
    recurrent,
    embedding,
    norm,
    fused_projection,
    attention_context,
    attention_role,
    attention_projection,
    convolution,
    head,
    feed_forward,
    bare,  # answers always
)
