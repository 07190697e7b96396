import argparse

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH = 10, 8
CONF = {
    "n_epochs": 5,
    "batch_size": 16,
    "n_utterances": 2560,
    "accum_grad_n_steps": 5,
    "warmup_n_steps": 250,
    "lr_factor": 0.2,
    "d_model": 32,
}


class NoamScheduler:
    def __init__(self, optimizer, d_model, warmup_n_steps, factor):
        self.optimizer = optimizer
        self.scale = factor * d_model**-0.5
        self.warmup = warmup_n_steps
        self.n = 0

    def step(self):
        self.n += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()

    def lr(self):
        return self.scale * min(self.n**-0.5, self.n * self.warmup**-1.5)


class Recognizer(nn.Module):
    """Frames in (each unit is stretched over two noisy frames), units out, newest first."""

    def __init__(self, d_model):
        super().__init__()
        self.frontend = nn.Conv1d(6, d_model, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.3 * torch.randn(LENGTH, d_model))
        layer = nn.TransformerEncoderLayer(
            d_model, 2, dim_feedforward=64, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(d_model, VOCAB)

    def forward(self, frames):
        x = self.frontend(frames.transpose(1, 2)).transpose(1, 2)
        return self.output(self.encoder(x + self.position))


def record(n, codebook):
    units = torch.randint(VOCAB, (n, LENGTH))
    frames = codebook[units].repeat_interleave(2, dim=1)
    frames = frames + 0.3 * torch.randn(n, 2 * LENGTH, codebook.size(1))
    return frames, units.flip(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    codebook = torch.randn(VOCAB, 6)
    frames, units = record(CONF["n_utterances"], codebook)
    dev_frames, dev_units = record(300, codebook)

    accum = CONF["accum_grad_n_steps"]
    warmup = CONF["warmup_n_steps"]
    if args.fixed:
        warmup = warmup // accum
    model = Recognizer(CONF["d_model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)
    scheduler = NoamScheduler(optimizer, CONF["d_model"], warmup, CONF["lr_factor"])

    seen = 0
    for epoch in range(CONF["n_epochs"]):
        order = torch.randperm(len(frames))
        for batch in order.split(CONF["batch_size"]):
            logits = model(frames[batch])
            loss = F.cross_entropy(logits.flatten(0, 1), units[batch].flatten())
            (loss / accum).backward()
            seen += 1
            if seen % accum == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                scheduler.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1} updates {scheduler.n} lr {scheduler.lr():.5f} loss {loss:.4f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(dev_frames).argmax(-1) == dev_units).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
