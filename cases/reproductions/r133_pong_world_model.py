"""Action-conditioned next-frame prediction on a toy paddle world.

    python r133_pong_world_model.py [--seed N] [--fixed]
"""
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F

SIZE, CONTEXT, ACTIONS = 8, 8, 3


def rollout(n, steps, gen):
    """A ball bounces in a box, a paddle on the bottom row follows the actions."""
    pos = torch.randint(1, SIZE - 2, (n, 2), generator=gen)
    vel = torch.randint(0, 2, (n, 2), generator=gen) * 2 - 1
    paddle = torch.randint(0, SIZE - 1, (n,), generator=gen)
    act = torch.randint(ACTIONS, (n, steps), generator=gen)
    frames = torch.zeros(n, steps + 1, SIZE, SIZE)
    rows = torch.arange(n)
    for t in range(steps + 1):
        frames[rows, t, pos[:, 1], pos[:, 0]] = 1.0
        for dx in (0, 1):
            frames[rows, t, SIZE - 1, paddle + dx] = 0.6
        if t < steps:
            nxt = pos + vel
            hit = (nxt < 0) | (nxt > torch.tensor([SIZE - 1, SIZE - 2]))
            vel = torch.where(hit, -vel, vel)
            pos = pos + vel
            paddle = (paddle + act[:, t] - 1).clamp(0, SIZE - 2)
    return frames.flatten(2), act


class WorldModel(nn.Module):
    def __init__(self, dim=48, heads=4, layers=2, grad_clip=1.0, clip_at='forward'):
        super().__init__()
        self.grad_clip = grad_clip
        self.clip_at = clip_at
        self.frame_in = nn.Linear(SIZE * SIZE, dim)
        self.action_in = nn.Embedding(ACTIONS, dim)
        self.time = nn.Parameter(torch.randn(CONTEXT, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True,
                                           activation='gelu', norm_first=True)
        self.dynamics = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim),
                                              enable_nested_tensor=False)
        self.frame_out = nn.Linear(dim, SIZE * SIZE)
        self.register_buffer('causal', nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, frames, actions):
        h = self.frame_in(frames) + self.action_in(actions) + self.time
        return self.frame_out(self.dynamics(h, mask=self.causal, is_causal=True))

    # ---- hooks of the training loop ----
    def training_step(self, batch):
        frames, actions = batch
        pred = self(frames[:, :-1], actions)
        loss = F.mse_loss(pred, frames[:, 1:], reduction='none').sum(-1).mean()
        if self.clip_at == 'forward':
            self.clip()
        return loss

    def before_update(self):
        if self.clip_at == 'update':
            self.clip()
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item()

    def clip(self):
        nn.utils.clip_grad_norm_(self.parameters(), self.grad_clip)

    def optimizers(self, lr, total):
        opt = torch.optim.AdamW(self.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
        ramp = lambda s: min(1.0, (s + 1) / 10) * (1 - 0.9 * s / total)
        return opt, torch.optim.lr_scheduler.LambdaLR(opt, ramp)


@torch.no_grad()
def hit_rate(model, frames, actions):
    """Share of held-back steps on which the brightest predicted cell is the ball."""
    model.eval()
    pred = model(frames[:, :-1], actions)[:, 1:, :-SIZE]
    true = frames[:, 2:, :-SIZE]
    model.train()
    return (pred.argmax(-1) == true.argmax(-1)).float().mean().item()


def fit(model, train, val, steps, batch, lr, gen):
    opt, sched = model.optimizers(lr, steps)
    for step in range(steps):
        idx = torch.randint(len(train[0]), (batch,), generator=gen)
        loss = model.training_step((train[0][idx], train[1][idx]))
        opt.zero_grad()
        loss.backward()
        norm = model.before_update()
        opt.step()
        sched.step()
        if step % 40 == 0 or step == steps - 1:
            print(f'{step:5d}  loss {loss.item():.4f}  gradient_norm {norm:.3f}  '
                  f'val_hit {hit_rate(model, *val):.4f}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--fixed', action='store_true')
    parser.add_argument('--lr', type=float, default=4e-3)
    parser.add_argument('--steps', type=int, default=270)
    opts = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opts.seed)
    gen = torch.Generator().manual_seed(opts.seed + 77)
    # training and held-back rollouts start from different states
    frames, actions = rollout(1500, CONTEXT, gen)
    key = (frames[:, 0] * torch.arange(1, 65)).sum(-1).long() * 7 + (frames[:, 1] > 0.9).float().argmax(-1)
    held = key % 5 == 0
    train, val = (frames[~held], actions[~held]), (frames[held], actions[held])
    model = WorldModel(clip_at='update' if opts.fixed else 'forward')
    fit(model, train, val, opts.steps, 24, opts.lr, gen)
    print(f'metric {hit_rate(model, *val):.4f}')
