"""Slot attention trained for set prediction on small images of coloured discs."""
import argparse
from itertools import permutations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

COLORS = np.array([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.25, 0.35, 0.95], [0.9, 0.85, 0.2]], dtype=np.float32)
NUM_OBJ = 3
SIZE = 16


def make_scenes(n, rng):
    """Images (n, 3, 16, 16) and their sets of three objects (n, 3, 6): x, y, colour one-hot."""
    yy, xx = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    images = rng.normal(0.1, 0.03, size=(n, 3, SIZE, SIZE)).astype(np.float32)
    targets = np.zeros((n, NUM_OBJ, 6), dtype=np.float32)
    for i in range(n):
        placed = []
        for j in range(NUM_OBJ):
            while True:
                x, y = rng.uniform(2.5, SIZE - 3.5, size=2)
                if all((x - a) ** 2 + (y - b) ** 2 > 25 for a, b in placed):
                    break
            placed.append((x, y))
            c = rng.integers(4)
            disc = (xx - x) ** 2 + (yy - y) ** 2 <= 2.3 ** 2
            images[i][:, disc] = COLORS[c][:, None]
            targets[i, j, :2] = x / (SIZE - 1), y / (SIZE - 1)
            targets[i, j, 2 + c] = 1.0
    return torch.from_numpy(images), torch.from_numpy(targets)


class SoftPositionEmbed(nn.Module):
    def __init__(self, hidden, res):
        super().__init__()
        self.proj = nn.Linear(4, hidden)
        r = torch.linspace(0, 1, res)
        gy, gx = torch.meshgrid(r, r, indexing="ij")
        grid = torch.stack([gx, gy], dim=-1)
        self.register_buffer("grid", torch.cat([grid, 1 - grid], dim=-1)[None])

    def forward(self, x):  # (B, H, W, C)
        return x + self.proj(self.grid)


class SlotAttention(nn.Module):
    def __init__(self, num_slots, dim, iters=3, hidden_dim=64, eps=1e-8):
        super().__init__()
        self.num_slots, self.iters, self.eps = num_slots, iters, eps
        self.scale = dim ** -0.5
        self.slots_mu = nn.Parameter(torch.empty(1, 1, dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.slots_mu)
        nn.init.xavier_uniform_(self.slots_log_sigma)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)

    def forward(self, inputs):
        b, n, d = inputs.shape
        mu = self.slots_mu.expand(b, self.num_slots, -1)
        slots = mu + self.slots_log_sigma.exp() * torch.randn_like(mu)

        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            prev = slots
            q = self.to_q(self.norm_slots(slots))
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps          # slots compete for every input
            attn = attn / attn.sum(dim=-1, keepdim=True)   # weighted mean over the inputs
            updates = torch.einsum("bij,bjd->bid", attn, v)
            slots = self.gru(updates.reshape(-1, d), prev.reshape(-1, d)).reshape(b, -1, d)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots


class SetPredictor(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, dim, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
        )
        self.pos = SoftPositionEmbed(dim, SIZE // 2)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.slot_attention = SlotAttention(NUM_OBJ, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 6), nn.Sigmoid())

    def forward(self, image):
        x = self.pos(self.encoder(image).permute(0, 2, 3, 1)).flatten(1, 2)
        x = self.mlp(self.norm(x))
        return self.head(self.slot_attention(x))


PERMS = torch.tensor(list(permutations(range(NUM_OBJ))))


def matched_loss(pred, target):
    """Huber loss under the best assignment; with three slots all assignments are tried."""
    b = pred.shape[0]
    p, t = torch.broadcast_tensors(pred[:, :, None], target[:, None])
    cost = F.smooth_l1_loss(p, t, reduction="none").sum(-1)          # (B, slot, object)
    per_perm = cost[:, torch.arange(NUM_OBJ), PERMS]                   # (B, perms, slot)
    return per_perm.mean(-1).min(dim=1).values.mean()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=480)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    images, sets = make_scenes(3000, rng)
    images = (images - images[:2600].mean()) / images[:2600].std()
    train_x, train_y = images[:2600], sets[:2600]
    test_x, test_y = images[2600:], sets[2600:]

    model = SetPredictor()
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    warmup = 40
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / warmup, 1.0) * 0.5 ** (s / 300))

    model.train()
    for step in range(args.steps):
        idx = torch.randint(0, len(train_x), (32,))
        loss = matched_loss(model(train_x[idx]), train_y[idx])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 80 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        test_loss = matched_loss(model(test_x), test_y).item()
    print("metric %.5f" % -test_loss)


if __name__ == "__main__":
    main()
