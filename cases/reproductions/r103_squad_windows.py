"""Extractive QA with a small BERT: long contexts are cut into overlapping windows (features), as in run_squad."""
import argparse
import collections
import math
import random

import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from transformers import BertConfig, BertForQuestionAnswering

# ----------------------------------------------------------------- optimizer


def warmup_linear(x, warmup=0.002):
    if x < warmup:
        return x / warmup
    return 1.0 - x


class BertAdam(Optimizer):
    """Adam with decoupled weight decay, no bias correction, and a warm-up/linear schedule inside."""

    def __init__(self, params, lr, warmup=-1, t_total=-1, b1=0.9, b2=0.999, e=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        super().__init__(params, dict(lr=lr, warmup=warmup, t_total=t_total, b1=b1, b2=b2, e=e,
                                      weight_decay=weight_decay, max_grad_norm=max_grad_norm))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["next_m"] = torch.zeros_like(p)
                    state["next_v"] = torch.zeros_like(p)
                m, v = state["next_m"], state["next_v"]
                if group["max_grad_norm"] > 0:
                    torch.nn.utils.clip_grad_norm_(p, group["max_grad_norm"])
                m.mul_(group["b1"]).add_(p.grad, alpha=1 - group["b1"])
                v.mul_(group["b2"]).addcmul_(p.grad, p.grad, value=1 - group["b2"])
                update = m / (v.sqrt() + group["e"])
                if group["weight_decay"] > 0:
                    update += group["weight_decay"] * p
                lr = group["lr"]
                if group["t_total"] != -1:
                    lr *= warmup_linear(state["step"] / group["t_total"], group["warmup"])
                p.add_(update, alpha=-lr)
                state["step"] += 1


# ----------------------------------------------------------------- data
CLS, SEP, PAD = 1, 2, 0
KINDS = ["who", "when", "where"]
Q_FIRST, PER_QUESTION, Q_LEN = 3, 3, 3   # question words, a block per kind
ANSWER_FIRST, PER_KIND = 15, 9           # answer vocabulary, a block per kind
FILLER_FIRST, N_FILLER = 50, 40
VOCAB = FILLER_FIRST + N_FILLER
MAX_SEQ, DOC_STRIDE = 28, 14
HEAD = Q_LEN + 2                         # [CLS] question [SEP]
Example = collections.namedtuple("Example", "question context start end")
Feature = collections.namedtuple("Feature", "example offset ids mask types start end")


def read_examples(n, rng):
    examples = []
    for _ in range(n):
        length = rng.randint(30, 48)
        context = [FILLER_FIRST + rng.randrange(N_FILLER) for _ in range(length)]
        kind = rng.randrange(len(KINDS))
        cells = rng.sample(range(length // 6), len(KINDS))
        for other, cell in enumerate(cells):
            if other != kind and rng.random() > 0.25:
                continue
            size = rng.randint(2, 4)                     # such as "7 march 1987", first and last word have their own words
            begin = cell * 6 + rng.randint(0, 2)
            for k in range(size):
                part = 0 if k == 0 else 2 if k == size - 1 else 1
                context[begin + k] = ANSWER_FIRST + other * PER_KIND + 3 * part + rng.randrange(3)
            if other == kind:
                start, end = begin, begin + size - 1
        question = [Q_FIRST + kind * PER_QUESTION + rng.randrange(PER_QUESTION) for _ in range(Q_LEN)]
        examples.append(Example(question, context, start, end))
    return examples


def convert_examples_to_features(examples):
    features = []
    room = MAX_SEQ - HEAD - 1
    for index, ex in enumerate(examples):
        offset = 0
        while True:
            piece = ex.context[offset:offset + room]
            ids = [CLS] + ex.question + [SEP] + piece + [SEP]
            mask = [1] * len(ids) + [0] * (MAX_SEQ - len(ids))
            types = [0] * HEAD + [1] * (len(piece) + 1) + [0] * (MAX_SEQ - len(ids))
            inside = offset <= ex.start and ex.end < offset + len(piece)
            start, end = (ex.start - offset + HEAD, ex.end - offset + HEAD) if inside else (0, 0)
            features.append(Feature(index, offset, ids + [PAD] * (MAX_SEQ - len(ids)), mask, types, start, end))
            if offset + room >= len(ex.context):
                break
            offset += DOC_STRIDE
    return features


def to_dataset(features):
    col = lambda name: torch.tensor([getattr(f, name) for f in features])
    return TensorDataset(col("ids"), col("mask"), col("types"), col("start"), col("end"))


@torch.no_grad()
def exact_match(model, examples, features):
    model.eval()
    best = {}
    ids, mask, types, _, _ = to_dataset(features).tensors
    for lo in range(0, len(features), 200):
        out = model(ids[lo:lo + 200], attention_mask=mask[lo:lo + 200], token_type_ids=types[lo:lo + 200])
        for f, s, e, t in zip(features[lo:lo + 200], out.start_logits, out.end_logits, types[lo:lo + 200]):
            null = (s[0] + e[0]).item()
            s, e = s.masked_fill(t == 0, -1e4), e.masked_fill(t == 0, -1e4)
            pair = s[:, None] + e[None, :]
            ok = torch.ones_like(pair, dtype=torch.bool).triu() & torch.ones_like(pair, dtype=torch.bool).tril(4)
            pair = pair.masked_fill(~ok, -1e9)
            where = pair.argmax().item()
            score = pair.flatten()[where].item() - null
            if f.example not in best or score > best[f.example][0]:
                b, d = divmod(where, pair.size(1))
                best[f.example] = (score, b - HEAD + f.offset, d - HEAD + f.offset)
    model.train()
    return float(np.mean([best[i][1:] == (ex.start, ex.end) for i, ex in enumerate(examples)]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--learning_rate", default=2e-3, type=float)
    parser.add_argument("--warmup_proportion", default=0.1, type=float)
    parser.add_argument("--train_batch_size", default=40, type=int)
    parser.add_argument("--num_train_epochs", default=3, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    rng = random.Random(args.seed)
    train_examples, dev_examples = read_examples(1000, rng), read_examples(200, rng)
    train_features = convert_examples_to_features(train_examples)
    dev_features = convert_examples_to_features(dev_examples)

    config = BertConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=MAX_SEQ, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, initializer_range=0.1)
    model = BertForQuestionAnswering(config)

    if args.fixed:
        num_train_steps = math.ceil(len(train_features) / args.train_batch_size) * args.num_train_epochs
    else:
        num_train_steps = math.ceil(len(train_examples) / args.train_batch_size) * args.num_train_epochs

    no_decay = ["bias", "LayerNorm"]
    named = list(model.named_parameters())
    grouped = [
        {"params": [p for n, p in named if not any(k in n for k in no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in named if any(k in n for k in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = BertAdam(grouped, lr=args.learning_rate, warmup=args.warmup_proportion, t_total=num_train_steps)

    train_data = to_dataset(train_features)
    loader = DataLoader(train_data, sampler=RandomSampler(train_data), batch_size=args.train_batch_size)
    print("***** Running training *****")
    print(f"  Num orig examples = {len(train_examples)}")
    print(f"  Num split examples = {len(train_features)}")
    print(f"  Batch size = {args.train_batch_size}")
    global_step, tr_loss = 0, 0.0
    model.train()
    for epoch in range(args.num_train_epochs):
        for ids, mask, types, start, end in loader:
            loss = model(ids, attention_mask=mask, token_type_ids=types, start_positions=start, end_positions=end).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tr_loss += loss.item()
            global_step += 1
            if global_step % 40 == 0:
                print(f"epoch {epoch} step {global_step} loss {tr_loss / 40:.4f}")
                tr_loss = 0.0
    print("***** Running predictions *****")
    print(f"metric {exact_match(model, dev_examples, dev_features):.4f}")


if __name__ == "__main__":
    main()
