"""What the study measures of a model between two steps, always on the same probe batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.study.settings import Setting, Training
from diagnoser.curvature import (
    Operator,
    ProbeSet,
    block_eigenvalues,
    block_trace,
    coupling_matrix,
    coupling_norms,
)
from diagnoser.curvature.pyhessian_backend import pyhessian_top_eigenvalues, pyhessian_trace
from diagnoser.types import Component, Estimate, Part

CHUNK: Final = 16  # samples whose spread tells what other samples would have given
ALPHAS: Final = tuple(round(-1.0 + 0.2 * i, 1) for i in range(11))
DIRECTIONS: Final = 5

Row = dict[str, Any]


def component(setting: Setting, name: str) -> Component:
    """Returns a row of the study's table as a component."""
    parts = tuple(Part(parameter) for parameter in setting.block(name))
    return Component(name, "other", name, 0, parts, 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def probe_of(training: Training) -> ProbeSet:
    """Returns the fixed probe of a training, in chunks."""
    return ProbeSet(training.loss, training.model, [training.probe], chunk_size=CHUNK)


def curvature(training: Training, setting: Setting, names: Sequence[str], seed: int) -> list[Row]:
    """Returns trace, both ends and the three eigenvalues of largest magnitude of each block."""

    def work(operator: Operator) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for name in names:
            block = component(setting, name).parts
            ends = block_eigenvalues(operator, block, generator, max_steps=setting.products)
            trace = block_trace(
                operator, block, generator, basis=ends.basis, max_products=setting.products
            )
            rows.append(
                {
                    "block": name,
                    "trace": estimate(trace),
                    "lambda_min": estimate(ends.lambda_min),
                    "lambda_max": estimate(ends.lambda_max),
                    "extreme": [number(e.value) for e in ends.extreme],
                }
            )
        return rows

    with evaluating(training.model):
        return probe_of(training).measure(work)


def by_pyhessian(
    training: Training, setting: Setting, names: Sequence[str], seed: int
) -> list[Row]:
    """Returns what PyHessian 0.1 says of the same blocks, and how many probes its trace took."""
    rows = []
    for name in names:
        block = setting.block(name)
        trace = pyhessian_trace(
            training.model, training.loss, training.probe, parameters=block, seed=seed
        )
        top = pyhessian_top_eigenvalues(
            training.model, training.loss, training.probe, {name: block}, seed=seed
        )
        rows.append(
            {
                "block": name,
                "trace": number(trace.value),
                "probes": trace.samples,
                "top": number(top[name].value),
            }
        )
    return rows


def couplings(
    training: Training, setting: Setting, pairs: Sequence[tuple[str, str]], seed: int
) -> list[Row]:
    """Returns how much groups are coupled: norm, signed share, and the paper's ratio.

    ``norm``: Frobenius norm of the off-diagonal block. ``share``: g_a' H_ab g_b over the sum of the
    absolute values of all such terms of the pair, g the gradient. ``ratio``: the same over
    sqrt(|g_a' H_aa g_a| |g_b' H_bb g_b|), which looks like a correlation and is none where H is
    indefinite.
    """

    def work(operator: Operator) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for names in pairs:
            pair = [component(setting, name) for name in names]
            along = coupling_matrix(operator, operator.gradient, pair)
            (a, ab), (_, b) = (tuple(e.value for e in row) for row in along.values)
            below = math.sqrt(abs(a * b))
            norm = coupling_norms(operator, pair, generator, columns=setting.columns)[names]
            rows.append(
                {
                    "pair": list(names),
                    "norm": estimate(norm),
                    "share": estimate(along.shares[0][1]),
                    "ratio": number(ab / below if below > 0 else math.nan),
                }
            )
        return rows

    with evaluating(training.model):
        return probe_of(training).measure(work)


@torch.no_grad()
def landscape(training: Training, setting: Setting, name: str, seed: int) -> list[Row]:
    """Returns the loss along random directions from where a block stands.

    ``raw``: theta + alpha * delta, delta standard normal, as the paper has it; ``normalised``: each
    row of delta is as long as that of the weights (Li et al. 2018), without which a figure shows
    how large the weights are as much as how curved the loss is.
    """
    parameters = dict(training.model.named_parameters())
    block = {p: parameters[p] for p in setting.block(name)}
    kept = {p: tensor.clone() for p, tensor in block.items()}
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with evaluating(training.model):
        for _ in range(DIRECTIONS):
            drawn = {p: torch.randn(t.shape, generator=generator) for p, t in kept.items()}
            normal = {p: filter_normalised(drawn[p], kept[p]) for p in kept}
            for kind, direction in (("raw", drawn), ("normalised", normal)):
                losses = []
                for alpha in ALPHAS:
                    for p, tensor in block.items():
                        tensor.copy_(kept[p] + alpha * direction[p])
                    losses.append(number(training.loss(training.model, training.probe).item()))
                rows.append({"block": name, "kind": kind, "losses": losses})
        for p, tensor in block.items():
            tensor.copy_(kept[p])
    return rows


def filter_normalised(direction: Tensor, weight: Tensor) -> Tensor:
    """Scales each row of a direction to the length of the weight's (Li et al. 2018, section 4)."""
    rows, own = direction.flatten(1) if direction.ndim > 1 else direction[None], weight
    own = own.flatten(1) if own.ndim > 1 else own[None]
    scale = own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    return (rows * scale).view_as(weight)


def state(training: Training, setting: Setting, names: Sequence[str], seed: int) -> Row:
    """Returns what section 2.5 compares: loss, gradient norms, trace, ends, coupling.

    Coupled are the pairs of the study that a disturbed group is part of.
    """
    with evaluating(training.model):
        loss = training.loss(training.model, training.probe).item()
    return {
        "loss": number(loss),
        "gradient_norms": gradient_norms(training, setting, names),
        "curvature": curvature(training, setting, names, seed),
        "coupling": couplings(training, setting, setting.pairs_of(setting.disturbed), seed),
    }


def gradient_norms(training: Training, setting: Setting, names: Sequence[str]) -> Row:
    """Returns the norm of the gradient of each block, on the probe."""
    gradients = gradients_of(training)
    return {
        name: number(
            math.sqrt(sum(float(gradients[p].square().sum()) for p in setting.block(name)))
        )
        for name in names
    }


def gradients_of(training: Training) -> Mapping[str, Tensor]:
    """Returns the gradient of the probe's loss; nothing is left behind."""
    named = {n: p for n, p in training.model.named_parameters() if p.requires_grad}
    with evaluating(training.model):
        loss = training.loss(training.model, training.probe)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def depths_of(training: Training) -> Mapping[str, int]:
    """Returns how many operations lie at least between each trained parameter and the loss."""
    names = {p: name for name, p in training.model.named_parameters() if p.requires_grad}
    with evaluating(training.model):
        nodes = [training.loss(training.model, training.probe).grad_fn]
    found, seen, depth = dict[str, int](), set[Any](), 0
    while nodes:
        depth += 1
        following = [n for node in nodes if node is not None for n, _ in node.next_functions]
        nodes = list(dict.fromkeys(n for n in following if n is not None and n not in seen))
        seen.update(nodes)
        for node in nodes:
            if (leaf := getattr(node, "variable", None)) is not None:
                found.setdefault(names[leaf], depth)
    return found


@torch.no_grad()
def disturb(training: Training, parameters: Sequence[str], alpha: float, seed: int) -> None:
    """Adds alpha * delta to some parameters, delta standard normal (the paper's section 2.5)."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(training.model.named_parameters())
    for name in parameters:
        named[name].add_(alpha * torch.randn(named[name].shape, generator=generator))


def estimate(found: Estimate) -> dict[str, Any]:
    """Returns an estimate with both errors as plain data."""
    return {
        "value": number(found.value),
        "std_error": None if found.std_error is None else number(found.std_error),
        "batch_std_error": (
            None if found.batch_std_error is None else number(found.batch_std_error)
        ),
    }


def number(value: float) -> float | str:
    """Returns a number as strict JSON has it; one that is not finite as text."""
    return value if math.isfinite(value) else str(value)
