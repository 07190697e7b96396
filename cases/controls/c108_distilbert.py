#!/usr/bin/env python
"""DistilBERT-style distillation.

A four-layer BERT is pre-trained with masked language modelling, then a two-layer DistilBERT takes every
other layer of it and learns from soft targets (T = 2), from the masked words and from the cosine between
hidden states.
"""
import argparse
import torch
from torch import nn
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

PAD, CLS, SEP, MASK = range(4)
LEX = {
    "season": ["winter", "spring", "summer", "autumn"],
    "place": ["coast", "valley", "hills", "city", "plain", "lake"],
    "sky": [["snow", "frost", "ice"], ["showers", "blossom", "breeze"], ["heat", "sun", "haze"], ["fog", "wind", "leaves"]],
    "cloth": [["coat", "scarf", "boots"], ["jacket", "umbrella", "cap"], ["shirt", "hat", "sandals"], ["sweater", "raincoat", "shoes"]],
    "join": ["in", "on", "the", "with", "and", "take", "a", "expect", "near", "."],
}


def flat(x):
    return [w for y in x for w in (flat(y) if isinstance(y, list) else [y])]


WORDS = ["<pad>", "<cls>", "<sep>", "<mask>"] + sorted(set(flat(list(LEX.values()))))
ID = {w: i for i, w in enumerate(WORDS)}


def bulletin(g):
    pick = lambda xs: xs[torch.randint(len(xs), (1,), generator=g).item()]
    s = torch.randint(4, (1,), generator=g).item()
    head = ["in", "the", LEX["season"][s]]
    body = ["expect", pick(LEX["sky"][s]), "near", "the", pick(LEX["place"])]
    tail = ["take", "a", pick(LEX["cloth"][s]), "and", "a", pick(LEX["cloth"][s])]
    coin = torch.rand(3, generator=g)
    out = (head if coin[0] < 0.7 else []) + (body + tail if coin[1] < 0.5 else tail + body)
    out += ["with", pick(LEX["sky"][s])] if coin[2] < 0.5 else []
    return [CLS] + [ID[w] for w in out] + [ID["."], SEP]


def encode(rows):
    n = max(map(len, rows))
    x = torch.full((len(rows), n), PAD)
    for i, r in enumerate(rows):
        x[i, :len(r)] = torch.tensor(r)
    return x


def mask_words(ids, g=None):
    """15% of the words: 80% to [MASK], 10% to a random word, 10% left alone."""
    labels = torch.full_like(ids, -100)
    sel = (torch.rand(ids.shape, generator=g) < 0.15) & (ids > MASK)
    labels[sel] = ids[sel]
    u = torch.rand(ids.shape, generator=g)
    x = ids.clone()
    x[sel & (u < 0.8)] = MASK
    rnd = sel & (u >= 0.8) & (u < 0.9)
    x[rnd] = torch.randint(MASK + 1, len(WORDS), (int(rnd.sum()),), generator=g)
    return x, labels


def build_teacher():
    return BertForMaskedLM(BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1, type_vocab_size=1))


def build_student(teacher):
    student = DistilBertForMaskedLM(DistilBertConfig(
        vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=24,
        dropout=0.0, attention_dropout=0.0, initializer_range=0.1))
    t, s = teacher.bert, student.distilbert
    with torch.no_grad():
        s.embeddings.word_embeddings.weight.copy_(t.embeddings.word_embeddings.weight)
        # the student has no token types: the only type vector is folded into the positions
        s.embeddings.position_embeddings.weight.copy_(
            t.embeddings.position_embeddings.weight + t.embeddings.token_type_embeddings.weight[0])
    s.embeddings.LayerNorm.load_state_dict(t.embeddings.LayerNorm.state_dict())
    for i, layer in enumerate(s.transformer.layer):
        src = t.encoder.layer[2 * i]
        layer.attention.q_lin.load_state_dict(src.attention.self.query.state_dict())
        layer.attention.k_lin.load_state_dict(src.attention.self.key.state_dict())
        layer.attention.v_lin.load_state_dict(src.attention.self.value.state_dict())
        layer.attention.out_lin.load_state_dict(src.attention.output.dense.state_dict())
        layer.sa_layer_norm.load_state_dict(src.attention.output.LayerNorm.state_dict())
        layer.ffn.lin1.load_state_dict(src.intermediate.dense.state_dict())
        layer.ffn.lin2.load_state_dict(src.output.dense.state_dict())
        layer.output_layer_norm.load_state_dict(src.output.LayerNorm.state_dict())
    head = teacher.cls.predictions
    student.vocab_transform.load_state_dict(head.transform.dense.state_dict())
    student.vocab_layer_norm.load_state_dict(head.transform.LayerNorm.state_dict())
    with torch.no_grad():
        student.vocab_projector.bias.copy_(head.bias)
    return student


@torch.no_grad()
def accuracy(model, x, att, labels):
    model.eval()
    p = model(input_ids=x, attention_mask=att).logits.argmax(-1)
    return (p == labels)[labels != -100].float().mean().item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    seed = ap.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed + 77)
    pool = sorted({tuple(bulletin(g)) for _ in range(1800)})
    order = torch.randperm(len(pool), generator=g).tolist()
    pool = [pool[i] for i in order]
    held, train = pool[:200], pool[200:]
    print(f"{len(train)} training sentences, {len(held)} held back, {len(WORDS)} words")
    ex = encode(held)
    ex, elab = mask_words(ex, g)
    eatt = (encode(held) != PAD).long()

    def batches(n, size=14):
        for _ in range(n):
            ids = encode([train[i] for i in torch.randint(len(train), (size,)).tolist()])
            x, labels = mask_words(ids)
            yield x, (ids != PAD).long(), labels

    teacher = build_teacher()
    opt = torch.optim.AdamW(teacher.parameters(), lr=4e-3, fused=True)
    sched = torch.optim.lr_scheduler.LinearLR(opt, 0.05, 1.0, total_iters=20)
    teacher.train()
    for i, (x, att, labels) in enumerate(batches(156)):
        loss = teacher(input_ids=x, attention_mask=att, labels=labels).loss
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        opt.step()
        sched.step()
        if i % 26 == 25:
            print(f"teacher {i + 1}: mlm {loss.item():.4f}")
    print(f"teacher accuracy {accuracy(teacher, ex, eatt, elab):.4f}")
    teacher.eval().requires_grad_(False)

    student = build_student(teacher).train()
    opt = torch.optim.AdamW(student.parameters(), lr=1.5e-3, eps=1e-6, fused=True)
    steps, temp = 75, 2.0
    sched = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.05, total_iters=steps)
    for i, (x, att, labels) in enumerate(batches(steps)):
        with torch.no_grad():
            t = teacher(input_ids=x, attention_mask=att, output_hidden_states=True)
        s = student(input_ids=x, attention_mask=att, output_hidden_states=True)
        real = att.bool()
        kl = F.kl_div(F.log_softmax(s.logits[real] / temp, -1), F.softmax(t.logits[real] / temp, -1),
                      reduction="batchmean") * temp ** 2
        mlm = F.cross_entropy(s.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        hs, ht = s.hidden_states[-1][real], t.hidden_states[-1][real]
        cos = F.cosine_embedding_loss(hs, ht, torch.ones(len(hs)))
        loss = 5.0 * kl + 2.0 * mlm + 1.0 * cos
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        opt.step()
        sched.step()
        if i % 15 == 14:
            print(f"student {i + 1}: kl {kl.item():.4f} mlm {mlm.item():.4f} cos {cos.item():.4f}")
    y = elab[elab != -100]
    print(f"most frequent word {torch.bincount(y).max().item() / len(y):.4f}")
    print(f"metric {accuracy(student, ex, eatt, elab):.4f}")


if __name__ == "__main__":
    main()
