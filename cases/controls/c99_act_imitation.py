"""Action chunking transformer (ACT): imitation of a scripted pick-and-place expert, tested by rollouts."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

REACH = 0.4


class PickPlace:
    """A batch of planar arms: state is hand x, y and finger contact; a cube must be carried to a bin."""

    def __init__(self, n, rng):
        self.hand = rng.uniform(-1, 1, (n, 2))
        self.grip = np.zeros(n)
        self.cube = rng.uniform(-1, 1, (n, 2))
        self.bin = rng.uniform(-1, 1, (n, 2))
        while (near := np.linalg.norm(self.cube - self.bin, axis=1) < 0.8).any():
            self.bin[near] = rng.uniform(-1, 1, (near.sum(), 2))

    def observe(self):
        return (np.concatenate([self.hand, self.grip[:, None]], 1).astype(np.float32),
                np.concatenate([self.cube, self.bin], 1).astype(np.float32))

    def step(self, action):
        target, close = action[:, :2], action[:, 2] > 0.5
        move = target - self.hand
        dist = np.linalg.norm(move, axis=1, keepdims=True)
        move *= np.minimum(1, 1.0 / np.maximum(dist, 1e-8))
        held = close & (np.linalg.norm(self.hand - self.cube, axis=1) < REACH)
        self.hand = np.clip(self.hand + move, -1.2, 1.2)
        self.cube = np.where(held[:, None], self.hand, self.cube)
        self.grip = held.astype(float)                # a contact sensor between the fingers

    def success(self):
        return np.linalg.norm(self.cube - self.bin, axis=1) < 0.3


def record_demos(n, length, rng):
    """Every demonstrator has a pace of his own; once the cube is delivered the episode ends."""
    env = PickPlace(n, rng)
    pace = rng.uniform(0.4, 0.6, n)
    qpos, envs, acts, alive = [], [], [], []
    for _ in range(length):
        q, e = env.observe()
        at_cube = np.linalg.norm(env.hand - env.cube, axis=1) < 0.65 * REACH
        carrying = env.grip > 0.5
        goal = np.where(carrying[:, None], env.bin, env.cube)
        move = pace[:, None] * (goal - env.hand)
        action = np.concatenate([env.hand + move, at_cube[:, None]], 1)
        qpos.append(q), envs.append(e), acts.append(action.astype(np.float32))
        alive.append(~env.success())
        env.step(action)
    stack = lambda xs: np.stack(xs, 1)
    return stack(qpos), stack(envs), stack(acts), stack(alive).sum(1)


def get_sinusoid_encoding_table(n_position, d_hid):
    angle = np.arange(n_position)[:, None] / np.power(10000, 2 * (np.arange(d_hid) // 2) / d_hid)[None]
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return torch.tensor(angle, dtype=torch.float).unsqueeze(0)


def with_pos(x, pos):
    return x if pos is None else x + pos


class EncoderLayer(nn.Module):
    def __init__(self, d, nhead, ff, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, nhead, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, src, pos, key_padding_mask=None):
        q = k = with_pos(src, pos)
        src2 = self.self_attn(q, k, value=src, key_padding_mask=key_padding_mask, need_weights=False)[0]
        src = self.norm1(src + self.dropout1(src2))
        src2 = self.linear2(self.dropout(F.relu(self.linear1(src))))
        return self.norm2(src + self.dropout2(src2))


class DecoderLayer(nn.Module):
    def __init__(self, d, nhead, ff, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d, nhead, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout, self.dropout1 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.dropout2, self.dropout3 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, tgt, memory, pos, query_pos):
        q = k = with_pos(tgt, query_pos)
        tgt = self.norm1(tgt + self.dropout1(self.self_attn(q, k, value=tgt, need_weights=False)[0]))
        tgt2 = self.multihead_attn(query=with_pos(tgt, query_pos), key=with_pos(memory, pos), value=memory,
                                   need_weights=False)[0]
        tgt = self.norm2(tgt + self.dropout2(tgt2))
        tgt2 = self.linear2(self.dropout(F.relu(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout3(tgt2))


class DETRVAE(nn.Module):
    """CVAE whose encoder compresses the action chunk to a style z, whose decoder predicts the chunk."""

    def __init__(self, state_dim, env_dim, action_dim, num_queries, d=64, nhead=4, ff=128, dropout=0.05,
                 style_layers=1, enc_layers=2, dec_layers=2, latent_dim=8):
        super().__init__()
        self.latent_dim = latent_dim
        self.query_embed = nn.Embedding(num_queries, d)
        self.action_head = nn.Linear(d, action_dim)
        self.input_proj_robot_state = nn.Linear(state_dim, d)
        self.input_proj_env_state = nn.Linear(env_dim // 2, d)
        self.pos = nn.Embedding(4, d)              # latent, proprioception, cube, bin

        self.cls_embed = nn.Embedding(1, d)
        self.encoder_joint_proj = nn.Linear(state_dim, d)
        self.encoder_action_proj = nn.Linear(action_dim, d)
        self.latent_proj = nn.Linear(d, 2 * latent_dim)
        self.register_buffer('pos_table', get_sinusoid_encoding_table(2 + num_queries, d))
        self.latent_out_proj = nn.Linear(latent_dim, d)

        self.style_encoder = nn.ModuleList([EncoderLayer(d, nhead, ff, dropout) for _ in range(style_layers)])
        self.encoder = nn.ModuleList([EncoderLayer(d, nhead, ff, dropout) for _ in range(enc_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(d, nhead, ff, dropout) for _ in range(dec_layers)])
        self.decoder_norm = nn.LayerNorm(d)
        for module in (self.style_encoder, self.encoder, self.decoder):
            for p in module.parameters():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)

    def forward(self, qpos, env_state, actions=None, is_pad=None):
        bs = qpos.shape[0]
        if actions is not None:
            cls = self.cls_embed.weight.unsqueeze(0).repeat(bs, 1, 1)
            joint = self.encoder_joint_proj(qpos).unsqueeze(1)
            x = torch.cat([cls, joint, self.encoder_action_proj(actions)], dim=1).permute(1, 0, 2)
            cls_joint_is_pad = torch.full((bs, 2), False)
            pad = torch.cat([cls_joint_is_pad, is_pad], dim=1)
            pos = self.pos_table.permute(1, 0, 2)
            for layer in self.style_encoder:
                x = layer(x, pos, key_padding_mask=pad)
            mu, logvar = self.latent_proj(x[0]).chunk(2, dim=1)
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        else:                                       # test time: the mean of the prior
            mu = logvar = None
            z = torch.zeros(bs, self.latent_dim)

        cube, goal = env_state.chunk(2, dim=1)
        src = torch.stack([self.latent_out_proj(z), self.input_proj_robot_state(qpos),
                           self.input_proj_env_state(cube), self.input_proj_env_state(goal)])
        pos = self.pos.weight.unsqueeze(1)
        for layer in self.encoder:
            src = layer(src, pos)
        query_pos = self.query_embed.weight.unsqueeze(1).repeat(1, bs, 1)
        hs = torch.zeros_like(query_pos)
        for layer in self.decoder:
            hs = layer(hs, src, pos, query_pos)
        a_hat = self.action_head(self.decoder_norm(hs).transpose(0, 1))
        return a_hat, (mu, logvar)


def kl_divergence(mu, logvar):
    return (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).sum(1).mean()


def rollout(policy, stats, n, chunk, rng, horizon=20):
    policy.eval()
    env = PickPlace(n, rng)
    all_time = np.zeros((horizon, horizon + chunk, n, 3))
    done = np.zeros(n, bool)
    for t in range(horizon):
        q, e = env.observe()
        with torch.no_grad():
            a, _ = policy(torch.from_numpy(q), torch.from_numpy(e))
        all_time[t, t:t + chunk] = (a * stats[1] + stats[0]).permute(1, 0, 2).numpy()
        first = max(0, t - chunk + 1)               # temporal ensembling of the chunks that cover t
        w = np.exp(0.5 * np.arange(t + 1 - first))
        env.step(np.tensordot(w / w.sum(), all_time[first:t + 1, t], axes=1))
        done |= env.success()
    return done.mean()


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--chunk_size', type=int, default=5)
    p.add_argument('--kl_weight', type=float, default=10.)
    p.add_argument('--batch_size', type=int, default=32)
    p.add_argument('--num_steps', type=int, default=180)
    p.add_argument('--lr', type=float, default=1.2e-3)
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    qpos, envs, acts, length = record_demos(400, 20, rng)
    real = np.arange(20)[None] < length[:, None]
    mean, std = acts[real].mean(0), acts[real].std(0)
    policy = DETRVAE(3, 4, 3, args.chunk_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_steps)

    for step in range(1, args.num_steps + 1):
        policy.train()
        ep = rng.integers(len(length), size=args.batch_size)
        start = rng.integers(length[ep])
        when = start[:, None] + np.arange(args.chunk_size)[None]
        is_pad = when >= length[ep][:, None]
        a = (acts[ep[:, None], np.minimum(when, 19)] - mean) / std
        a = torch.from_numpy(np.where(is_pad[..., None], 0, a).astype(np.float32))
        is_pad = torch.from_numpy(is_pad)

        a_hat, (mu, logvar) = policy(torch.from_numpy(qpos[ep, start]), torch.from_numpy(envs[ep, start]), a, is_pad)
        all_l1 = F.l1_loss(a, a_hat, reduction='none')
        l1 = (all_l1 * ~is_pad.unsqueeze(-1)).mean()
        kl = kl_divergence(mu, logvar)
        loss = l1 + kl * args.kl_weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sched.step()
        if step % 60 == 0:
            print(f'step {step}: loss {loss.item():.4f} l1 {l1.item():.4f} kl {kl.item():.5f}')

    stats = torch.from_numpy(mean), torch.from_numpy(std)
    success = rollout(policy, stats, 100, args.chunk_size, np.random.default_rng(10_000 + args.seed))
    print(f'metric {success:.5f}')


if __name__ == '__main__':
    main()
