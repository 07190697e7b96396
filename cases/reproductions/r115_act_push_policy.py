#!/usr/bin/env python
"""Behaviour cloning with an action chunking transformer on a 2D pushing task.

Observation: a 16x16 camera image with the block and the goal, and the position of the end effector (pixels of
the 512x512 workspace).  Action: the next CHUNK target positions of the end effector, also in pixels.
"""
import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 8
WORKSPACE = 512.0


def collect_demonstrations(n: int, seed: int):
    """Scripted expert: go round to the far side of the block, then push it towards the goal."""
    rng = np.random.RandomState(seed)
    block = rng.uniform(120, 392, (n, 2))
    goal = rng.uniform(60, 452, (n, 2))
    agent = rng.uniform(20, 492, (n, 2))

    direction = goal - block
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-6
    contact = block - 50.0 * direction
    way = np.linspace(0, 1, CHUNK // 2 + 1)[1:]
    approach = agent[:, None] + (contact - agent)[:, None] * way[None, :, None]
    push = contact[:, None] + (goal - contact)[:, None] * way[None, :, None]
    action = np.concatenate([approach, push], axis=1) + rng.normal(0, 3.0, (n, CHUNK, 2))

    centers = (np.arange(16) + 0.5) * WORKSPACE / 16
    def blob(p):
        gx = np.exp(-((centers[None] - p[:, :1]) ** 2) / (2 * 30.0 ** 2))
        gy = np.exp(-((centers[None] - p[:, 1:]) ** 2) / (2 * 30.0 ** 2))
        return gy[:, :, None] * gx[:, None, :]
    image = np.stack([blob(block), blob(goal)], axis=1)

    to = lambda a: torch.tensor(a, dtype=torch.float32)
    return {"observation.image": to(image), "observation.state": to(agent), "action": to(action)}


def compute_stats(data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    stats = {}
    img = data["observation.image"]
    stats["observation.image"] = {"mean": img.mean((0, 2, 3)).view(-1, 1, 1), "std": img.std((0, 2, 3)).view(-1, 1, 1)}
    stats["observation.state"] = {"mean": data["observation.state"].mean(0), "std": data["observation.state"].std(0)}
    act = data["action"].flatten(0, 1)
    stats["action"] = {"mean": act.mean(0), "std": act.std(0)}
    return stats


class Normalize(nn.Module):
    def __init__(self, keys, stats):
        super().__init__()
        self.keys = keys
        for k in keys:
            name = k.replace(".", "_")
            self.register_buffer(name + "_mean", stats[k]["mean"])
            self.register_buffer(name + "_std", stats[k]["std"])

    def stat(self, k):
        name = k.replace(".", "_")
        return getattr(self, name + "_mean"), getattr(self, name + "_std")

    def forward(self, batch):
        batch = dict(batch)
        for k in self.keys:
            mean, std = self.stat(k)
            batch[k] = (batch[k] - mean) / (std + 1e-8)
        return batch


class Unnormalize(Normalize):
    def forward(self, batch):
        batch = dict(batch)
        for k in self.keys:
            mean, std = self.stat(k)
            batch[k] = batch[k] * std + mean
        return batch


class ACT(nn.Module):
    def __init__(self, dim=40, heads=4):
        super().__init__()
        self.patchify = nn.Conv2d(2, dim, kernel_size=4, stride=4)
        self.image_pos = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        self.state_proj = nn.Linear(2, dim)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, heads, 80, dropout=0.0, batch_first=True, norm_first=True),
            num_layers=1, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.action_queries = nn.Parameter(torch.randn(1, CHUNK, dim) * 0.5)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(dim, heads, 80, dropout=0.0, batch_first=True, norm_first=True),
            num_layers=1, norm=nn.LayerNorm(dim))
        self.action_head = nn.Linear(dim, 2)

    def forward(self, batch):
        tokens = self.patchify(batch["observation.image"]).flatten(2).transpose(1, 2) + self.image_pos
        state = self.state_proj(batch["observation.state"]).unsqueeze(1)
        memory = self.encoder(torch.cat([state, tokens], dim=1))
        queries = self.action_queries.expand(len(memory), -1, -1)
        return self.action_head(self.decoder(queries, memory))


class ACTPolicy(nn.Module):
    def __init__(self, stats, fixed=False):
        super().__init__()
        self.fixed = fixed
        self.normalize_inputs = Normalize(["observation.image", "observation.state"], stats)
        self.normalize_targets = Normalize(["action"], stats)
        self.unnormalize_outputs = Unnormalize(["action"], stats)
        self.model = ACT()

    def forward(self, batch) -> Tensor:
        batch = self.normalize_inputs(batch)
        if self.fixed:
            batch = self.normalize_targets(batch)
        return F.l1_loss(self.model(batch), batch["action"])

    @torch.no_grad()
    def select_actions(self, batch) -> Tensor:
        self.eval()
        actions = self.model(self.normalize_inputs(batch))
        self.train()
        return self.unnormalize_outputs({"action": actions})["action"]


def within_reach(pred: Tensor, action: Tensor) -> float:
    """Share of the waypoints that end up within 40 pixels of the demonstrated ones."""
    return ((pred - action).norm(dim=-1) < 40.0).float().mean().item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--fixed", action="store_true")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--training_steps", type=int, default=240)
    ap.add_argument("--lr", type=float, default=2e-3)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    train = collect_demonstrations(4000, args.seed)
    heldout = collect_demonstrations(400, args.seed + 90001)
    policy = ACTPolicy(compute_stats(train), fixed=args.fixed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / args.training_steps)))

    policy.train()
    for step in range(args.training_steps):
        idx = torch.randint(0, 4000, (40,))
        batch = {k: v[idx] for k, v in train.items()}
        loss = policy(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == args.training_steps - 1:
            print(f"step: {step} loss: {loss.item():.3f}")

    print(f"metric {within_reach(policy.select_actions(heldout), heldout['action']):.4f}")


if __name__ == "__main__":
    main()
