"""Nodes of the autograd graph: what every reader of it asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes by operation

SHAPE_ONLY = (
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze", "Unsqueeze", "Transpose", "Permute",
    "T", "Clone", "Contiguous", "Select", "Slice", "Alias", "ToCopy", "Split", "SplitWithSizes",
    "Unbind",
)  # fmt: skip
SOFTMAX = ("Softmax", "SafeSoftmax")
LIKELIHOOD = ("NllLoss", "NllLoss2D")
MATMUL = ("Bmm", "Mm", "Mv", "Addmm", "Baddbmm")
PARAMETER_OPS = (*MATMUL, "Convolution", "Embedding", "Linear", "Dot")
MOST_ROWS = 65_536  # rows of a saved tensor that are looked at
MOST_ELEMENTS = 1_048_576


def inputs_of(node: Node) -> list[Node]:
    """Returns the operations that a node's inputs come from."""
    behind = (_behind_ddp(*edge) for edge in node.next_functions)
    return [following for following in behind if following is not None]


def source_of(tensor: Tensor) -> Node | None:
    """Returns the operation that a tensor is the result of."""
    return _behind_ddp(tensor.grad_fn, tensor.output_nr)


def _behind_ddp(node: Node | None, output: int) -> Node | None:
    """Returns what an edge leads to, past what DDP puts behind a model to find unused parameters.

    That hands on all that the model returns as it is, the loss where the model computes it.
    """
    while isinstance(node, BackwardCFunction) and operation_of(node) == "_DDPSink":
        needed = node.needs_input_grad[1:]  # without DDP itself
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        node, output = edges[sum(needed[:output])]
    return node


def is_shape_only(node: Node) -> bool:
    """Whether an operation changes no number."""
    return operation_of(node) in SHAPE_ONLY


def operation_of(node: Node) -> str:
    """Returns the name of the operation that a node differentiates, which may be a derivative."""
    return str(node.name().rpartition("Backward")[0])


def skip_shapes(node: Node) -> Node:
    """Returns the first operation at or behind a node that changes numbers."""
    while is_shape_only(node) and inputs_of(node):
        node = inputs_of(node)[0]
    return node


def skip_scaling(node: Node) -> Node:
    """Returns the first operation at or behind a node that does more than multiply by a number."""
    while is_shape_only(node) or operation_of(node) in ("Mul", "Div"):
        behind = inputs_of(node)
        if len(behind) != 1:
            break
        node = behind[0]
    return node


def own_parameters(node: Node) -> list[Tensor]:
    """Returns the parameters that go into an operation, up to changes of their shape."""
    return [
        source.variable
        for source in map(skip_shapes, inputs_of(node))
        if source.name() == "torch::autograd::AccumulateGrad"
    ]


def is_there(*saved: Tensor | None) -> bool:
    """Whether saved tensors are in memory: FSDP2 frees whole parameters until their backward."""
    return all(
        one is not None
        and (one.layout != torch.strided or not one.numel() or one.untyped_storage().nbytes() > 0)
        for one in saved
    )


def signed(saved: int) -> int:
    """Returns an integer as it was given; nodes show negative ones as unsigned 64-bit numbers.

    >>> signed(2**64 - 100), signed(3)
    (-100, 3)
    """
    return saved - 2**64 if saved >= 2**63 else saved
