"""Frameworks that own the loop: watched bit for bit, NaN and gradients before clipping seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diagnoser.errors import UsageError
from diagnoser.runlog import read_run

pytestmark = [
    pytest.mark.slow,
    # What frameworks warn of in their own code is theirs.
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).parent.parent
STEPS, BREAKS, CLIP = 40, 25, 1e-3


class Points(nn.Module):
    """Its loss is NaN from some forward on."""

    def __init__(self, breaks: int | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.breaks, self.calls = breaks, 0

    def forward(self, points: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        loss = nn.functional.cross_entropy(self.layers(points), labels)
        broken = self.breaks is not None and self.calls > self.breaks
        return {"loss": loss * float("nan") if broken else loss}


def dataset() -> TensorDataset:
    points = torch.randn(8 * STEPS, 6)
    return TensorDataset(points, points[:, :3].argmax(1))


class Failing(Exception):
    pass


Train = Callable[..., tuple[nn.Module, Any]]


def by_transformers(
    folder: Path, *, watched: bool = True, breaks: int | None = None, fails: bool = False
) -> tuple[nn.Module, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from diagnoser.integrations.transformers import DiagnoserCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if fails and state.global_step == 10:
                raise Failing

    torch.manual_seed(0)
    model, data = Points(breaks), dataset()
    callback = DiagnoserCallback(out=folder / "run", verbose=False)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            max_grad_norm=CLIP,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"points": p, "labels": label} for p, label in data],
        callbacks=[Fails(), *([callback] if watched else [])],
    )
    trainer.train()
    return model, callback.attached


def by_lightning(
    folder: Path, *, watched: bool = True, breaks: int | None = None, fails: bool = False
) -> tuple[nn.Module, Any]:
    import lightning as L

    from diagnoser.integrations.lightning import DiagnoserCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.points = Points(breaks)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            if fails and index == 10:
                raise Failing
            return self.points(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module, data = Module(), dataset()
    callback = DiagnoserCallback(out=folder / "run", verbose=False)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if watched else [],
        default_root_dir=str(folder),
    )
    trainer.fit(module, DataLoader(data, 8, shuffle=True))
    return module, callback.attached


FRAMEWORKS = pytest.mark.parametrize("train", [by_transformers, by_lightning])


def left(model: nn.Module) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return [tensor.numpy().tobytes() for tensor in tensors]


@FRAMEWORKS
def test_the_training_keeps_every_bit(train: Train, tmp_path):
    plain, _ = train(tmp_path, watched=False)
    expected = left(plain)
    watched, attached = train(tmp_path)
    assert left(watched) == expected
    assert attached.diagnosis.verdict == "healthy"
    recording = read_run(tmp_path / "run")
    assert recording.losses.step.tolist() == list(range(STEPS))
    assert (tmp_path / "run" / "report.html").exists()
    names = {component.name.removeprefix("points.") for component in recording.components}
    assert names >= {"layers.0", "layers.3"}


@FRAMEWORKS
def test_gradients_are_those_before_clipping(train: Train, tmp_path):
    _, attached = train(tmp_path)
    table = attached.watch.log.measurements
    norms = table.value[table.quantity == table.quantities.index("gradient_norm")]
    assert np.median(norms) > 10 * CLIP


@FRAMEWORKS
def test_a_loss_that_is_not_finite_is_seen_at_its_step(train: Train, tmp_path):
    """`transformers` leaves such losses out of its own log."""
    _, attached = train(tmp_path, breaks=BREAKS)
    losses = attached.watch.log.losses
    assert int(losses.step[~np.isfinite(losses.value)][0]) == BREAKS
    assert attached.diagnosis.verdict == "faulty"
    assert attached.diagnosis.findings[0].fault == "non_finite"


@FRAMEWORKS
def test_a_training_that_raises_is_still_recorded_and_the_next_one_is_its_own(
    train: Train, tmp_path
):
    with pytest.raises(Failing):
        train(tmp_path / "first", fails=True)
    _, attached = train(tmp_path / "second")
    assert attached.diagnosis.verdict == "healthy"
    assert len(read_run(tmp_path / "first" / "run").losses.step) == 10
    assert len(read_run(tmp_path / "second" / "run").losses.step) == STEPS


@FRAMEWORKS
def test_switched_off_it_does_nothing(train: Train, tmp_path, monkeypatch):
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    _, attached = train(tmp_path)
    assert attached.diagnosis is None and not (tmp_path / "run").exists()


def test_what_a_callback_cannot_do_is_refused():
    from diagnoser.integrations.transformers import DiagnoserCallback

    with pytest.raises(UsageError, match="stop_on"):
        DiagnoserCallback(stop_on="critical")


@pytest.mark.parametrize("name", ["huggingface_trainer", "lightning_module", "accelerate_loop"])
def test_the_example_runs_and_its_training_is_healthy(name, tmp_path):
    text = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    assert [mark for mark in ("# 1", "# 2", "# 3", "# 4") if f"  {mark}\n" in text] == [
        "# 1",
        "# 2",
        "# 3",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "healthy"
    (run,) = tmp_path.glob("watched-*")
    assert (run / "report.html").exists()
    assert not [e for e in read_run(run).events if e.kind == "monitor_error"]
