from __future__ import annotations

import math
import statistics

import pytest
import torch
from curvature_subjects import (
    TinyTransformer,
    build,
    component,
    dense,
    flat,
    loss_of,
    positions,
    random_vector,
    transformer_components,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.curvature import Hessian, block_curvature, coupling_matrix, row_curvature
from diagnoser.types import Part

COMPONENTS = transformer_components()


def exact_coupling(model, direction, seed=0):
    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        H = dense(loss_of(model, seed), parameters)
    at = [positions(c.parts, parameters) for c in COMPONENTS]
    d = flat(direction)
    return torch.stack([torch.stack([d[i] @ H[i][:, j] @ d[j] for j in at]) for i in at])


def values(coupling):
    return torch.tensor([[e.value for e in row] for row in coupling.values], dtype=torch.float64)


@pytest.fixture(scope="module")
def subject():
    model = build(TinyTransformer)
    direction = random_vector(dict(model.named_parameters()), 1)
    return model, direction, exact_coupling(model, direction)


def test_the_coupling_matrix_is_exact_and_symmetric_in_any_order_of_components(subject):
    model, direction, M = subject
    found = coupling_matrix(
        Hessian(loss_of(model), dict(model.named_parameters())), direction, COMPONENTS
    )
    assert found.names == tuple(c.name for c in COMPONENTS)
    torch.testing.assert_close(values(found), M)
    assert torch.equal(values(found), values(found).T)
    backwards = coupling_matrix(
        Hessian(loss_of(model), dict(model.named_parameters())), direction, COMPONENTS[::-1]
    )
    torch.testing.assert_close(values(backwards), M.flip(0, 1))
    assert all(e.std_error == 0.0 and e.method == "exact" for row in found.values for e in row)


def test_rows_blocks_and_total_are_sums_of_the_coupling_matrix(subject):
    model, direction, M = subject
    hessian = Hessian(loss_of(model), dict(model.named_parameters()))
    rows = row_curvature(hessian, direction, COMPONENTS)
    blocks = block_curvature(hessian, direction, COMPONENTS)
    names = [c.name for c in COMPONENTS]
    assert [rows.components[n].value for n in names] == pytest.approx(M.sum(1).tolist())
    assert [blocks[n].value for n in names] == pytest.approx(M.diagonal().tolist())
    assert rows.total.value == pytest.approx(float(M.sum()))


def test_the_total_covers_what_no_component_does(subject):
    model, direction, M = subject
    hessian = Hessian(loss_of(model), dict(model.named_parameters()))
    rows = row_curvature(hessian, direction, COMPONENTS[:2])
    assert rows.total.value == pytest.approx(float(M.sum()))
    assert rows.components["query"].value == pytest.approx(float(M[1].sum()))


def test_shares_are_bounded_where_the_usual_ratio_is_not():
    # H = [[e, 1], [1, e]] is indefinite; M_12 / sqrt(|M_11 M_22|) = 1 / e is no correlation.
    e = 0.01
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    loss = (0.5 * e * (a * a + b * b) + a * b).sum()
    found = coupling_matrix(
        Hessian(loss, {"a": a, "b": b}),
        {"a": torch.ones(1), "b": torch.ones(1)},
        [component("a", Part("a")), component("b", Part("b"))],
    )
    M, shares = values(found), [[s.value for s in row] for row in found.shares]
    assert float(M[0, 1] / (M[0, 0] * M[1, 1]).abs().sqrt()) == pytest.approx(100.0)
    assert shares[0][1] == pytest.approx(1 / 2.02)
    assert sum(abs(s) for row in shares for s in row) == pytest.approx(1.0)


def test_chunks_give_the_mean_and_its_spread(subject):
    model, direction, _ = subject
    seeds = (0, 1, 2)
    each = torch.stack([exact_coupling(model, direction, seed) for seed in seeds])
    hessian = Hessian([loss_of(model, s) for s in seeds], dict(model.named_parameters()))
    found = coupling_matrix(hessian, direction, COMPONENTS)
    torch.testing.assert_close(values(found), each.mean(0))
    i, j = 1, 3
    spread = statistics.stdev(each[:, i, j].tolist()) / math.sqrt(3)
    assert found.values[i][j].batch_std_error == pytest.approx(spread)
    assert found.values[i][j].samples == 3
    share = each.mean(0)[i, j] / each.mean(0).abs().sum()
    assert found.shares[i][j].value == pytest.approx(float(share))
    rows = row_curvature(hessian, direction, COMPONENTS)
    spread = statistics.stdev(each.sum((1, 2)).tolist()) / math.sqrt(3)
    assert rows.total.batch_std_error == pytest.approx(spread)
    blocks = block_curvature(hessian, direction, COMPONENTS)
    assert blocks["query"].value == pytest.approx(float(each.mean(0)[1, 1]))


def test_frozen_components_and_missing_directions_count_as_zero(subject):
    model, direction, _ = subject
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("head")}
    partial = {n: d for n, d in direction.items() if n != "norm.bias"}
    hessian = Hessian(loss_of(model), parameters)
    rows = row_curvature(hessian, partial, COMPONENTS)
    blocks = block_curvature(hessian, partial, COMPONENTS)
    M = values(coupling_matrix(hessian, partial, COMPONENTS))
    assert rows.components["head"].value == blocks["head"].value == 0.0
    assert M[-1].abs().sum() == 0.0
    zeroed = {n: d if n in partial else torch.zeros_like(d) for n, d in direction.items()}
    wanted = exact_coupling(model, zeroed)[:-1, :-1]
    torch.testing.assert_close(M[:-1, :-1], wanted)
    assert rows.total.value == pytest.approx(float(wanted.sum()))


def test_no_curvature_has_no_shares_and_no_components_no_matrix():
    a = nn.Parameter(torch.ones(2))
    hessian = Hessian(a.sum(), {"a": a})
    found = coupling_matrix(hessian, {"a": torch.ones(2)}, [component("a", Part("a"))])
    assert found.values[0][0].value == 0.0
    assert math.isnan(found.shares[0][0].value)
    assert coupling_matrix(hessian, {"a": torch.ones(2)}, []).names == ()
    assert block_curvature(hessian, {"a": torch.ones(2)}, []) == {}
    assert row_curvature(hessian, {"a": torch.ones(2)}, []).total.value == 0.0
