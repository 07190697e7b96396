import argparse

import torch
from torch import nn
from torch.nn import functional as F

PAD, ASK, NUMBERS, MAX_LEN = 0, 1, 16, 12


def make_prompts(n, generator):
    """Lists of numbers, padded on the left; the answer after the last token is the largest."""
    tokens = torch.full((n, MAX_LEN), PAD)
    answers = torch.empty(n, dtype=torch.long)
    lengths = torch.randint(3, MAX_LEN, (n,), generator=generator)
    for i, length in enumerate(lengths.tolist()):
        numbers = torch.randint(NUMBERS, (length,), generator=generator)
        tokens[i, MAX_LEN - 1 - length : -1] = numbers + 2
        answers[i] = numbers.max()
    tokens[:, -1] = ASK
    return tokens, answers


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, fixed):
        super().__init__()
        self.n_head = n_head
        self.fixed = fixed
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, visible):
        b, n, c = x.shape
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (t.view(b, n, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        w = q @ k.transpose(-2, -1) / (c // self.n_head) ** 0.5
        if self.fixed:
            bias = (1 - visible.to(w.dtype)) * torch.finfo(w.dtype).min
            w = F.softmax(w.float() + bias.float(), dim=-1).to(w.dtype)
        else:
            bias = (1 - visible.to(w.dtype)) * -1e10
            w = F.softmax(w + bias, dim=-1)
        return self.c_proj((w @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, fixed):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, fixed)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 2 * n_embd), nn.GELU(), nn.Linear(2 * n_embd, n_embd)
        )

    def forward(self, x, visible):
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, fixed, n_embd=32, n_head=2, n_layer=2):
        super().__init__()
        self.wte = nn.Embedding(NUMBERS + 2, n_embd)
        self.wpe = nn.Embedding(MAX_LEN, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, fixed) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, NUMBERS)

    def forward(self, tokens):
        n = tokens.size(1)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        visible = causal & (tokens != PAD)[:, None, None, :]
        x = self.wte(tokens) + self.wpe(torch.arange(n))
        for block in self.h:
            x = block(x, visible)
        return self.lm_head(self.ln_f(x[:, -1]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train_x, train_y = make_prompts(3000, generator)
    test_x, test_y = make_prompts(500, generator)
    new = ~(test_x[:, None] == train_x[None]).all(-1).any(-1)
    test_x, test_y = test_x[new], test_y[new]

    model = GPT2(args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    running = 0.0
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(train_x), (32,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(train_x[rows])
        loss = F.cross_entropy(logits.float(), train_y[rows])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        running += loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {running / 50:.4f} scale {scaler.get_scale():.0f}")
            running = 0.0

    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        accuracy = (model(test_x).argmax(-1) == test_y).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
