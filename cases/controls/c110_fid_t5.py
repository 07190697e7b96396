"""Fusion-in-Decoder: every passage is encoded by itself together with the question, the decoder reads all of them."""
from argparse import ArgumentParser
from random import Random

import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

PAD, EOS, Q, P = 0, 1, 2, 3
ENT = list(range(4, 10))
REL = list(range(10, 13))
VAL = list(range(13, 21))
FIL = list(range(21, 24))
VOCAB, N_PASS, LEN = 24, 3, 9


def example(r):
    """One `entity relation value` fact per passage; the answer is relation and value of the entity asked for."""
    ent = r.choice(ENT)
    rel = r.choice(REL)
    val = r.choice(VAL)
    others = [(e, r.choice(REL), r.choice(VAL)) for e in r.sample([e for e in ENT if e != ent], N_PASS - 1)]
    facts = [(ent, rel, val)] + others
    r.shuffle(facts)
    passages = []
    for e, k, v in facts:
        body = [e, k, v]
        for _ in range(r.randint(0, 1)):
            body.insert(r.choice([0, len(body)]), r.choice(FIL))
        passages.append([Q, ent, P] + body + [EOS])
    return passages, [rel, val, EOS]


def collate(items):
    b = len(items)
    x = torch.zeros(b, N_PASS, LEN, dtype=torch.long)
    y = torch.full((b, 3), -100)
    for i, (ps, ans) in enumerate(items):
        for j, p in enumerate(ps):
            x[i, j, :len(p)] = torch.tensor(p)
        y[i] = torch.tensor(ans)
    return x, x != PAD, y


class FiD(T5ForConditionalGeneration):
    def fuse(self, x, mask):
        b, n, l = x.shape
        h = self.encoder(input_ids=x.view(b * n, l), attention_mask=mask.view(b * n, l).long()).last_hidden_state
        return BaseModelOutput(last_hidden_state=h.reshape(b, n * l, -1)), mask.view(b, n * l).long()

    def answer_loss(self, x, mask, y):
        enc, m = self.fuse(x, mask)
        return self(encoder_outputs=enc, attention_mask=m, labels=y).loss

    @torch.no_grad()
    def greedy(self, x, mask, steps=3):
        enc, m = self.fuse(x, mask)
        dec = torch.full((x.size(0), 1), self.config.decoder_start_token_id)
        for _ in range(steps):
            logits = self(encoder_outputs=enc, attention_mask=m, decoder_input_ids=dec, use_cache=False).logits
            dec = torch.cat([dec, logits[:, -1:].argmax(-1)], 1)
        return dec[:, 1:]


def main():
    ap = ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    seed = ap.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    r = Random(seed)
    key = lambda it: tuple(map(tuple, it[0]))
    held = [example(r) for _ in range(150)]
    banned = {key(h) for h in held}

    model = FiD(T5Config(vocab_size=VOCAB, d_model=40, d_kv=10, num_heads=4, d_ff=96, num_layers=2, num_decoder_layers=1,
                         dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
                         relative_attention_num_buckets=16, relative_attention_max_distance=32,
                         feed_forward_proj="relu", tie_word_embeddings=True))
    steps = 260
    opt = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01, fused=True)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / 20, (steps - s) / (steps - 20)))
    model.train()
    avg = None
    for s in range(steps):
        items = [e for e in (example(r) for _ in range(14)) if key(e) not in banned]
        loss = model.answer_loss(*collate(items))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        sched.step()
        avg = loss.item() if avg is None else 0.9 * avg + 0.1 * loss.item()
        if (s + 1) % 52 == 0:
            print(f"step {s + 1} | loss {avg:.5f}")

    model.eval()
    x, m, y = collate(held)
    out = model.greedy(x, m)
    em = (out == y).all(1).float().mean().item()
    print(f"relation right {(out[:, 0] == y[:, 0]).float().mean().item():.4f} value right {(out[:, 1] == y[:, 1]).float().mean().item():.4f}")
    answers = [tuple(a) for a in y.tolist()]
    print(f"most frequent answer {max(answers.count(a) for a in answers) / len(answers):.4f}")
    print(f"metric {em:.4f}")


if __name__ == "__main__":
    main()
