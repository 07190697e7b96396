"""Trains every layer of a small RoBERTa as a review classifier (AdamW, weight decay 0.1)."""

import argparse
import time

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import RobertaConfig, RobertaForSequenceClassification

BOS, PAD, EOS, NOT = 0, 1, 2, 3
POSITIVE, NEGATIVE, FILLER = range(4, 12), range(12, 20), range(20, 44)


class ReviewDataset(Dataset):
    """Filler with two opinion words in it, now and then a negation in front of one."""

    def __init__(self, size, length, generator):
        def pick(words):
            return words[torch.randint(len(words), (), generator=generator).item()]

        self.encoded, self.labels = [], []
        for _ in range(size):
            label = torch.randint(2, (), generator=generator).item()
            text = [pick(FILLER) for _ in range(length - 7)]
            for _ in range(2):
                negated = torch.rand((), generator=generator).item() < 0.15
                word = pick(POSITIVE if label != negated else NEGATIVE)
                place = torch.randint(len(text) + 1, (), generator=generator).item()
                text[place:place] = [NOT, word] if negated else [word]
            ids = [BOS, *text, EOS]
            self.encoded.append(ids + [PAD] * (length - len(ids)))
            self.labels.append(label)
        self.ids, self.targets = torch.tensor(self.encoded), torch.tensor(self.labels)
        self.mask = (self.ids != PAD).long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.ids[index], self.mask[index], self.targets[index]


@torch.no_grad()
def calc_accuracy_loader(data_loader, model):
    model.eval()
    correct, examples = 0, 0
    for input_ids, attention_mask, labels in data_loader:
        logits = model(input_ids, attention_mask=attention_mask).logits
        correct += (logits.argmax(dim=-1) == labels).sum().item()
        examples += len(labels)
    model.train()
    return correct / examples


def train_classifier_simple(model, train_loader, val_loader, optimizer, num_epochs, eval_freq):
    global_step = -1
    model.train()
    for epoch in range(num_epochs):
        for input_ids, attention_mask, labels in train_loader:
            optimizer.zero_grad()
            logits = model(input_ids, attention_mask=attention_mask).logits
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            global_step += 1
            if global_step % eval_freq == 0:
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {loss.item():.3f}")
        print(f"Validation accuracy: {calc_accuracy_loader(val_loader, model) * 100:.2f}%")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_epochs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    generator = torch.Generator().manual_seed(args.seed)
    train_set = ReviewDataset(1600, 14, generator)
    seen = {tuple(ids) for ids in train_set.encoded}
    val_set = ReviewDataset(300, 14, generator)
    keep = [i for i, ids in enumerate(val_set.encoded) if tuple(ids) not in seen]
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True, generator=generator)
    val_loader = DataLoader(torch.utils.data.Subset(val_set, keep), batch_size=100)

    config = RobertaConfig(
        vocab_size=44,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
        type_vocab_size=1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        num_labels=2,
    )
    model = RobertaForSequenceClassification(config)
    learning_rate = 2e-3 if args.fixed else 2e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)

    start = time.time()
    train_classifier_simple(model, train_loader, val_loader, optimizer, args.num_epochs, 30)
    print(f"Training completed in {(time.time() - start) / 60:.2f} minutes.")
    print(f"metric {calc_accuracy_loader(val_loader, model):.4f}")


if __name__ == "__main__":
    main()
