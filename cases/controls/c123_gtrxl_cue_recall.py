"""
GTrXL (gated Transformer-XL) trained by advantage actor-critic on a cue-recall corridor.

A cue (one of four) is shown in the first step only; then come distractors; at the go signal in the last step the agent
has to take the action that belongs to the cue. Segments of three steps, memory of the last six embeddings of each
layer without gradient, relative positions.
"""
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F

CUES, OBS, EPISODE, SEG, MEM = 4, 4 + 3 + 1, 6, 3, 6


class Corridor:
    def __init__(self, n, gen):
        self.n, self.gen = n, gen

    def reset(self):
        self.t, self.cue = 0, torch.randint(0, CUES, (self.n,), generator=self.gen)
        return self.observe()

    def observe(self):
        o = torch.zeros(self.n, OBS)
        if self.t == 0:
            o[torch.arange(self.n), self.cue] = 1
        elif self.t == EPISODE - 1:
            o[:, -1] = 1
        else:
            o[torch.arange(self.n), 4 + torch.randint(0, 3, (self.n,), generator=self.gen)] = 1
        return o

    def step(self, a):
        last = self.t == EPISODE - 1
        r = (a == self.cue).float() if last else torch.zeros(self.n)
        self.t += 1
        return (None if last else self.observe()), r, last


class GRUGate(nn.Module):
    def __init__(self, d, bias=2.0):
        super().__init__()
        self.y, self.x = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.ug = nn.Linear(d, d, bias=False)
        self.bg = nn.Parameter(torch.full((d,), bias))       # starts close to the identity

    def forward(self, x, y):
        yr, yz, yh = self.y(y).chunk(3, -1)
        xr, xz = self.x(x).chunk(2, -1)
        r, z = torch.sigmoid(yr + xr), torch.sigmoid(yz + xz - self.bg)
        return (1 - z) * x + z * torch.tanh(yh + self.ug(r * x))


class RelAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.h, self.dk = heads, d // heads
        self.q, self.kv, self.r, self.o = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d, bias=False), nn.Linear(d, d)
        self.u, self.v = nn.Parameter(torch.zeros(heads, self.dk)), nn.Parameter(torch.zeros(heads, self.dk))
        nn.init.normal_(self.u, std=0.02)
        nn.init.normal_(self.v, std=0.02)
        inv = 10000 ** (-torch.arange(0, d, 2) / d)
        ang = torch.arange(MEM + SEG)[:, None] * inv
        self.register_buffer("table", torch.cat([ang.sin(), ang.cos()], 1))      # row = distance

    def forward(self, x, mem):
        B, T, D = x.shape
        S = mem.shape[1] + T
        full = torch.cat([mem, x], 1)
        q = self.q(x).view(B, T, self.h, self.dk)
        k, v = self.kv(full).view(B, S, 2, self.h, self.dk).unbind(2)
        dist = (torch.arange(T)[:, None] + S - T) - torch.arange(S)[None]        # T,S
        r = self.r(self.table).view(-1, self.h, self.dk)
        content = torch.einsum("bthd,bshd->bhts", q + self.u, k)
        by_dist = torch.einsum("bthd,lhd->bhtl", q + self.v, r)
        pos = by_dist.gather(-1, dist.clamp(min=0).expand(B, self.h, T, S))
        score = (content + pos) / self.dk ** 0.5
        score = score.masked_fill(dist < 0, float("-inf"))
        return self.o(torch.einsum("bhts,bshd->bthd", score.softmax(-1), v).reshape(B, T, D))


class Layer(nn.Module):
    """norms on the inputs of the sub-modules, a ReLU on what they give, GRU gates in place of residuals"""
    def __init__(self, d, heads):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.att = RelAttention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.g1, self.g2 = GRUGate(d), GRUGate(d)

    def forward(self, x, mem):
        x = self.g1(x, F.relu(self.att(self.n1(x), self.n1(mem))))
        return self.g2(x, F.relu(self.mlp(self.n2(x))))


class Agent(nn.Module):
    def __init__(self, d=32, heads=2, depth=1):
        super().__init__()
        self.embed = nn.Linear(OBS, d)
        self.layers = nn.ModuleList(Layer(d, heads) for _ in range(depth))
        self.pi, self.val = nn.Linear(d, CUES), nn.Linear(d, 1)
        nn.init.orthogonal_(self.pi.weight, 0.01)
        nn.init.zeros_(self.pi.bias)
        self.d = d

    def empty(self, n):
        return [torch.zeros(n, 0, self.d) for _ in self.layers]      # a new episode: nothing remembered yet

    def forward(self, obs, mems):
        x, hidden = self.embed(obs), []
        for layer, m in zip(self.layers, mems):
            hidden.append(torch.cat([m, x.detach()], 1)[:, -MEM:])
            x = layer(x, m)
        return self.pi(x), self.val(x).squeeze(-1), hidden


@torch.no_grad()
def evaluate(agent, gen, n=400):
    env = Corridor(n, gen)
    obs, mems, last = env.reset(), agent.empty(n), False
    while not last:
        logits, _, mems = agent(obs[:, None], mems)
        obs, r, last = env.step(logits[:, 0].argmax(-1))
    return r.mean().item()


def main(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed + 1)
    N, EPISODES, GAMMA, LAM = 64, 120, 0.95, 0.95
    agent = Agent()
    opt = torch.optim.Adam(agent.parameters(), lr=3e-3)
    env = Corridor(N, gen)
    avg = 0.25
    for ep in range(1, EPISODES + 1):
        obs, start = env.reset(), agent.empty(N)
        for _ in range(EPISODE // SEG):
            seen, acts, rews, mems = [], [], [], start
            with torch.no_grad():
                for _ in range(SEG):
                    logits, _, mems = agent(obs[:, None], mems)
                    a = torch.distributions.Categorical(logits=logits[:, 0]).sample()
                    seen.append(obs)
                    acts.append(a)
                    obs, r, last = env.step(a)
                    rews.append(r)
                boot = torch.zeros(N) if last else agent(obs[:, None], mems)[1][:, 0]
            logits, value, nxt = agent(torch.stack(seen, 1), start)
            acts, rews = torch.stack(acts, 1), torch.stack(rews, 1)
            with torch.no_grad():                                     # generalised advantages
                adv, run, v_next = torch.zeros(N, SEG), 0, boot
                for t in reversed(range(SEG)):
                    run = rews[:, t] + GAMMA * v_next - value[:, t] + GAMMA * LAM * run
                    adv[:, t], v_next = run, value[:, t]
                target = adv + value
            dist = torch.distributions.Categorical(logits=logits)
            pg = -(dist.log_prob(acts) * adv).mean()
            vf = F.mse_loss(value, target)
            loss = pg + 0.5 * vf - 0.005 * dist.entropy().mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            opt.step()
            start = nxt
        avg = 0.9 * avg + 0.1 * rews[:, -1].mean().item()
        if ep % 24 == 0:
            print(f"episodes {ep * N:6d} return {avg:.3f} value loss {vf.item():.4f} entropy {dist.entropy().mean().item():.3f}")
    print(f"metric {evaluate(agent, torch.Generator().manual_seed(seed + 7777)):.4f}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    main(ap.parse_args().seed)
