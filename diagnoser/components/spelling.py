"""What the names and shapes of modules and parameters say about their part in a model.

Names are only hints: whether ``value`` is a value projection depends on the surroundings, which
`sites` and `kinds` look at.
"""

from __future__ import annotations

import re
from typing import Final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

QKV: Final = ("query", "key", "value")

# How people spell projections: q_lin, to_q, W_Q, w_qs, query_proj, toqueries, q_proj_weight.
_BEFORE = r"(?:to_?|w_?|proj_|lin_|linear_|fc_|conv_)?"
_AFTER = r"(?:_?(?:proj|projection|lin|linear|layer|attn|conv|dense|weight|bias|transform))*s?"
_ROLES: Final = {
    "query": re.compile(rf"{_BEFORE}(?:q|query|querie){_AFTER}"),
    "key": re.compile(rf"{_BEFORE}(?:k|key){_AFTER}"),
    "value": re.compile(rf"{_BEFORE}(?:v|value){_AFTER}"),
}
_FUSED = re.compile(rf"{_BEFORE}([qkv]{{2,3}}){_AFTER}")
_OUTPUT = re.compile(
    rf"(?:{_BEFORE}|c_)(?:o|out|output|proj|projection|fc|dense|(?:unify|combine)_?heads?){_AFTER}"
)
_CONTEXT = re.compile(r".*context.*|v|v_?a|u|u_?w")  # u_w: Yang et al. 2016, v_a: Bahdanau 2015
_NORM = re.compile(r"Norm(?!al(?!i))")  # LlamaRMSNorm and Normalization, but not NormalPrior
_EMBEDDING_WORDS = {"emb", "embed", "embedding", "embeddings", "cls", "token", "tokens"}
_EMBEDDING_WORDS |= {"pe", "pos", "position", "positions", "positional"}

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def words(name: str) -> set[str]:
    """Returns the words of a snake-case or camel-case name, in lower case.

    >>> sorted(words("WordAttNet")), sorted(words("MLPAttention")), sorted(words("pos_embed"))
    (['att', 'net', 'word'], ['attention', 'mlp'], ['embed', 'pos'])
    """
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def says_attention(name: str) -> bool:
    """Returns whether a name speaks of attention (``crossattention``, ``self_attn``, ``Att``)."""
    return bool(re.search("attention|attn", name.lower())) or "att" in words(name)


def says_feed_forward(name: str) -> bool:
    """Returns whether a name speaks of the feed-forward half of a transformer block."""
    return bool(re.search("ffn|feed_?forward", name.lower())) or "ff" in words(name)


def says_embedding(name: str) -> bool:
    """Returns whether a name speaks of an embedding, a position or a class token."""
    return not _EMBEDDING_WORDS.isdisjoint(words(name))


def says_norm(name: str) -> bool:
    """Returns whether the name of a class speaks of a normalisation."""
    return bool(_NORM.search(name))


def says_context(name: str) -> bool:
    """Returns whether a name can be that of the context vector of an additive attention."""
    return bool(_CONTEXT.fullmatch(name.lower()))


def says_output(name: str) -> bool:
    """Returns whether a name inside an attention block is that of its output projection."""
    return bool(_OUTPUT.fullmatch(name.lower()))


def role(name: str) -> str | None:
    """Returns query, key or value when a name inside an attention block says so.

    >>> [role(name) for name in ("k_lin", "W_Q", "to_v", "w_qs", "toqueries", "out_proj")]
    ['key', 'query', 'value', 'query', 'query', None]
    """
    return next((kind for kind, form in _ROLES.items() if form.fullmatch(name.lower())), None)


def fused_roles(name: str) -> tuple[str, ...]:
    """Returns what a fused projection makes, in its order; empty when the name says nothing.

    >>> fused_roles("to_kv"), fused_roles("Wqkv"), fused_roles("c_attn"), fused_roles("q_proj")
    (('key', 'value'), ('query', 'key', 'value'), ('query', 'key', 'value'), ())
    """
    if name.lower() in ("c_attn", "in_proj"):
        return QKV
    match = _FUSED.fullmatch(name.lower())
    letters = match[1] if match else ""
    by_letter = {kind[0]: kind for kind in QKV}
    return tuple(by_letter[x] for x in letters) if len(set(letters)) == len(letters) else ()


def is_vector(parameter: Tensor) -> bool:
    """Returns whether at most one dimension is longer than one: (d,), (d, 1), (1, d)."""
    return not is_lazy(parameter) and parameter.numel() == max(parameter.shape, default=0)


def linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """Returns inputs, outputs and whether the weight is (out, in), of a linear map; else None.

    Linear maps are nn.Linear, hand-written classes called ...Linear..., convolutions with a kernel
    of one position, and the Conv1D of GPT-2, whose weight is (in, out).
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, True
    if isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1}:
        return module.in_channels, module.out_channels, True
    # Not getattr: reading a parametrized weight runs the user's code and may change buffers.
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.dim() != 2:
        return None
    first, second = weight.shape
    if type(module).__name__ == "Conv1D":
        return first, second, False
    return (second, first, True) if "Linear" in type(module).__name__ else None


def makes_scores(module: nn.Module) -> bool:
    """Returns whether a module maps a vector to one number, as a context vector does."""
    shape = linear_shape(module)
    return shape is not None and shape[1] == 1 and shape[0] != 1
