"""Train a small DETR on synthetic images with one or two coloured rectangles."""
import argparse
import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, MAX_OBJ, SIZE = 3, 2, 20


# ---------------------------------------------------------------- data
def make_scene(n, g):
    """images (n,3,S,S), boxes (n,2,4) as cxcywh in [0,1], labels (n,2) with -1 for an absent object"""
    images = 0.15 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    boxes = torch.zeros(n, MAX_OBJ, 4)
    labels = torch.full((n, MAX_OBJ), -1, dtype=torch.long)
    for i in range(n):
        taken = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        count = int(torch.randint(1, MAX_OBJ + 1, (1,), generator=g))
        k = 0
        while k < count:
            w, h = torch.randint(5, 11, (2,), generator=g).tolist()
            x = int(torch.randint(0, SIZE - w + 1, (1,), generator=g))
            y = int(torch.randint(0, SIZE - h + 1, (1,), generator=g))
            if taken[y:y + h, x:x + w].any():
                if torch.rand(1, generator=g) < 0.1:   # no room left for this one
                    count -= 1
                continue
            c = int(torch.randint(0, CLASSES, (1,), generator=g))
            taken[y:y + h, x:x + w] = True
            images[i, c, y:y + h, x:x + w] += 1.0
            boxes[i, k] = torch.tensor([x + w / 2, y + h / 2, w, h]) / SIZE
            labels[i, k] = c
            k += 1
    return images, boxes, labels


# ---------------------------------------------------------------- boxes
def to_xyxy(b):
    cx, cy, w, h = b.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def iou_and_giou(a, b):
    """element-wise (broadcast) IoU and generalised IoU of xyxy boxes"""
    lt, rb = torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:])
    inter = (rb - lt).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    union = area - inter
    iou = inter / union.clamp(min=1e-6)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


# ---------------------------------------------------------------- model
def sine_position(h, w, dim):
    y, x = torch.meshgrid(torch.arange(1, h + 1) / h, torch.arange(1, w + 1) / w, indexing="ij")
    freq = 20.0 ** (-torch.arange(dim // 4) / (dim // 4))
    ax, ay = 2 * math.pi * x[..., None] * freq * 2, 2 * math.pi * y[..., None] * freq * 2
    return torch.cat([ay.sin(), ay.cos(), ax.sin(), ax.cos()], -1).flatten(0, 1)   # (hw, dim)


class EncoderLayer(nn.Module):
    def __init__(self, d, heads, ff):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, src, pos):
        q = k = src + pos
        src = self.norm1(src + self.self_attn(q, k, value=src, need_weights=False)[0])
        return self.norm2(src + self.linear2(F.relu(self.linear1(src))))


class DecoderLayer(nn.Module):
    def __init__(self, d, heads, ff):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads)
        self.cross_attn = nn.MultiheadAttention(d, heads)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, tgt, memory, pos, query_pos):
        q = k = tgt + query_pos
        tgt = self.norm1(tgt + self.self_attn(q, k, value=tgt, need_weights=False)[0])
        out = self.cross_attn(tgt + query_pos, memory + pos, value=memory, need_weights=False)[0]
        tgt = self.norm2(tgt + out)
        return self.norm3(tgt + self.linear2(F.relu(self.linear1(tgt))))


class DETR(nn.Module):
    def __init__(self, d=64, heads=4, ff=128, num_queries=5, enc=1, dec=2):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU())
        self.input_proj = nn.Conv2d(48, d, 1)
        self.encoder = nn.ModuleList([EncoderLayer(d, heads, ff) for _ in range(enc)])
        layer = DecoderLayer(d, heads, ff)
        self.decoder = nn.ModuleList([copy.deepcopy(layer) for _ in range(dec)])
        self.decoder_norm = nn.LayerNorm(d)
        self.query_embed = nn.Embedding(num_queries, d)
        self.class_embed = nn.Linear(d, CLASSES + 1)
        self.bbox_embed = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 4))
        self.register_buffer("pos", sine_position(SIZE // 4, SIZE // 4, d).unsqueeze(1))

    def forward(self, images):
        src = self.input_proj(self.backbone(images)).flatten(2).permute(2, 0, 1)   # HW, B, C
        for layer in self.encoder:
            src = layer(src, self.pos)
        query_pos = self.query_embed.weight.unsqueeze(1).expand(-1, images.shape[0], -1)
        tgt, outs = torch.zeros_like(query_pos), []
        for layer in self.decoder:
            tgt = layer(tgt, src, self.pos, query_pos)
            h = self.decoder_norm(tgt).transpose(0, 1)
            outs.append({"logits": self.class_embed(h), "boxes": self.bbox_embed(h).sigmoid()})
        return outs


# ---------------------------------------------------------------- criterion
class SetCriterion:
    def __init__(self, num_queries, eos_coef=0.2):
        # with so few queries every assignment can simply be listed
        self.perms = torch.tensor(list(itertools.permutations(range(num_queries), MAX_OBJ)))
        self.class_weight = torch.ones(CLASSES + 1)
        self.class_weight[-1] = eos_coef

    @torch.no_grad()
    def match(self, out, boxes, labels):
        prob = out["logits"].softmax(-1)                                            # B,Q,C+1
        cls = -prob.gather(2, labels.clamp(min=0)[:, None, :].expand(-1, prob.shape[1], -1))
        l1 = (out["boxes"][:, :, None] - boxes[:, None]).abs().sum(-1)
        giou = iou_and_giou(to_xyxy(out["boxes"])[:, :, None], to_xyxy(boxes)[:, None])[1]
        cost = (cls + 5 * l1 - 2 * giou) * (labels >= 0)[:, None, :]                # B,Q,T
        total = sum(cost[:, self.perms[:, t], t] for t in range(MAX_OBJ))           # B,P
        return self.perms[total.argmin(1)]                                          # B,T

    def __call__(self, out, boxes, labels):
        idx = self.match(out, boxes, labels)
        real = labels >= 0
        b, t = real.nonzero(as_tuple=True)
        q = idx[b, t]
        target = torch.full(out["logits"].shape[:2], CLASSES)
        target[b, q] = labels[b, t]
        ce = F.cross_entropy(out["logits"].transpose(1, 2), target, weight=self.class_weight)
        pred, gold = out["boxes"][b, q], boxes[b, t]
        l1 = (pred - gold).abs().sum() / len(b)
        giou = (1 - iou_and_giou(to_xyxy(pred), to_xyxy(gold))[1]).sum() / len(b)
        return ce + 5 * l1 + 2 * giou


def detection_f1(logits, pred, boxes, labels, thr=0.5):
    """F1 of detections that have the right class and an IoU above thr with an unclaimed object"""
    score, cls = logits.softmax(-1).max(-1)
    iou = iou_and_giou(to_xyxy(pred)[:, :, None], to_xyxy(boxes)[:, None])[0]
    hits = found = 0
    for i in range(len(pred)):
        free = (labels[i] >= 0).tolist()
        for q in score[i].argsort(descending=True).tolist():
            if cls[i, q] == CLASSES:
                continue
            found += 1
            ok = [t for t in range(MAX_OBJ) if free[t] and labels[i, t] == cls[i, q] and iou[i, q, t] > thr]
            if ok:
                free[max(ok, key=lambda t: float(iou[i, q, t]))] = False
                hits += 1
    return 2 * hits / max(1, found + int((labels >= 0).sum()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=220)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)

    train = make_scene(1500, g)
    test = make_scene(200, g)
    model = DETR()
    criterion = SetCriterion(model.query_embed.num_embeddings)
    slow = [p for n, p in model.named_parameters() if n.startswith("backbone")]
    fast = [p for n, p in model.named_parameters() if not n.startswith("backbone")]
    optimizer = torch.optim.AdamW([{"params": fast}, {"params": slow, "lr": 2e-3}], lr=2e-3, weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, int(args.steps * 0.75), gamma=0.2)

    model.train()
    for step in range(1, args.steps + 1):
        idx = torch.randint(0, len(train[0]), (20,), generator=g)
        images, boxes, labels = (t[idx] for t in train)
        loss = sum(criterion(out, boxes, labels) for out in model(images))
        optimizer.zero_grad()
        loss.backward()
        grad = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 40 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  grad {grad.item():.2f}")

    model.eval()
    with torch.no_grad():
        out = model(test[0])[-1]
    print(f"metric {detection_f1(out['logits'], out['boxes'], test[1], test[2]):.4f}")


if __name__ == "__main__":
    main()
