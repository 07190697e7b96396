"""Frameworks that own the loop, each over a model, its batches and its loss (`popular_models`).

Every one trains with the flags that it has for what `popular_loops` writes out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from popular_loops import RATE, STEPS, Drawn, Training, trained
from popular_models import WIDTH, Batch, Subject, classifier_of_text
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import diagnoser
from diagnoser.session import Watch
from diagnoser.types import Diagnosis

BACKEND = "aot_eager"


@dataclass(frozen=True)
class Flags:
    """What a framework is asked for."""

    accumulation: int = 1
    clips: bool = False
    half: bool = False  # bfloat16
    compiles: bool = False
    checkpoints: bool = False


Watched = tuple[Watch, Diagnosis]
Framework = Callable[[Subject, Training, Flags, Path | None], Watched | None]


def batches(subject: Subject, flags: Flags) -> list[Batch]:
    return [subject.draw() for _ in range(STEPS * flags.accumulation)]


def note(training: Training, losses: list[float], flags: Flags) -> None:
    """Of every step the sum of its parts, each as it went backward."""
    size = flags.accumulation
    training.losses += [sum(losses[i : i + size]) for i in range(0, len(losses), size)]


def said_by(callback: Any) -> Watched | None:
    if callback is None:
        return None
    return callback.attached.watch, callback.attached.diagnosis


class Losing(nn.Module):
    """Gives the loss of a batch, as the models of transformers do."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.loss = subject.model, subject.loss

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.model, batch)}


def small() -> Subject:
    return classifier_of_text(
        "DistilBert", dim=WIDTH, n_heads=2, n_layers=1, hidden_dim=32, max_position_embeddings=16
    )


def by_transformers(
    subject: Subject, training: Training, flags: Flags, out: Path | None
) -> Watched | None:
    import transformers

    from diagnoser.integrations.transformers import DiagnoserCallback

    losses: list[float] = []

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    drawn = batches(subject, flags)
    samples = [{k: v[i] for k, v in b.items()} for b in drawn for i in range(len(b["labels"]))]
    own = isinstance(subject.model, transformers.PreTrainedModel)
    callback = DiagnoserCallback(out=out, verbose=False) if out is not None else None
    trainer = Trainer(
        model=subject.model if own else Losing(subject),
        args=transformers.TrainingArguments(
            output_dir="never-written",
            max_steps=STEPS,
            learning_rate=RATE,
            per_device_train_batch_size=len(drawn[0]["labels"]),
            gradient_accumulation_steps=flags.accumulation,
            max_grad_norm=1.0 if flags.clips else 0.0,
            bf16=flags.half,
            torch_compile=flags.compiles,
            torch_compile_backend=BACKEND if flags.compiles else None,
            gradient_checkpointing=flags.checkpoints,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=samples,
        callbacks=[callback] if callback is not None else [],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    training.built(subject.model, trainer.optimizer)
    note(training, losses, flags)
    return said_by(callback)


def by_lightning(
    subject: Subject, training: Training, flags: Flags, out: Path | None
) -> Watched | None:
    import lightning as L

    from diagnoser.integrations.lightning import DiagnoserCallback

    losses: list[float] = []
    model: Any = subject.model
    if flags.checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(model, backend=BACKEND) if flags.compiles else model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = subject.loss(self.model, batch)
            losses.append(loss.item() / flags.accumulation)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = AdamW(trained(self), lr=RATE)
            training.built(optimizer)
            return optimizer

    callback = DiagnoserCallback(out=out, verbose=False) if out is not None else None
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=flags.accumulation,
        gradient_clip_val=1.0 if flags.clips else None,
        precision="bf16-mixed" if flags.half else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if callback is not None else [],
    )
    trainer.fit(Module(), DataLoader(Drawn(batches(subject, flags)), batch_size=None))
    training.built(model)
    note(training, losses, flags)
    return said_by(callback)


def by_accelerate(
    subject: Subject, training: Training, flags: Flags, out: Path | None
) -> Watched | None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=flags.accumulation,
        mixed_precision="bf16" if flags.half else "no",
        dynamo_backend=BACKEND if flags.compiles else "no",
    )
    bare: Any = subject.model
    if flags.checkpoints:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    data = DataLoader(Drawn(batches(subject, flags)), batch_size=None)
    watch = diagnoser.watch(out=out, verbose=False) if out is not None else None
    losses = []
    with watch or nullcontext():
        optimizer = AdamW(trained(bare), lr=RATE)
        training.built(bare, optimizer)
        model, optimizer, data = accelerator.prepare(bare, optimizer, data)
        for batch in data:
            with accelerator.accumulate(model):
                loss = subject.loss(model, batch)
                accelerator.backward(loss)
                losses.append(loss.item() / flags.accumulation)
                if flags.clips:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    note(training, losses, flags)
    return None if watch is None else (watch, watch.diagnose(write=False))


FRAMEWORKS: dict[str, Framework] = {
    "transformers.Trainer": by_transformers,
    "Lightning": by_lightning,
    "accelerate": by_accelerate,
}
FLAGS: dict[str, Flags] = {
    "plain": Flags(),
    "gradient accumulation": Flags(accumulation=3),
    "clipping": Flags(clips=True),
    "bfloat16": Flags(half=True),
    "compiled": Flags(compiles=True),
    "checkpointing": Flags(checkpoints=True),
}
