"""Clips in which a handwritten digit moves in one of seven ways; which digit it is says nothing.

The pixels are real (the digits of scikit-learn, 8 x 8), the motions are drawn. Training,
validation and test clips show different digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

FRAMES, SIDE, DIGIT = 8, 20, 8
MOTIONS = ("still", "left", "right", "up", "down", "down-right", "up-left")
STEPS = torch.tensor([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (1, 1), (-1, -1)])
NOISE = 0.1
SIZES = {"train": 1400, "validation": 420, "test": 420}


@dataclass(frozen=True)
class Clips:
    """Clips (N, 1, frames, rows, columns) and their motions (N,)."""

    frames: Tensor
    motions: Tensor

    def __len__(self) -> int:
        return len(self.motions)


def load() -> dict[str, Clips]:
    """Draws the same clips each time."""
    digits = torch.from_numpy(load_digits().images).float() / 16.0
    generator = torch.Generator().manual_seed(0)
    digits = digits[torch.randperm(len(digits), generator=generator)]
    first, second = int(0.6 * len(digits)), int(0.8 * len(digits))
    parts = (digits[:first], digits[first:second], digits[second:])
    return {
        name: _draw(SIZES[name], part, generator) for name, part in zip(SIZES, parts, strict=True)
    }


def _draw(count: int, digits: Tensor, generator: torch.Generator) -> Clips:
    motions = torch.randint(len(MOTIONS), (count,), generator=generator)
    shown = digits[torch.randint(len(digits), (count,), generator=generator)]
    frames = NOISE * torch.randn(count, 1, FRAMES, SIDE, SIDE, generator=generator)
    reach = FRAMES - 1
    for clip, (motion, digit) in enumerate(zip(motions.tolist(), shown, strict=True)):
        corner = []
        for step in STEPS[motion].tolist():
            room = SIDE - DIGIT - reach * abs(step)
            start = int(torch.randint(room + 1, (1,), generator=generator))
            corner.append(start + reach if step < 0 else start)
        for frame in range(FRAMES):
            row, column = (c + frame * int(s) for c, s in zip(corner, STEPS[motion], strict=True))
            frames[clip, 0, frame, row : row + DIGIT, column : column + DIGIT] += digit
    return Clips(frames, motions)
