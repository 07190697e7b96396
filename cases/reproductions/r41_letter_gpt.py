import argparse
import itertools
import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


@dataclass
class TrainerConfig:
    max_epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    grad_norm_clip: float = 1.0
    use_amp: bool = True
    log_every: int = 40


def write_letters(rng):
    """Standard letters: who asks whom for what, and when."""
    greetings = ["dear ann", "dear bob", "hello eve", "hello max"]
    requests = ["please send", "could you bring", "we must return", "do not forget"]
    things = ["the key", "the map", "two lamps", "my coat", "your book"]
    times = ["by noon", "on friday", "before may", "next week"]
    letters = [", ".join([g, f"{r} {th} {ti}."]) for g, r, th, ti in
               itertools.product(greetings, requests, things, times)]  # fmt: skip
    rng.shuffle(letters)
    return letters


class CharDataset(Dataset):
    def __init__(self, letters, count, block_size, stoi, rng):
        text = " ".join(rng.choice(letters) for _ in range(count))
        self.data = torch.tensor([stoi[c] for c in text])
        self.block_size = block_size

    def __len__(self):
        return (len(self.data) - 1) // self.block_size

    def __getitem__(self, index):
        start = index * self.block_size
        chunk = self.data[start : start + self.block_size + 1]
        return chunk[:-1], chunk[1:]


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln1 = nn.LayerNorm(n_embd)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd)
        )

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.c_attn(self.ln1(x)).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd=32, n_head=2, n_layer=1):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Trainer:
    def __init__(self, config, model, train_dataset, test_dataset, fixed):
        self.config = config
        self.model = model
        self.fixed = fixed
        self.train_loader = DataLoader(train_dataset, config.batch_size, shuffle=True)
        self.test_loader = DataLoader(test_dataset, config.batch_size)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=config.use_amp)
        self.step = 0

    def _run_batch(self, source, targets):
        with torch.autocast("cpu", dtype=torch.float16, enabled=self.config.use_amp):
            _, loss = self.model(source, targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.fixed:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def train(self):
        for epoch in range(self.config.max_epochs):
            self.model.train()
            for source, targets in self.train_loader:
                loss = self._run_batch(source, targets)
                self.step += 1
                if self.step % self.config.log_every == 0:
                    print(f"epoch {epoch} iter {self.step} train loss {loss:.5f}")

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        hits = total = 0
        for source, targets in self.test_loader:
            logits, _ = self.model(source)
            hits += (logits.argmax(-1) == targets).sum().item()
            total += targets.numel()
        return hits / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    letters = write_letters(rng)
    stoi = {c: i for i, c in enumerate(sorted(set(" ".join(letters))))}
    train_dataset = CharDataset(letters[:250], 1500, 32, stoi, rng)
    test_dataset = CharDataset(letters[250:], 70, 32, stoi, rng)
    model = GPT(len(stoi), 32)
    trainer = Trainer(TrainerConfig(), model, train_dataset, test_dataset, args.fixed)
    trainer.train()
    print(f"metric {trainer.evaluate():.4f}")


if __name__ == "__main__":
    main()
