import argparse
import math
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

ANIMALS = ["cat", "dog", "fox", "hen", "owl", "pig"]
PLACES = ["barn", "wood", "field", "yard"]
ACTS = {
    "cat": "sleeps",
    "dog": "barks",
    "fox": "hides",
    "hen": "pecks",
    "owl": "waits",
    "pig": "digs",
}


def write_text(n_sentences, scenes, rng):
    lines = []
    for _ in range(n_sentences):
        animal, place = rng.choice(scenes)
        lines.append(f"the {animal} of the {place} {ACTS[animal]} in the {place}.")
    return " ".join(lines)


class Chunks(Dataset):
    def __init__(self, ids, block, stride):
        self.ids, self.block, self.stride = ids, block, stride

    def __len__(self):
        return (len(self.ids) - self.block - 1) // self.stride + 1

    def __getitem__(self, i):
        piece = self.ids[i * self.stride : i * self.stride + self.block + 1]
        return piece[:-1], piece[1:]


class TransformerLM(nn.Module):
    def __init__(self, ntoken, d_model, nhead, d_hid, nlayers, block, norm_first):
        super().__init__()
        self.d_model = d_model
        self.encoder = nn.Embedding(ntoken, d_model)
        self.pos_encoder = nn.Embedding(block, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, d_hid, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, nlayers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.decoder = nn.Linear(d_model, ntoken)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(block))
        self.init_weights()

    def init_weights(self):
        for p in self.transformer_encoder.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        nn.init.normal_(self.encoder.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.pos_encoder.weight, std=0.5)

    def forward(self, src):
        x = self.encoder(src) * math.sqrt(self.d_model)
        x = x + self.pos_encoder(torch.arange(src.size(1)))
        x = self.transformer_encoder(x, mask=self.mask, is_causal=True)
        return self.decoder(x)


def evaluate(model, loader):
    model.eval()
    loss, hits, count = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            logits = model(x)
            loss += nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="sum").item()
            hits += (logits.argmax(-1) == y).sum().item()
            count += y.numel()
    model.train()
    return loss / count, hits / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    scenes = [(animal, place) for animal in ANIMALS for place in PLACES]
    rng.shuffle(scenes)
    train_text, val_text = write_text(430, scenes[6:], rng), write_text(30, scenes[:6], rng)
    vocab = sorted(set(train_text + val_text))
    stoi = {c: i for i, c in enumerate(vocab)}
    train_ids = torch.tensor([stoi[c] for c in train_text])
    val_ids = torch.tensor([stoi[c] for c in val_text])

    block = 16
    train_loader = DataLoader(
        Chunks(train_ids, block, 6), batch_size=16, shuffle=True, drop_last=True
    )
    val_loader = DataLoader(Chunks(val_ids, block, block), batch_size=32)

    model = TransformerLM(
        len(vocab), d_model=24, nhead=2, d_hid=48, nlayers=12, block=block, norm_first=args.fixed
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)

    step = 0
    while step < 150:
        for x, y in train_loader:
            logits = model(x)
            loss = nn.functional.cross_entropy(logits.reshape(-1, len(vocab)), y.reshape(-1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step % 50 == 0:
                val_loss, _ = evaluate(model, val_loader)
                print(f"step {step:4d} | train {loss.item():.3f} | val {val_loss:.3f}")
            if step == 150:
                break
    print(f"metric {evaluate(model, val_loader)[1]:.4f}")


if __name__ == "__main__":
    main()
