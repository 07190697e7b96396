"""Tags entities in short captions; the photo that comes with a caption settles their type."""

import argparse

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

WORDS, LENGTH, REGIONS, PIXELS = 24, 10, 3, 12
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def make_captions(n, generator):
    """Words 0-3 announce a name (words 12-23) of one or two words; the photo says of what type."""
    words = torch.randint(4, 12, (n, LENGTH), generator=generator)
    tags = torch.zeros(n, LENGTH, dtype=torch.long)
    kind = torch.randint(2, (n,), generator=generator)
    for start in (0, LENGTH // 2):
        at = start + torch.randint(LENGTH // 2 - 2, (n,), generator=generator)
        rows = torch.arange(n)
        words[rows, at] = torch.randint(4, (n,), generator=generator)
        words[rows, at + 1] = torch.randint(12, 24, (n,), generator=generator)
        tags[rows, at + 1] = 1 + 2 * kind
        longer = torch.rand(n, generator=generator) < 0.5
        rows = rows[longer]
        words[rows, at[longer] + 2] = torch.randint(12, 24, (len(rows),), generator=generator)
        tags[rows, at[longer] + 2] = 2 + 2 * kind[longer]
    stray = torch.rand(n, LENGTH, generator=generator) < 0.15
    stray &= (tags == 0) & (words >= 4)
    stray[:, 1:] &= (words[:, :-1] >= 4) & (tags[:, :-1] == 0)
    names = torch.randint(12, 24, (n, LENGTH), generator=generator)
    words = torch.where(stray, names, words)
    look = torch.linspace(-1, 1, PIXELS).expand(n, REGIONS, PIXELS)
    images = look * (2.0 * kind - 1)[:, None, None]
    images = images + torch.randn(n, REGIONS, PIXELS, generator=generator)
    return words, images, tags


class CRF(nn.Module):
    def __init__(self, num_tags):
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.end_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags).uniform_(-0.1, 0.1))

    def forward(self, emissions, tags):
        """Mean log likelihood of the tag sequences."""
        score = emissions.gather(2, tags.unsqueeze(2)).sum(dim=(1, 2))
        score = score + self.start_transitions[tags[:, 0]] + self.end_transitions[tags[:, -1]]
        score = score + self.transitions[tags[:, :-1], tags[:, 1:]].sum(dim=1)
        alpha = self.start_transitions + emissions[:, 0]
        for i in range(1, emissions.size(1)):
            alpha = (alpha.unsqueeze(2) + self.transitions).logsumexp(dim=1) + emissions[:, i]
        return (score - (alpha + self.end_transitions).logsumexp(dim=1)).mean()

    def decode(self, emissions):
        score, history = self.start_transitions + emissions[:, 0], []
        for i in range(1, emissions.size(1)):
            score, index = (score.unsqueeze(2) + self.transitions).max(dim=1)
            score = score + emissions[:, i]
            history.append(index)
        best = (score + self.end_transitions).argmax(dim=1)
        path = [best]
        for index in reversed(history):
            best = index.gather(1, best.unsqueeze(1)).squeeze(1)
            path.append(best)
        return torch.stack(path[::-1], dim=1)


class TextModel(nn.Module):
    def __init__(self, hidden, layers):
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, hidden)
        self.position_embeddings = nn.Embedding(LENGTH, hidden)
        self.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.1, batch_first=True)
            for _ in range(layers)
        )

    def forward(self, words, prompts):
        x = self.word_embeddings(words)
        x = x + self.position_embeddings(torch.arange(words.size(1)))
        for layer, prompt in zip(self.layer, prompts, strict=True):
            x = layer(torch.cat([prompt, x], dim=1))[:, prompt.size(1) :]
        return x


class PromptTagger(nn.Module):
    def __init__(self, hidden=32, layers=2):
        super().__init__()
        self.layers = layers
        self.bert = TextModel(hidden, layers)
        self.encoder_conv = nn.Sequential(
            nn.Linear(PIXELS, 48), nn.Tanh(), nn.Linear(48, layers * hidden)
        )
        self.gates = nn.ModuleList(nn.Linear(layers * hidden, layers) for _ in range(layers))
        self.fc = nn.Linear(hidden, len(TAGS))
        self.crf = CRF(len(TAGS))

    def forward(self, words, images, tags=None):
        guides = self.encoder_conv(images)
        split = torch.stack(guides.chunk(self.layers, dim=-1), dim=2)
        prompts = []
        for gate in self.gates:
            weight = gate(guides.mean(dim=1)).softmax(dim=-1)
            prompts.append((weight[:, None, :, None] * split).sum(dim=2))
        emissions = self.fc(self.bert(words, prompts))
        loss = None if tags is None else -self.crf(emissions, tags)
        return self.crf.decode(emissions), loss


class Trainer:
    def __init__(self, model, train_loader, test_loader, args):
        self.model, self.args = model, args
        self.train_loader, self.test_loader = train_loader, test_loader
        self.before_train()

    def before_train(self):
        parameters = []
        params = {"lr": self.args.lr, "weight_decay": 1e-2, "params": []}
        for name, param in self.model.named_parameters():
            if "bert" in name:
                params["params"].append(param)
        parameters.append(params)

        params = {"lr": self.args.lr, "weight_decay": 1e-2, "params": []}
        for name, param in self.model.named_parameters():
            if "encoder_conv" in name or "gates" in name:
                params["params"].append(param)
        parameters.append(params)

        params = {"lr": 5 * self.args.lr, "weight_decay": 1e-2, "params": []}
        for name, param in self.model.named_parameters():
            if "crf" in name or name.startswith("fc"):
                params["params"].append(param)
        if self.args.fixed:
            parameters.append(params)

        self.optimizer = optim.AdamW(parameters)
        total = self.args.num_epochs * len(self.train_loader)
        self.scheduler = optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min((n + 1) / (0.06 * total), max(0.0, 1 - n / total))
        )

    def train(self):
        for epoch in range(self.args.num_epochs):
            self.model.train()
            total = 0.0
            for batch in self.train_loader:
                _, loss = self.model(*batch)
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                total += loss.item()
            print(f"Epoch {epoch + 1}: loss {total / len(self.train_loader):.4f}")

    @torch.no_grad()
    def test(self):
        """F1 of the tags that are not O."""
        self.model.eval()
        hit = found = real = 0
        for words, images, tags in self.test_loader:
            guess, _ = self.model(words, images)
            hit += ((guess == tags) & (tags > 0)).sum().item()
            found += (guess > 0).sum().item()
            real += (tags > 0).sum().item()
        return 2 * hit / (found + real)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--num_epochs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    captions = make_captions(1760, generator)
    train_set = TensorDataset(*(t[:1360] for t in captions))
    test_set = TensorDataset(*(t[1360:] for t in captions))
    trainer = Trainer(
        PromptTagger(),
        DataLoader(train_set, batch_size=32, shuffle=True, generator=generator),
        DataLoader(test_set, batch_size=100),
        args,
    )
    trainer.train()
    print(f"metric {trainer.test():.4f}")
