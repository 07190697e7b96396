"""Question answering over short lists of facts, with sparsemax attention."""
import argparse

import torch
from torch import nn
from torch.autograd import Function

PEOPLE, RELATIONS, PLACES, MAX_FACTS = 8, 3, 12, 10


class SparsemaxFunction(Function):
    """Euclidean projection onto the simplex (Martins & Astudillo, 2016), last dimension."""

    @staticmethod
    def forward(ctx, z):
        z = z - z.max(dim=-1, keepdim=True).values
        zs = z.sort(dim=-1, descending=True).values
        k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        cumsum = zs.cumsum(-1)
        support_size = (1 + k * zs > cumsum).sum(-1, keepdim=True)
        tau = (cumsum.gather(-1, support_size - 1) - 1) / support_size.to(z.dtype)
        p = torch.clamp(z - tau, min=0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        support = (p > 0).to(grad.dtype)
        mean = (grad * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (grad - mean)


sparsemax = SparsemaxFunction.apply


def make_stories(n, gen):
    """Facts (who, relation, place) without repeated (who, relation); the question names one of them."""
    n_facts = torch.randint(4, MAX_FACTS + 1, (n,), generator=gen)
    keys = torch.rand(n, PEOPLE * RELATIONS, generator=gen).argsort(1)[:, :MAX_FACTS]
    who, rel = keys // RELATIONS, keys % RELATIONS
    place = torch.randint(PLACES, (n, MAX_FACTS), generator=gen)
    present = torch.arange(MAX_FACTS)[None] < n_facts[:, None]
    asked = (torch.rand(n, generator=gen) * n_facts).long()[:, None]
    facts = torch.stack([who, rel, place], -1) + 1          # 0 is padding
    facts = facts * present[..., None]
    question = torch.cat([who.gather(1, asked), rel.gather(1, asked)], 1) + 1
    answer = place.gather(1, asked).squeeze(1)
    return facts, question, answer


class SparseReader(nn.Module):
    def __init__(self, dim=32, heads=2):
        super().__init__()
        self.who = nn.Embedding(PEOPLE + 1, dim, padding_idx=0)
        self.rel = nn.Embedding(RELATIONS + 1, dim, padding_idx=0)
        self.place = nn.Embedding(PLACES + 1, dim, padding_idx=0)
        self.read_fact = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.Tanh())
        self.read_question = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.Tanh())
        self.heads = heads
        self.query = nn.Linear(2 * dim, 2 * dim)
        self.key = nn.Linear(2 * dim, 2 * dim)
        self.value = nn.Linear(2 * dim, 2 * dim)
        self.answer = nn.Sequential(nn.Linear(4 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, PLACES))

    def forward(self, facts, question):
        pad = facts[..., 0] == 0
        b, m = pad.shape
        f = self.read_fact(torch.cat([self.who(facts[..., 0]), self.rel(facts[..., 1]), self.place(facts[..., 2])], -1))
        q = self.read_question(torch.cat([self.who(question[:, 0]), self.rel(question[:, 1])], -1))
        query = self.query(q).view(b, self.heads, 1, -1)
        key = self.key(f).view(b, m, self.heads, -1).transpose(1, 2)
        value = self.value(f).view(b, m, self.heads, -1).transpose(1, 2)
        scores = (query * key).sum(-1) / key.shape[-1] ** 0.5              # (b, heads, m)
        attn = sparsemax(scores.masked_fill(pad[:, None], -1e4))
        context = torch.einsum("bhm,bhmd->bhd", attn, value).reshape(b, -1)
        return self.answer(torch.cat([context, q], -1)), attn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed)

    facts, question, answer = make_stories(11000, gen)
    train, test = slice(0, 10000), slice(10000, 11000)

    net = SparseReader()
    opt = torch.optim.NAdam(net.parameters(), lr=3e-3)
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        net.train()
        total = 0.0
        batches = torch.randperm(train.stop, generator=gen).split(80)
        for idx in batches:
            logits, _ = net(facts[idx], question[idx])
            loss = loss_fn(logits, answer[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item()
        print(f"epoch {epoch + 1} loss {total / len(batches):.4f}")

    net.eval()
    with torch.no_grad():
        logits, attn = net(facts[test], question[test])
        acc = (logits.argmax(-1) == answer[test]).float().mean().item()
    print(f"facts in the support: {(attn > 0).sum(-1).float().mean().item():.2f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
