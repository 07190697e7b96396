"""Trains a pointer-generator network with coverage to summarise short generated news items."""
import argparse
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PAD, UNK, START, STOP = "[PAD]", "[UNK]", "[START]", "[STOP]"
SYLLABLES = "ba do ki lo mar ne ro sha tu vel wi zan gor pe sil ha".split()
EVENTS = {"detained": "held", "arrested": "held", "elected": "wins", "chosen": "wins",
          "injured": "hurt", "wounded": "hurt"}
CITIES = "paris london cairo lima tokyo oslo madrid delhi".split()
DAYS = "monday tuesday friday sunday".split()


def surname(rng):
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def story(rng):
    who, other = surname(rng), surname(rng)
    city = rng.choice(CITIES) if rng.random() < 0.5 else surname(rng) + "ville"
    verb = rng.choice(list(EVENTS))
    main = rng.choice(["{w} was {v} in {c} on {d} .", "on {d} {w} was {v} near {c} ."])
    main = main.format(w=who, v=verb, c=city, d=rng.choice(DAYS)).split()
    side = rng.choice(["{o} declined to comment .", "officials met {o} .", "a report by {o} is due ."])
    sents = [main, side.format(o=other).split()]
    rng.shuffle(sents)
    return sum(sents, []), f"{who} {EVENTS[verb]} in {city}".split()


class Vocab:
    def __init__(self, stories, size):
        counts = {}
        for article, abstract in stories:
            for w in article + abstract:
                counts[w] = counts.get(w, 0) + 1
        common = sorted(counts, key=lambda w: (-counts[w], w))[:size]
        self.itos = [PAD, UNK, START, STOP] + common
        self.stoi = {w: i for i, w in enumerate(self.itos)}

    def id(self, w):
        return self.stoi.get(w, self.stoi[UNK])

    def __len__(self):
        return len(self.itos)


class Batch:
    def __init__(self, stories, vocab):
        self.abstracts = [s[1] for s in stories]
        self.oovs, ext, enc, dec, tgt = [], [], [], [], []
        for article, abstract in stories:
            oov = []
            for w in article:
                if w not in vocab.stoi and w not in oov:
                    oov.append(w)
            extended = lambda w: len(vocab) + oov.index(w) if w in oov else vocab.id(w)
            self.oovs.append(oov)
            enc.append([vocab.id(w) for w in article])
            ext.append([extended(w) for w in article])
            dec.append([vocab.id(START)] + [vocab.id(w) for w in abstract])
            tgt.append([extended(w) for w in abstract] + [vocab.id(STOP)])
        pad = lambda rows: nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        self.enc_lens = torch.tensor([len(r) for r in enc])
        self.enc, self.enc_ext, self.dec_in, self.target = pad(enc), pad(ext), pad(dec), pad(tgt)
        self.enc_mask = (self.enc != 0).float()
        self.dec_mask = (self.target != 0).float()
        self.max_oov = max(len(o) for o in self.oovs)


class Attention(nn.Module):
    def __init__(self, n_hidden):
        super().__init__()
        self.W_h = nn.Linear(2 * n_hidden, 2 * n_hidden, bias=False)
        self.W_s = nn.Linear(2 * n_hidden, 2 * n_hidden)
        self.v = nn.Linear(2 * n_hidden, 1, bias=False)
        self.w_c = None

    def add_coverage(self):
        self.w_c = nn.Linear(1, self.v.in_features, bias=False)
        return self.w_c.parameters()

    def forward(self, state, enc_out, enc_feat, mask, coverage):
        feat = enc_feat + self.W_s(torch.cat(state, 1)).unsqueeze(1)
        if self.w_c is not None:
            feat = feat + self.w_c(coverage.unsqueeze(2))
        e = self.v(torch.tanh(feat)).squeeze(2)
        a = F.softmax(e, dim=1) * mask
        a = a / a.sum(1, keepdim=True)
        return torch.bmm(a.unsqueeze(1), enc_out).squeeze(1), a


class PointerGenerator(nn.Module):
    def __init__(self, n_vocab, n_emb=32, n_hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(n_vocab, n_emb)
        self.encoder = nn.LSTM(n_emb, n_hidden, batch_first=True, bidirectional=True)
        self.reduce_h = nn.Linear(2 * n_hidden, n_hidden)
        self.reduce_c = nn.Linear(2 * n_hidden, n_hidden)
        self.attention = Attention(n_hidden)
        self.x_context = nn.Linear(2 * n_hidden + n_emb, n_emb)
        self.cell = nn.LSTMCell(n_emb, n_hidden)
        self.p_gen = nn.Linear(4 * n_hidden + n_emb, 1)
        self.out1 = nn.Linear(3 * n_hidden, n_hidden)
        self.out2 = nn.Linear(n_hidden, n_vocab)
        nn.init.normal_(self.embedding.weight, std=0.1)
        for rnn in (self.encoder, self.cell):
            for name, p in rnn.named_parameters():
                if "weight" in name:
                    nn.init.uniform_(p, -0.1, 0.1)
                else:
                    n = p.numel() // 4
                    nn.init.zeros_(p)
                    if "bias_ih" in name:
                        p.data[n:2 * n] = 1.0       # forget gate

    def encode(self, b):
        packed = pack_padded_sequence(self.embedding(b.enc), b.enc_lens, batch_first=True, enforce_sorted=False)
        out, (h, c) = self.encoder(packed)
        out, _ = pad_packed_sequence(out, batch_first=True)
        merge = lambda x: torch.cat([x[0], x[1]], 1)
        state = F.relu(self.reduce_h(merge(h))), F.relu(self.reduce_c(merge(c)))
        return out, self.attention.W_h(out), state

    def step(self, y, state, context, coverage, enc_out, enc_feat, b):
        x = self.x_context(torch.cat([context, self.embedding(y)], 1))
        state = self.cell(x, state)
        context, attn = self.attention(state, enc_out, enc_feat, b.enc_mask, coverage)
        p_gen = torch.sigmoid(self.p_gen(torch.cat([context, *state, x], 1)))
        p_vocab = F.softmax(self.out2(self.out1(torch.cat([state[0], context], 1))), dim=1)
        final = F.pad(p_gen * p_vocab, (0, b.max_oov))
        final = final.scatter_add(1, b.enc_ext, (1 - p_gen) * attn)
        return final, attn, state, context

    def loss(self, b, cov_weight=1.0):
        enc_out, enc_feat, state = self.encode(b)
        context, coverage = enc_out.new_zeros(enc_out.size(0), enc_out.size(2)), torch.zeros_like(b.enc_mask)
        losses = []
        for t in range(b.dec_in.size(1)):
            final, attn, state, context = self.step(b.dec_in[:, t], state, context, coverage, enc_out, enc_feat, b)
            nll = -torch.log(final.gather(1, b.target[:, t:t + 1]).squeeze(1) + 1e-12)
            if self.attention.w_c is not None:
                nll = nll + cov_weight * torch.minimum(attn, coverage).sum(1)
                coverage = coverage + attn
            losses.append(nll * b.dec_mask[:, t])
        return (torch.stack(losses, 1).sum(1) / b.dec_mask.sum(1)).mean()

    @torch.no_grad()
    def decode(self, b, vocab, max_len=8):
        enc_out, enc_feat, state = self.encode(b)
        n = enc_out.size(0)
        context, coverage = enc_out.new_zeros(n, enc_out.size(2)), torch.zeros_like(b.enc_mask)
        y, outputs = torch.full((n,), vocab.id(START)), []
        for _ in range(max_len):
            final, attn, state, context = self.step(y, state, context, coverage, enc_out, enc_feat, b)
            coverage = coverage + attn
            best = final.argmax(1)
            outputs.append(best)
            y = best.masked_fill(best >= len(vocab), vocab.id(UNK))
        summaries = []
        for i, row in enumerate(torch.stack(outputs, 1).tolist()):
            text = []
            for k in row:
                if k == vocab.id(STOP):
                    break
                text.append(vocab.itos[k] if k < len(vocab) else
                            b.oovs[i][k - len(vocab)] if k - len(vocab) < len(b.oovs[i]) else UNK)
            summaries.append(text)
        return summaries


def rouge_2(hyp, ref):
    bigrams = lambda words: set(zip(words, words[1:]))
    h, r = bigrams(hyp), bigrams(ref)
    return 2 * len(h & r) / (len(h) + len(r)) if h and r else 0.0


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=210)
    ap.add_argument("--coverage-steps", type=int, default=40)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    stories = {}
    while len(stories) < 1700:
        article, abstract = story(rng)
        stories[" ".join(article)] = (article, abstract)
    stories = list(stories.values())
    train, test = stories[:1500], stories[1500:]
    vocab = Vocab(train, size=48)

    net = PointerGenerator(len(vocab))
    opt = torch.optim.Adagrad(net.parameters(), lr=0.15, initial_accumulator_value=0.1)
    running = None
    for step in range(args.steps + args.coverage_steps):
        if step == args.steps:      # second phase: the coverage model, from the trained parameters
            print("adding coverage")
            opt.add_param_group({"params": net.attention.add_coverage()})
        loss = net.loss(Batch(rng.sample(train, 20), vocab))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 2.0)
        opt.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 40 == 0:
            print(f"step {step + 1} running loss {running:.4f}")

    net.eval()
    summaries = net.decode(Batch(test, vocab), vocab)
    scores = [rouge_2(h, ref) for h, (_, ref) in zip(summaries, test)]
    print("example:", " ".join(test[0][0]), "->", " ".join(summaries[0]))
    print(f"metric {sum(scores) / len(scores):.4f}")


if __name__ == "__main__":
    main()
