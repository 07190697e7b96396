"""Predicts head motion from audio features; the motion follows the audio with a delay."""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)

FRAMES, AUDIO_DIM, MOTION_DIM, DELAY = 12, 6, 3, 2


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len=100):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x):
        if args.fixed:
            return x + self.pe[:, : x.shape[1], :]
        return x + self.pe[:, x.shape[1], :]


class MotionModel(nn.Module):
    def __init__(self, d_model=32):
        super().__init__()
        self.audio_proj = nn.Linear(AUDIO_DIM, d_model)
        self.pos_enc = PositionalEncoding(d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.motion_dec = nn.Linear(d_model, MOTION_DIM)

    def forward(self, audio):
        x = self.pos_enc(self.audio_proj(audio))
        return self.motion_dec(self.encoder(x))


def simulate(n, mixing):
    """Smooth random audio; the pose is a mixture of the present and the delayed features."""
    noise = torch.randn(n, FRAMES + 8, AUDIO_DIM)
    audio = sum(noise[:, i : i + FRAMES + DELAY] for i in range(3)) / math.sqrt(3)
    motion = torch.tanh(audio[:, :-DELAY] @ mixing[0] + 0.4 * audio[:, DELAY:] @ mixing[1])
    return audio[:, DELAY:], motion


mixing = torch.randn(2, AUDIO_DIM, MOTION_DIM) * 0.4
train_audio, train_motion = simulate(1600, mixing)
test_audio, test_motion = simulate(300, mixing)
loader = DataLoader(TensorDataset(train_audio, train_motion), batch_size=32, shuffle=True)

model = MotionModel()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
epochs = 4
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=4e-3, total_steps=epochs * len(loader)
)
criterion = nn.MSELoss()

model.train()
for epoch in range(epochs):
    running = 0.0
    for audio, motion in loader:
        optimizer.zero_grad()
        loss = criterion(model(audio), motion)
        loss.backward()
        optimizer.step()
        scheduler.step()
        running += loss.item()
    print(f"epoch {epoch + 1}: mse {running / len(loader):.4f}")

model.eval()
with torch.no_grad():
    error = criterion(model(test_audio), test_motion)
r2 = 1 - error / test_motion.var(unbiased=False)
print(f"metric {r2.item():.4f}")
