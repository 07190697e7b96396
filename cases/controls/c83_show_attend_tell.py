"""Soft-attention captioner: names the handwritten digits on a strip from left to right."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset

WORDS = ['<pad>', '<start>', '<end>', 'zero', 'one', 'two', 'three', 'four',
         'five', 'six', 'seven', 'eight', 'nine']
word_map = {w: i for i, w in enumerate(WORDS)}
PAD, START, END = 0, 1, 2
MAX_DIGITS = 3


class CanvasCaptions(Dataset):
    """8x24 strips with one to three digits in three cells."""

    def __init__(self, images, labels, size, rng):
        self.canvas = np.zeros((size, 1, 8, 24), dtype=np.float32)
        self.caps = np.full((size, MAX_DIGITS + 2), PAD, dtype=np.int64)
        self.caplens = np.zeros(size, dtype=np.int64)
        for n in range(size):
            k = rng.integers(1, MAX_DIGITS + 1)
            cells = np.sort(rng.choice(3, size=k, replace=False))
            caption = [START]
            for cell in cells:
                j = rng.integers(len(images))
                self.canvas[n, 0, :, 8 * cell:8 * cell + 8] = images[j]
                caption.append(3 + labels[j])
            caption.append(END)
            self.caps[n, :len(caption)] = caption
            self.caplens[n] = len(caption)

    def __len__(self):
        return len(self.canvas)

    def __getitem__(self, i):
        return torch.from_numpy(self.canvas[i]), torch.from_numpy(self.caps[i]), int(self.caplens[i])


class Encoder(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.Conv2d(32, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, images):
        out = self.net(images)                 # (B, dim, 2, 6)
        return out.permute(0, 2, 3, 1)         # (B, 2, 6, dim)


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, encoder_out, h):
        att1 = self.encoder_att(encoder_out)
        att2 = self.decoder_att(h)
        att = self.full_att(torch.tanh(att1 + att2.unsqueeze(1))).squeeze(2)
        alpha = F.softmax(att, dim=1)
        awe = (encoder_out * alpha.unsqueeze(2)).sum(dim=1)
        return awe, alpha


class DecoderWithAttention(nn.Module):
    def __init__(self, vocab_size, encoder_dim=64, embed_dim=32, decoder_dim=96, attention_dim=48, dropout=0.2):
        super().__init__()
        self.vocab_size = vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        # deep output layer: L_o (E y + L_h h + L_z z)
        self.L_h = nn.Linear(decoder_dim, embed_dim)
        self.L_z = nn.Linear(encoder_dim, embed_dim)
        self.L_o = nn.Linear(embed_dim, vocab_size)
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.L_o.bias.data.fill_(0)
        self.L_o.weight.data.uniform_(-0.1, 0.1)

    def init_hidden_state(self, encoder_out):
        mean = encoder_out.mean(dim=1)
        return torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))

    def step(self, prev_words, encoder_out, h, c):
        emb = self.embedding(prev_words)
        awe, alpha = self.attention(encoder_out, h)
        awe = torch.sigmoid(self.f_beta(h)) * awe
        h, c = self.decode_step(torch.cat([emb, awe], dim=1), (h, c))
        preds = self.L_o(self.dropout(torch.tanh(emb + self.L_h(self.dropout(h)) + self.L_z(awe))))
        return preds, alpha, h, c

    def forward(self, encoder_out, captions, caplens):
        B, encoder_dim = encoder_out.size(0), encoder_out.size(-1)
        encoder_out = encoder_out.reshape(B, -1, encoder_dim)
        caplens, sort_ind = caplens.sort(dim=0, descending=True, stable=True)
        encoder_out, captions = encoder_out[sort_ind], captions[sort_ind]
        h, c = self.init_hidden_state(encoder_out)
        decode_lengths = (caplens - 1).tolist()       # nothing is predicted after <end>
        T = max(decode_lengths)
        predictions = encoder_out.new_zeros(B, T, self.vocab_size)
        alphas = encoder_out.new_zeros(B, T, encoder_out.size(1))
        for t in range(T):
            bt = sum(l > t for l in decode_lengths)
            preds, alpha, h, c = self.step(captions[:bt, t], encoder_out[:bt], h[:bt], c[:bt])
            predictions[:bt, t] = preds
            alphas[:bt, t] = alpha
        return predictions, captions, decode_lengths, alphas

    @torch.no_grad()
    def greedy(self, encoder_out, max_len=MAX_DIGITS + 1):
        encoder_out = encoder_out.reshape(encoder_out.size(0), -1, encoder_out.size(-1))
        h, c = self.init_hidden_state(encoder_out)
        word = torch.full((encoder_out.size(0),), START)
        done = torch.zeros_like(word, dtype=torch.bool)
        out = []
        for _ in range(max_len):
            preds, _, h, c = self.step(word, encoder_out, h, c)
            word = preds.argmax(-1).masked_fill(done, PAD)
            done = done | (word == END)
            out.append(word)
        return torch.stack(out, dim=1)


def pretrain_encoder(encoder, images, labels, steps=80, batch_size=64):
    """Classify single digits first, in the place of the ImageNet weights of the paper."""
    head = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(list(encoder.parameters()) + list(head.parameters()), lr=3e-3)
    encoder.train()
    for _ in range(steps):
        j = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(head(encoder(images[j].unsqueeze(1)).mean(dim=(1, 2))), labels[j])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f'encoder pretrained, last loss {loss.item():.4f}')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--alpha-c', type=float, default=0.1)
    parser.add_argument('--grad-clip', type=float, default=5.)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    digits = load_digits()
    imgs, labels = (digits.images / 16.0).astype(np.float32), digits.target
    order = rng.permutation(len(imgs))
    tr, va = order[:1400], order[1400:]
    train_set = CanvasCaptions(imgs[tr], labels[tr], 1600, rng)
    val_set = CanvasCaptions(imgs[va], labels[va], 300, rng)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=100)

    encoder = Encoder()
    decoder = DecoderWithAttention(len(word_map))
    pretrain_encoder(encoder, torch.from_numpy(imgs[tr]), torch.from_numpy(labels[tr]))
    encoder_optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-4)
    decoder_optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()

    for epoch in range(args.epochs):
        encoder.train()
        decoder.train()
        if epoch == args.epochs - 1:
            for opt in (encoder_optimizer, decoder_optimizer):
                for g in opt.param_groups:
                    g['lr'] *= 0.3
        total = 0.
        for images, caps, caplens in train_loader:
            scores, caps_sorted, decode_lengths, alphas = decoder(encoder(images), caps, caplens)
            targets = caps_sorted[:, 1:]
            packed_scores = pack_padded_sequence(scores, decode_lengths, batch_first=True).data
            packed_targets = pack_padded_sequence(targets, decode_lengths, batch_first=True).data
            loss = criterion(packed_scores, packed_targets)
            # doubly stochastic attention regularisation
            loss = loss + args.alpha_c * ((1. - alphas.sum(dim=1)) ** 2).mean()
            encoder_optimizer.zero_grad()
            decoder_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(encoder.parameters(), args.grad_clip)
            nn.utils.clip_grad_value_(decoder.parameters(), args.grad_clip)
            encoder_optimizer.step()
            decoder_optimizer.step()
            total += loss.item()

        encoder.eval()
        decoder.eval()
        right = count = exact = 0
        with torch.no_grad():
            for images, caps, caplens in val_loader:
                enc = encoder(images)
                scores, caps_sorted, decode_lengths, _ = decoder(enc, caps, caplens)
                packed_scores = pack_padded_sequence(scores, decode_lengths, batch_first=True).data
                packed_targets = pack_padded_sequence(caps_sorted[:, 1:], decode_lengths, batch_first=True).data
                right += (packed_scores.argmax(-1) == packed_targets).sum().item()
                count += packed_targets.numel()
                exact += (decoder.greedy(enc) == caps[:, 1:]).all(dim=1).sum().item()
        print(f'epoch {epoch}  loss {total / len(train_loader):.4f}  val top-1 {right / count:.4f}  '
              f'exact captions {exact / len(val_set):.4f}')
    print(f'metric {right / count:.4f}')


if __name__ == '__main__':
    main()
