"""Decision transformer on offline trajectories of a point that must reach a goal."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

STEP, HORIZON, SCALE = 0.2, 16, 10.0


class PointEnv:
    """A batch of points in the plane; state = (position, goal), reward = -distance to the goal."""

    def __init__(self, n, rng):
        self.goal = rng.uniform(-1, 1, size=(n, 2))
        self.pos = rng.uniform(-1, 1, size=(n, 2))

    def state(self):
        return np.concatenate([self.pos, self.goal], axis=1).astype(np.float32)

    def step(self, action):
        self.pos = self.pos + STEP * np.clip(action, -1, 1)
        return -np.linalg.norm(self.pos - self.goal, axis=1).astype(np.float32)


def collect(n, rng):
    """Behaviour policies of every quality between random and expert."""
    env = PointEnv(n, rng)
    skill = rng.random((n, 1))
    states, actions, rewards = [], [], []
    for _ in range(HORIZON):
        states.append(env.state())
        expert = np.clip((env.goal - env.pos) / STEP, -1, 1)
        a = np.clip(skill * expert + (1 - skill) * rng.uniform(-1, 1, size=(n, 2)), -1, 1)
        actions.append(a.astype(np.float32))
        rewards.append(env.step(a))
    rewards = np.stack(rewards, 1)
    rtg = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1].copy()
    return {'states': np.stack(states, 1), 'actions': np.stack(actions, 1), 'rtg': rtg[..., None] / SCALE}


class CausalSelfAttention(nn.Module):
    def __init__(self, hidden, n_head, p):
        super().__init__()
        self.n_head, self.p = n_head, p
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden)

    def forward(self, x, allowed):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=self.p if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, hidden, n_head, p):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = CausalSelfAttention(hidden, n_head, p)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden))
        self.drop = nn.Dropout(p)

    def forward(self, x, allowed):
        x = x + self.drop(self.attn(self.ln_1(x), allowed))
        return x + self.drop(self.mlp(self.ln_2(x)))


class DecisionTransformer(nn.Module):
    def __init__(self, state_dim=4, act_dim=2, hidden=48, n_layer=2, n_head=1, p=0.1):
        super().__init__()
        self.embed_timestep = nn.Embedding(HORIZON, hidden)
        self.embed_return = nn.Linear(1, hidden)
        self.embed_state = nn.Linear(state_dim, hidden)
        self.embed_action = nn.Linear(act_dim, hidden)
        self.embed_ln = nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(Block(hidden, n_head, p) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(hidden)
        self.predict_action = nn.Sequential(nn.Linear(hidden, act_dim), nn.Tanh())
        nn.init.normal_(self.embed_timestep.weight, std=0.02)

    def forward(self, states, actions, returns_to_go, timesteps, attention_mask):
        B, K = timesteps.shape
        time = self.embed_timestep(timesteps)
        tokens = torch.stack((self.embed_return(returns_to_go) + time,
                              self.embed_state(states) + time,
                              self.embed_action(actions) + time), dim=2)
        x = self.embed_ln(tokens.reshape(B, 3 * K, -1))              # R_1, s_1, a_1, R_2, s_2, a_2, ...

        keys = attention_mask.repeat_interleave(3, dim=1)
        causal = torch.ones(3 * K, 3 * K, dtype=torch.bool).tril()
        allowed = (causal & keys[:, None, :]) | torch.eye(3 * K, dtype=torch.bool)
        for block in self.blocks:
            x = block(x, allowed.unsqueeze(1))
        x = self.ln_f(x).view(B, K, 3, -1)
        return self.predict_action(x[:, :, 1])                        # a_t from the state token s_t


def get_batch(data, batch_size, K, rng):
    n = len(data['states'])
    s = np.zeros((batch_size, K, 4), np.float32)
    a = np.zeros((batch_size, K, 2), np.float32)
    r = np.zeros((batch_size, K, 1), np.float32)
    t = np.zeros((batch_size, K), np.int64)
    m = np.zeros((batch_size, K), bool)
    for i in range(batch_size):
        traj, start = rng.integers(n), rng.integers(HORIZON)
        stop = min(start + K, HORIZON)
        length = stop - start
        s[i, K - length:] = data['states'][traj, start:stop]
        a[i, K - length:] = data['actions'][traj, start:stop]
        r[i, K - length:] = data['rtg'][traj, start:stop]
        t[i, K - length:] = np.arange(start, stop)
        m[i, K - length:] = True
    return [torch.from_numpy(v) for v in (s, a, r, t, m)]


@torch.no_grad()
def rollout(model, K, target_return, n, rng):
    model.eval()
    env = PointEnv(n, rng)
    s = torch.zeros(n, K, 4)
    a = torch.zeros(n, K, 2)
    r = torch.zeros(n, K, 1)
    t = torch.zeros(n, K, dtype=torch.long)
    m = torch.zeros(n, K, dtype=torch.bool)
    rtg = np.full(n, target_return, np.float32)
    total = np.zeros(n)
    for step in range(HORIZON):
        s, a, r, t, m = (v.roll(-1, dims=1) for v in (s, a, r, t, m))
        s[:, -1] = torch.from_numpy(env.state())
        a[:, -1] = 0.0                                               # not known yet
        r[:, -1, 0] = torch.from_numpy(rtg)
        t[:, -1] = step
        m[:, -1] = True
        action = model(s, a, r, t, m)[:, -1]
        a[:, -1] = action
        reward = env.step(action.numpy())
        rtg = rtg - reward / SCALE
        total += reward
    return total.mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--K', type=int, default=6)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--max_steps', type=int, default=220)
    parser.add_argument('--warmup_steps', type=int, default=40)
    parser.add_argument('--lr', type=float, default=2e-3)
    variant = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(variant.seed)
    rng = np.random.default_rng(variant.seed)

    data = collect(600, rng)
    returns = data['rtg'][:, 0, 0]
    target = float(np.quantile(returns, 0.9))
    print(f'dataset return: mean {SCALE * returns.mean():.2f}, max {SCALE * returns.max():.2f}, '
          f'target {SCALE * target:.2f}')

    model = DecisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=variant.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / variant.warmup_steps, 1))

    for step in range(1, variant.max_steps + 1):
        model.train()
        states, actions, rtg, timesteps, mask = get_batch(data, variant.batch_size, variant.K, rng)
        preds = model(states, actions, rtg, timesteps, mask)
        loss = ((preds[mask] - actions[mask]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        scheduler.step()
        if step % 55 == 0:
            ret = rollout(model, variant.K, target, 50, np.random.default_rng(variant.seed + 500))
            print(f'iteration {step}: action error {loss.item():.4f}, evaluation return {ret:.2f}')

    ret = rollout(model, variant.K, target, 150, np.random.default_rng(variant.seed + 1000))
    print(f'metric {ret:.4f}')


if __name__ == '__main__':
    main()
