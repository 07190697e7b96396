"""A6: a video model with spatial, temporal and cross attention, on moving shapes.

Shapes of different texture move, each its own way; a picture of one of them asks where it goes.
The stem sees two frames at a time, so a place knows how the shape in it moves; which shape is
meant, only the cross attention finds out.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.layers import Attention, FeedForward, plus
from diagnoser.benchmark.subjects.objectives import accuracy, smoothed_cross_entropy
from diagnoser.injection.training import Batch, Data, Settings, Subject

FRAMES, SIDE, SHAPE = 4, 12, 3
STRIDE = (2, 4, 4)  # of the stem: frames, rows, columns
TIMES, PLACES = FRAMES // STRIDE[0], (SIDE // STRIDE[1]) * (SIDE // STRIDE[2])
SHAPES = 2  # in a clip, each in its half of the rows
NOISE = 0.1
WAYS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # rows, columns in a frame
TEXTURES = (
    ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((-1, -1, -1), (-1, -1, -1), (-1, -1, -1)),
    ((1, -1, 1), (-1, 1, -1), (1, -1, 1)),
)
TRAIN, HELD_OUT = 6000, 500


@functools.cache
def data() -> Data:
    """Draws the clips."""
    generator = torch.Generator().manual_seed(0)
    return Data(train=draw(TRAIN, generator), held_out=draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws clips, (count, FRAMES, SIDE, SIDE), questions (count, SHAPE, SHAPE) and directions.

    A shape that leaves at the top comes back at the bottom; none leaves at the sides.
    """
    textures = torch.tensor(TEXTURES, dtype=torch.float32)
    ways = torch.tensor(WAYS)
    which = torch.rand(count, len(TEXTURES), generator=generator).argsort(-1)[:, :SHAPES]
    goes = torch.randint(len(WAYS), (count, SHAPES), generator=generator)
    halves = torch.arange(SHAPES) * (SIDE // SHAPES)
    starts = torch.stack(
        [
            halves.expand(count, -1) + torch.randint(2, (count, SHAPES), generator=generator),
            FRAMES
            - 1
            + torch.randint(SIDE - SHAPE - 2 * FRAMES + 3, (count, SHAPES), generator=generator),
        ],
        dim=-1,
    )
    inputs = NOISE * torch.randn(count, FRAMES, SIDE, SIDE, generator=generator)
    pixels = torch.cartesian_prod(torch.arange(SHAPE), torch.arange(SHAPE))
    rows = torch.arange(count)[:, None]
    for shape in range(SHAPES):
        for frame in range(FRAMES):
            corner = starts[:, shape] + frame * ways[goes[:, shape]]
            at = (corner[:, None] + pixels) % SIDE
            inputs[rows, frame, at[..., 0], at[..., 1]] += textures[which[:, shape]].flatten(1)
    asked = torch.randint(SHAPES, (count, 1), generator=generator)
    return {
        "inputs": inputs,
        "question": textures[which.gather(1, asked).squeeze(1)],
        "targets": goes.gather(1, asked).squeeze(1),
    }


class Layer(nn.Module):
    """A pre-norm block: attention among the places of a time, then among the times of a place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial_attention = Attention(width, heads)
        self.temporal_norm = nn.LayerNorm(width)
        self.temporal_attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.residual = plus

    def forward(self, states: Tensor) -> Tensor:
        """(batch, times, places, width) to the same."""
        size = states.shape[:2]
        change = self.spatial_attention(self.spatial_norm(states).flatten(0, 1))
        states = self.residual(states, self.dropout(change.unflatten(0, size)))
        turned = states.transpose(1, 2)
        change = self.temporal_attention(self.temporal_norm(turned).flatten(0, 1))
        turned = self.residual(turned, self.dropout(change.unflatten(0, turned.shape[:2])))
        change = self.feed_forward(self.feed_forward_norm(turned))
        return self.residual(turned, self.dropout(change)).transpose(1, 2)


class VideoModel(nn.Module):
    """A convolution makes tokens, blocks mix them, a question attends to them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.stem = nn.Conv3d(1, width, (2, 6, 6), STRIDE, padding=(0, 1, 1))
        self.positions = nn.Parameter(0.1 * torch.randn(TIMES, PLACES, width))
        self.position_scale = 1.0
        self.layers = nn.ModuleList(
            Layer(width, heads, settings.dropout) for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.question = nn.Linear(SHAPE * SHAPE, width)
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.residual = plus
        self.head = nn.Linear(width, len(WAYS))

    def forward(self, clips: Tensor, question: Tensor) -> Tensor:
        """(batch, frames, rows, columns) and (batch, 3, 3) to logits (batch, directions)."""
        states = self.stem(clips[:, None]).flatten(3).permute(0, 2, 3, 1)
        states = states + self.position_scale * self.positions
        for layer in self.layers:
            states = layer(states)
        source = self.norm(states).flatten(1, 2)
        asked = self.question(question.flatten(1))[:, None]
        asked = self.residual(asked, self.cross_attention(asked, None, source))
        return self.head(self.cross_norm(asked).squeeze(1))  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, directions)."""
    return model(batch["inputs"], batch["question"])  # type: ignore[no-any-return]


VIDEO = Subject(
    id="A6",
    name="video",
    split="test",
    summary="video model with spatial, temporal and cross attention, on moving shapes",
    recipes={
        "a": Settings(steps=380, batch_size=32, learning_rate=3e-3, depth=1),
        "b": Settings(
            steps=400, batch_size=24, learning_rate=2.5e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.1, schedule="constant", depth=1,
        ),
        "c": Settings(
            steps=380, batch_size=32, learning_rate=4e-3, betas=(0.9, 0.95), weight_decay=0.1,
            depth=1, heads=2,
        ),
    },
    data=data,
    build=VideoModel,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy",
)  # fmt: skip
