"""Space-time memory network: semi-supervised object segmentation in short synthetic videos."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SIZE, FRAMES = 16, 4


def render_clip(rng):
    yy, xx = np.mgrid[0:SIZE, 0:SIZE]
    video = np.empty((FRAMES, 3, SIZE, SIZE), np.float32)
    masks = np.zeros((FRAMES, SIZE, SIZE), np.int64)
    bg = rng.uniform(0., 0.35, 3)
    colours = rng.permutation(np.array([[1, .2, .2], [.2, 1, .2], [.25, .25, 1], [1, 1, .2], [1, .2, 1], [.2, 1, 1]]))
    objs = []
    for k in range(2):
        objs.append(dict(r=rng.uniform(3., 4.5), p=rng.uniform(3, SIZE - 3, 2), v=rng.uniform(-2., 2., 2),
                         disk=rng.random() < 0.5, c=colours[k]))
    for t in range(FRAMES):
        video[t] = bg[:, None, None] + rng.normal(0, 0.05, (3, SIZE, SIZE))
        for k, o in enumerate(objs):                      # the last drawn object is the target
            dy, dx = yy - o['p'][0], xx - o['p'][1]
            m = dy ** 2 + dx ** 2 < o['r'] ** 2 if o['disk'] else (abs(dy) < o['r'] * .85) & (abs(dx) < o['r'] * .85)
            video[t][:, m] = o['c'][:, None] + rng.normal(0, 0.05, (3, m.sum()))
            if k == 1:
                masks[t] = m
            o['p'] = o['p'] + o['v']
            for d in range(2):
                if not 2 < o['p'][d] < SIZE - 2:
                    o['v'][d] *= -1
                    o['p'][d] = np.clip(o['p'][d], 2, SIZE - 2)
    return video, masks


def build(n, rng):
    v, m = zip(*(render_clip(rng) for _ in range(n)))
    return torch.from_numpy(np.stack(v)), torch.from_numpy(np.stack(m))


class ResBlock(nn.Module):
    def __init__(self, indim, outdim=None, stride=1):
        super().__init__()
        outdim = outdim or indim
        self.downsample = None
        if indim != outdim or stride != 1:
            self.downsample = nn.Conv2d(indim, outdim, 3, padding=1, stride=stride)
        self.norm1, self.norm2 = nn.GroupNorm(4, indim), nn.GroupNorm(4, outdim)
        self.conv1 = nn.Conv2d(indim, outdim, 3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(outdim, outdim, 3, padding=1)

    def forward(self, x):
        r = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        if self.downsample is not None:
            x = self.downsample(x)
        return x + r


class Encoder_M(nn.Module):
    """Memory encoder: the frame together with its mask."""

    def __init__(self, dim):
        super().__init__()
        self.conv1_m = nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False)
        self.conv1_o = nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.res = ResBlock(16, dim, stride=2)

    def forward(self, in_f, in_m, in_o):
        return self.res(self.conv1(in_f) + self.conv1_m(in_m) + self.conv1_o(in_o))


class Encoder_Q(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.res = ResBlock(16, dim, stride=2)

    def forward(self, in_f):
        c1 = self.conv1(in_f)
        return self.res(c1), c1


class KeyValue(nn.Module):
    def __init__(self, indim, keydim, valdim):
        super().__init__()
        self.Key = nn.Conv2d(indim, keydim, 3, padding=1)
        self.Value = nn.Conv2d(indim, valdim, 3, padding=1)

    def forward(self, x):
        return self.Key(x), self.Value(x)


class Memory(nn.Module):
    def forward(self, m_in, m_out, q_in, q_out):
        # m_in, m_out: B, C, T, H, W      q_in, q_out: B, C, H, W
        B, D_e, T, H, W = m_in.size()
        D_o = m_out.size(1)
        mi = m_in.reshape(B, D_e, T * H * W).transpose(1, 2)      # B, THW, D_e
        qi = q_in.reshape(B, D_e, H * W)                          # B, D_e, HW
        p = torch.bmm(mi, qi) / math.sqrt(D_e)                    # B, THW, HW
        p = F.softmax(p, dim=1)
        mo = m_out.reshape(B, D_o, T * H * W)
        mem = torch.bmm(mo, p).view(B, D_o, H, W)
        return torch.cat([mem, q_out], dim=1), p


class Decoder(nn.Module):
    def __init__(self, indim, mdim):
        super().__init__()
        self.convFM = nn.Conv2d(indim, mdim, 3, padding=1)
        self.ResMM = ResBlock(mdim)
        self.convFS = nn.Conv2d(16, mdim, 3, padding=1)
        self.ResFS = ResBlock(mdim)
        self.pred2 = nn.Conv2d(mdim, 2, 3, padding=1)

    def forward(self, r4, r2):
        m4 = self.ResMM(self.convFM(r4))
        m2 = self.ResFS(self.convFS(r2) + F.interpolate(m4, scale_factor=2, mode='bilinear', align_corners=False))
        p2 = self.pred2(F.relu(m2))
        return F.interpolate(p2, scale_factor=2, mode='bilinear', align_corners=False)


class STM(nn.Module):
    def __init__(self, dim=24, keydim=8, valdim=16):
        super().__init__()
        self.Encoder_M, self.Encoder_Q = Encoder_M(dim), Encoder_Q(dim)
        self.KV_M, self.KV_Q = KeyValue(dim, keydim, valdim), KeyValue(dim, keydim, valdim)
        self.Memory = Memory()
        self.Decoder = Decoder(2 * valdim, 16)

    def memorize(self, frame, mask):
        m = mask.unsqueeze(1)
        k, v = self.KV_M(self.Encoder_M(frame, m, 1 - m))
        return k.unsqueeze(2), v.unsqueeze(2)

    def segment(self, frame, keys, values):
        r4, r2 = self.Encoder_Q(frame)
        k4, v4 = self.KV_Q(r4)
        m4, _ = self.Memory(keys, values, k4, v4)
        return self.Decoder(m4, r2)

    def forward(self, video, first_mask):
        """Segments frames 1.. one after the other; each prediction is written into the memory."""
        keys, values = self.memorize(video[:, 0], first_mask.float())
        logits = []
        for t in range(1, video.size(1)):
            logit = self.segment(video[:, t], keys, values)
            logits.append(logit)
            if t + 1 < video.size(1):
                k, v = self.memorize(video[:, t], F.softmax(logit, dim=1)[:, 1])
                keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return torch.stack(logits, 1)        # B, T-1, 2, H, W


def mean_iou(pred, gt):
    inter = (pred & gt).flatten(2).sum(-1).float()
    union = (pred | gt).flatten(2).sum(-1).float()
    return (inter / union.clamp(min=1)).mean().item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--iters', type=int, default=180)
    ap.add_argument('--pairs', type=int, default=140)
    ap.add_argument('--batch', type=int, default=8)
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    train_v, train_m = build(500, rng)
    val_v, val_m = build(80, rng)

    net = STM()
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)
    for it in range(1, a.iters + 1):
        net.train()
        if it == int(a.iters * 0.75):
            for g in opt.param_groups:
                g['lr'] = 1e-3
        sel = torch.from_numpy(rng.integers(0, len(train_v), a.batch))
        clip, mask = train_v[sel], train_m[sel]
        if it <= a.pairs:                                 # first stage: two frames of a clip
            second = 1 + it % (FRAMES - 1)
            clip, mask = clip[:, [0, second]], mask[:, [0, second]]
        out = net(clip, mask[:, 0])
        loss = F.cross_entropy(out.flatten(0, 1), mask[:, 1:].flatten(0, 1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()
        if it % 36 == 0:
            print('it %4d  loss %.4f' % (it, loss.item()))

    net.eval()
    with torch.no_grad():
        pred = net(val_v, val_m[:, 0]).argmax(2).bool()
    gt = val_m[:, 1:].bool()
    print('J per frame:', ' '.join('%.3f' % mean_iou(pred[:, t:t + 1], gt[:, t:t + 1]) for t in range(FRAMES - 1)))
    print('metric %.4f' % mean_iou(pred, gt))


if __name__ == '__main__':
    main()
