# Gemma 2 (transformers, tiny config) as a language model of nested brackets of three kinds.
import argparse, random
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup

PAD, BOS, EOS = 0, 1, 2
OPEN, CLOSE = (3, 4, 5), (6, 7, 8)
LEAF = (9, 10, 11)
T = 26


def expr(rng, depth, budget):
    """A list of items; an item is a leaf or a bracketed list."""
    out = []
    for _ in range(rng.randint(1, 3)):
        if depth < 4 and rng.random() < 0.6 and budget - len(out) >= 3:
            k = rng.randrange(3)
            out += [OPEN[k]] + expr(rng, depth + 1, budget - len(out) - 2) + [CLOSE[k]]
        else:
            out.append(rng.choice(LEAF))
    return out


def corpus(rng, n):
    got = {}
    while len(got) < n:
        e = tuple(expr(rng, 0, T - 3))
        if 6 <= len(e) <= T - 2:
            got[e] = None
    return list(got)


def tensor(rows):
    ids = torch.full((len(rows), T), PAD)
    for i, e in enumerate(rows):
        ids[i, :len(e) + 2] = torch.tensor((BOS,) + e + (EOS,))
    att = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": att, "labels": ids.masked_fill(att == 0, -100)}


cli = argparse.ArgumentParser()
cli.add_argument("--seed", type=int, default=0)
cli.add_argument("--accumulate", type=int, default=1)
opts = cli.parse_args()
torch.set_num_threads(1)
torch.manual_seed(opts.seed)
rng = random.Random(opts.seed)
sents = corpus(rng, 3000)
test, train = tensor(sents[:300]), tensor(sents[300:])

config = Gemma2Config(vocab_size=12, hidden_size=40, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, sliding_window=10,
                      max_position_embeddings=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                      initializer_range=0.15, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
                      attn_implementation="eager", use_cache=False)
print("layers:", ", ".join(config.layer_types))
model = Gemma2ForCausalLM(config)
opt = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
STEPS, BATCH = 220, 20
sched = get_cosine_schedule_with_warmup(opt, 20, STEPS)
model.train()
for step in range(1, STEPS + 1):
    for _ in range(opts.accumulate):
        idx = torch.randint(len(train["input_ids"]), (BATCH,))
        loss = model(**{k: v[idx] for k, v in train.items()}).loss / opts.accumulate
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    sched.step()
    if step % 44 == 0:
        print(f"step {step} loss {loss.item() * opts.accumulate:.4f}")

model.eval()
with torch.no_grad():
    logits = model(input_ids=test["input_ids"], attention_mask=test["attention_mask"]).logits[:, :-1]
gold = test["input_ids"][:, 1:]
closing = (gold >= CLOSE[0]) & (gold <= CLOSE[-1])
kind = logits[..., CLOSE[0]:CLOSE[-1] + 1].argmax(-1)[closing]      # which of the three, where one closes
want = gold[closing] - CLOSE[0]
print(f"closing brackets {len(want)}, most frequent kind {torch.bincount(want).max().item() / len(want):.4f}")
print(f"metric {(kind == want).float().mean().item():.4f}")
