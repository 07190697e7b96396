"""Deciphers short messages: letters are replaced by a table and the message is read backwards."""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

ALPHABET, LENGTH = 16, 8


class SelfAttentionCell(nn.Module):
    def __init__(self, units, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.proj_query = nn.Linear(units, units, bias=False)
        self.proj_key = nn.Linear(units, units, bias=False)
        self.proj_value = nn.Linear(units, units, bias=False)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)
            for proj in (self.proj_query, self.proj_key, self.proj_value)
        )
        weights = F.softmax(q @ k.transpose(2, 3) / math.sqrt(c / self.num_heads), dim=-1)
        return (weights @ v).transpose(1, 2).reshape(b, n, c)


class PositionwiseFFN(nn.Module):
    def __init__(self, units, hidden_size, dropout):
        super().__init__()
        self.ffn_1 = nn.Linear(units, hidden_size)
        self.ffn_2 = nn.Linear(hidden_size, units)
        self.dropout_layer = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(units)

    def forward(self, x):
        out = self.ffn_2(F.relu(self.ffn_1(x)))
        return self.layer_norm(x + self.dropout_layer(out))


class TransformerEncoderCell(nn.Module):
    def __init__(self, units, hidden_size, num_heads, dropout):
        super().__init__()
        self.attention_cell = SelfAttentionCell(units, num_heads)
        self.proj = nn.Linear(units, units, bias=False)
        self.dropout_layer = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(units)
        self.ffn = PositionwiseFFN(units, hidden_size, dropout)

    def forward(self, x):
        out = self.dropout_layer(self.proj(self.attention_cell(x)))
        return self.ffn(self.layer_norm(x + out))


class TransformerEncoder(nn.Module):
    def __init__(
        self,
        num_layers=2,
        units=48,
        hidden_size=96,
        num_heads=4,
        dropout=0.1,
        use_layer_norm_before_dropout=False,
    ):
        super().__init__()
        self.use_layer_norm_before_dropout = use_layer_norm_before_dropout
        self.dropout_layer = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(units)
        position = torch.arange(LENGTH).unsqueeze(1)
        rate = torch.exp(torch.arange(0, units, 2) * (-math.log(10000.0) / units))
        table = torch.cat([torch.sin(position * rate), torch.cos(position * rate)], dim=1)
        self.register_buffer("position_weight", table)
        self.transformer_cells = nn.Sequential(
            *(
                TransformerEncoderCell(units, hidden_size, num_heads, dropout)
                for _ in range(num_layers)
            )
        )

    def forward(self, inputs):
        x = inputs * math.sqrt(inputs.size(-1)) + self.position_weight
        if self.use_layer_norm_before_dropout:
            x = self.dropout_layer(self.layer_norm(x))
        else:
            x = self.layer_norm(self.dropout_layer(x))
        return self.transformer_cells(x)


class Decipher(nn.Module):
    def __init__(self, encoder, units=48):
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, units)
        self.encoder = encoder
        self.project = nn.Linear(units, ALPHABET)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, tokens):
        return self.project(self.encoder(self.embed(tokens)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--warmup_steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.25)
    parser.add_argument("--num_steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    table = torch.randperm(ALPHABET)
    plain = torch.randint(ALPHABET, (5000, LENGTH)).unique(dim=0)
    plain = plain[torch.randperm(len(plain))]
    secret = table[plain].flip(1)
    train, held_out = slice(0, len(plain) - 400), slice(len(plain) - 400, None)
    x_train, y_train = secret[train], plain[train]

    encoder = TransformerEncoder(use_layer_norm_before_dropout=not args.fixed)
    model = Decipher(encoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)

    average = None
    for step in range(1, args.num_steps + 1):
        rate = args.lr / math.sqrt(48) * min(step**-0.5, step * args.warmup_steps**-1.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(x_train), (args.batch_size,))
        log_probs = F.log_softmax(model(x_train[pick]), dim=-1)
        loss = F.nll_loss(log_probs.flatten(0, 1), y_train[pick].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 60 == 0:
            print(f"[step {step}/{args.num_steps}] lr={rate:.2e} loss={average:.4f}")

    model.eval()
    with torch.no_grad():
        right = (model(secret[held_out]).argmax(-1) == plain[held_out]).float().mean().item()
    print(f"metric {right:.4f}")


if __name__ == "__main__":
    main()
