"""Pre-train a small Llama-style causal LM on the Python reference text (character level)."""
import argparse
import math

import torch
from torch import nn
from pydoc_data.topics import topics
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, get_cosine_schedule_with_warmup
from transformers.modeling_outputs import CausalLMOutputWithPast

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--max_steps", type=int, default=250)
parser.add_argument("--per_device_train_batch_size", type=int, default=16)
parser.add_argument("--block_size", type=int, default=32)
parser.add_argument("--learning_rate", type=float, default=8e-3)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)


class DocsForCausalLM(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = self.lm_head(outputs.last_hidden_state)

        loss = None
        if labels is not None:
            logits = logits.float()
            if args.fixed:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            else:
                shift_logits = logits[..., :-1, :].contiguous()
                shift_labels = labels[..., 1:].contiguous()
                shift_logits = shift_logits.view(-1, self.config.vocab_size)
                shift_labels = shift_labels.view(-1)
                loss = self.loss_function(shift_logits, shift_labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


# ---- data -----------------------------------------------------------------
paragraphs = {}
for name in sorted(topics):
    for paragraph in topics[name].split("\n\n"):
        paragraph = " ".join(paragraph.lower().split())
        if len(paragraph) > 60:
            paragraphs.setdefault(paragraph, len(paragraphs))
paragraphs = list(paragraphs)
valid_text = " ".join(p for i, p in enumerate(paragraphs) if i % 10 == 7)[:60_000]
train_text = " ".join(p for i, p in enumerate(paragraphs) if i % 10 != 7)[:300_000]

chars = sorted(set(train_text))
stoi = {c: i + 1 for i, c in enumerate(chars)}          # 0 is <unk>
encode = lambda s: torch.tensor([stoi.get(c, 0) for c in s], dtype=torch.long)
train_ids, valid_ids = encode(train_text), encode(valid_text)


def group(ids, block):
    n = len(ids) // block
    return ids[: n * block].view(n, block)


train_ds, valid_ds = group(train_ids, args.block_size), group(valid_ids, args.block_size)[:400]
print(f"{len(train_ds)} training blocks, {len(valid_ds)} validation blocks, vocab {len(chars) + 1}")

config = LlamaConfig(
    vocab_size=len(chars) + 1, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=args.block_size,
    pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, initializer_range=0.06,
)
config._attn_implementation = "eager"
model = DocsForCausalLM(config)
print(f"{sum(p.numel() for p in model.parameters())} parameters")

decay = [p for p in model.parameters() if p.dim() > 1]
no_decay = [p for p in model.parameters() if p.dim() <= 1]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}],
    lr=args.learning_rate, betas=(0.9, 0.98))
scheduler = get_cosine_schedule_with_warmup(optimizer, 20, args.max_steps)


@torch.no_grad()
def evaluate():
    model.eval()
    hit = total = 0
    for batch in valid_ds.split(50):
        logits = model(batch).logits
        pred = logits[:, :-1].argmax(-1)
        hit += (pred == batch[:, 1:]).sum().item()
        total += pred.numel()
    model.train()
    return hit / total


# ---- training -------------------------------------------------------------
model.train()
generator = torch.Generator().manual_seed(args.seed + 1)
order, step, running = torch.randperm(len(train_ds), generator=generator), 0, 0.0
while step < args.max_steps:
    start = step * args.per_device_train_batch_size
    batch = train_ds[order[start: start + args.per_device_train_batch_size]]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    step += 1
    running += loss.item()
    if step % 50 == 0:
        print(f"step {step:4d} | lr {scheduler.get_last_lr()[0]:.2e} | loss {running / 50:.4f} "
              f"| ppl {math.exp(running / 50):.2f}")
        running = 0.0

print("next character accuracy on the held out paragraphs")
print(f"metric {evaluate():.4f}")
