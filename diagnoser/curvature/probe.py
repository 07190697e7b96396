r"""A fixed set of samples to measure on, larger than memory if need be.

The loss of a probe set is the mean over its samples. In chunks of :math:`n_k` of N samples

.. math:: L = \sum_k \frac{n_k}{N} L_k = \frac{1}{K} \sum_k w_k L_k, \qquad w_k = \frac{K n_k}{N}

and the same holds for its Hessian, so the chunks are given the weights :math:`w_k`. The chunks of a
batch differ by one sample at most, and so the spread between them is that between samples. Of a
loss that is a mean over something else (tokens that are not padding), ``terms`` counts that
instead; without it such means are weighted by samples, which is another quantity, and said.

All chunks' graphs are kept if memory allows (one forward each, any number of products), else one at
a time, built again whenever another is needed. When memory runs out all the same, the work is
started again with less.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diagnoser.curvature.finite_difference import TOLERANCE, CentralDifference
from diagnoser.curvature.hessian import Hessian, NoSecondDerivativeError
from diagnoser.curvature.memory import free_memory, kept_bytes, out_of_memory
from diagnoser.curvature.operator import Operator, trained
from diagnoser.curvature.random_states import RandomStates
from diagnoser.curvature.replay import compiled_modules, eager_code
from diagnoser.curvature.self_checks import (
    finite_difference_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.curvature.streamed import Loss, StreamedHessian
from diagnoser.errors import MeasurementError

SHARE_OF_FREE = 0.5  # of the memory that is free now, for graphs
GRAPH = 3.0  # memory of a loss and its gradient's graph, in what the loss's forward alone keeps
SAME = 1e-3  # relative difference of two losses that count as the same

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch)``: the scalar loss of a batch, a mean over its samples."""

T = TypeVar("T")


class ProbeSet:
    """Measures a model's curvature on fixed batches, whatever their size.

    While it measures, all modules are in evaluation mode, compiled code runs uncompiled, and every
    evaluation draws the same random numbers; afterwards modes, buffers and random streams are as
    they were. No ``.grad`` is touched.

    Args:
        loss_fn: Gives the loss of a model on a batch: a mean over samples.
        model: The model.
        batches: The batches. Each is a tensor, or tuples, lists and mappings of tensors, all with
            the samples along dimension 0 (tensors without dimensions belong to every sample).
            Where one is something else, batches stay whole and have equal weights.
        parameters: Name to leaf tensor; the model's trained parameters if left out.
        terms: How many terms the loss of a batch is the mean of; its number of samples if left out.
        chunk_size: The most samples of a chunk; whatever fits if left out.
        streamed: Keep one chunk's graph at a time from the start, not only when memory is short.
        sites: Also keep the gradient at every site, where all graphs are kept (`per_sample`).
        dtype: Measures on a copy of the model and of the batches in this type, such as
            ``torch.float64``; that is so under autocast, too, which leaves float64 alone.
        on_note: Told, in a sentence, whenever memory or a missing derivative changes the plan.

    Attributes:
        notes: All that ``on_note`` was told.

    Raises:
        MeasurementError: There is no batch, or one without samples.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        parameters: Mapping[str, Tensor] | None = None,
        terms: Callable[[Any], float] | None = None,
        chunk_size: int | None = None,
        streamed: bool = False,
        sites: bool = False,
        dtype: torch.dtype | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        if not batches:
            raise MeasurementError("a probe set without batches; give at least one")
        self._whole = not all(divisible(batch) for batch in batches)
        sizes = [1 if self._whole else samples_of(batch) for batch in batches]
        self.notes: list[str] = []
        self._plan = _Plan(max(sizes) if chunk_size is None else max(chunk_size, 1), streamed)
        self._loss_fn, self._model, self._batches = loss_fn, model, list(batches)
        self._dtype = dtype
        self._parameters = trained(
            dict(model.named_parameters()) if parameters is None else parameters
        )
        self._terms = terms or (_one if self._whole else samples_of)
        self._sites = sites
        self._on_note = on_note
        self._random = RandomStates.now()

    @property
    def chunk_size(self) -> int:
        """The most samples of a chunk at present."""
        return self._plan.chunk_size

    @property
    def streamed(self) -> bool:
        """Whether only one chunk's graph is kept at a time."""
        return self._plan.streamed

    def measure(
        self, work: Callable[[Operator], T], parameters: Mapping[str, Tensor] | None = None
    ) -> T:
        """Returns ``work(operator)``, by the best method that works here.

        ``work`` may be started several times: with smaller chunks after memory has run out, with
        central differences where an operation has no second derivative. Random vectors should
        therefore come from a generator that it makes itself.

        Args:
            work: Given the operator, whose ``parameters`` have the names given here.
            parameters: From now on, instead of those of the constructor.

        Raises:
            MeasurementError: When a single sample needs more memory than there is, or no method
                gives products.
        """
        if parameters is not None:
            self._parameters = trained(parameters)
        if self._dtype is not None:
            try:
                return self._twin(self._dtype).measure(work)
            except RuntimeError as error:
                if out_of_memory(error) or "dtype" not in str(error):
                    raise
                raise MeasurementError(
                    f"in {self._dtype}: {error}; let loss_fn follow the type of the model's "
                    "parameters"
                ) from error
        with self._evaluating():
            if not self._plan.made:
                self._plan.made = True
                self._make_plan()
            while True:
                try:
                    with self._operator() as operator:
                        return work(operator)
                except NoSecondDerivativeError as error:
                    if self._plan.differences:
                        raise
                    remedy = functools.partial(self._use_differences, str(error))
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    remedy = functools.partial(self._shrink)
                remedy()  # out here: a handler keeps the failed attempt's tensors alive

    @contextmanager
    def evaluations(self) -> Iterator[Sequence[Loss]]:
        """Yields what computes the loss of each batch, for who differentiates it in another way.

        Raises:
            MeasurementError: It is to be measured on a copy in another type.
        """
        if self._dtype is not None:
            raise MeasurementError("dtype= needs a copy of the model, and there can be none")
        with self._evaluating():
            yield [functools.partial(self._loss, *one) for one in self._chunks()]

    def _twin(self, dtype: torch.dtype) -> ProbeSet:
        """Returns the same probe set on a copy of the model as it is now, in another type."""
        twin = copy.copy(self)  # with the same plan: what was learnt of memory stays
        memo: dict[int, Any] = {}
        twin._model = copy.deepcopy(self._model, memo)
        for parameter in self._parameters.values():
            if id(parameter) not in memo:
                raise MeasurementError(
                    f"in {str(dtype).removeprefix('torch.')} only parameters of the model can be "
                    "measured; leave `dtype` out, or the others"
                )
        twin._model.to(dtype)
        twin._parameters = {name: memo[id(p)] for name, p in self._parameters.items()}
        twin._batches = [_cast(batch, dtype) for batch in self._batches]
        twin._dtype = None
        return twin

    # -- the operator ----------------------------------------------------------------------------

    def _operator(self) -> Operator:
        chunks = self._chunks()
        losses = [functools.partial(self._loss, chunk, weight) for chunk, weight in chunks]
        if len(chunks) > len(self._batches) and not self._plan.compared:
            self._plan.compared = True
            self._compare(losses)
        if self._plan.differences:
            return CentralDifference(losses, self._parameters)
        operator: Operator
        if self.streamed:
            operator = StreamedHessian(losses, self._parameters, self._trustworthy)
        else:
            graphs = [self._trustworthy(loss) for loss in losses]
            operator = Hessian(graphs, self._parameters, sites=self._sites)
        if compiled_modules(self._model):
            operator.method = "eager replay"
        return operator

    def _chunks(self) -> list[tuple[Any, float]]:
        """Returns pieces of the batches with their weights, whose mean is one."""
        pieces = [piece for batch in self._batches for piece in self._split(batch)]
        terms = [float(self._terms(piece)) for piece in pieces]
        counted = [(piece, n) for piece, n in zip(pieces, terms, strict=True) if n > 0.0]
        total = sum(n for _, n in counted)
        if not total > 0.0:
            raise MeasurementError("the probe set's loss has no terms; look at `terms`")
        return [(piece, n * len(counted) / total) for piece, n in counted]

    def _split(self, batch: Any) -> list[Any]:
        if self._whole:
            return [batch]
        return split(batch, math.ceil(samples_of(batch) / self.chunk_size))

    def _loss(self, chunk: Any, weight: float) -> Tensor:
        with self._random.replayed():
            loss = self._loss_fn(self._model, chunk)
        return loss if weight == 1.0 else loss * weight

    def _trustworthy(self, compute: Loss) -> Tensor:
        """Returns the loss, after a look at whether its second derivative can be trusted."""
        with torch.enable_grad():
            loss = compute()
        for node in unreliable_nodes(loss):
            raise NoSecondDerivativeError(f"{node} has no trustworthy second derivative")
        unverified = [] if self._plan.verified else unverified_nodes(loss)
        if unverified and not self._agrees(loss, compute):
            raise NoSecondDerivativeError(f"{unverified[0]}: its second derivative is wrong")
        self._plan.verified = True
        return loss

    def _agrees(self, loss: Tensor, compute: Loss) -> bool:
        """Whether a product with a random vector is the central difference of gradients."""
        generator = torch.Generator().manual_seed(0)
        v = {
            name: torch.randn(p.shape, generator=generator).to(p)
            for name, p in self._parameters.items()
        }
        exact = Hessian(loss, self._parameters).product(v)
        return finite_difference_defect(compute, self._parameters, v, exact) <= TOLERANCE

    def _use_differences(self, reason: str) -> None:
        self._plan.differences = True
        self._note(f"central differences instead of exact products: {reason.partition(';')[0]}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self._on_note is not None:
            self._on_note(text)

    # -- memory ----------------------------------------------------------------------------------

    def _make_plan(self) -> None:
        """Chooses chunks that should fit, by what the graph of a single sample keeps."""
        if self._whole:
            return
        free = free_memory(next(iter(self._parameters.values())).device)
        samples = sum(samples_of(batch) for batch in self._batches)
        if free is None or samples < 2:
            return
        one = split(self._batches[0], samples_of(self._batches[0]))[0]
        try:
            needed = GRAPH * kept_bytes(lambda: self._loss(one, 1.0), self._parameters)
        except Exception:  # the work itself will meet it, in a place where it can be told
            return
        room = SHARE_OF_FREE * free
        if needed * samples <= room:
            return
        self._plan.streamed = True
        self._plan.chunk_size = min(self.chunk_size, max(int(room / needed), 1))
        self._note(
            f"the graphs of {samples} samples would take about {needed * samples / 2**30:.2g} GiB "
            f"of {free / 2**30:.2g} free: at most {self.chunk_size} at a time"
        )

    def _shrink(self) -> None:
        """Makes do with less memory: one graph at a time, then half a chunk."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        sizes = [1 if self._whole else samples_of(chunk) for chunk, _ in self._chunks()]
        if len(sizes) > 1 and not self.streamed and not self._plan.differences:
            self._plan.streamed = True
            piece = "batch" if self._whole else f"chunk of {max(sizes)} samples"
            self._note(f"out of memory: one {piece} at a time")
            return
        if self._whole:
            raise MeasurementError(
                "out of memory with a single batch, and batches that are not tensors (or tuples, "
                "lists and mappings of them) cannot be split; give smaller ones"
            )
        if max(sizes) < 2:
            raise MeasurementError(
                "out of memory with a single sample; use shorter samples, fewer parameters or a "
                "device with more memory"
            )
        self._plan.streamed = True
        self._plan.chunk_size = max(sizes) // 2
        self._note(f"out of memory with {max(sizes)} samples: halved to {self.chunk_size}")

    def _compare(self, losses: Sequence[Loss]) -> None:
        """Notes it when the chunks' mean loss is not the batches': another quantity is measured."""
        terms = [float(self._terms(batch)) for batch in self._batches]
        try:
            with torch.no_grad():
                whole = sum(
                    n * float(self._loss(batch, 1.0))
                    for batch, n in zip(self._batches, terms, strict=True)
                ) / sum(terms)
                chunked = sum(float(loss()) for loss in losses) / len(losses)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._note("whole batches do not fit: not known whether their loss is the chunks' mean")
            return
        if not abs(chunked - whole) <= SAME * max(abs(whole), abs(chunked)):
            self._note(
                f"the chunks' mean loss is {chunked:.4g}, that of whole batches {whole:.4g}: the "
                "samples are coupled, or the loss is a mean over something else (see `terms`)"
            )

    # -- leaving no trace ------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode; modes, buffers and random streams are put back, also after an error."""
        modes = [(module, module.training) for module in self._model.modules()]
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._model.buffers()]
        random = RandomStates.now()
        with eager_code():
            try:
                for module, _ in modes:
                    module.training = False
                yield
            finally:
                for module, training in modes:
                    module.training = training
                for buffer, saved in buffers:
                    buffer.data.copy_(saved)  # through .data: a live graph may have saved it
                random.restore()


@dataclass(slots=True, eq=False)
class _Plan:
    """How a probe set is measured, as far as it has been found out."""

    chunk_size: int
    streamed: bool
    differences: bool = False
    made: bool = False
    compared: bool = False
    verified: bool = False


def divisible(batch: Any) -> bool:
    """Whether a batch can be split: all its tensors have as many samples along dimension 0."""
    return len({tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0}) == 1


def _one(_: Any) -> float:
    return 1.0


def samples_of(batch: Any) -> int:
    """Returns the number of samples of a batch.

    Raises:
        MeasurementError: When there is none, or tensors disagree.
    """
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0}
    if len(sizes) != 1 or 0 in sizes:
        raise MeasurementError(
            "a probe batch must hold tensors with the same number of samples along dimension 0, at "
            f"least one; this {type(batch).__name__} has {sorted(sizes) or 'none'}"
        )
    return sizes.pop()


def split(batch: Any, pieces: int) -> list[Any]:
    """Splits a batch along dimension 0 into views of nearly equally many samples.

    Tensors without dimensions and whatever is no tensor go into every piece; mappings become
    dictionaries.

    >>> import torch
    >>> split({"x": torch.arange(5), "scale": 2.0}, 2)
    [{'x': tensor([0, 1, 2]), 'scale': 2.0}, {'x': tensor([3, 4]), 'scale': 2.0}]
    """
    samples = samples_of(batch)
    bounds = [-(-samples * k // pieces) for k in range(pieces + 1)]
    return [_narrow(batch, start, stop) for start, stop in itertools.pairwise(bounds)]


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Returns a batch with a function applied to its tensors; mappings become dictionaries."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_map(function, value) for value in batch)
    return batch


def _narrow(batch: Any, start: int, stop: int) -> Any:
    return _map(lambda tensor: tensor[start:stop] if tensor.ndim > 0 else tensor, batch)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    return _map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
