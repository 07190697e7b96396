"""Deformable DETR: multi-scale deformable attention for detecting coloured shapes in small images."""
import argparse
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

IMG = 32
NUM_CLASSES = 3        # square, disk, cross


# ----------------------------------------------------------------------------- data
def make_scene(rng):
    img = rng.normal(0.2, 0.08, (3, IMG, IMG)).astype(np.float32)
    yy, xx = np.mgrid[0:IMG, 0:IMG] + 0.5
    labels, boxes = [], []
    for _ in range(rng.integers(1, 3)):
        for _ in range(20):
            r = rng.uniform(4, 7)
            cx, cy = rng.uniform(r, IMG - r, 2)
            if all(abs(cx - b[0] * IMG) > r + b[2] * IMG / 2 or abs(cy - b[1] * IMG) > r + b[2] * IMG / 2
                   for b in boxes):
                break
        else:
            continue
        kind = int(rng.integers(NUM_CLASSES))
        dx, dy = np.abs(xx - cx), np.abs(yy - cy)
        if kind == 0:
            m = (dx < r) & (dy < r)
        elif kind == 1:
            m = dx ** 2 + dy ** 2 < r ** 2
        else:
            m = ((dx < r) & (dy < r / 3)) | ((dy < r) & (dx < r / 3))
        img[:, m] = rng.uniform(0.5, 1.0, 3).astype(np.float32)[:, None]
        labels.append(kind)
        boxes.append([cx / IMG, cy / IMG, 2 * r / IMG, 2 * r / IMG])
    return img, {'labels': torch.tensor(labels), 'boxes': torch.tensor(boxes, dtype=torch.float32)}


def make_split(n, rng):
    imgs, targets = zip(*[make_scene(rng) for _ in range(n)])
    return torch.from_numpy(np.stack(imgs)), list(targets)


# ----------------------------------------------------------------------------- boxes
def box_cxcywh_to_xyxy(x):
    cx, cy, w, h = x.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def box_iou(a, b):
    area_a = (a[:, 2:] - a[:, :2]).prod(1)
    area_b = (b[:, 2:] - b[:, :2]).prod(1)
    lt, rb = torch.max(a[:, None, :2], b[:, :2]), torch.min(a[:, None, 2:], b[:, 2:])
    inter = (rb - lt).clamp(min=0).prod(2)
    union = area_a[:, None] + area_b - inter
    return inter / union, union


def generalized_box_iou(a, b):
    iou, union = box_iou(a, b)
    lt, rb = torch.min(a[:, None, :2], b[:, :2]), torch.max(a[:, None, 2:], b[:, 2:])
    area = (rb - lt).clamp(min=0).prod(2)
    return iou - (area - union) / area


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


# ----------------------------------------------------------------------------- model
def ms_deform_attn_core(value, spatial_shapes, sampling_locations, attention_weights):
    N_, S_, M_, D_ = value.shape
    _, Lq_, M_, L_, P_, _ = sampling_locations.shape
    value_list = value.split([h * w for h, w in spatial_shapes], dim=1)
    sampling_grids = 2 * sampling_locations - 1
    sampled = []
    for lid, (H_, W_) in enumerate(spatial_shapes):
        value_l = value_list[lid].flatten(2).transpose(1, 2).reshape(N_ * M_, D_, H_, W_)
        grid_l = sampling_grids[:, :, :, lid].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(value_l, grid_l, mode='bilinear', padding_mode='zeros', align_corners=False))
    attention_weights = attention_weights.transpose(1, 2).reshape(N_ * M_, 1, Lq_, L_ * P_)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * attention_weights).sum(-1).view(N_, M_ * D_, Lq_)
    return output.transpose(1, 2)


class MSDeformAttn(nn.Module):
    def __init__(self, d_model=64, n_levels=2, n_heads=4, n_points=4):
        super().__init__()
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self):
        nn.init.constant_(self.sampling_offsets.weight, 0.)
        thetas = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        grid = torch.stack([thetas.cos(), thetas.sin()], -1)
        grid = (grid / grid.abs().max(-1, keepdim=True)[0]).view(self.n_heads, 1, 1, 2)
        grid = grid.repeat(1, self.n_levels, self.n_points, 1)
        for i in range(self.n_points):
            grid[:, :, i, :] *= i + 1
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.view(-1))
        nn.init.constant_(self.attention_weights.weight, 0.)
        nn.init.constant_(self.attention_weights.bias, 0.)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.constant_(proj.bias, 0.)

    def forward(self, query, reference_points, src, spatial_shapes):
        """reference_points: (N, Len_q, 2) as (x, y) in [0, 1]; src: flattened levels (N, sum HW, C)."""
        N, Len_q, _ = query.shape
        value = self.value_proj(src).view(N, -1, self.n_heads, self.d_model // self.n_heads)
        offsets = self.sampling_offsets(query).view(N, Len_q, self.n_heads, self.n_levels, self.n_points, 2)
        weights = self.attention_weights(query).view(N, Len_q, self.n_heads, self.n_levels * self.n_points)
        weights = F.softmax(weights, -1).view(N, Len_q, self.n_heads, self.n_levels, self.n_points)
        normalizer = query.new_tensor([[w, h] for h, w in spatial_shapes])
        locations = reference_points[:, :, None, None, None, :] + offsets / normalizer[None, None, None, :, None, :]
        return self.output_proj(ms_deform_attn_core(value, spatial_shapes, locations, weights))


class FFN(nn.Module):
    def __init__(self, d_model, d_ffn):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x):
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, d_ffn, n_levels):
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels)
        self.norm1 = nn.LayerNorm(d_model)
        self.ffn = FFN(d_model, d_ffn)

    def forward(self, src, pos, reference_points, spatial_shapes):
        src2 = self.self_attn(src + pos, reference_points, src, spatial_shapes)
        return self.ffn(self.norm1(src + src2))


class DecoderLayer(nn.Module):
    def __init__(self, d_model, d_ffn, n_levels, n_heads=4):
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = FFN(d_model, d_ffn)

    def forward(self, tgt, query_pos, reference_points, src, spatial_shapes):
        q = k = tgt + query_pos
        tgt2 = self.self_attn(q.transpose(0, 1), k.transpose(0, 1), tgt.transpose(0, 1),
                              need_weights=False)[0].transpose(0, 1)
        tgt = self.norm2(tgt + tgt2)
        tgt2 = self.cross_attn(tgt + query_pos, reference_points, src, spatial_shapes)
        return self.ffn(self.norm1(tgt + tgt2))


class MLP(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out_dim)])

    def forward(self, x):
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.layers[2](x)


def sine_position(h, w, d_model):
    feats = d_model // 2
    y = (torch.arange(h) + 0.5) / h * 2 * math.pi
    x = (torch.arange(w) + 0.5) / w * 2 * math.pi
    dim_t = 10000 ** (2 * torch.div(torch.arange(feats), 2, rounding_mode='floor') / feats)
    enc = lambda p: torch.stack([(p[:, None] / dim_t)[:, 0::2].sin(), (p[:, None] / dim_t)[:, 1::2].cos()], 2).flatten(1)
    ey, ex = enc(y)[:, None].expand(h, w, feats), enc(x)[None].expand(h, w, feats)
    return torch.cat([ey, ex], dim=-1).reshape(h * w, d_model)


class DeformableDETR(nn.Module):
    def __init__(self, d_model=32, d_ffn=64, n_queries=4, enc_layers=1, dec_layers=2):
        super().__init__()
        gn = lambda c: nn.GroupNorm(4, c)
        self.stage1 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), gn(16), nn.ReLU(),
                                    nn.Conv2d(16, 32, 3, 2, 1), gn(32), nn.ReLU())                      # 8x8
        self.stage2 = nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1), gn(48), nn.ReLU())                      # 4x4
        self.input_proj = nn.ModuleList([nn.Sequential(nn.Conv2d(c, d_model, 1), gn(d_model)) for c in (32, 48)])
        self.level_embed = nn.Parameter(torch.empty(2, d_model))
        nn.init.normal_(self.level_embed)
        self.encoder = nn.ModuleList([EncoderLayer(d_model, d_ffn, 2) for _ in range(enc_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(d_model, d_ffn, 2) for _ in range(dec_layers)])
        self.query_embed = nn.Embedding(n_queries, d_model * 2)
        self.reference_points = nn.Linear(d_model, 2)
        nn.init.xavier_uniform_(self.reference_points.weight, gain=1.0)
        nn.init.constant_(self.reference_points.bias, 0.)
        class_embed = nn.Linear(d_model, NUM_CLASSES)
        nn.init.constant_(class_embed.bias, -math.log((1 - 0.01) / 0.01))
        bbox_embed = MLP(d_model, 4)
        nn.init.constant_(bbox_embed.layers[-1].weight, 0.)
        nn.init.constant_(bbox_embed.layers[-1].bias, 0.)
        nn.init.constant_(bbox_embed.layers[-1].bias.data[2:], -1.0)
        self.class_embed = nn.ModuleList([class_embed] * dec_layers)      # heads shared by the layers
        self.bbox_embed = nn.ModuleList([bbox_embed] * dec_layers)

    @staticmethod
    def encoder_reference_points(shapes):
        refs = []
        for h, w in shapes:
            y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing='ij')
            refs.append(torch.stack([x.reshape(-1), y.reshape(-1)], -1))
        return torch.cat(refs)

    def forward(self, images):
        f1 = self.stage1(images)
        feats = [proj(f) for proj, f in zip(self.input_proj, (f1, self.stage2(f1)))]
        shapes = [tuple(f.shape[-2:]) for f in feats]
        src = torch.cat([f.flatten(2).transpose(1, 2) for f in feats], 1)
        pos = torch.cat([sine_position(h, w, src.shape[-1]) + self.level_embed[i] for i, (h, w) in enumerate(shapes)])
        refs = self.encoder_reference_points(shapes).expand(len(images), -1, -1)
        for layer in self.encoder:
            src = layer(src, pos, refs, shapes)

        query_pos, tgt = self.query_embed.weight.chunk(2, dim=1)
        query_pos = query_pos.expand(len(images), -1, -1)
        tgt = tgt.expand(len(images), -1, -1)
        reference = self.reference_points(query_pos).sigmoid()
        outputs = []
        for lid, layer in enumerate(self.decoder):
            tgt = layer(tgt, query_pos, reference, src, shapes)
            delta = self.bbox_embed[lid](tgt)
            boxes = torch.cat([delta[..., :2] + inverse_sigmoid(reference), delta[..., 2:]], -1).sigmoid()
            outputs.append({'pred_logits': self.class_embed[lid](tgt), 'pred_boxes': boxes})
        out = outputs[-1]
        out['aux_outputs'] = outputs[:-1]
        return out


# ----------------------------------------------------------------------------- criterion
@functools.cache
def permutations(n, k):
    return np.array(list(itertools.permutations(range(n), k)))


def assign(cost):
    """Exact minimum-cost assignment of a (queries, boxes) matrix; there are two boxes at most, so try all."""
    nq, nb = cost.shape
    perms = permutations(nq, nb)
    rows = perms[cost[perms, np.arange(nb)].sum(1).argmin()]
    cols = np.argsort(rows)
    return rows[cols], cols


@torch.no_grad()
def match(outputs, targets, w_class=2., w_bbox=5., w_giou=2.):
    bs, nq = outputs['pred_logits'].shape[:2]
    p = outputs['pred_logits'].flatten(0, 1).sigmoid()
    boxes = outputs['pred_boxes'].flatten(0, 1)
    tgt_ids = torch.cat([t['labels'] for t in targets])
    tgt_boxes = torch.cat([t['boxes'] for t in targets])
    alpha, gamma = 0.25, 2.0
    neg = (1 - alpha) * p ** gamma * -(1 - p + 1e-8).log()
    pos = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    cost_class = pos[:, tgt_ids] - neg[:, tgt_ids]
    cost_bbox = torch.cdist(boxes, tgt_boxes, p=1)
    cost_giou = -generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(tgt_boxes))
    C = (w_bbox * cost_bbox + w_class * cost_class + w_giou * cost_giou).view(bs, nq, -1)
    sizes = [len(t['labels']) for t in targets]
    indices = [assign(c[i].numpy()) for i, c in enumerate(C.split(sizes, -1))]
    return [(torch.as_tensor(i), torch.as_tensor(j)) for i, j in indices]


def sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2.0):
    prob = logits.sigmoid()
    ce = F.binary_cross_entropy_with_logits(logits, onehot, reduction='none')
    p_t = prob * onehot + (1 - prob) * (1 - onehot)
    return (alpha * onehot + (1 - alpha) * (1 - onehot)) * ce * (1 - p_t) ** gamma


def set_loss(outputs, targets):
    num_boxes = max(sum(len(t['labels']) for t in targets), 1)
    total = 0.
    for out in [outputs] + outputs['aux_outputs']:
        indices = match(out, targets)
        b = torch.cat([torch.full_like(i, n) for n, (i, _) in enumerate(indices)])
        q = torch.cat([i for i, _ in indices])
        labels = torch.cat([t['labels'][j] for t, (_, j) in zip(targets, indices)])
        boxes = torch.cat([t['boxes'][j] for t, (_, j) in zip(targets, indices)])
        onehot = torch.zeros_like(out['pred_logits'])
        onehot[b, q, labels] = 1.
        loss_ce = sigmoid_focal_loss(out['pred_logits'], onehot).sum() / num_boxes
        src = out['pred_boxes'][b, q]
        loss_bbox = F.l1_loss(src, boxes, reduction='sum') / num_boxes
        giou = generalized_box_iou(box_cxcywh_to_xyxy(src), box_cxcywh_to_xyxy(boxes)).diag()
        total = total + 2 * loss_ce + 5 * loss_bbox + 2 * (1 - giou).sum() / num_boxes
    return total


@torch.no_grad()
def average_precision(model, images, targets, iou_thr=0.5):
    """Mean over the classes of AP at the given IoU."""
    model.eval()
    out = model(images)
    scores = out['pred_logits'].sigmoid()
    aps = []
    for c in range(NUM_CLASSES):
        dets, n_gt = [], 0
        for n, t in enumerate(targets):
            gt = t['boxes'][t['labels'] == c]
            n_gt += len(gt)
            used = torch.zeros(len(gt), dtype=torch.bool)
            iou = box_iou(box_cxcywh_to_xyxy(out['pred_boxes'][n]), box_cxcywh_to_xyxy(gt))[0]
            for q in scores[n, :, c].argsort(descending=True).tolist():
                hit = False
                if len(gt):
                    best = iou[q].argmax()
                    hit = bool(iou[q, best] >= iou_thr and not used[best])
                    used[best] |= hit
                dets.append((scores[n, q, c].item(), hit))
        dets.sort(key=lambda d: -d[0])
        tp = np.cumsum([d[1] for d in dets])
        precision = tp / np.arange(1, len(tp) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        recall = np.concatenate([[0], tp / max(n_gt, 1)])
        aps.append(float(((recall[1:] - recall[:-1]) * precision).sum()))
    return float(np.mean(aps))


def get_args():
    parser = argparse.ArgumentParser('Deformable DETR')
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--iters', default=180, type=int)
    parser.add_argument('--batch_size', default=10, type=int)
    parser.add_argument('--lr', default=2.5e-3, type=float)
    return parser.parse_args()


if __name__ == '__main__':
    args = get_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train_images, train_targets = make_split(700, rng)
    val_images, val_targets = make_split(80, rng)

    model = DeformableDETR()
    slow = [p for n, p in model.named_parameters() if 'reference_points' in n or 'sampling_offsets' in n]
    rest = [p for n, p in model.named_parameters() if not ('reference_points' in n or 'sampling_offsets' in n)]
    optimizer = torch.optim.AdamW([{'params': rest}, {'params': slow, 'lr': args.lr * 0.1}],
                                  lr=args.lr, weight_decay=1e-4, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(args.iters * 0.8)], gamma=0.1)
    model.train()
    log = []
    for it in range(args.iters):
        idx = torch.randint(0, len(train_images), (args.batch_size,))
        loss = set_loss(model(train_images[idx]), [train_targets[i] for i in idx.tolist()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        log.append(loss.item())
        if (it + 1) % 30 == 0:
            print(f'iter {it + 1:4d}  loss {np.mean(log[-30:]):.4f}')
    print(f'metric {average_precision(model, val_images, val_targets):.4f}')
