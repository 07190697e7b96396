"""BERT-style pretraining on sentence pairs: masked tokens + "is the second sentence the next one?".

    python r124_pretrain_pairs.py [--fixed] [--seed N]
"""
import argparse
import random

import torch
import torch.nn as nn

PAD, UNK, EOS, SOS, MASK = range(5)
N_TOPICS, WORDS_PER_TOPIC, N_COMMON = 4, 6, 8
VOCAB = 5 + N_TOPICS * WORDS_PER_TOPIC + N_COMMON
SENT, SEQ = 6, 16


class Corpus:
    """Each line holds two sentences about one topic, mixed with common words."""

    def __init__(self, n_lines, rng):
        self.rng = rng
        self.lines = []
        for _ in range(n_lines):
            topic = rng.randrange(N_TOPICS)
            self.lines.append((topic, self.sentence(topic), self.sentence(topic)))

    def sentence(self, topic):
        words = []
        for _ in range(self.rng.randint(SENT - 2, SENT)):
            if self.rng.random() < 0.25:
                words.append(5 + N_TOPICS * WORDS_PER_TOPIC + self.rng.randrange(N_COMMON))
            else:
                words.append(5 + topic * WORDS_PER_TOPIC + self.rng.randrange(WORDS_PER_TOPIC))
        return words

    def pair(self, i):
        topic, t1, t2 = self.lines[i]
        if self.rng.random() < 0.5:
            return t1, t2, 1
        while True:
            other, _, t2 = self.lines[self.rng.randrange(len(self.lines))]
            if other != topic:
                return t1, t2, 0

    def mask(self, sent):
        tokens, labels = [], []
        for tok in sent:
            p = self.rng.random()
            if p < 0.15:
                labels.append(tok)
                if p < 0.12:
                    tokens.append(MASK)
                elif p < 0.135:
                    tokens.append(self.rng.randrange(5, VOCAB))
                else:
                    tokens.append(tok)
            else:
                tokens.append(tok)
                labels.append(PAD)
        return tokens, labels

    def item(self, i):
        t1, t2, is_next = self.pair(i)
        (a, la), (b, lb) = self.mask(t1), self.mask(t2)
        ids = [SOS] + a + [EOS] + b + [EOS]
        lab = [PAD] + la + [PAD] + lb + [PAD]
        seg = [1] * (len(a) + 2) + [2] * (len(b) + 1)
        fill = SEQ - len(ids)
        return ids + [PAD] * fill, lab + [PAD] * fill, seg + [0] * fill, is_next

    def tensors(self, order):
        ids, lab, seg, nxt = zip(*(self.item(i) for i in order))
        return dict(bert_input=torch.tensor(ids), bert_label=torch.tensor(lab),
                    segment_label=torch.tensor(seg), is_next=torch.tensor(nxt))


class TransformerBlock(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, hidden * 2), nn.GELU(), nn.Linear(hidden * 2, hidden))
        self.norm2 = nn.LayerNorm(hidden)

    def forward(self, x, pad):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, key_padding_mask=pad, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class BERT(nn.Module):
    def __init__(self, hidden=32, layers=2, heads=4):
        super().__init__()
        self.token = nn.Embedding(VOCAB, hidden, padding_idx=PAD)
        self.segment = nn.Embedding(3, hidden, padding_idx=0)
        self.position = nn.Embedding(SEQ, hidden)
        self.blocks = nn.ModuleList([TransformerBlock(hidden, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden)
        for table in (self.token, self.segment, self.position):
            nn.init.normal_(table.weight, std=0.1)
        with torch.no_grad():
            self.token.weight[PAD].zero_()
            self.segment.weight[0].zero_()

    def forward(self, ids, seg):
        pos = torch.arange(ids.size(1))
        x = self.token(ids) + self.segment(seg) + self.position(pos)
        for block in self.blocks:
            x = block(x, ids == PAD)
        return self.norm(x)


class NextSentencePrediction(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.linear = nn.Linear(hidden, 2)
        self.softmax = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        return self.softmax(self.linear(x[:, 0]))


class MaskedLanguageModel(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.linear = nn.Linear(hidden, VOCAB)
        self.softmax = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        return self.softmax(self.linear(x))


class BERTLM(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.bert = BERT(hidden)
        self.next_sentence = NextSentencePrediction(hidden)
        self.mask_lm = MaskedLanguageModel(hidden)

    def forward(self, ids, seg):
        x = self.bert(ids, seg)
        return self.next_sentence(x), self.mask_lm(x)


class BERTTrainer:
    def __init__(self, model, fixed, lr=4e-3, warmup=20):
        self.model = model
        self.optim = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optim, lambda s: min(1.0, (s + 1) / warmup))
        self.criterion = nn.NLLLoss(ignore_index=PAD)
        self.next_criterion = nn.NLLLoss() if fixed else self.criterion

    def step(self, data):
        next_out, mask_out = self.model(data["bert_input"], data["segment_label"])
        next_loss = self.next_criterion(next_out, data["is_next"])
        mask_loss = self.criterion(mask_out.transpose(1, 2), data["bert_label"])
        loss = next_loss + mask_loss
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.schedule.step()
        return next_loss.item(), mask_loss.item()

    @torch.no_grad()
    def evaluate(self, data):
        self.model.eval()
        next_out, mask_out = self.model(data["bert_input"], data["segment_label"])
        self.model.train()
        where = data["bert_label"] != PAD
        mask_acc = (mask_out.argmax(-1) == data["bert_label"])[where].float().mean().item()
        return (next_out.argmax(-1) == data["is_next"]).float().mean().item(), mask_acc


def run():
    ap = argparse.ArgumentParser()
    ap.add_argument("--fixed", action="store_true")
    ap.add_argument("--seed", type=int, default=0)
    opt = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)

    rng = random.Random(1000 + opt.seed)
    train, test = Corpus(1500, rng), Corpus(400, rng)
    seen = {tuple(a + b) for _, a, b in train.lines}
    test.lines = [line for line in test.lines if tuple(line[1] + line[2]) not in seen]
    test_data = test.tensors(range(len(test.lines)))

    trainer = BERTTrainer(BERTLM(), opt.fixed)
    for it in range(1, 201):
        data = train.tensors([rng.randrange(len(train.lines)) for _ in range(24)])
        next_loss, mask_loss = trainer.step(data)
        if it % 40 == 0:
            print({"iter": it, "next_loss": round(next_loss, 4), "mask_loss": round(mask_loss, 4)})
    next_acc, mask_acc = trainer.evaluate(test_data)
    print({"next_acc": round(next_acc, 4), "mask_acc": round(mask_acc, 4)})
    print("metric", round(next_acc, 4))


run()
