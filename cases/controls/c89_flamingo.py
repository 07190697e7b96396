"""Flamingo-style model: frozen image encoder and frozen GPT-2, joined by a resampler and gated cross-attention."""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import einsum, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB = ['<pad>', '<bos>', '<image>', '<eoc>', 'an', 'odd', 'even', 'digit', 'the', 'number', 'is', 'written', 'here',
         'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
TOK = {w: i for i, w in enumerate(VOCAB)}
NUMBERS = VOCAB[-10:]
FIRST_NUMBER = TOK['zero']


def caption(digit, rng):
    if rng.random() < 0.5:
        words = ['an', 'odd' if digit % 2 else 'even', 'digit', NUMBERS[digit]]
    else:
        words = ['the', 'number', NUMBERS[digit], 'is', 'written', 'here']
    return ['<image>'] + words + ['<eoc>']


def make_documents(pool, labels, n, rng, max_images=2):
    """Interleaved documents: each image is followed by its caption. Short documents are padded on the right."""
    max_len = 1 + max_images * 8
    ids = np.full((n, max_len), TOK['<pad>'])
    images = np.zeros((n, max_images, 1, 8, 8), dtype=np.float32)
    for i in range(n):
        words = ['<bos>']
        for j in range(rng.integers(1, max_images + 1)):
            k = rng.integers(len(pool))
            images[i, j, 0] = pool[k]
            words += caption(int(labels[k]), rng)
        ids[i, :len(words)] = [TOK[w] for w in words]
    return torch.from_numpy(images), torch.from_numpy(ids)


class VisionEncoder(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(16, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(),
                                  nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU())
        self.fc = nn.Linear(dim, 10)

    def features(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)        # n, 16, dim

    def forward(self, x):
        return self.fc(self.features(x).mean(1))


def FeedForward(dim, mult=2):
    inner = dim * mult
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner, bias=False), nn.GELU(),
                         nn.Linear(inner, dim, bias=False))


class PerceiverAttention(nn.Module):
    def __init__(self, dim, dim_head=16, heads=2):
        super().__init__()
        self.scale, self.heads = dim_head ** -0.5, heads
        inner = dim_head * heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        q, k, v = [t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (q, k, v)]
        sim = einsum('... i d, ... j d -> ... i j', q * self.scale, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = einsum('... i j, ... j d -> ... i d', sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(-3, -2).flatten(-2))


class PerceiverResampler(nn.Module):
    def __init__(self, dim, depth=1, num_latents=4, tokens=16):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.patch_pos = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.layers = nn.ModuleList([nn.ModuleList([PerceiverAttention(dim), FeedForward(dim)]) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.patch_pos                                 # b, t, n, d
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attn, ff in self.layers:
            latents = attn(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    """A text token sees only the image that comes last before it."""

    def __init__(self, dim, dim_visual, dim_head=16, heads=3):
        super().__init__()
        self.scale, self.heads = dim_head ** -0.5, heads
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, media, media_locations):
        b, t, n, _ = media.shape
        q = self.to_q(self.norm(x)) * self.scale
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        q, k, v = [z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v)]
        sim = einsum('b h i d, b h j d -> b h i j', q, k)

        text_time = media_locations.cumsum(dim=-1)
        media_time = torch.arange(1, t + 1).repeat_interleave(n)
        mask = text_time[:, None, :, None] == media_time
        sim = sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=-1)
        # tokens before the first image attend to nothing
        attn = attn.masked_fill((text_time == 0)[:, None, :, None], 0.)

        out = einsum('b h i j, b h j d -> b h i d', attn, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, dim, dim_visual):
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual)
        self.attn_gate = nn.Parameter(torch.tensor([0.]))
        self.ff = FeedForward(dim)
        self.ff_gate = nn.Parameter(torch.tensor([0.]))

    def forward(self, x, media, media_locations):
        x = self.attn(x, media, media_locations) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class FlamingoLayer(nn.Module):
    """A gated cross-attention block in front of a frozen decoder layer."""

    def __init__(self, gated_cross_attn_layer, decoder_layer):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.vis_x = self.media_locations = None

    def condition(self, vis_x, media_locations):
        self.vis_x, self.media_locations = vis_x, media_locations

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states = self.gated_cross_attn_layer(hidden_states, self.vis_x, self.media_locations)
        return self.decoder_layer(hidden_states, *args, **kwargs)


class Flamingo(nn.Module):
    def __init__(self, vision_encoder, lang_encoder, vis_dim):
        super().__init__()
        vision_encoder.requires_grad_(False)
        lang_encoder.requires_grad_(False)
        self.vision_encoder, self.lang_encoder = vision_encoder, lang_encoder
        self.perceiver = PerceiverResampler(vis_dim)
        blocks = lang_encoder.transformer.h
        for i in range(len(blocks)):
            blocks[i] = FlamingoLayer(GatedCrossAttentionBlock(lang_encoder.config.n_embd, vis_dim), blocks[i])

    def train(self, mode=True):
        super().train(mode)
        self.vision_encoder.eval()                 # keep the statistics of the frozen encoder
        return self

    def forward(self, images, ids):
        b, t = images.shape[:2]
        with torch.no_grad():
            feats = self.vision_encoder.features(images.flatten(0, 1)).unflatten(0, (b, t))
        media = self.perceiver(feats)
        for layer in self.lang_encoder.transformer.h:
            layer.condition(media, ids == TOK['<image>'])
        return self.lang_encoder(input_ids=ids, attention_mask=(ids != TOK['<pad>']).long(), use_cache=False).logits


def next_token_loss(logits, ids):
    labels = ids.clone()
    labels[(ids == TOK['<pad>']) | (ids == TOK['<image>'])] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def number_accuracy(logits, ids):
    target = ids[:, 1:]
    where = target >= FIRST_NUMBER
    return (logits[:, :-1].argmax(-1) == target)[where].float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=160)
    parser.add_argument('--batch', type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    digits = load_digits()
    pool, labels = (digits.images / 8 - 1).astype(np.float32), digits.target
    order = rng.permutation(len(pool))
    tr, va = order[:1400], order[1400:]
    train_images, train_ids = make_documents(pool[tr], labels[tr], 1500, rng)
    val_images, val_ids = make_documents(pool[va], labels[va], 200, rng)

    # 1. vision encoder
    vision = VisionEncoder()
    opt = torch.optim.Adam(vision.parameters(), lr=3e-3)
    x, y = torch.from_numpy(pool[tr]).unsqueeze(1), torch.from_numpy(labels[tr])
    for _ in range(90):
        j = torch.randint(len(x), (32,))
        loss = F.cross_entropy(vision(x[j]), y[j])
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f'vision encoder  loss {loss.item():.4f}')

    # 2. language model, text only
    lang = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCAB), n_positions=24, n_embd=48, n_layer=2, n_head=3, n_inner=96,
                                      resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=TOK['<bos>'],
                                      eos_token_id=TOK['<eoc>'], pad_token_id=TOK['<pad>']))
    opt = torch.optim.AdamW(lang.parameters(), lr=3e-3)
    for _ in range(80):
        ids = train_ids[torch.randint(len(train_ids), (16,))]
        loss = next_token_loss(lang(input_ids=ids, attention_mask=(ids != TOK['<pad>']).long(),
                                    use_cache=False).logits, ids)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f'language model  loss {loss.item():.4f}')

    # 3. the bridge
    model = Flamingo(vision, lang, vis_dim=32)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=8e-3, weight_decay=0.01)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1., (s + 1) / 10, (args.steps - s) / 60))
    model.train()
    for step in range(1, args.steps + 1):
        idx = torch.randint(len(train_ids), (args.batch,))
        logits = model(train_images[idx], train_ids[idx])
        loss = next_token_loss(logits, train_ids[idx])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if step % 32 == 0:
            gates = [round(l.gated_cross_attn_layer.attn_gate.tanh().item(), 3) for l in lang.transformer.h]
            print(f'step {step}  loss {loss.item():.4f}  number acc {number_accuracy(logits, train_ids[idx]):.3f}  gates {gates}')

    model.eval()
    with torch.no_grad():
        logits = model(val_images, val_ids)
        print(f'val loss {next_token_loss(logits, val_ids).item():.4f}')
    print(f'metric {number_accuracy(logits, val_ids):.4f}')


if __name__ == '__main__':
    main()
