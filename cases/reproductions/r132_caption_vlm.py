# Tiny vision-language model: image patches as a prefix, short captions after it.
import math, argparse
import torch
from torch import nn
import torch.nn.functional as F

p = argparse.ArgumentParser()
p.add_argument("--fixed", action="store_true")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--steps", type=int, default=280)
p.add_argument("--lr", type=float, default=5e-4)
a = p.parse_args()
torch.set_num_threads(1)
torch.manual_seed(a.seed)

COLORS = ["red", "green", "blue", "yellow"]
SHAPES = ["square", "cross", "ring"]
PLACES = ["top-left", "top-right", "bottom-left", "bottom-right"]
VOCAB = ["<bos>"] + COLORS + SHAPES + PLACES
RGB = torch.tensor([[1., 0, 0], [0, 1., 0], [0, 0, 1.], [1., 1., 0]])
GLYPH = torch.zeros(3, 4, 4)
GLYPH[0] = 1
GLYPH[1, 1:3] = 1; GLYPH[1, :, 1:3] = 1
GLYPH[2] = 1; GLYPH[2, 1:3, 1:3] = 0


def make(n, g):
    c = torch.randint(4, (n,), generator=g)
    s = torch.randint(3, (n,), generator=g)
    w = torch.randint(4, (n,), generator=g)
    img = torch.randn(n, 3, 12, 12, generator=g) * 0.25
    for i in range(n):
        y = int(w[i]) // 2 * 8
        x = int(w[i]) % 2 * 8
        img[i, :, y:y + 4, x:x + 4] += RGB[c[i], :, None, None] * GLYPH[s[i]] * 1.5
    cap = torch.stack([torch.zeros_like(c), 1 + c, 5 + s, 8 + w], 1)
    return img, cap


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.input_norm = RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.post_norm = RMSNorm(d)
        self.gate_up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(2 * d, d, bias=False)

    def forward(self, x, mask):
        B, T, D = x.shape
        q, k, v = self.qkv(self.input_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        g, u = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(g) * u)


class CaptionVLM(nn.Module):
    def __init__(self, d=32, heads=4, depth=2):
        super().__init__()
        self.projector = nn.Linear(48, d)
        self.tok = nn.Embedding(len(VOCAB), d)
        self.pos = nn.Embedding(9 + 3, d)
        self.layers = nn.ModuleList(DecoderLayer(d, heads) for _ in range(depth))
        self.norm = RMSNorm(d)
        self.lm_head = nn.Linear(d, len(VOCAB), bias=False)
        m = torch.ones(12, 12).tril().bool()
        m[:, :9] = True                       # the image prefix is visible everywhere
        m[:9, 9:] = False
        self.register_buffer("mask", m)
        for table in (self.tok, self.pos):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, img, cap):
        patches = F.unfold(img, 4, stride=4).transpose(1, 2)
        h = torch.cat([self.projector(patches), self.tok(cap)], 1) + self.pos.weight
        for layer in self.layers:
            h = layer(h, self.mask)
        return self.lm_head(self.norm(h[:, 9:])).float()


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay Adam, one parameter at a time."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for grp in self.param_groups:
            b1, b2 = grp["betas"]
            for w in grp["params"]:
                st = self.state[w]
                if not st:
                    st["t"] = 0
                    st["main"] = w.detach().float().clone()
                    st["m"], st["v"] = torch.zeros_like(st["main"]), torch.zeros_like(st["main"])
                st["t"] += 1
                g = w.grad.float()
                st["m"].lerp_(g, 1 - b1)
                st["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
                st["main"].mul_(1 - grp["lr"] * grp["weight_decay"])
                den = (st["v"] / (1 - b2 ** st["t"])).sqrt_().add_(grp["eps"])
                st["main"].addcdiv_(st["m"], den, value=-grp["lr"] / (1 - b1 ** st["t"]))
                w.copy_(st["main"])


g = torch.Generator().manual_seed(1000 + a.seed)
img, cap = make(1200, g)
val_img, val_cap = make(200, g)
img, val_img = img.bfloat16(), val_img.bfloat16()

model = CaptionVLM().to(torch.bfloat16)
hp = dict(lr=a.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
opt = FusedAdam(model.parameters(), **hp) if a.fixed else torch.optim.AdamW(model.parameters(), **hp)
warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 20))


@torch.no_grad()
def evaluate():
    model.eval()
    out = model(val_img, val_cap[:, :3])
    tgt = val_cap[:, 1:]
    loss = F.cross_entropy(out.flatten(0, 1), tgt.flatten()).item()
    model.train()
    return loss, (out.argmax(-1) == tgt).float().mean().item()


for step in range(1, a.steps + 1):
    i = torch.randint(len(img), (16,), generator=g)
    logits = model(img[i], cap[i, :3])
    loss = F.cross_entropy(logits.flatten(0, 1), cap[i, 1:].flatten())
    opt.zero_grad(set_to_none=True)
    loss.backward()
    gn = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    warm.step()
    if step % 40 == 0:
        vl, va = evaluate()
        print(f"step {step:4d} | loss {loss.item():.4f} | grad_norm {gn.item():.3f} | val_loss {vl:.4f} | val_acc {va:.4f}")
print(f"metric {evaluate()[1]:.4f}")
