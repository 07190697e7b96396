"""Attention heads by themselves, on request: components, entropies, what stays as it was."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from popular_models import MODELS
from torch import Tensor, nn

from diagnoser.components import head_of, parameters_of, split_components
from diagnoser.diagnosis import is_grave
from diagnoser.errors import UsageError
from diagnoser.session import Watch, watch

# Heads of query, and of key and value, of every attention; models without one stay as they are.
HEADS: dict[str, tuple[int, int]] = {
    "BERT": (2, 2),
    "DistilBERT": (2, 2),
    "RoBERTa": (2, 2),
    "GPT-2": (2, 2),
    "Llama": (4, 2),
    "Mixtral": (4, 2),
    "ViT": (2, 2),
    "T5": (2, 2),
    "nn.Transformer": (2, 2),
    "nn.TransformerEncoder": (2, 2),
    "nn.TransformerDecoder": (2, 2),
    "Perceiver": (2, 2),
    "LoRA": (2, 2),
}


def heads_of(name: str) -> Counter[tuple[str, str]]:
    found = split_components({"model": MODELS[name]().model}, heads=True)
    whole = ((c.kind, re.sub(r"\[head=\d+\]$", "", c.name)) for c in found if "[head=" in c.name)
    return Counter(whole)


@pytest.mark.parametrize("name", MODELS)
def test_projections_are_cut_by_head_and_nothing_else_is(name):
    whole = split_components({"model": MODELS[name]().model})
    counts = heads_of(name)
    ours = {c.name: c for c in whole}
    assert {of for _, of in counts} <= ours.keys()
    uncut = {c.name for c in whole if c.kind in ("query", "key", "value")} - {n for _, n in counts}
    if name not in HEADS:
        assert not counts
        return
    assert all("lora" in n for n in uncut)
    queries, keys = HEADS[name]
    assert set(counts.values()) == {queries, keys}
    assert {n for (kind, _), n in counts.items() if kind == "query"} == {queries}


@pytest.mark.parametrize("name", MODELS)
def test_every_element_is_still_in_one_component(name):
    models = {"model": MODELS[name]().model}
    seen = {n: torch.zeros_like(p, dtype=torch.int) for n, p in parameters_of(models).items()}
    for component in split_components(models, heads=True):
        for part in component.parts:
            part.view(seen[part.parameter]).add_(1)
    assert all((count == 1).all() for count in seen.values())


class Attention(nn.Module):
    """Written by hand; ``fused`` by torch's own operation."""

    def __init__(self, width: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.out_proj(mixed.transpose(-2, -3).flatten(-2))


class Torchs(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, average_attn_weights=False)[0]


def entropies(model: nn.Module, out: Path) -> dict[int, float]:
    """The first recorded entropy of each head."""
    model = nn.Sequential(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1)
    x = torch.randn(3, 5, 12)
    with Watch(out, models={"m": model}, optimizer=optimizer, heads=True) as watched:
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    rows = watched.log.measurements
    code = rows.quantities.index("head_entropy")
    of_quantity = rows.quantity == code
    first = of_quantity & (rows.step == rows.step[of_quantity].min())
    names = [rows.components[i] for i in rows.component[first]]
    return dict(zip(map(head_of, names), rows.value[first].tolist(), strict=True))


@pytest.mark.parametrize("form", ["by hand", "fused", "of torch"])
def test_the_entropy_of_each_head_is_that_of_its_own_weights(form, tmp_path):
    torch.manual_seed(0)
    if form == "of torch":
        model: nn.Module = Torchs(12, 3)
        query = model.attn.in_proj_weight[:12]
    else:
        model = Attention(12, 3, fused=form == "fused")
        query = model.q_proj.weight
    with torch.no_grad():
        query[4:8] *= 40.0  # head 1 alone is sharp
    torch.manual_seed(1)
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        if form == "of torch":
            weights = model.attn(x, x, x, average_attn_weights=False)[1]
        else:
            q, k = model.heads(model.q_proj(x)), model.heads(model.k_proj(x))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean(dim=(0, 2)) / math.log(5)
    found = entropies(model, tmp_path / "run")
    assert set(found) == {0, 1, 2}
    assert [found[head] for head in range(3)] == pytest.approx(expected.tolist(), rel=1e-4)
    assert found[1] < 0.5 < min(found[0], found[2])


def test_a_model_that_does_not_say_how_many_heads_stays_whole():
    model = Attention(12, 3, fused=True)
    del model.num_heads
    assert split_components({"m": model}, heads=True) == split_components({"m": model})
    model.num_heads = 5  # does not come out even
    assert split_components({"m": model}, heads=True) == split_components({"m": model})


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_looking_at_heads_changes_no_bit_and_calls_nothing_faulty(name, tmp_path: Path):
    def trained() -> tuple[list[float], list[bytes]]:
        torch.manual_seed(0)
        subject = MODELS[name]()
        model, batch = subject.model, subject.draw()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            value = subject.loss(model, batch)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses, [t.detach().numpy().tobytes() for t in model.state_dict().values()]

    torch.set_num_threads(1)
    expected = trained()
    with Watch(tmp_path / "run", heads=True) as watched:
        found = trained()
    assert found == expected
    assert [e for e in watched.log.events if e.kind == "monitor_error"] == []
    rows = watched.log.measurements
    entropic = rows.quantity == rows.quantities.index("head_entropy")
    queries = sum(n for (kind, _), n in heads_of(name).items() if kind == "query")
    assert len(set(rows.component[entropic].tolist())) == queries
    diagnosis = watched.diagnose()
    assert [f for f in diagnosis.findings if is_grave(f.severity)] == []
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "attention entropy by head" in page
    assert "[head=1]" in page


def test_repairs_of_single_heads_are_refused(tmp_path):
    with pytest.raises(UsageError, match="repairs act on whole projections"):
        watch(heads=True, repair="apply", out=tmp_path / "run")


@pytest.mark.slow
def test_the_command_names_a_head_that_never_gets_a_gradient(tmp_path):
    """One head's mistake, in a script that knows nothing of it."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "class Attention(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.num_heads = 2\n"
        "        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)\n"
        "        self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        split = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)\n"
        "        q, k, v = (split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))\n"
        "        y = nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "        y = torch.cat([y[:, :1], y[:, :1]], dim=1)  # head 0 twice: head 1 is lost\n"
        "        return self.out_proj(y.transpose(1, 2).flatten(-2))\n"
        "model = nn.Sequential(Attention(), nn.Flatten(), nn.Linear(40, 3))\n"
        "optimizer = torch.optim.Adam(model.parameters(), 1e-2)\n"
        "for _ in range(60):\n"
        "    x = torch.randn(16, 5, 8)\n"
        "    optimizer.zero_grad()\n"
        "    loss = nn.functional.cross_entropy(model(x), x[:, 0, :3].argmax(-1))\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
    )
    command = [sys.executable, "-m", "diagnoser.cli", "run", "--heads", "--out", "run", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=dict(os.environ))
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert {f["component"] for f in diagnosis["findings"]} >= {"0.q_proj[head=1]"}
