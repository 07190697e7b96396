"""LoRA fine-tuning of a small ViT: pretrained on digits 0-4, adapted to digits 5-9."""
import argparse
import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import ViTConfig, ViTForImageClassification


class LoRALinear(nn.Module):
    def __init__(self, base, r=4, alpha=8):
        super().__init__()
        self.base = base
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + (x @ self.lora_A.t() @ self.lora_B.t()) * self.scaling

    def merge(self):
        with torch.no_grad():
            self.base.weight += self.scaling * self.lora_B @ self.lora_A
        return self.base


def attentions(model):
    return [layer.attention for layer in model.vit.layers]


def train(model, params, x, y, steps, lr, tag, generator):
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 20) * (1 - s / steps))
    model.train()
    for step in range(1, steps + 1):
        idx = torch.randint(len(x), (32,), generator=generator)
        loss = model(pixel_values=x[idx], labels=y[idx]).loss
        loss.backward()
        opt.step()
        sched.step()
        opt.zero_grad()
        if step % 50 == 0:
            print(f"[{tag}] step {step} loss {loss.item():.4f}")


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    return (model(pixel_values=x).logits.argmax(-1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    images, digits = load_digits(return_X_y=True)
    x_tr, x_te, y_tr, y_te = train_test_split(
        torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits),
        test_size=0.3, stratify=digits, random_state=args.seed)

    def part(x, y, low):
        keep = (y >= low) & (y < low + 5)
        return x[keep], y[keep] - low

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                       image_size=8, patch_size=2, num_channels=1, num_labels=5, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, initializer_range=0.08)
    model = ViTForImageClassification(config)

    # 1. the backbone
    train(model, model.parameters(), *part(x_tr, y_tr, 0), 200, 3e-3, "pretrain", generator)
    print(f"digits 0-4: accuracy {accuracy(model, *part(x_te, y_te, 0)):.4f}")

    # 2. freeze it, add adapters to the query and value projections and a new head
    model.requires_grad_(False)
    for attn in attentions(model):
        attn.q_proj = LoRALinear(attn.q_proj, args.rank, 2 * args.rank)
        attn.v_proj = LoRALinear(attn.v_proj, args.rank, 2 * args.rank)
    model.classifier = nn.Linear(config.hidden_size, 5)
    trainable = [p for p in model.parameters() if p.requires_grad]
    n_train, n_all = sum(p.numel() for p in trainable), sum(p.numel() for p in model.parameters())
    print(f"trainable {n_train} of {n_all} parameters ({100 * n_train / n_all:.1f} %)")

    train(model, trainable, *part(x_tr, y_tr, 5), 250, 8e-3, "lora", generator)

    # 3. fold the adapters into the weights for inference
    for attn in attentions(model):
        attn.q_proj = attn.q_proj.merge()
        attn.v_proj = attn.v_proj.merge()
    print(f"metric {accuracy(model, *part(x_te, y_te, 5)):.4f}")


if __name__ == "__main__":
    main()
