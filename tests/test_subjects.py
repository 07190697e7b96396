"""The evidence subjects: each fault is the mistake it is named after, and nothing else."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml

from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, MODEL

FOLDER = Path(__file__).parents[1] / "benchmarks" / "subjects"
TRUTH = {entry["name"]: entry for entry in yaml.safe_load((FOLDER / "faults.yaml").read_text())}
OPTIMIZER = {"han": "Adam", "transformer": "AdamW"}
BLOCK = {"han": "word_attention", "transformer": "layers.1.attention"}


class Subject:
    """A subject's script in this process, on little data, with its model and optimizer in sight."""

    def __init__(self, name, monkeypatch):
        self.name, self.patch = name, monkeypatch
        monkeypatch.setattr(sys, "path", list(sys.path))
        for shared in ("bbc_news", "model"):
            monkeypatch.setitem(sys.modules, shared, None)  # so that it is forgotten afterwards
            del sys.modules[shared]
        spec = importlib.util.spec_from_file_location(f"subject_{name}", FOLDER / f"{name}.py")
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)

        if name == "han":
            news = sys.modules["bbc_news"]
            documents = torch.randint(2, 30, (64, 4, 6), generator=torch.Generator().manual_seed(0))
            documents[::2, 2:] = news.PADDING
            part = news.Split(documents, torch.arange(64) % 5)
            monkeypatch.setattr(self.script, "load", lambda: news.BBCNews(part, part, part, 30))

        def evaluate(model, *_):
            self.model = model
            return 0.0

        def optimizer(*arguments):
            self.optimizer = kept(*arguments)
            return self.optimizer

        kept = getattr(torch.optim, OPTIMIZER[name])
        monkeypatch.setattr(self.script, "evaluate", evaluate)
        monkeypatch.setattr(torch.optim, OPTIMIZER[name], optimizer)

    def train(self, fault="none", epochs=1):
        """Trains two batches an epoch; returns the parameters by name."""
        words = [self.name, "--fault", fault, "--seed", "3", "--epochs", str(epochs)]
        if self.name == "transformer":
            words += ["--steps", "2"]
        self.patch.setattr(sys, "argv", words)
        self.script.main()
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def moved(self, fault):
        before, after = self.train(fault, epochs=0), self.train(fault)
        return {name for name in before if not torch.equal(before[name], after[name])}

    def in_block(self, names):
        return {name for name in names if name.startswith(BLOCK[self.name] + ".")}

    def optimized(self):
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name for name, p in self.model.named_parameters() if id(p) in known}


@pytest.fixture(params=sorted(TRUTH))
def subject(request, monkeypatch):
    return Subject(request.param, monkeypatch)


def test_the_truth_uses_the_words_of_the_vocabulary(subject):
    entries = TRUTH[subject.name]["faults"]
    assert tuple(entry["name"] for entry in entries) == subject.script.FAULTS[1:]
    for entry in entries:
        assert set(entry["faults"]) <= set(FAULTS)
        assert entry["cause"] in CAUSE_CATEGORY
        assert entry["local"] is (entry["components"] != [MODEL])


def test_the_truth_names_modules_of_the_model(subject):
    subject.train(epochs=0)
    for entry in TRUTH[subject.name]["faults"]:
        for component in set(entry["components"]) - {MODEL}:
            assert subject.model.get_submodule(component)


def test_healthy_training_moves_everything(subject):
    # A key's bias shifts all scores of a row alike, so its gradient is zero but for rounding.
    biases = {name for name in subject.train(epochs=0) if name.endswith("key.bias")}
    assert subject.moved("none") >= subject.optimized() - biases
    assert subject.optimized() == set(dict(subject.model.named_parameters()))


def test_twins_start_alike(subject):
    healthy = subject.train(epochs=0)
    for entry in TRUTH[subject.name]["faults"]:
        faulty = subject.train(entry["name"], epochs=0)
        changed = {name for name in healthy if not torch.equal(healthy[name], faulty[name])}
        if entry["name"] != "attention_weights_x12":
            assert not changed
            continue
        assert len(changed) == 2
        assert changed == {name for name in subject.in_block(changed) if name.endswith("weight")}
        for name in changed:
            torch.testing.assert_close(faulty[name], 12 * healthy[name])


def test_learning_rates(subject):
    def rates(fault):
        subject.train(fault, epochs=0)
        return [group["lr"] for group in subject.optimizer.param_groups]

    assert rates("none") == pytest.approx([3e-3, 3e-3])
    assert rates("learning_rate_x30") == pytest.approx([9e-2, 9e-2])
    assert rates("component_learning_rate_x100") == pytest.approx([3e-3, 3e-1])
    block = {id(p) for p in subject.model.get_submodule(BLOCK[subject.name]).parameters()}
    assert {id(p) for p in subject.optimizer.param_groups[1]["params"]} == block


def test_a_frozen_block_is_in_the_optimizer_and_never_moves(subject):
    moved = subject.moved("frozen_block")
    assert moved
    assert not subject.in_block(moved)
    assert subject.optimized() == set(dict(subject.model.named_parameters()))
    frozen = {name for name, p in subject.model.named_parameters() if not p.requires_grad}
    assert frozen == subject.in_block(frozen) != set()


def test_a_late_block_has_gradients_and_is_in_no_optimizer(subject):
    moved = subject.moved("late_component")
    assert moved
    assert not subject.in_block(moved)
    names = set(dict(subject.model.named_parameters()))
    assert names - subject.optimized() == subject.in_block(names) != set()
    block = subject.model.get_submodule(BLOCK[subject.name])
    assert all(p.requires_grad and p.grad is not None for p in block.parameters())


def test_gradients_add_up_without_zero_grad(subject):
    def calls(fault):
        count = 0
        kept = torch.optim.Optimizer.zero_grad

        def counted(self, set_to_none=True):
            nonlocal count
            count += 1
            kept(self, set_to_none)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Optimizer, "zero_grad", counted)
            subject.train(fault)
        return count

    assert calls("none") == 2
    assert calls("no_zero_grad") == 0


def test_the_loss_sees_probabilities_only_with_a_softmax_before_it(subject, monkeypatch):
    seen = []
    kept = torch.nn.functional.cross_entropy

    def cross_entropy(output, target):
        seen.append(output.detach())
        return kept(output, target)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    subject.train("softmax_before_loss")
    assert all(torch.allclose(output.sum(-1), torch.ones(len(output))) for output in seen)
    assert all((output >= 0).all() for output in seen)
    subject.train("none")
    assert (seen[-1] < 0).any()


def test_a_row_without_a_visible_word_makes_everything_nan(subject):
    assert all(value.isfinite().all() for value in subject.train("none").values())
    poisoned = subject.train("masked_row_nan")
    assert subject.in_block(poisoned)
    assert all(poisoned[name].isnan().any() for name in subject.in_block(poisoned))


def test_recall_answers_are_in_the_sequence(monkeypatch):
    recall = Subject("transformer", monkeypatch).script
    tokens, answers = recall.draw(500, torch.Generator().manual_seed(0))
    assert tokens.shape == (500, recall.LENGTH)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        *pairs, question = row
        table = dict(zip(pairs[::2], pairs[1::2], strict=True))
        padding = pairs.count(recall.PADDING) // 2
        assert len(table) == recall.PAIRS - padding + bool(padding)  # distinct keys, and padding
        assert recall.PAIRS - padding >= recall.FEWEST_PAIRS
        assert table[question] == answer + 1 + recall.SYMBOLS
