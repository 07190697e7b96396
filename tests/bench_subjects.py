"""A catalogue that trains in milliseconds, with mistakes that kill, crash and hang."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diagnoser.benchmark.configuration import Catalogue
from diagnoser.benchmark.harm import Harm
from diagnoser.injection import Change, Data, Operator, Place, Remedy, Settings, Subject


def data() -> Data:
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        inputs = torch.randn(count, 4, generator=generator)
        return {"inputs": inputs, "targets": inputs.sum(1)}

    return Data(draw(64), draw(32))


def subject(name, *, packages=()):
    return Subject(
        id="T",
        name=name,
        split="train",
        summary="a line through points",
        recipes={"a": Settings(steps=12, batch_size=16, learning_rate=0.05)},
        data=data,
        build=lambda settings: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        predict=lambda model, batch: model(batch["inputs"]).squeeze(-1),
        criterion=lambda settings: F.mse_loss,
        score=lambda outputs, targets: 1 - float(F.mse_loss(outputs, targets)),
        score_name="explained variance",
        packages=packages,
    )


def set_learning_rate(training, place, values, generator):
    if "sleep" in values:
        time.sleep(values["sleep"])
    rate = training.settings.learning_rate * values["factor"]
    training.settings = dataclasses.replace(training.settings, learning_rate=rate)


def divide_learning_rate(training, place, values, generator):
    rate = training.settings.learning_rate / values["factor"]
    training.settings = dataclasses.replace(training.settings, learning_rate=rate)


def everywhere(training):
    return (Place("model", ("model",)),)


def change(apply):
    return Change("settings", apply, lambda training, place: ("settings.learning_rate",))


def kill_seed_1(training, place, values, generator):
    if training.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    set_learning_rate(training, place, values, generator)


def raise_on_seed_1(training, place, values, generator):
    print("said by a subject", file=sys.stdout)
    if training.seed == 1:
        raise ValueError("cannot be\nbuilt")
    set_learning_rate(training, place, values, generator)


def kill_worker_once(training, place, values, generator):
    marker = Path(os.environ["BENCH_MARKER"])
    if training.seed == 1 and not marker.exists():
        marker.write_text("")
        os.kill(os.getppid(), signal.SIGKILL)
    set_learning_rate(training, place, values, generator)


def operator(name, apply=set_learning_rate, **high):
    values = {"factor": 1e-3, **high}
    remedies = (Remedy("scale_learning_rate", change(divide_learning_rate)),)
    return Operator(
        id=name,
        name=name.lower(),
        summary="wrong learning rate",
        change=change(apply),
        places=everywhere,
        severities={"low": {**values, "factor": 0.5}, "high": values},
        remedies=remedies if name == "SLOW" else (),
        defect=False,
    )


def made(name, subjects, *operators):
    return Catalogue(
        f"bench_subjects:{name}", {s.name: s for s in subjects}, {o.id: o for o in operators}
    )


TWO = (subject("line"), subject("other"))
SLOW, FAST = operator("SLOW"), operator("FAST", factor=1e30)
SMALL = made("SMALL", TWO, SLOW, FAST)
SLEEPY = made("SLEEPY", TWO, SLOW, operator("NAP", sleep=0.7, factor=2.0))
FAILING = made(
    "FAILING", TWO[:1], SLOW, operator("KILL", kill_seed_1), operator("RAISE", raise_on_seed_1)
)
WORKERS = made("WORKERS", TWO[:1], SLOW, operator("KILL", kill_worker_once))
HUNG = made("HUNG", TWO[:1], operator("NAP", sleep=60.0))
LACKING = made("LACKING", (TWO[0], subject("absent", packages=("no-such-package",))), SLOW)


def harm_of(item, verdict):
    """A verdict of no numbers on a configuration of a plan."""
    judged = item.judged()
    words = (judged.hash, judged.subject, judged.recipe, judged.role, judged.operator)
    rest = (judged.severity, judged.place, judged.remedy, verdict, 12, 0)
    return Harm(*words, *rest, *(0.0,) * 9, 0, 0.0, trivial=False)
