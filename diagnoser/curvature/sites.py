r"""Where parameters act: the operations of a loss's graph that use them, and how samples lie there.

A *site* is one operation that uses a parameter. If the parameter changes by :math:`s V`, the output
of the site changes by :math:`s\,\delta`, where for a linear map :math:`\delta = a V^\top` with *a*
its input, for the gain of a norm :math:`\delta = V \odot \hat x`, and so on. With sites, a vector
may differ from sample to sample although the parameter is shared (`per_sample`).

Nothing has to be prepared in the forward pass: what an operation saved for its backward (its input,
a view of the parameter) stands on its node in the graph, and its output is named by a
`torch.autograd.graph.GradientEdge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

GROUP_ELEMENTS = 1 << 24  # of the vectors of a group of samples that exist at the same time

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes by operation


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which rows of a site's output belong to which sample.

    Attributes:
        labels: (rows,) the sample of each row; -1: of none, the loss does not depend on it.
        index: (samples, most) the rows of each sample, padded with the number of rows.
        place: (rows,) where a row stands in ``index`` flattened; its length for rows of none.
        plain: Rows are sorted by sample, equally many each.
    """

    labels: Tensor
    index: Tensor
    place: Tensor
    plain: bool

    @classmethod
    def of(cls, labels: Tensor, samples: int) -> Rows:
        """Builds the tables from labels."""
        rows = labels.numel()
        known = (labels >= 0).nonzero().squeeze(1)
        order = known[torch.argsort(labels[known], stable=True)]
        counts = torch.bincount(labels[known], minlength=samples)
        most = max(int(counts.max()), 1) if known.numel() else 1
        start = counts.cumsum(0) - counts
        within = torch.arange(order.numel(), device=labels.device) - start[labels[order]]
        index = torch.full((samples, most), rows, device=labels.device)
        index[labels[order], within] = order
        place = torch.full((rows,), samples * most, device=labels.device)
        place[order] = labels[order] * most + within
        plain = samples * most == rows and bool((place == torch.arange(rows).to(place)).all())
        return cls(labels, index, place, plain)

    def gather(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Returns the rows (rows, ...) of some samples as (samples, most, ...), padded by zero."""
        if self.plain:
            most = self.index.shape[1]
            return values[start * most : stop * most].reshape(stop - start, most, *values.shape[1:])
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])])[self.index[start:stop]]

    def scatter(self, groups: Sequence[Tensor]) -> Tensor:
        """Puts (samples, most, ...) of all samples, in pieces, back into rows; zero for none."""
        flat = torch.cat(list(groups)).flatten(0, 1)
        if self.plain:
            return flat
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.place]


class Vectors(Protocol):
    """A vector of the parameters at every sample; what a site asks for its change of output.

    ``batch(name, start, stop)`` gives (samples, *shape), or (1, *shape) if all have the same;
    ``table_rows(name, tokens, labels)`` the rows of an embedding's table, (tokens, width).

    Attributes:
        shared: All samples have the same.
        names: The parameters that it is not zero for.
    """

    shared: bool
    names: frozenset[str]

    def batch(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the vectors of a range of samples."""
        ...

    def table_rows(self, name: str, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the rows ``tokens`` of an embedding's table, for samples ``labels``."""
        ...


Change = Callable[[Vectors, Rows], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One operation that uses parameters.

    Attributes:
        edge: Its output, as autograd names it.
        names: The parameters it uses.
        change: (vectors, rows) to the change of its output, rows first; differentiable by
            the operation's input.
        row_size: Elements of its output that are one row: all that one set of weights makes at
            once, so that a convolution's row is an image.
        table: It looks rows of a table up, instead of using all of a parameter.
    """

    edge: GradientEdge
    names: tuple[str, ...]
    change: Change
    row_size: int
    table: bool = False

    def rows(self, gradient: Tensor) -> int:
        """Returns how many rows the site has, of the gradient of its output."""
        return gradient.numel() // self.row_size


def find_sites(loss: Tensor, parameters: Mapping[str, Tensor]) -> list[Site]:
    """Returns the sites in the graph of a loss, the ones nearest to it first.

    Known are linear maps (addmm, mm), added biases, gains, layer norms, embeddings and
    convolutions. A parameter that is also used in another way has no complete list; whoever uses
    sites compares the gradient they give with the real one.

    All of the loss has to go through the first site, because what happens between it and the loss
    is what `sample_rows` looks at. A loss with several heads has no such site, and none is
    returned: another head could couple the samples, or see rows that the first one does not.
    """
    names = {id(p): n for n, p in parameters.items()}
    found: list[Site] = []
    for node in _nodes(loss.grad_fn):
        maker = _MAKERS.get(node.name())
        site = None if maker is None else maker(node, _leaves(node, names), parameters)
        if site is not None:
            found.append(site)
    if not found:
        return []
    passed_by = set(_nodes(loss.grad_fn, without=found[0].edge.node))
    return [] if any(site.edge.node in passed_by for site in found[1:]) else found


def _nodes(start: Node, without: Node = None) -> list[Node]:
    """Returns the nodes that can be reached from one, breadth first, not through ``without``."""
    order: list[Node] = [] if start is None or start == without else [start]
    seen: set[Node] = {start, without}
    for node in order:  # which grows
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                order.append(following)
    return order


_VIEWS = ("TBackward0", "ViewBackward0", "SliceBackward0", "SplitBackward0", "UnsafeSplitBackward0",
          "SelectBackward0", "TransposeBackward0", "PermuteBackward0", "ReshapeAliasBackward0",
          "UnsqueezeBackward0", "SqueezeBackward1", "SplitWithSizesBackward0", "AliasBackward0",
          "UnbindBackward0", "ChunkBackward0", "NarrowBackward0")  # fmt: skip


def _leaves(node: Node, names: Mapping[int, str]) -> list[tuple[str | None, list[str]]]:
    """For each input of a node: the parameter it is (a view of), and the views on the way."""
    found: list[tuple[str | None, list[str]]] = []
    for source, _ in node.next_functions:
        way: list[str] = []
        at: Node = source
        while at is not None and at.name() in _VIEWS:
            way.append(at.name())
            at = at.next_functions[0][0]
        variable = getattr(at, "variable", None)
        found.append((names.get(id(variable)) if variable is not None else None, way))
    return found


Leaves = list[tuple[str | None, list[str]]]
Parameters = Mapping[str, Tensor]


def _addmm(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return None
    bias, weight = leaves[0], leaves[2]
    return _linear(node, node._saved_mat1, node._saved_mat2, weight, bias[0], parameters)


def _mm(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    return _linear(node, node._saved_self, node._saved_mat2, leaves[1], None, parameters)


def _linear(
    node: Node,
    a: Tensor | None,
    matrix: Tensor | None,
    weight: tuple[str | None, list[str]],
    bias: str | None,
    parameters: Parameters,
) -> Site | None:
    """``out = a @ matrix + bias``, the matrix (in, out) a view of a parameter."""
    name, way = weight
    if name is not None and a is None:
        return None
    if name is not None and matrix is None and way not in ([], ["TBackward0"]):
        return None
    if name is None and bias is None:
        return None
    view = _view_of(parameters[name], matrix, way) if name is not None else None

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        count = rows.labels.numel()
        total: Tensor | None = None
        if view is not None and name is not None and name in vectors.names and a is not None:
            left = a.to(parameters[name].dtype)
            if vectors.shared:
                total = left @ view(vectors.batch(name, 0, 1))[0]
            else:
                total = rows.scatter(
                    [
                        torch.bmm(rows.gather(left, i, j), view(vectors.batch(name, i, j)))
                        for i, j in _groups(rows, parameters[name])
                    ]
                )
        if bias is not None and bias in vectors.names:
            added = _spread(vectors, bias, rows, parameters)
            total = added if total is None else total + added
        assert total is not None
        return total.expand(count, *total.shape[1:])

    used = tuple(n for n in (name, bias) if n is not None)
    return Site(GradientEdge(node, 0), used, change, _output_shape(node)[-1])


def _view_of(
    parameter: Tensor, matrix: Tensor | None, way: list[str]
) -> Callable[[Tensor], Tensor]:
    """Returns how the matrix (in, out) is seen in the parameter, for a batch of such parameters."""
    if matrix is None or not parameter.is_contiguous():
        return (lambda V: V.transpose(1, 2)) if way == ["TBackward0"] else (lambda V: V)
    size, stride = tuple(matrix.shape), tuple(matrix.stride())
    offset = matrix.storage_offset() - parameter.storage_offset()

    def view(V: Tensor) -> Tensor:
        whole = V.contiguous()
        return whole.as_strided((V.shape[0], *size), (whole.stride(0), *stride), offset)

    same = matrix.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    if same:
        return view
    return (lambda V: V.transpose(1, 2)) if way == ["TBackward0"] else (lambda V: V)


def _groups(rows: Rows, parameter: Tensor) -> list[tuple[int, int]]:
    """Returns ranges of samples whose vectors of a parameter fit into memory together."""
    samples = rows.index.shape[0]
    step = max(1, min(samples, GROUP_ELEMENTS // max(parameter.numel(), 1)))
    return [(i, min(i + step, samples)) for i in range(0, samples, step)]


def _spread(vectors: Vectors, name: str, rows: Rows, parameters: Parameters) -> Tensor:
    """Returns a parameter's vector at each row: (rows, *shape), or (1, *shape) when shared."""
    if vectors.shared:
        return vectors.batch(name, 0, 1)
    groups = _groups(rows, parameters[name])
    whole = torch.cat([vectors.batch(name, i, j) for i, j in groups])
    return torch.cat([whole, whole.new_zeros(1, *whole.shape[1:])])[rows.labels]


def _add(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    """``x + b``: an added bias or a table of positions, broadcast along leading dimensions."""
    if getattr(node, "_saved_alpha", 1) != 1:
        return None
    named = [name for name, way in leaves if name is not None and not way]
    if len(named) != 1:
        return None
    return _elementwise(node, named[0], None, parameters)


def _mul(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    """``x * w``: the gain of a norm written by hand."""
    named = [i for i, (name, way) in enumerate(leaves) if name is not None and not way]
    if len(named) != 1:
        return None
    factor = node._saved_other if named[0] == 0 else node._saved_self
    name = leaves[named[0]][0]
    return None if name is None or factor is None else _elementwise(node, name, factor, parameters)


def _elementwise(
    node: Node, name: str, factor: Tensor | None, parameters: Parameters
) -> Site | None:
    shape = _output_shape(node)
    event = tuple(parameters[name].shape)
    if len(shape) <= len(event) or shape[len(shape) - len(event) :] != event:
        return None
    rows_of = None if factor is None else factor.expand(shape).reshape(-1, *event)

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        added = _spread(vectors, name, rows, parameters)
        total = added if rows_of is None else added * rows_of
        return total.expand(rows.labels.numel(), *event)

    return Site(GradientEdge(node, 0), (name,), change, math.prod(event))


def _output_shape(node: Node) -> tuple[int, ...]:
    # What a node's backward takes in has the shape of the operation's output.
    return tuple(node._input_metadata[0].shape)


def _layer_norm(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    gain, bias = leaves[1][0], leaves[2][0]
    if gain is None and bias is None:
        return None
    event = tuple(node._saved_normalized_shape)
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    return _affine(node, (x - mean) * rstd, event, gain, bias, parameters)


def _affine(
    node: Node,
    normalized: Tensor,
    event: tuple[int, ...],
    gain: str | None,
    bias: str | None,
    parameters: Parameters,
) -> Site:
    rows_of = normalized.reshape(-1, *event)

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        total: Tensor = torch.zeros((), dtype=rows_of.dtype, device=rows_of.device)
        if gain is not None and gain in vectors.names:
            total = total + _spread(vectors, gain, rows, parameters) * rows_of
        if bias is not None and bias in vectors.names:
            total = total + _spread(vectors, bias, rows, parameters)
        return total.expand(rows.labels.numel(), *event)

    used = tuple(n for n in (gain, bias) if n is not None)
    return Site(GradientEdge(node, 0), used, change, math.prod(event))


def _embedding(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    name, way = leaves[0]
    if name is None or way or node._saved_scale_grad_by_freq:
        return None
    tokens = node._saved_indices.reshape(-1)
    padding = int(node._saved_padding_idx)
    padding = padding if padding < 2**62 else padding - 2**64  # an unsigned -1: no padding

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        found = vectors.table_rows(name, tokens, rows.labels)
        lost = (tokens == padding) | (rows.labels < 0)
        return found.masked_fill(lost.unsqueeze(1), 0.0)

    return Site(GradientEdge(node, 0), (name,), change, parameters[name].shape[1], table=True)


def _convolution(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    weight, bias = leaves[1], leaves[2][0]
    name = weight[0]
    x = node._saved_input
    if node._saved_transposed or (name is not None and (weight[1] or x is None)):
        return None
    if name is None and bias is None:
        return None
    shape = _output_shape(node)
    stride, padding = tuple(node._saved_stride), tuple(node._saved_padding)
    dilation, parts = tuple(node._saved_dilation), int(node._saved_groups)
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(stride)]

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        total: Tensor | None = None
        if name is not None and name in vectors.names and vectors.shared:
            V = vectors.batch(name, 0, 1)[0]
            total = convolve(x, V, None, stride, padding, dilation, parts)
        elif name is not None and name in vectors.names:
            pieces = []
            for i, j in _groups(rows, parameters[name]):
                V = vectors.batch(name, i, j).flatten(0, 1)  # samples as groups of one convolution
                images = rows.gather(x, i, j).transpose(0, 1).flatten(1, 2)
                y = convolve(images, V, None, stride, padding, dilation, parts * (j - i))
                pieces.append(y.unflatten(1, (j - i, -1)).transpose(0, 1))
            total = rows.scatter(pieces)
        if bias is not None and bias in vectors.names:
            added = _spread(vectors, bias, rows, parameters)
            added = added.reshape(*added.shape, *[1] * len(stride))
            total = added if total is None else total + added
        assert total is not None
        return total.expand(shape)

    used = tuple(n for n in (name, bias) if n is not None)
    return Site(GradientEdge(node, 0), used, change, math.prod(shape[1:]))


_MAKERS: dict[str, Callable[[Node, Leaves, Parameters], Site | None]] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "AddBackward0": _add,
    "MulBackward0": _mul,
    "NativeLayerNormBackward0": _layer_norm,
    "EmbeddingBackward0": _embedding,
    "ConvolutionBackward0": _convolution,
}
"""Operations a site can be made of; a new one is a function here."""

_MATCH = 1e-3  # relative distance at which two labels count as the same (as a share of spacing)
_DEPENDS = 1e-7  # of the largest row: below it, the loss does not depend on a row


def sample_rows(
    sites: Sequence[Site],
    gradients: Sequence[Tensor],
    hint: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int, list[Rows | None]] | None:
    r"""Finds out which rows of every site belong to which sample, from two backward passes.

    Backward is linear: rows of the site nearest to the loss get a random seed :math:`\epsilon`
    once as it is and once multiplied by a number of their own sample, :math:`\ell_n`. A row of
    another site that only sample *n* depends on then receives twice the same, the second time
    :math:`\ell_n` as large; a row that several samples depend on does not. So no layout is assumed:
    batch first, time first, flattened, packed sequences; and samples that are coupled (batch norm
    in training mode) are noticed. A loss that couples them (a contrastive one) shows in the second
    derivative at the first site.

    Args:
        sites: From `find_sites`.
        gradients: The loss's gradient at each site, with its graph.
        hint: How many samples there are, if that is known; else the rows of the first site, or
            what divides them.
        generator: Source of the seeds.

    Returns:
        The number of samples and the rows of each site (None: not separable there); None when
        the samples of this loss cannot be told apart.
    """
    if not sites:
        return None
    root, gradient = sites[0].edge, gradients[0]
    generator = generator or torch.Generator().manual_seed(0)
    seed = torch.randn(gradient.shape, generator=generator).to(gradient)
    edges = [site.edge for site in sites[1:]]
    once = _backward(root, seed, edges)
    best: tuple[int, list[Rows | None]] | None = None
    most = 0
    for samples, labels in _layouts(sites[0].rows(gradient), hint, sites):
        numbers = (1.0 + torch.randperm(samples, generator=generator) / samples).to(gradient)
        labels = labels.to(gradient.device)  # noqa: PLW2901 - the same, where it is needed
        scaled = (seed.view(labels.numel(), -1) * numbers[labels].unsqueeze(1)).view_as(seed)
        if _coupled_by_the_loss(root, gradient, seed, scaled, labels, numbers):
            continue
        twice = _backward(root, scaled, edges)
        found: list[Rows | None] = [Rows.of(labels, samples)]
        for site, at, one, two in zip(sites[1:], gradients[1:], once, twice, strict=True):
            assigned = _labels(one, two, site.rows(at), numbers)
            found.append(None if assigned is None else Rows.of(assigned, samples))
        separable = sum(rows is not None for rows in found)
        if separable > most:  # among equals the first, which is the finest
            best, most = (samples, found), separable
        if separable == len(found):
            break
    return best


def _layouts(rows: int, hint: int | None, sites: Sequence[Site]) -> list[tuple[int, Tensor]]:
    """Ways in which the rows nearest to the loss may belong to samples: (samples, labels).

    Without a hint: every row a sample of its own (the finest that is right is the best), else one
    of the two leading sizes that activations have before a linear map flattens them.
    """
    at = torch.arange(rows)
    sizes = [rows, *_leading_sizes(sites)] if hint is None else [hint]
    found: list[tuple[int, Tensor]] = []
    for size in dict.fromkeys(sizes):
        if size < 2 or rows % size:
            continue
        found.append((size, at // (rows // size)))
        if size < rows:
            found.append((size, at % size))
    return found


def _leading_sizes(sites: Sequence[Site]) -> list[int]:
    sizes: list[int] = []
    for site in sites:
        for source, _ in site.edge.node.next_functions:
            shape = getattr(source, "_saved_self_sym_sizes", ())
            if len(shape) >= 3:
                sizes += [int(size) for size in shape[:2]]
    return sizes


def _coupled_by_the_loss(
    root: GradientEdge,
    gradient: Tensor,
    seed: Tensor,
    scaled: Tensor,
    labels: Tensor,
    numbers: Tensor,
) -> bool:
    if not gradient.requires_grad:  # a loss that is linear from here on
        return False
    once, twice = (
        torch.autograd.grad(gradient, [root], s, retain_graph=True, allow_unused=True)[0]
        for s in (seed, scaled)
    )
    if once is None or twice is None or not bool(once.any()):
        return False
    own = _labels(once, twice, labels.numel(), numbers)
    return own is None or bool(((own != labels) & (own >= 0)).any())


def _backward(
    output: GradientEdge, seed: Tensor, inputs: Sequence[GradientEdge]
) -> Sequence[Tensor | None]:
    if not inputs:
        return []
    return torch.autograd.grad([output], list(inputs), [seed], retain_graph=True, allow_unused=True)


def _labels(once: Tensor | None, twice: Tensor | None, rows: int, numbers: Tensor) -> Tensor | None:
    """Returns the sample of every row, -1 where none; None when some row has several."""
    if once is None or twice is None:
        return None
    a, b = once.reshape(rows, -1).double(), twice.reshape(rows, -1).double()
    square = a.square().sum(1)
    if not bool(square.max() > 0):
        return None
    depends = square > (_DEPENDS**2) * square.max()
    ratio = (a * b).sum(1) / square.clamp(min=1e-300)
    # Several samples: the second pass points elsewhere, or between the numbers.
    apart = (b - ratio.unsqueeze(1) * a).square().sum(1).sqrt() / square.sqrt().clamp(min=1e-150)
    order = torch.argsort(numbers)
    level = ((ratio - 1.0) * numbers.numel()).round().clamp(0, numbers.numel() - 1).long()
    label = order[level]
    distance = (ratio - numbers.double()[label]).abs() * numbers.numel()
    fits = (distance < 0.1) & (apart < _MATCH)
    if not bool((fits | ~depends).all()):
        return None
    return torch.where(depends, label, torch.full_like(label, -1))
