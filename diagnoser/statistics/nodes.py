"""Nodes of the autograd graph: what every reader of it asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes by operation

SHAPE_ONLY = (
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze", "Unsqueeze", "Transpose", "Permute",
    "T", "Clone", "Contiguous", "Select", "Slice", "Alias", "ToCopy", "Split", "Unbind",
)  # fmt: skip
SOFTMAX = ("SoftmaxBackward", "SafeSoftmaxBackward")
MATMUL = ("Bmm", "Mm", "Mv", "Addmm", "Baddbmm")
PARAMETER_OPS = (*MATMUL, "Convolution", "Embedding", "Linear", "Dot")
MOST_ROWS = 65_536  # rows of a saved tensor that are looked at
MOST_ELEMENTS = 1_048_576


def inputs_of(node: Node) -> list[Node]:
    """Returns the operations that a node's inputs come from."""
    return [following for following, _ in node.next_functions if following is not None]


def is_shape_only(node: Node) -> bool:
    """Whether an operation changes no number."""
    return bool(node.name().split("Backward")[0] in SHAPE_ONLY)


def operation_of(node: Node) -> str:
    """Returns the name of the forward operation."""
    return str(node.name().split("Backward")[0])


def skip_shapes(node: Node) -> Node:
    """Returns the first operation at or behind a node that changes numbers."""
    while is_shape_only(node) and inputs_of(node):
        node = inputs_of(node)[0]
    return node


def own_parameters(node: Node) -> list[Tensor]:
    """Returns the parameters that go into an operation, up to changes of their shape."""
    return [
        source.variable
        for source in map(skip_shapes, inputs_of(node))
        if source.name() == "torch::autograd::AccumulateGrad"
    ]


def signed(saved: int) -> int:
    """Returns an integer as it was given; nodes show negative ones as unsigned 64-bit numbers.

    >>> signed(2**64 - 100), signed(3)
    (-100, 3)
    """
    return saved - 2**64 if saved >= 2**63 else saved
