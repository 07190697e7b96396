"""Trains a poly-encoder to select the reply to a short dialogue among the replies of the batch."""
import argparse
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

PETS = "dog cat parrot rabbit hamster snake".split()
HOBBIES = "chess football painting cooking fishing dancing guitar gardening".split()
MEALS = "pizza sushi curry soup pasta salad".split()
PLACES = "beach mountains city forest island desert".split()
WORDS = {"dog": "bark", "cat": "meow", "parrot": "feathers", "rabbit": "carrots", "hamster": "wheel", "snake": "scales",
         "chess": "checkmate", "football": "goals", "painting": "brushes", "cooking": "recipes", "fishing": "trout",
         "dancing": "salsa", "guitar": "strings", "gardening": "roses", "pizza": "cheese", "sushi": "rice",
         "curry": "spices", "soup": "broth", "pasta": "sauce", "salad": "lettuce", "beach": "waves",
         "mountains": "hiking", "city": "museums", "forest": "pines", "island": "boats", "desert": "camels"}
TOPICS = [
    (PETS, ["i have a {x}", "my {x} is very funny", "we got a new {x}"], ["how nice , i like {y}", "oh {y} , so cute"]),
    (HOBBIES, ["i spend my days on {x}", "my hobby is {x}"], ["{y} , that sounds fun", "i am bad at {y}"]),
    (MEALS, ["i just ate {x}", "tonight we make {x}"], ["i am hungry , give me {y}", "{y} for me please"]),
    (PLACES, ["we travel to the {x}", "i live near the {x}"], ["enjoy the {y}", "i have never seen {y}"]),
]
OPENERS = ["hello", "hi how are you", "good morning", "hey there friend"]


def dialogue(rng):
    """Two statements of the speaker; the reply answers both."""
    a, b = rng.sample(range(len(TOPICS)), 2)
    turns, replies = [rng.choice(OPENERS)], []
    for t in (a, b):
        things, says, answers = TOPICS[t]
        x = rng.choice(things)
        turns.append(rng.choice(says).format(x=x))
        replies.append(rng.choice(answers).format(y=WORDS[x]))
    return " __turn__ ".join(turns), " and ".join(replies)


def build_dialogues(n, rng):
    data = {}
    while len(data) < n:
        c, r = dialogue(rng)
        data.setdefault(c, r)
    return list(data.items())


class Encoder(nn.Module):
    def __init__(self, n_words, d=48, heads=4, layers=2, max_len=40):
        super().__init__()
        self.tokens = nn.Embedding(n_words, d, padding_idx=0)
        self.positions = nn.Embedding(max_len, d)
        nn.init.normal_(self.tokens.weight, std=d ** -0.5)
        nn.init.normal_(self.positions.weight, std=d ** -0.5)
        with torch.no_grad():
            self.tokens.weight[0].zero_()
        self.norm = nn.LayerNorm(d)
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for p in self.layers.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, ids):
        mask = ids != 0
        x = self.norm(self.tokens(ids) + self.positions.weight[:ids.size(1)])
        return self.layers(x, src_key_padding_mask=~mask), mask


def basic_attention(xs, ys, mask=None):
    """Dot-product attention without scale: every x looks at the ys."""
    scores = torch.matmul(xs, ys.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -1e20)
    return torch.matmul(F.softmax(scores, dim=-1), ys)


class PolyEncoder(nn.Module):
    def __init__(self, n_words, d=48, n_codes=8):
        super().__init__()
        self.context_encoder = Encoder(n_words, d)
        self.candidate_encoder = Encoder(n_words, d)
        self.candidate_encoder.load_state_dict(self.context_encoder.state_dict())   # start alike, not tied
        self.codes = nn.Parameter(torch.empty(n_codes, d))
        nn.init.normal_(self.codes, std=d ** -0.5)

    def encode_context(self, ids):
        out, mask = self.context_encoder(ids)
        return basic_attention(self.codes.expand(ids.size(0), -1, -1), out, mask)    # (B, m, d)

    def encode_candidates(self, ids):
        out, _ = self.candidate_encoder(ids)
        return out[:, 0]                                                             # first token

    def score(self, ctx, cands):
        """Scores of every context with every candidate: (B, C)."""
        cands = cands.unsqueeze(0).expand(ctx.size(0), -1, -1)
        final = basic_attention(cands, ctx)
        return (final * cands).sum(-1)

    def forward(self, ctx_ids, cand_ids):
        return self.score(self.encode_context(ctx_ids), self.encode_candidates(cand_ids))


def main(opt):
    torch.manual_seed(opt["seed"])
    rng = random.Random(opt["seed"])
    data = build_dialogues(1970, rng)
    train, valid = data[:1670], data[1670:]
    words = sorted({w for c, r in train for w in (c + " " + r).split()})
    vocab = {"__pad__": 0, "__start__": 1, "__unk__": 2, **{w: i + 3 for i, w in enumerate(words)}}

    def vectorize(texts):
        rows = [torch.tensor([1] + [vocab.get(w, 2) for w in t.split()]) for t in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def collate(pairs):
        contexts, replies = zip(*pairs)
        return vectorize(contexts), vectorize(replies), replies

    loader = DataLoader(train, opt["batchsize"], shuffle=True, drop_last=True, collate_fn=collate,
                        generator=torch.Generator().manual_seed(opt["seed"]))
    model = PolyEncoder(len(vocab))
    optimizer = torch.optim.Adamax(model.parameters(), lr=opt["learningrate"])
    updates, total = 0, opt["epochs"] * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 20, 1.0) * max(0.05, 1 - k / total))
    for epoch in range(opt["epochs"]):
        for ctx, cand, replies in loader:
            scores = model(ctx, cand)
            # the other replies of the batch are the negatives; equal replies are not
            same = torch.tensor([[a == b for b in replies] for a in replies])
            same.fill_diagonal_(False)
            loss = F.cross_entropy(scores.masked_fill(same, -1e20), torch.arange(len(ctx)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            updates += 1
            if updates % 40 == 0:
                print({"epoch": epoch, "updates": updates, "loss": round(loss.item(), 4)})

    model.eval()
    hits = 0
    with torch.no_grad():
        for ctx, cand, replies in DataLoader(valid, 20, collate_fn=collate):
            hits += (model(ctx, cand).argmax(1) == torch.arange(len(ctx))).sum().item()
    print(f"hits@1/20 on {len(valid)} held-out dialogues")
    print(f"metric {hits / len(valid):.4f}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=3)
    ap.add_argument("--batchsize", type=int, default=32)
    ap.add_argument("--learningrate", type=float, default=6e-3)
    torch.set_num_threads(1)
    main(vars(ap.parse_args()))
