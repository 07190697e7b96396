import argparse
import random

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

IGNORE_INDEX = -100
LETTERS = 12          # items that can appear in a request
N_ITEMS = 5


class ChatTokenizer:
    """<bos> <user> item*5 <assistant> item*5 <eos>"""

    bos, user, assistant, eos = range(4)
    vocab_size = 4 + LETTERS

    def prompt(self, items):
        return [self.bos, self.user] + [4 + i for i in items] + [self.assistant]

    def conversation(self, items, reply):
        return self.prompt(items) + [4 + i for i in reply] + [self.eos]


class SortingChats:
    """Requests list five letters, replies give them back in alphabetical order."""

    def __init__(self, tokenizer, requests, fixed):
        self.rows = []
        for items in requests:
            full_tokens = tokenizer.conversation(items, sorted(items))
            prompt_len = len(tokenizer.prompt(items))
            input_ids = full_tokens[:-1]
            label_ids = full_tokens[1:]
            masked = prompt_len - 1 if fixed else prompt_len
            label_ids = [IGNORE_INDEX] * masked + label_ids[masked:]
            self.rows.append((input_ids, label_ids))

    def batches(self, batch_size, generator):
        ids = torch.tensor([r[0] for r in self.rows])
        labels = torch.tensor([r[1] for r in self.rows])
        while True:
            order = torch.randperm(len(self.rows), generator=generator)
            for i in range(0, len(order) - batch_size + 1, batch_size):
                pick = order[i:i + batch_size]
                yield ids[pick], labels[pick]


def draw_requests(rng, n):
    seen = set()
    while len(seen) < n:
        seen.add(tuple(rng.sample(range(LETTERS), N_ITEMS)))
    seen = sorted(seen)
    rng.shuffle(seen)
    return seen


@torch.no_grad()
def reply(model, prompts, n_new):
    ids = prompts
    for _ in range(n_new):
        nxt = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, nxt], dim=1)
    return ids[:, prompts.size(1):]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    tok = ChatTokenizer()
    requests = draw_requests(rng, 6200)
    train, held = requests[:6000], requests[6000:]
    data = SortingChats(tok, train, args.fixed)

    config = LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, bos_token_id=tok.bos, eos_token_id=tok.eos,
        pad_token_id=None, tie_word_embeddings=False, attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=args.lr, total_steps=args.steps, pct_start=0.15)

    model.train()
    loader = data.batches(args.batch_size, torch.Generator().manual_seed(args.seed))
    for step in range(1, args.steps + 1):
        input_ids, labels = next(loader)
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        opt.zero_grad(set_to_none=True)
        if step % 40 == 0 or step == 1:
            print(f"step {step}: loss {loss.item():.4f} grad_norm {gnorm.item():.3f}")

    model.eval()
    prompts = torch.tensor([tok.prompt(r) for r in held])
    want = torch.tensor([[4 + i for i in sorted(r)] + [tok.eos] for r in held])
    got = reply(model, prompts, want.size(1))
    right = got == want
    print("per position:", " ".join(f"{a:.2f}" for a in right.float().mean(0).tolist()))
    print(f"metric {right.all(1).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
