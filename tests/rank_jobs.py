"""What two ranks do for `test_distributed`: ``python rank_jobs.py SCRIPT`` on each of them.

One pair of processes does everything, since most of the time of a rank goes into its imports. They
run the script as it is, unwatched, then all else; what they find goes to ``found-RANK.json`` beside
the script, and the logs as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from diagnoser import watch
from diagnoser.session import Watch

DDP = {
    "as it is": {},
    "accumulation": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}
FSDP = ("sharded", "sharded, accumulation", "sharded, checkpoints", "sharded, on a probe")
FAULTS = ("healthy", "rate", "left out", "nan")
TRAINER = ("divides", "averages")  # what a model of its own makes of the number of all labels
WORDS, LABELS = 21, 3


class Block(nn.Module):
    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(15)
        self.query, self.key = nn.Linear(15, 15, bias=False), nn.Linear(15, 15, bias=False)
        self.value, self.out = nn.Linear(15, 15), nn.Linear(15, 15)
        self.dropout = nn.Dropout(0.1)
        self.recomputed = recomputed

    def attend(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        mixed = F.scaled_dot_product_attention(self.query(n), self.key(n), self.value(n))
        return self.dropout(self.out(mixed))

    def forward(self, h: Tensor) -> Tensor:
        if self.recomputed:
            return h + checkpoint(self.attend, h, use_reentrant=False)
        return h + self.attend(h)


class Net(nn.Module):
    """Odd widths: no parameter can be cut into two equal halves."""

    def __init__(self, *, recomputed: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 15)
        self.blocks = nn.ModuleList(Block(recomputed) for _ in range(2))
        self.fused = nn.MultiheadAttention(15, 3, batch_first=True)
        self.scale = nn.Parameter(torch.ones(1))  # all of it is on one rank
        self.head = nn.Linear(15, LABELS)
        if spare:
            self.spare = nn.Linear(15, 15)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, words: Tensor) -> Tensor:
        self.seen += 1
        h = self.embedding(words)
        for block in self.blocks:
            h = block(h)
        h = h + self.fused(h, h, h, need_weights=False)[0]
        return self.head(self.scale * h.mean(1))


class Answering(nn.Module):
    """Computes its loss itself, as models of transformers do.

    Their trainer tells it how many labels a step has on all ranks, and then multiplies what it
    answers by the number of ranks, whether or not it has divided by that.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.divides = without_dropout(Net().double()), kind == "divides"

    def forward(self, words: Tensor, labels: Tensor, **told: Any) -> dict[str, Tensor]:
        scores = self.net(words)
        if self.divides:
            loss = F.cross_entropy(scores, labels, reduction="sum") / told["num_items_in_batch"]
        else:
            loss = F.cross_entropy(scores, labels)
        return {"loss": loss, "scores": scores}


class OtherAdamW(torch.optim.AdamW):
    """AdamW, but as its class is another its next step is not told in advance."""


def batches(steps: int, size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        words = torch.randint(0, WORDS, (size, 6), generator=generator)
        mine = words[rank::ranks]
        yield mine, mine[:, 0] % LABELS


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def without_dropout(model: Net) -> Net:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def sharded(model: Net, **options: Any) -> Net:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> str:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    states = (state for state in optimizer.state.values())
    tensors += [t for state in states for t in state.values() if isinstance(t, Tensor)]
    sha = hashlib.sha256(repr(losses).encode())
    for tensor in [*map(here, tensors), torch.get_rng_state()]:
        sha.update(tensor.detach().numpy().tobytes())
    sha.update(repr((random.getstate(), np.random.get_state())).encode())  # noqa: NPY002
    return sha.hexdigest()


def trained(mode: str, rank: int, out: Path | None) -> str:
    """Trains some steps, with a watch where there is a place for its log; returns all its bits."""
    torch.manual_seed(0)
    model = Net(recomputed="checkpoints" in mode, spare=mode == "unused parameters")
    whole = sharded(model) if mode in FSDP else DistributedDataParallel(model, **DDP[mode])
    for one in (random.seed, np.random.seed, torch.manual_seed):  # noqa: NPY002
        one(rank + 1)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    losses = []
    probe = next(batches(1, 8, rank, 2)) if "probe" in mode else None
    options = {} if probe is None else {"loss_fn": loss_of, "probe": probe}
    watching: Any = contextlib.nullcontext()
    if out is not None:
        at = {0: (), 2: ("spectrum",) if mode == "as it is" else (), 4: ("interaction",)}
        watching = watch(whole, optimizer, at=at, out=out, verbose=False, **options)
    with watching:
        for step in range(6):
            optimizer.zero_grad()
            for part, batch in enumerate(batches(2, 8, rank, 2)):
                if "accumulation" not in mode and part:
                    continue
                first = "accumulation" in mode and not part
                if mode in FSDP:
                    whole.set_requires_gradient_sync(not first)
                kept = whole.no_sync() if first and mode in DDP else contextlib.nullcontext()
                with kept:
                    loss = loss_of(whole, batch)
                    loss.backward()
                losses.append(loss.item() + random.random() + step)
            optimizer.step()
    return digest(whole, optimizer, losses)


def numbers(kind: str, out: Path, rank: int = 0, ranks: int = 1) -> None:
    """Trains in float64 on the same joint batches, however many ranks there are."""
    torch.manual_seed(0)
    model: Any = without_dropout(Net().double())
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        model = sharded(model)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
        model = sharded(model, mesh=mesh)
    optimizer = OtherAdamW(model.parameters(), lr=3e-3)
    probe = next(batches(1, 16, rank, ranks)) if kind.endswith("probe") else None
    options = {} if probe is None else {"loss_fn": loss_of, "probe": probe}
    at = {0: (), 3: ("interaction",), 6: ()}
    with watch(model, optimizer, out=out, at=at, verbose=False, **options):
        for batch in batches(8, 8, rank, ranks):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


def faulty(fault: str, out: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Trains with a mistake, on all ranks or on the last; returns what the diagnosis is."""
    torch.manual_seed(0)
    model = Net()
    key = [p for n, p in model.named_parameters() if n.startswith("blocks.1.key")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks.1.key")]
    groups = [{"params": rest}, {"params": key, "lr": 0.3 if fault == "rate" else 3e-3}]
    optimizer = torch.optim.AdamW(groups[:1] if fault == "left out" else groups, lr=3e-3)
    if ranks > 1:
        model = DistributedDataParallel(model)
    torch.manual_seed(rank)
    watching = Watch(out)
    with watching:
        for step, (words, labels) in enumerate(batches(60, 32, rank, ranks)):
            optimizer.zero_grad()
            loss = loss_of(model, (words, labels))
            if fault == "nan" and step == 30 and rank == ranks - 1:
                loss = loss * float("nan")
            loss.backward()
            optimizer.step()
    if rank:
        return {}
    found = watching.diagnose()
    causes = [(cause.cause, cause.component) for cause in found.causes[:1]]
    faults = [(f.fault, f.component) for f in found.findings if f.severity != "low"]
    return {"verdict": found.verdict, "causes": causes, "faults": faults[:1]}


def by_trainer(kind: str, out: Path, ranks: int = 1, *, watched: bool = True) -> dict[str, Any]:
    """Trains by transformers' Trainer on the same joint batches, however many ranks there are."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from diagnoser.integrations.transformers import DiagnoserCallback

    torch.manual_seed(0)
    model = Answering(kind)
    words = torch.randint(0, WORDS, (640, 6))
    labels = (words < WORDS // 3).sum(1).clamp(1, LABELS) - 1  # whatever their order
    if kind == "divides":  # a rank may have fewer than the other
        labels = labels.where(words[:, 1] > 4, -100)
    callback = DiagnoserCallback(out=out, verbose=False)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out.with_name("never written")),
            max_steps=160,
            per_device_train_batch_size=16 // ranks,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",  # it is low for some measurements
            adam_epsilon=1e-300,  # so that what a loss is multiplied by changes no step
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo" if ranks > 1 else None,
            disable_tqdm=True,
        ),
        train_dataset=[{"words": w, "labels": x} for w, x in zip(words, labels, strict=True)],
        callbacks=[callback] if watched else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    bits = digest(model, trainer.optimizer, [])
    if not watched or callback.attached.diagnosis is None:
        return {"bits": bits}
    found = callback.attached.diagnosis
    return {"bits": bits, "verdict": found.verdict, "sources": [f.source for f in found.findings]}


def main() -> None:
    script = Path(sys.argv[1])
    folder, rank = script.parent, int(os.environ["RANK"])
    runpy.run_path(str(script))["train"](rank, 2, "well")
    # Another port: the first group's may still be taken. Not a file: the rank that is first may
    # have left and removed it before the other comes.
    meeting = f"tcp://127.0.0.1:{os.environ['SECOND_PORT']}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found: dict[str, Any] = {"bits": {}, "faults": {}, "trainer": {}}
    for mode in (*DDP, *FSDP):
        watched = trained(mode, rank, folder / f"bits {mode}")
        found["bits"][mode] = [trained(mode, rank, None), watched]
    for kind in ("ddp", "fsdp", "hsdp", "fsdp on a probe"):
        numbers(kind, folder / kind, rank, 2)
    for fault in FAULTS:
        found["faults"][fault] = faulty(fault, folder / f"fault {fault}", rank, 2)
    os.environ["LOCAL_RANK"] = str(rank)  # without it each rank trains for itself
    for kind in TRAINER:
        plain = by_trainer(kind, folder / "plain", 2, watched=False)
        watched = by_trainer(kind, folder / f"trainer {kind}", 2)
        found["trainer"][kind] = watched | {"plain bits": plain["bits"]}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
