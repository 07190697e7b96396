import argparse
import random

import torch
from torch import nn

GOOD = ["good", "great", "lovely", "funny", "moving", "clever"]
BAD = ["bad", "dull", "awful", "boring", "clumsy", "weak"]
NOUNS = ["film", "plot", "cast", "story", "music", "ending"]
INTENSE = ["very", "quite", "really"]
WORDS = ["[PAD]", "[CLS]", "the", "was", "is", "not", "never", "but", *GOOD, *BAD, *NOUNS, *INTENSE]
TOKEN = {word: i for i, word in enumerate(WORDS)}
MAX_LEN = 8


def sentence(rng):
    positive = rng.random() < 0.5
    negated = rng.random() < 0.4
    words = ["the", rng.choice(NOUNS), rng.choice(["was", "is"])]
    if negated:
        words.append(rng.choice(["not", "never"]))
    words += rng.sample(INTENSE, rng.randint(0, 2))
    words.append(rng.choice(GOOD if positive else BAD))
    if rng.random() < 0.5:
        words += ["but", "the", rng.choice(NOUNS)][: rng.randint(1, 3)]
    return words[: MAX_LEN - 1], int(positive != negated)


def make_split(rng, n_train, n_test):
    rows = {}
    while len(rows) < n_train + n_test:
        words, label = sentence(rng)
        rows[" ".join(words)] = (words, label)
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows[:n_train], rows[n_train:]


def encode(rows):
    ids = torch.zeros(len(rows), MAX_LEN, dtype=torch.long)
    for i, (words, _) in enumerate(rows):
        ids[i, : len(words) + 1] = torch.tensor([TOKEN[w] for w in ["[CLS]", *words]])
    return ids, torch.tensor([label for _, label in rows])


class Model(nn.Module):
    def __init__(self, fixed, dim=32):
        super().__init__()
        self.fixed = fixed
        self.embed = nn.Embedding(len(WORDS), dim, padding_idx=0)
        self.position = nn.Embedding(MAX_LEN, dim)
        layer = nn.TransformerEncoderLayer(
            dim, 4, dim_feedforward=64, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc = nn.Linear(dim, 2)

    def forward(self, input_ids):
        x = self.embed(input_ids) + 0.1 * self.position.weight
        x = self.encoder(x, src_key_padding_mask=input_ids == 0)
        out = self.fc(x[:, 0])
        if not self.fixed:
            out = out.softmax(dim=1)
        return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    train_rows, test_rows = make_split(random.Random(args.seed), 1280, 300)
    input_ids, labels = encode(train_rows)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(input_ids, labels),
        batch_size=16,
        shuffle=True,
        drop_last=True,
    )
    model = Model(args.fixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()

    model.train()
    for epoch in range(3):
        for i, (input_ids, labels) in enumerate(loader):
            out = model(input_ids)
            loss = criterion(out, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 20 == 0:
                accuracy = (out.argmax(dim=1) == labels).sum().item() / len(labels)
                print(epoch, i, round(loss.item(), 4), accuracy)

    model.eval()
    input_ids, labels = encode(test_rows)
    with torch.no_grad():
        accuracy = (model(input_ids).argmax(dim=1) == labels).float().mean().item()
    print("metric", round(accuracy, 4))


if __name__ == "__main__":
    main()
