"""The rules that ship: they keep to their own examples, to the vocabulary and to 80 columns."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from made_recordings import EVERY, Components, made_recording
from rich.cells import cell_len
from rich.console import Console

from diagnoser.diagnosis import SHIPPED, default_rules, diagnose
from diagnoser.features import CATALOGUE
from diagnoser.report import finding_line, print_diagnosis
from diagnoser.rules import Rule, check_directory, evaluate, shipped_rules_directory
from diagnoser.rules.checking import example_ranges, example_tables
from diagnoser.types import Cost, Diagnosis, Finding, RankedCause
from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, REPAIRS, SEVERITIES, STATUSES

RULES = [rule for family in SHIPPED for rule in default_rules(Path(family))]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.family}/{rule.id}")


@pytest.mark.parametrize("family", SHIPPED)
def test_the_examples_of_every_rule_come_out_and_need_every_condition(family: str) -> None:
    assert check_directory(shipped_rules_directory(family), CATALOGUE) == []


@each_rule
def test_a_rule_speaks_the_vocabulary(rule: Rule) -> None:
    assert rule.causes
    assert set(rule.causes) <= CAUSE_CATEGORY.keys()
    assert {rule.fault, *rule.explains} <= FAULTS.keys()
    assert {repair.name for repair in rule.repairs} <= REPAIRS.keys()
    assert rule.severity in SEVERITIES
    assert rule.status in STATUSES


@each_rule
def test_a_rule_names_its_source_and_where_it_errs(rule: Rule) -> None:
    assert rule.references
    assert rule.falsepositives


@each_rule
def test_an_experimental_rule_makes_no_run_faulty(rule: Rule) -> None:
    assert rule.status != "experimental" or rule.severity == "low"


@each_rule
def test_only_a_critical_fault_ends_a_run(rule: Rule) -> None:
    assert not rule.ends_run or rule.severity == "critical"


# -- messages on a terminal ------------------------------------------------------------------------

# As long as the names of modules are in a large encoder and decoder.
A = "model.decoder.layers.11.encoder_attn.in_proj[query]"
B = "distilbert.transformer.layer.5.attention.k_lin"


def examples(rule: Rule) -> list[Finding]:
    """What the rule says of its own examples, about components with long names."""
    found = []
    for example in rule.tests:
        if example.fires:
            tables = example_tables(rule, example, CATALOGUE)
            for scope, table in tables.items():
                subjects = tuple(
                    tuple({"a": A, "b": B}.get(name or "", name) for name in subject)
                    for subject in table.subjects
                )
                kinds = {A: example.kinds["a"], B: example.kinds["b"]}
                tables[scope] = dataclasses.replace(table, subjects=subjects, kinds=kinds)
            found += evaluate([rule], tables, example_ranges(example, CATALOGUE)).findings
    return found


def page(finding: Finding) -> str:
    cause = RankedCause(finding.causes[0].cause, finding.component)
    diagnosis = Diagnosis(
        *("run", "faulty", "reason", 0),
        causes=(cause,),
        findings=(finding,),
        unknown=(),
        checked=(),
        cost=Cost(1, 1, 1.0, 1.0),
    )
    file = io.StringIO()
    print_diagnosis(diagnosis, Console(file=file, width=80))
    return file.getvalue()


@each_rule
def test_a_message_is_whole_on_80_columns(rule: Rule) -> None:
    found = examples(rule)
    assert len(found) >= sum(example.fires for example in rule.tests)
    for finding in found:
        lines = page(finding).splitlines()
        assert max(map(cell_len, lines)) <= 80
        # A name may be longer than a line, and is then broken; nothing else may be lost.
        assert "".join(finding.message.split()) in "".join("".join(lines).split())


@each_rule
def test_the_first_number_of_a_message_is_shown_while_the_training_runs(rule: Rule) -> None:
    for finding in examples(rule):
        late = dataclasses.replace(finding, since_step=123_456)
        _, _, text = finding_line(late).partition("123456: ")
        assert all(number in text for number in numbers(finding)[:1])


def numbers(finding: Finding) -> list[str]:
    """The words of a message that hold a digit, without the names of components."""
    words = finding.message.replace(A, "").replace(B, "").split()
    return [word.strip(",;:.()") for word in words if any(c.isdigit() for c in word)]


def test_messages_have_numbers_to_lose() -> None:
    with_numbers = [rule for rule in RULES if any(map(numbers, examples(rule)))]
    assert len(with_numbers) > len(RULES) / 2


# -- AutoTrainer -----------------------------------------------------------------------------------

KERNELS: Components = {
    "first": ("feed_forward", "first", 300),
    "norm": ("norm", "norm", 50),
    "last": ("head", "last", 100),
}
EPOCHS, STEPS_AN_EPOCH = 20, 10


def published(
    accuracy: list[float],
    first: list[float],
    last: list[float],
    zero_share: list[float],
    losses: list[float],
) -> set[str]:
    """The five conditions of Zhang et al. 2021 with their defaults, on one accuracy an epoch.

    As there, a gradient problem counts if it was ever seen, in a run that does not converge. The
    published tool keeps one problem only, and calls a run slow if it found nothing else: here each
    is found by itself.
    """
    not_converged = max(accuracy) < 0.7
    slow = max(b - a for a, b in pairwise(accuracy)) < 0.01
    highs, lows = [], []
    for before, here, after in zip(accuracy, accuracy[1:], accuracy[2:], strict=False):
        if here > before and here >= after:
            highs.append(here)
        if here < before and here <= after:
            lows.append(here)
    swings = sum(high - low >= 0.03 for high, low in zip(highs, lows, strict=False))
    gradients = list(zip(first, last, strict=True))
    bad = not_converged or slow
    conditions = {
        "vanishing_gradient": bad and any(f / b < 1e-3 and f < 1e-4 for f, b in gradients),
        "exploding_gradient": bad
        and any(f / b > 70 for f, b in gradients)
        or not all(map(math.isfinite, losses)),
        "dying_relu": bad and any(share >= 0.7 for share in zero_share),
        "oscillating_loss": swings >= 0.2 * len(accuracy),
        "slow_convergence": not_converged and slow,
    }
    return {fault for fault, found in conditions.items() if found}


def test_autotrainers_rules_find_what_its_published_conditions_find() -> None:
    rules = default_rules(Path("autotrainer"))
    random = Random(0)
    runs = 400
    found_in: Counter[str] = Counter()
    for _ in range(runs):
        rise, noise = random.choice([0.0, 0.005, 0.03]), random.choice([0.0, 0.02, 0.1])
        accuracy = [
            min(max(0.2 + rise * e + random.uniform(-noise, noise), 0), 1) for e in range(EPOCHS)
        ]
        steps = EPOCHS * STEPS_AN_EPOCH
        losses = [random.uniform(0.1, 3.0) for _ in range(steps)]
        if random.random() < 0.1:
            losses[random.randrange(steps)] = math.nan
        measured = steps // EVERY
        size = random.choice([-5, 0, 3])
        first = [10 ** random.gauss(size, 0.5) for _ in range(measured)]
        last = [10 ** random.gauss(0, 0.5) for _ in range(measured)]
        zero = random.choice([[0.1, 0.6], [0.1, 0.9]])
        zeros = {name: [random.uniform(*zero) for _ in range(measured)] for name in KERNELS}
        recording = made_recording(
            KERNELS,
            {
                "gradient_norm": {"first": first, "norm": [1e9] * measured, "last": last},
                "zero_share": zeros,
            },
            losses,
            [value for value in accuracy for _ in range(STEPS_AN_EPOCH)],
        )
        elements = {name: elements for name, (_, _, elements) in KERNELS.items()}
        shares = [
            sum(zeros[name][k] * elements[name] for name in KERNELS) / sum(elements.values())
            for k in range(measured)
        ]
        expected = published(accuracy, first, last, shares, losses)
        found = {finding.fault for finding in diagnose(recording, rules).findings}
        assert found == expected
        found_in.update(found)
    for rule in rules:  # each decides both ways, often enough to mean something
        assert 0.05 * runs < found_in[rule.fault] < 0.95 * runs, rule.fault
