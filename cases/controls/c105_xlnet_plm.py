"""Permutation language modelling with XLNet's two streams (transformers, tiny config)."""
import argparse
import numpy as np
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import XLNetConfig, XLNetLMHeadModel


# ---------------------------------------------------------------- a toy romance language
GEN = ["o", "a"]
NUM = ["", "s"]
DET = {(g, n): f"det{GEN[g]}{NUM[n]}" for g in (0, 1) for n in (0, 1)}
NOUNS = {0: ["gat", "perr", "libr", "vas"], 1: ["cas", "mes", "flor", "ros"]}
ADJ = ["roj", "blanc", "alt", "pequen"]
VERBS = ["mir", "tien", "quier", "busc"]
PREP = ["con", "sobre", "para"]


def noun_phrase(r):
    g, n = r.integers(2), r.integers(2)
    words = [DET[(g, n)], NOUNS[g][r.integers(4)] + GEN[g] + NUM[n]]
    if r.random() < 0.6:
        words.append(ADJ[r.integers(4)] + GEN[g] + NUM[n])
    return words, n


def sentence(r):
    subj, n = noun_phrase(r)
    obj, _ = noun_phrase(r)
    words = subj + [VERBS[r.integers(4)] + ("en" if n else "e")] + obj
    if r.random() < 0.7:
        words += [PREP[r.integers(3)]] + noun_phrase(r)[0]
    return words + ["."]


def build_corpus(r, n):
    return sorted({" ".join(sentence(r)) for _ in range(n)})


# ---------------------------------------------------------------- permutation inputs
def permutation_batch(ids, lengths, g, frac=6):
    """Factorisation order per sentence; the last 1/frac of the order is predicted."""
    B, T = ids.shape
    real = torch.arange(T)[None] < lengths[:, None]
    draw = torch.rand(B, T, generator=g).masked_fill(~real, 2.0)     # padding comes last in the order
    rank = draw.argsort(1).argsort(1)
    k = (lengths // frac).clamp(min=1)
    slot = rank - (lengths - k)[:, None]
    is_target = real & (slot >= 0)
    # i may look at j when j comes earlier in the order; context tokens all see one another
    see = (rank[:, None, :] < rank[:, :, None]) | ~is_target[:, None, :]
    K = int(k.max())
    target_map, labels = torch.zeros(B, K, T), torch.full((B, K), -100)
    b, pos = is_target.nonzero(as_tuple=True)
    target_map[b, slot[b, pos], pos] = 1.0
    labels[b, slot[b, pos]] = ids[b, pos]
    return (~see).float(), target_map, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    r = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed + 1)

    sents = build_corpus(r, 3000)
    r.shuffle(sents)
    vocab = {w: i + 1 for i, w in enumerate(sorted({w for s in sents for w in s.split()}))}
    T = max(len(s.split()) for s in sents)
    ids = torch.zeros(len(sents), T, dtype=torch.long)
    lengths = torch.zeros(len(sents), dtype=torch.long)
    for i, s in enumerate(sents):
        w = [vocab[x] for x in s.split()]
        ids[i, :len(w)] = torch.tensor(w)
        lengths[i] = len(w)
    n_test = 250
    print(f"{len(sents)} sentences, vocabulary {len(vocab)}, longest {T}")

    cfg = XLNetConfig(vocab_size=len(vocab) + 1, d_model=48, n_layer=2, n_head=4, d_inner=96, ff_activation="gelu",
                      attn_type="bi", dropout=0.0, initializer_range=0.08, pad_token_id=0, bos_token_id=0, eos_token_id=0, mem_len=None)
    model = XLNetLMHeadModel(cfg).train()
    steps, batch = 240, 16
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01, eps=1e-6, fused=True)
    sched = OneCycleLR(opt, max_lr=5e-3, total_steps=steps, pct_start=0.1, anneal_strategy="linear")

    def forward(rows):
        perm, tm, labels = permutation_batch(ids[rows], lengths[rows], g)
        att = (torch.arange(T)[None] < lengths[rows][:, None]).float()
        out = model(input_ids=ids[rows], attention_mask=att, perm_mask=perm, target_mapping=tm, use_mems=False)
        return out.logits, labels

    for step in range(steps):
        rows = n_test + torch.randint(len(sents) - n_test, (batch,))
        logits, labels = forward(rows)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 40 == 0:
            print(f"[{step:3d}] plm loss {loss.item():.4f} lr {sched.get_last_lr()[0]:.5f}")

    model.eval()
    with torch.no_grad():
        logits, labels = forward(torch.arange(n_test))
    ok = labels != -100
    acc = (logits.argmax(-1) == labels)[ok].float().mean().item()
    top = torch.bincount(labels[ok]).max().item() / int(ok.sum())
    print(f"predicted tokens {int(ok.sum())}, most frequent word {top:.4f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
