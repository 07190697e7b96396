"""Neural Turing machine with an LSTM controller on the copy task."""
import argparse

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=240)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--bits", type=int, default=6)
parser.add_argument("--max-len", type=int, default=4)


class Head(nn.Module):
    """Turns the controller's state into an address: content, gate, shift, sharpen."""

    def __init__(self, ctrl, width, extra=0):
        super().__init__()
        self.sizes = [width, 1, 1, 3, 1] + ([extra, extra] if extra else [])
        self.fc = nn.Linear(ctrl, sum(self.sizes))
        nn.init.xavier_uniform_(self.fc.weight, gain=1.4)
        nn.init.normal_(self.fc.bias, std=0.01)

    def address(self, k, beta, g, s, gamma, memory, w_prev):
        k = torch.tanh(k)
        sim = F.cosine_similarity(memory + 1e-16, k.unsqueeze(1) + 1e-16, dim=-1)
        w_c = F.softmax(F.softplus(beta) * sim, dim=1)
        gate = torch.sigmoid(g)
        w_g = gate * w_c + (1 - gate) * w_prev
        s = F.softmax(s, dim=1)
        w_s = s[:, :1] * w_g.roll(1, 1) + s[:, 1:2] * w_g + s[:, 2:] * w_g.roll(-1, 1)
        w = (w_s + 1e-8) ** (1 + F.softplus(gamma))
        return w / w.sum(1, keepdim=True)


class ReadHead(Head):
    def forward(self, h, memory, w_prev):
        w = self.address(*self.fc(h).split(self.sizes, dim=1), memory, w_prev)
        return torch.bmm(w.unsqueeze(1), memory).squeeze(1), w


class WriteHead(Head):
    def __init__(self, ctrl, width):
        super().__init__(ctrl, width, extra=width)

    def forward(self, h, memory, w_prev):
        *addr, erase, add = self.fc(h).split(self.sizes, dim=1)
        w = self.address(*addr, memory, w_prev)
        memory = memory * (1 - torch.einsum("bn,bm->bnm", w, torch.sigmoid(erase)))
        return memory + torch.einsum("bn,bm->bnm", w, torch.tanh(add)), w


class NTM(nn.Module):
    def __init__(self, n_in, n_out, ctrl=64, n=12, width=12):
        super().__init__()
        self.controller = nn.LSTMCell(n_in + width, ctrl)
        self.write, self.read = WriteHead(ctrl, width), ReadHead(ctrl, width)
        self.out = nn.Linear(ctrl + width, n_out)
        self.h0, self.c0 = nn.Parameter(0.05 * torch.randn(ctrl)), nn.Parameter(0.05 * torch.randn(ctrl))
        self.read0 = nn.Parameter(0.01 * torch.randn(width))
        self.register_buffer("memory0", torch.full((n, width), 1e-6))
        self.register_buffer("w0", torch.eye(n)[0])          # both heads start at the first slot

    def forward(self, x):
        """x: (time, batch, n_in) -> logits (time, batch, n_out)"""
        rep = lambda p: p.unsqueeze(0).expand(x.size(1), *p.shape)
        state, r, memory = (rep(self.h0), rep(self.c0)), rep(self.read0), rep(self.memory0)
        w_write = w_read = rep(self.w0)
        ys = []
        for x_t in x:
            state = self.controller(torch.cat([x_t, r], 1), state)
            memory, w_write = self.write(state[0], memory, w_write)
            r, w_read = self.read(state[0], memory, w_read)
            ys.append(self.out(torch.cat([state[0], r], 1)))
        return torch.stack(ys)


def copy_batch(pool, length, idx, bits):
    """sequence, end marker, then silence while the sequence is to be repeated"""
    seq = pool[length][idx].transpose(0, 1)                   # length, batch, bits
    x = torch.zeros(2 * length + 1, len(idx), bits + 1)
    x[:length, :, :bits] = seq
    x[length, :, bits] = 1
    return x, seq


def main(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, test = {}, {}
    for length in range(2, args.max_len + 1):
        seqs = torch.randint(0, 2, (1400, length, args.bits)).float().unique(dim=0)
        seqs = seqs[torch.randperm(len(seqs))]
        cut = int(0.85 * len(seqs))
        train[length], test[length] = seqs[:cut], seqs[cut:][:100]

    net = NTM(args.bits + 1, args.bits)
    opt = torch.optim.RMSprop(net.parameters(), lr=3e-3, alpha=0.95, momentum=0.9)
    for step in range(1, args.steps + 1):
        length = int(torch.randint(2, args.max_len + 1, (1,)))
        x, y = copy_batch(train, length, torch.randint(0, len(train[length]), (args.batch,)), args.bits)
        logits = net(x)[-length:]
        loss = F.binary_cross_entropy_with_logits(logits, y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(net.parameters(), 10.0)
        opt.step()
        if step % 40 == 0:
            print(f"step {step}: bce {loss.item():.4f}")

    net.eval()
    right = total = 0
    with torch.no_grad():
        for length in test:
            x, y = copy_batch(test, length, torch.arange(len(test[length])), args.bits)
            right += ((net(x)[-length:] > 0) == (y > 0.5)).sum().item()
            total += y.numel()
    print(f"metric {right / total:.4f}")


if __name__ == "__main__":
    main(parser.parse_args())
