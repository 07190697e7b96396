"""Small Robotics-Transformer: picture of the table + instruction -> discretised gripper action.

The table has 3x3 cells, some hold a coloured block.  The instruction names a colour, the action is the
(row, column) where the gripper has to go, each one a bin.
"""
import argparse
import math
import torch
import torch.nn as nn
import torch.nn.functional as F

N_COLORS = 4
CELLS = 3


def make_episodes(n_train, n_val, seed):
    """Every scene (layout and instruction) occurs once, either for training or for validation."""
    g = torch.Generator().manual_seed(seed)
    colors = torch.rand(N_COLORS, 3, generator=torch.Generator().manual_seed(77)) * 0.7 + 0.3
    draws = 3 * (n_train + n_val)
    cells = torch.rand(draws, CELLS * CELLS, generator=g).argsort(1)[:, :3].tolist()
    cols = torch.rand(draws, N_COLORS, generator=g).argsort(1)[:, :3].tolist()
    scenes = {}
    for ce, co in zip(cells, cols):
        blocks = list(zip(ce, co))
        scenes.setdefault((blocks[0], *sorted(blocks[1:])), None)
    scenes = list(scenes)[:n_train + n_val]

    img = torch.zeros(len(scenes), 3, 4 * CELLS, 4 * CELLS)
    for i, blocks in enumerate(scenes):
        for cell, col in blocks:
            r, c = divmod(cell, CELLS)
            img[i, :, 4 * r + 1:4 * r + 3, 4 * c + 1:4 * c + 3] = colors[col].view(3, 1, 1)
    img += 0.03 * torch.randn(img.shape, generator=g)
    instr = torch.tensor([s[0][1] for s in scenes])
    action = torch.tensor([divmod(s[0][0], CELLS) for s in scenes])
    data = (img, instr, action)
    return tuple(x[:n_train] for x in data), tuple(x[n_train:] for x in data)


class TransformerLayer(nn.Module):
    def __init__(self, layer_size, num_heads, feed_forward_size, dropout_rate):
        super().__init__()
        self.layernorm1 = nn.LayerNorm(layer_size)
        self.mha1 = nn.MultiheadAttention(layer_size, num_heads, dropout=dropout_rate, batch_first=True)
        self.layernorm2 = nn.LayerNorm(layer_size)
        self.ff = nn.Sequential(nn.Linear(layer_size, feed_forward_size), nn.ReLU(),
                                nn.Linear(feed_forward_size, layer_size))
        self.dropout_ff = nn.Dropout(dropout_rate)

    def forward(self, x):
        x1 = self.layernorm1(x)
        attn, _ = self.mha1(x1, x1, x1, need_weights=False)
        x = x + attn
        return x + self.dropout_ff(self.ff(self.layernorm2(x)))


class Transformer(nn.Module):
    def __init__(self, num_layers=2, layer_size=32, num_heads=2, feed_forward_size=64, dropout_rate=0.01,
                 input_size=32, vocab_size=2 * CELLS, max_len=CELLS * CELLS + 1, fixed=False):
        super().__init__()
        layers = [TransformerLayer(layer_size, num_heads, feed_forward_size, dropout_rate)
                  for _ in range(num_layers)]
        self._layers = nn.ModuleList(layers) if fixed else layers
        self._token_emb = nn.Linear(input_size, layer_size)
        self._position_emb = nn.Embedding(max_len, layer_size)
        nn.init.normal_(self._position_emb.weight, std=0.3)
        self._norm = nn.LayerNorm(layer_size)
        self._output_tokens = nn.Linear(layer_size, vocab_size)

    def forward(self, inputs):
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self._token_emb(inputs) + self._position_emb(positions)
        for layer in self._layers:
            x = layer(x)
        return self._output_tokens(self._norm(x))


class TransformerNetwork(nn.Module):
    def __init__(self, token_size=32, fixed=False):
        super().__init__()
        self.image_tokenizer = nn.Conv2d(3, token_size, 4, stride=4)
        self.instruction_embedding = nn.Embedding(N_COLORS, token_size)
        self.transformer = Transformer(input_size=token_size, fixed=fixed)

    def forward(self, image, instruction):
        img_tokens = self.image_tokenizer(image).flatten(2).transpose(1, 2)
        txt_token = self.instruction_embedding(instruction).unsqueeze(1)
        out = self.transformer(torch.cat([txt_token, img_tokens], dim=1))
        return out[:, 0].view(-1, 2, CELLS)           # action logits are read at the instruction token


def success_rate(net, data):
    net.eval()
    with torch.no_grad():
        pred = net(data[0], data[1]).argmax(-1)
    net.train()
    return (pred == data[2]).all(-1).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, val = make_episodes(2500, 400, args.seed)

    net = TransformerNetwork(fixed=args.fixed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * s / args.steps)))

    running = []
    for step in range(1, args.steps + 1):
        idx = torch.randint(0, len(train[0]), (48,))
        logits = net(train[0][idx], train[1][idx])
        loss = F.cross_entropy(logits.reshape(-1, CELLS), train[2][idx].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        running.append(loss.item())
        if step % 75 == 0:
            print(f"[{step}/{args.steps}] loss {sum(running) / len(running):.4f}  success {success_rate(net, val):.3f}")
            running = []
    print(f"metric {success_rate(net, val):.4f}")
