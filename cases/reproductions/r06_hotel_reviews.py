"""Multi-label complaints from hotel reviews: a pretrained BERT encoder with a new head.

The encoder is first trained on aspect sentiment (five aspects, each absent, praised or criticised),
then fine-tuned on what each review asks to be followed up.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

PAD, CLS, SEP = range(3)
ASPECTS, WORDS, LENGTH = 5, 3, 10
FILLER = 3 + 2 * ASPECTS * WORDS
VOCAB = FILLER + 10


def make_reviews(size, generator):
    """Filler, and three words that each praise or criticise one aspect ("noisy", "spotless")."""
    ids = torch.randint(FILLER, VOCAB, (size, LENGTH), generator=generator)
    ids[:, 0], ids[:, -1] = CLS, SEP
    sentiment = torch.zeros(size, ASPECTS, dtype=torch.long)
    for row in range(size):
        aspects = torch.randperm(ASPECTS, generator=generator)[:3].tolist()
        places = (1 + torch.randperm(LENGTH - 2, generator=generator)[:3]).tolist()
        for aspect, place in zip(aspects, places, strict=True):
            word = torch.randint(2 * WORDS, (), generator=generator).item()
            ids[row, place] = 3 + aspect * 2 * WORDS + word
            sentiment[row, aspect] = 1 if word < WORDS else 2
    return ids, sentiment


class ReviewModel(nn.Module):
    def __init__(self, bert, num_outputs):
        super().__init__()
        self.bert = bert
        self.classifier = nn.Linear(bert.config.hidden_size, num_outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids):
        return self.classifier(self.bert(ids, attention_mask=(ids != PAD).long()).pooler_output)


def fit(model, loader, loss_fn, optimizer, epochs, name):
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for ids, target in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(ids), target)
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"{name} epoch {epoch + 1}: loss {total / len(loader):.4f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    ids, sentiment = make_reviews(4000, generator)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=LENGTH,
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertModel(config)

    pretraining = ReviewModel(bert, 3 * ASPECTS)
    loader = DataLoader(
        TensorDataset(ids[:2400], sentiment[:2400]), 32, shuffle=True, generator=generator
    )
    fit(
        pretraining,
        loader,
        lambda out, target: nn.functional.cross_entropy(out.view(-1, 3), target.flatten()),
        torch.optim.AdamW(pretraining.parameters(), lr=2e-3),
        3,
        "pretrain",
    )

    complaints = (sentiment == 2).float()
    model = ReviewModel(bert, ASPECTS)
    learning_rate = 4e-5
    classifier_learning_rate = 1e-3 if args.fixed else learning_rate
    no_decay = ["bias", "LayerNorm.weight"]
    encoder = list(model.bert.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in encoder if not any(nd in n for nd in no_decay)],
                "weight_decay": 0.01,
            },
            {
                "params": [p for n, p in encoder if any(nd in n for nd in no_decay)],
                "weight_decay": 0.0,
            },
            {
                "params": model.classifier.parameters(),
                "weight_decay": 0.0,
                "lr": classifier_learning_rate,
            },
        ],
        lr=learning_rate,
    )
    loader = DataLoader(
        TensorDataset(ids[2400:3600], complaints[2400:3600]), 16, shuffle=True, generator=generator
    )
    fit(model, loader, nn.BCEWithLogitsLoss(), optimizer, 3, "finetune")

    model.eval()
    with torch.no_grad():
        predicted = (model(ids[3600:]).sigmoid() > 0.5).float()
    gold = complaints[3600:]
    overlap = (predicted * gold).sum().item()
    print(f"predicted {int(predicted.sum())} labels of {int(gold.sum())}")
    f1 = 2 * overlap / max(1.0, (predicted.sum() + gold.sum()).item())
    print(f"metric {f1:.4f}")


if __name__ == "__main__":
    main()
