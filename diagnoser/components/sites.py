"""Walks through a model: every module with parameters of its own, and its surroundings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from diagnoser.components.spelling import (
    CONVOLUTIONS,
    fused_roles,
    is_vector,
    linear_shape,
    makes_scores,
    role,
    says_attention,
    says_context,
    says_feed_forward,
    words,
)

# What DistributedDataParallel and PEFT put before a whole model ...
_LEADING_WRAPPERS = (("module",), ("base_model", "model"))
# ... and torch.compile, FSDP, activation checkpointing and LoRA around any module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}

# With one of these words a name means more than an attention (HierarchicalAttentionNetwork).
_LARGER = {"net", "network", "model", "classifier", "encoder", "decoder", "rnn", "block"}
# Transformer blocks are called so; a model does not end inside one.
_BLOCK = {"block", "layer"}


@dataclass(frozen=True, slots=True)
class Site:
    """A module with parameters of its own, and its surroundings; wrappers are left out.

    ``location`` is what the names of its parameters begin with (``module.layers.0.``). ``path``
    leads from the root to the module; ``modules`` are those on the way, root and module included.
    ``own`` are its parameters not met before, by their name within the module. ``attention`` is the
    length of the path to the enclosing attention block (None: outside), and may be that of the
    module itself. ``final`` says that this is the linear map the model ends with.
    """

    location: str
    path: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    own: Mapping[str, nn.Parameter]
    attention: int | None
    final: bool

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.modules[-1]

    @property
    def name(self) -> str:
        """The last segment of the path; empty at the root."""
        return self.path[-1] if self.path else ""

    @property
    def block(self) -> nn.Module | None:
        """The enclosing attention block."""
        return None if self.attention is None else self.modules[self.attention]


def sites(root: nn.Module, seen: set[int]) -> Iterator[Site]:
    """Yields the modules that have parameters not in ``seen``, in the order of definition.

    Adds the id of each parameter it yields to ``seen``. Uninitialised parameters of lazy modules
    are passed over.
    """
    modules = dict(root.named_modules())
    places = []
    for location in modules:
        segments = location.split(".") if location else []
        above = [modules[".".join(segments[:depth])] for depth in range(len(segments) + 1)]
        path, chain = _unwrapped(segments, above)
        places.append((location and f"{location}.", path, chain, _attention_depth(path, chain)))
    ends = [chain[-1] for _, path, chain, attention in places if _may_end(path, chain, attention)]
    for location, path, chain, attention in places:
        own = {}
        for name, parameter in _own_parameters(chain[-1]):
            if id(parameter) not in seen and not is_lazy(parameter):
                seen.add(id(parameter))
                own[name] = parameter
        if own:
            final = bool(ends) and chain[-1] is ends[-1]
            yield Site(location, path, chain, own, attention, final)


def is_additive(block: nn.Module | None) -> bool:
    """Returns whether an attention block scores with a context vector, not with query and key."""
    if block is None or {"query", "key"} <= {role(name) for name in block._modules}:
        return False
    return any(makes_scores(child) for child in block.children()) or any(
        says_context(name) and is_vector(parameter)
        for name, parameter in block.named_parameters(recurse=False)
    )


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the module's direct parameters, and the originals of those it parametrizes."""
    yield from module.named_parameters(recurse=False)
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None:
        for name, parameter in parametrizations.named_parameters():
            yield f"parametrizations.{name}", parameter


def _unwrapped(
    path: Sequence[str], modules: Sequence[nn.Module]
) -> tuple[tuple[str, ...], tuple[nn.Module, ...]]:
    """Leaves wrappers, and the path segments they add, out of a path and its modules."""
    start = 0
    while start < len(path):
        prefixes = (*_LEADING_WRAPPERS, *((name,) for name in _WRAPPERS))
        lengths = [len(p) for p in prefixes if tuple(path[start : start + len(p)]) == p]
        if not lengths:
            break
        start += lengths[0]
    kept = [depth for depth in range(start, len(path)) if path[depth] not in _WRAPPERS]
    return tuple(path[depth] for depth in kept), (*(modules[d] for d in kept), modules[-1])


def _attention_depth(path: Sequence[str], modules: Sequence[nn.Module]) -> int | None:
    """Returns the length of the path to the enclosing attention block, None outside one.

    A feed-forward block between ends the search. BERT and ViT put ``attention.self`` and
    ``attention.attention`` into an ``attention``: there the outer one is the block.
    """
    names = ("", *path)  # of the root and of the modules on the way
    depth = len(path)
    while not _is_attention(names[depth], modules[depth]):
        kind = type(modules[depth]).__name__
        ends = any(says_feed_forward(name) or "mlp" in words(name) for name in (names[depth], kind))
        if ends or depth == 0:
            return None
        depth -= 1
    while names[depth] in ("self", "attention", "attn") and says_attention(names[depth - 1]):
        depth -= 1
    return depth


def _is_attention(name: str, module: nn.Module) -> bool:
    """Returns whether a module is an attention block, by its name, its class or what it holds."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, nn.ModuleList) or linear_shape(module) is not None:
        return False
    if says_attention(name) and not words(name) & _LARGER:
        return True
    parts = [*module._modules, *module._parameters]
    if {"query", "key"} <= {role(part) for part in parts}:
        return True
    if any(fused_roles(part) for part in parts if part != "in_proj"):  # in_proj: Mamba has one too
        return True
    if any("context" in part.lower() and _can_compare(module, part) for part in parts):
        return True
    kind = type(module).__name__
    inner = any(says_attention(type(child).__name__) for child in module.children())
    return says_attention(kind) and not words(kind) & _LARGER and not inner


def _can_compare(module: nn.Module, part: str) -> bool:
    """Returns whether a child or parameter can be the context vector of an additive attention."""
    child, parameter = module._modules.get(part), module._parameters.get(part)
    return (child is not None and makes_scores(child)) or (
        parameter is not None and is_vector(parameter)
    )


def _may_end(path: Sequence[str], modules: Sequence[nn.Module], attention: int | None) -> bool:
    """Returns whether a model may end with this module: a linear map outside inner blocks."""
    if attention is not None or linear_shape(modules[-1]) is None:
        return False
    return not isinstance(modules[-1], CONVOLUTIONS) and not any(
        says_feed_forward(name)
        or says_feed_forward(type(module).__name__)
        or words(type(module).__name__) & _BLOCK
        for name, module in zip(path[:-1], modules[1:-1], strict=True)
    )
