"""DEFault++ on scripts: what it is given of one that nobody changed."""

from __future__ import annotations

import json

import pytest
import torch
from test_defaultplusplus import Extractor as OfTraining
from test_defaultplusplus import package  # noqa: F401 - a fixture

from benchmarks import defaultplusplus_scripts as peer
from benchmarks.defaultplusplus import PARTS

SCRIPT = """\
import torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
torch.set_num_threads(1)
model = BertForSequenceClassification(BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=8, num_labels=3, attn_implementation="eager"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()
for step in range(20):
    tokens = torch.randint(1, 20, (4, 6))
    optimizer.zero_grad()
    out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens[:, 0] % 3)
    out.loss.backward()
    optimizer.step()
print(float(out.loss.detach()), model.training)
"""


class Extractor(OfTraining):
    """The same, with hooks that can be taken out."""

    def __init__(self, model, arch, config):
        self.collector = self.sublayer_capture = self
        self.removed = 0
        model.config.is_encoder_decoder = False
        super().__init__(model, arch, config)

    def remove(self):
        self.removed += 1


@pytest.fixture
def script(tmp_path, package, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.argv", [])
    package.FeatureExtractor = Extractor
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def said(script, steps):
    out = script.with_name("said.json")
    peer.train_one(out, steps, [str(script)])
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_script_is_counted_and_then_watched_to_its_end(script, capsys):
    threads = torch.get_num_threads()
    counted = said(script, 0)
    plain = capsys.readouterr().out
    told = said(script, counted["steps"])
    torch.set_num_threads(threads)
    assert counted == {"steps": 20}
    assert capsys.readouterr().out == plain  # attention is eager there already
    assert (told["status"], told["verdict"], told["label"]) == ("ok", "faulty", "masking/zero_mask")
    assert told["causes"] == [["attention_mask", "model"]]
    last = Extractor.last
    assert len(last.steps) == 20
    assert last.epochs == list(range(PARTS))
    assert last.removed == 1
    assert {"loss", "accuracy"} <= set(last.validations[0])
    given = last.steps[0]
    assert given["input_ids"].shape == (4, 6)
    assert len(given["outputs"].attentions) == 2 and len(given["outputs"].hidden_states) == 3


@pytest.mark.slow
def test_where_it_breaks_the_row_says_so(script, monkeypatch):
    monkeypatch.setattr(Extractor, "breaks_at", 3)
    threads = torch.get_num_threads()
    told = said(script, 20)
    torch.set_num_threads(threads)
    assert (told["status"], told["verdict"], told["causes"]) == ("failed", "none", [])
    assert told["reason"].startswith("step 3")


def test_a_script_without_such_a_model_is_refused(script):
    script.write_text(
        "import torch\nweight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.SGD([weight], 0.1)\nweight.sum().backward()\noptimizer.step()\n"
    )
    told = said(script, 1)
    assert (told["status"], told["verdict"]) == ("refused", "none")
    assert "no model of Hugging Face" in told["reason"]
