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

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

GROUP_ELEMENTS = 1 << 24  # of the vectors of a group of samples that exist at the same time

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes by operation


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a site's output belong to which sample.

    The tables are made when they are first needed: a vector for all samples needs none.

    Attributes:
        labels: (rows,) the sample of each row; -1: of none, the loss does not depend on it.
        samples: How many there are.
    """

    labels: Tensor
    samples: int

    @property
    def index(self) -> Tensor:
        """(samples, most) the rows of each sample, padded with the number of rows."""
        return self._tables[0]

    @property
    def place(self) -> Tensor:
        """(rows,) where a row stands in ``index`` flattened; its length for rows of none."""
        return self._tables[1]

    @property
    def plain(self) -> bool:
        """Rows are sorted by sample, equally many each."""
        return self._tables[2]

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor, bool]:
        labels, samples = self.labels, self.samples
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
        return index, place, plain

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
        instead_of: The lookup that it stands for, and the views between; none of these is used
            elsewhere.
    """

    edge: GradientEdge
    names: tuple[str, ...]
    change: Change
    row_size: int
    table: bool = False
    instead_of: tuple[Node, ...] = ()

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
    nodes = _nodes(loss.grad_fn)
    for node in nodes:
        maker = _MAKERS.get(node.name())
        site = None if maker is None else maker(node, _leaves(node, names), parameters)
        if site is not None:
            found.append(site)
    found = _without_replaced(found, nodes)
    if not found:
        return []
    passed_by = set(_nodes(loss.grad_fn, without=found[0].edge.node))
    return [] if any(site.edge.node in passed_by for site in found[1:]) else found


def _without_replaced(sites: list[Site], nodes: Sequence[Node]) -> list[Site]:
    """Drops lookups that another site stands for; or that one, if they are used elsewhere, too."""
    if not any(site.instead_of for site in sites):
        return sites
    uses = Counter(following for node in nodes for following, _ in node.next_functions)
    kept = [site for site in sites if all(uses[node] == 1 for node in site.instead_of)]
    replaced = {node for site in kept for node in site.instead_of}
    return [site for site in kept if site.edge.node not in replaced]


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
    samples = rows.samples
    step = max(1, min(samples, GROUP_ELEMENTS // max(parameter.numel(), 1)))
    return [(i, min(i + step, samples)) for i in range(0, samples, step)]


def _spread(
    vectors: Vectors,
    name: str,
    rows: Rows,
    parameters: Parameters,
    event: tuple[int, ...] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Returns a parameter's vector at each row: (rows, *event), or (1, *event) when shared.

    Args:
        vectors: Of the parameters.
        name: The parameter.
        rows: Whose the rows are.
        parameters: All of them.
        event: Shape of a row; the parameter's own if left out.
        places: (rows,) which part of that shape a row gets; None: there is only one.
    """
    event = tuple(parameters[name].shape) if event is None else event
    if vectors.shared:
        one = vectors.batch(name, 0, 1)[0].reshape(-1, *event)
        return one if places is None else one[places.to(one.device)]
    groups = _groups(rows, parameters[name])
    whole = torch.cat([vectors.batch(name, i, j) for i, j in groups])
    parts = whole.reshape(whole.shape[0], -1, *event)
    padded = torch.cat([parts, parts.new_zeros(1, *parts.shape[1:])])
    if places is None:
        return padded.squeeze(1)[rows.labels]
    return padded[rows.labels, places.to(padded.device)]


def _add(node: Node, leaves: Leaves, parameters: Parameters) -> Site | None:
    """``x + b``: an added bias, or a table of positions that all samples share."""
    if getattr(node, "_saved_alpha", 1) != 1:
        return None
    named = [name for name, way in leaves if name is not None and not way]
    if not named:
        return _added_lookup(node, parameters)
    return _elementwise(node, named[0], None, parameters) if len(named) == 1 else None


_IN_ORDER = ("ViewBackward0", "UnsqueezeBackward0", "ReshapeAliasBackward0", "ExpandBackward0")


def _added_lookup(node: Node, parameters: Parameters) -> Site | None:
    """``x + table[positions]``, looked up once and broadcast: only the sum has rows of samples."""
    shape = _output_shape(node)
    for source, _ in node.next_functions:
        way: list[Node] = []
        at = source
        while at is not None and at.name() in _IN_ORDER:
            way.append(at)
            at = at.next_functions[0][0]
        if at is None or at.name() != "EmbeddingBackward0":
            continue
        tokens = at._saved_indices
        width = _output_shape(at)[-1]
        if tokens.numel() * width == math.prod(shape) or shape[-1] != width:
            continue
        for view in reversed(way):
            seen = _output_shape(view)
            if seen[-1] != width:
                return None
            expands = view.name() == "ExpandBackward0"
            tokens = tokens.expand(seen[:-1]) if expands else tokens.reshape(seen[:-1])
        leaves = _leaves(at, {id(p): name for name, p in parameters.items()})
        tokens = tokens.expand(shape[:-1]).reshape(-1)
        return _lookup(at, node, leaves, tokens, parameters, (*way, at))
    return None


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
    layout = _broadcast(tuple(parameters[name].shape), shape)
    if layout is None:
        return None
    event, places = layout
    rows_of = None if factor is None else factor.expand(shape).reshape(-1, *event)

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        added = _spread(vectors, name, rows, parameters, event, places)
        total = added if rows_of is None else added * rows_of
        return total.expand(rows.labels.numel(), *event)

    return Site(GradientEdge(node, 0), (name,), change, math.prod(event))


def _broadcast(
    size: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Tensor | None] | None:
    """Returns the shape of a row that a parameter is broadcast to, and which part each row gets.

    All of it (None), where only leading dimensions are added; else, as of a (T, 1, C) table of
    positions, the parts are those that its leading dimensions count.
    """
    while size and size[0] == 1 and len(size) > 1:
        size = size[1:]
    if len(size) < len(shape) and shape[len(shape) - len(size) :] == size:
        return size, None
    same = 0
    while same < min(len(size), len(shape)) and size[-1 - same] == shape[-1 - same]:
        same += 1
    lead = size[: len(size) - same]
    if same == 0 or math.prod(lead) == math.prod(shape[: len(shape) - same]):
        return None  # rows of a single element each, or nothing is broadcast
    places = torch.arange(math.prod(lead)).view(lead).expand(shape[: len(shape) - same])
    return size[len(lead) :], places.reshape(-1)


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
    return _lookup(node, node, leaves, node._saved_indices.reshape(-1), parameters)


def _lookup(
    node: Node,
    output: Node,
    leaves: Leaves,
    tokens: Tensor,
    parameters: Parameters,
    instead_of: tuple[Node, ...] = (),
) -> Site | None:
    """Rows ``tokens`` of a table, as an embedding's node looks them up, added to an output."""
    name, way = leaves[0]
    if name is None or way or node._saved_scale_grad_by_freq:
        return None
    padding = int(node._saved_padding_idx)
    padding = padding if padding < 2**62 else padding - 2**64  # an unsigned -1: no padding

    def change(vectors: Vectors, rows: Rows) -> Tensor:
        found = vectors.table_rows(name, tokens, rows.labels)
        lost = (tokens == padding) | (rows.labels < 0)
        return found.masked_fill(lost.unsqueeze(1), 0.0)

    edge, width = GradientEdge(output, 0), parameters[name].shape[1]
    return Site(edge, (name,), change, width, table=True, instead_of=instead_of)


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
