"""Models, loops and frameworks that people have: each watched bit for bit, as the document says."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from compatibility import BLOCKS, CELLS, DOCUMENT, HIDDEN, OUTCOMES, Cell, rendered
from popular_frameworks import Watched
from popular_loops import Training
from popular_models import ATTENDING, MODELS

from diagnoser.diagnosis import is_grave
from diagnoser.runlog import Recording

pytestmark = [
    pytest.mark.slow,
    # What frameworks and compilers warn of in their own code is theirs.
    pytest.mark.filterwarnings("ignore"),
]
SAID = ("monitor_error", "unmeasurable", "nothing_seen", "skipped_steps")


@pytest.fixture(autouse=True)
def _as_at_first():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def ran(cell: Cell, out: Path | None) -> tuple[Training, Watched | None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global stream is what must not move
    random.seed(0)
    training = Training()
    return training, cell.run(training, out)


def quantities(log: Recording) -> set[str]:
    return {log.measurements.quantities[code] for code in set(log.measurements.quantity.tolist())}


def methods(log: Recording, quantity: str) -> set[str]:
    table = log.measurements
    own = table.quantity == table.quantities.index(quantity)
    return {table.methods[code] for code in set(table.method[own].tolist())}


def norms(log: Recording) -> dict[int, float]:
    """The norm of the whole gradient at each step where it was measured."""
    table = log.measurements
    own = table.quantity == table.quantities.index("gradient_norm")
    squares: Counter[int] = Counter()
    for step, value in zip(table.step[own].tolist(), table.value[own].tolist(), strict=True):
        squares[step] += value**2
    return {step: square**0.5 for step, square in squares.items()}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_is_as_the_document_says(cell: Cell, tmp_path: Path):
    outcome = cell.outcome
    if not outcome.trains:
        with pytest.raises(RuntimeError, match=outcome.says[0]):
            ran(cell, None)
        return
    plain, _ = ran(cell, None)
    watched, found = ran(cell, tmp_path / "run")
    assert found is not None
    watch, diagnosis = found
    assert watched.losses == plain.losses
    assert watched.digest() == plain.digest()

    log = watch.log
    said = {event.message for event in log.events if event.kind in SAID}
    assert [m for m in said if not any(part in m for part in outcome.says)] == []
    assert [part for part in outcome.says if not any(part in m for m in said)] == []

    assert [f for f in diagnosis.findings if is_grave(f.severity)] == []
    if not outcome.measured:
        assert (len(log.losses.step), diagnosis.verdict) == (0, "inconclusive")
        return
    assert diagnosis.verdict == "healthy"
    np.testing.assert_allclose(log.losses.value, watched.losses, rtol=1e-6)
    assert log.losses.step.tolist() == list(range(len(watched.losses)))
    measured = quantities(log)
    assert {"gradient_norm", "update_ratio"} <= measured
    assert ("update_curvature" in measured) == bool(outcome.curvature)
    if outcome.curvature:
        assert methods(log, "update_curvature") == outcome.curvature
    if watched.norms:
        for step, norm in norms(log).items():
            assert norm == pytest.approx(watched.norms[step], rel=1e-4), step
    if cell.table == "models":
        assert ("attention_entropy" in measured) == (
            cell.row in ATTENDING and HIDDEN not in outcome.says
        )


def test_the_document_shows_these_cells_and_no_other():
    text = DOCUMENT.read_text("utf-8")
    assert all(f"<!-- {name} -->" in text for name in BLOCKS)
    assert rendered(text) == text


def test_no_cell_stands_for_two_trainings_and_every_outcome_is_explained():
    assert len({str(cell) for cell in CELLS}) == len(CELLS)
    marks = {outcome.mark: outcome.means for outcome in OUTCOMES}
    assert all(marks[cell.outcome.mark] == cell.outcome.means for cell in CELLS)
    assert {cell.outcome.mark for cell in CELLS} == marks.keys()
    assert {cell.row for cell in CELLS if cell.table == "models"} == MODELS.keys()
