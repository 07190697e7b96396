import argparse
import itertools
import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

TOPICS = {
    "room": ["room", "bed", "bathroom"],
    "food": ["breakfast", "dinner", "coffee"],
    "staff": ["waiter", "host", "porter"],
    "place": ["beach", "garden", "view"],
}
GOOD = ["lovely", "great", "fine", "perfect"]
BAD = ["awful", "poor", "dull", "bad"]
EXTRA = ["really", "today", "again", "here", "overall", "sadly"]
WORDS = ["<pad>", "the", "was", "not", *sum(TOPICS.values(), []), *GOOD, *BAD, *EXTRA]
VOCAB = {word: i for i, word in enumerate(WORDS)}
MAX_LEN = 12
NUM_CLASSES = 2 * len(TOPICS)


def write_reviews(rng):
    """Short reviews; a class is a topic together with its verdict."""
    reviews = []
    for number, nouns in enumerate(TOPICS.values()):
        for noun, word, negated in itertools.product(nouns, GOOD + BAD, (False, True)):
            for _ in range(10):
                words = ["the", noun, "was", "not", word] if negated else ["the", noun, "was", word]
                for _ in range(rng.randrange(5)):
                    words.insert(rng.randrange(len(words) + 1), rng.choice(EXTRA))
                label = 2 * number + int((word in GOOD) != negated)
                reviews.append((" ".join(words), label))
    reviews = sorted(set(reviews))
    rng.shuffle(reviews)
    return reviews


def collate(rows):
    input_ids = torch.zeros(len(rows), MAX_LEN, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), MAX_LEN, dtype=torch.long)
    for i, (text, _) in enumerate(rows):
        ids = [VOCAB[word] for word in text.split()]
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
    return input_ids, attention_mask, torch.tensor([label for _, label in rows])


class Block(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(dim)
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, attention_mask):
        B, T, C = x.shape
        q, k, v = self.c_attn(self.norm1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None].bool())
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


class LabelAttention(nn.Module):
    """The labels are queries over the tokens: one embedding of the text for each label."""

    def __init__(self, dim, n_head, num_classes, fixed):
        super().__init__()
        self.n_head = n_head
        self.fixed = fixed
        self.label_embeds = nn.Embedding(num_classes, dim)
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, dim, bias=False)
        self.c_v = nn.Linear(dim, dim, bias=False)
        self.c_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens, attention_mask):
        B = len(tokens)
        labels = self.label_embeds.weight.expand(B, -1, -1)
        q, k, v = self.c_q(labels), self.c_k(tokens), self.c_v(tokens)
        q, k, v = (t.view(B, t.shape[1], self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if self.fixed:
            mask = attention_mask[:, None, None, :] == 1
        else:
            mask = attention_mask[:, None, None, :] == 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class TextClassifier(nn.Module):
    def __init__(self, fixed, dim=32, n_head=2):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), dim, padding_idx=0)
        self.position = nn.Parameter(0.1 * torch.randn(MAX_LEN, dim))
        self.h = nn.ModuleList([Block(dim, n_head)])
        self.label_attention = LabelAttention(dim, n_head, NUM_CLASSES, fixed)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids) + self.position
        for block in self.h:
            x = block(x, attention_mask)
        return self.head(self.norm(self.label_attention(x, attention_mask))).squeeze(-1)


def main(args):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    reviews = write_reviews(rng)
    train, test = reviews[:1280], reviews[1280:]
    loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate)

    model = TextClassifier(args.fixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(args.num_epochs):
        model.train()
        losses = []
        for input_ids, attention_mask, labels in loader:
            loss = loss_fn(model(input_ids, attention_mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"Epoch {epoch}: train_loss={sum(losses) / len(losses):.4f}")

    model.eval()
    with torch.no_grad():
        input_ids, attention_mask, labels = collate(test)
        accuracy = (model(input_ids, attention_mask).argmax(1) == labels).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-epochs", type=int, default=7)
    main(parser.parse_args())
