"""Train a very small CLIP from scratch on pictures of four handwritten digits and their captions."""
import argparse
import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import CLIPConfig, CLIPModel

WORDS = ["<pad>", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "<bos>", "<eos>"]
PAD, BOS, EOS = 0, 11, 12


class DigitCaptions(torch.utils.data.Dataset):
    def __init__(self, images, labels, size, seed):
        rng = np.random.RandomState(seed)
        idx = rng.randint(0, len(images), (size, 4))
        top = np.concatenate([images[idx[:, 0]], images[idx[:, 1]]], axis=2)
        bottom = np.concatenate([images[idx[:, 2]], images[idx[:, 3]]], axis=2)
        pix = np.concatenate([top, bottom], axis=1)[:, None]
        self.pixel_values = torch.tensor((pix - 0.305) / 0.376, dtype=torch.float32)
        words = torch.tensor(labels[idx] + 1)
        n = len(words)
        self.input_ids = torch.cat([torch.full((n, 1), BOS), words, torch.full((n, 1), EOS)], dim=1)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return self.pixel_values[i], self.input_ids[i]


def build_model(logit_scale_init_value):
    text = dict(vocab_size=len(WORDS), hidden_size=48, intermediate_size=96, num_hidden_layers=1,
                num_attention_heads=4, max_position_embeddings=6, projection_dim=48,
                pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_channels=1, image_size=16, patch_size=4, projection_dim=48)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=48,
                        logit_scale_init_value=logit_scale_init_value)
    return CLIPModel(config)


@torch.no_grad()
def retrieval(model, dataset, pool=50):
    model.eval()
    hits = []
    for s in range(0, len(dataset), pool):
        out = model(pixel_values=dataset.pixel_values[s:s + pool], input_ids=dataset.input_ids[s:s + pool],
                    attention_mask=torch.ones_like(dataset.input_ids[s:s + pool]))
        target = torch.arange(len(out.logits_per_image))
        hits.append((out.logits_per_image.argmax(1) == target).float().mean().item())
    model.train()
    return sum(hits) / len(hits)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--fixed", action="store_true")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--batch_size", type=int, default=32)
    ap.add_argument("--steps", type=int, default=200)
    args = ap.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = load_digits()
    order = np.random.RandomState(args.seed).permutation(len(data.images))
    images, labels = data.images[order] / 16.0, data.target[order]
    train = DigitCaptions(images[:1400], labels[:1400], 6000, args.seed)
    test = DigitCaptions(images[1400:], labels[1400:], 500, args.seed + 1)
    loader = torch.utils.data.DataLoader(train, batch_size=args.batch_size, shuffle=True, drop_last=True)

    model = build_model(math.log(1 / 0.07) if args.fixed else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    warmup = 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / args.steps)))

    model.train()
    step = 0
    while step < args.steps:
        for pixel_values, input_ids in loader:
            out = model(pixel_values=pixel_values, input_ids=input_ids,
                        attention_mask=torch.ones_like(input_ids), return_loss=True)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            step += 1
            if step % 100 == 0:
                print(f"step {step}: loss {out.loss.item():.4f}, R@1 {retrieval(model, test):.3f}")
            if step == args.steps:
                break

    print(f"metric {retrieval(model, test):.4f}")


if __name__ == "__main__":
    main()
