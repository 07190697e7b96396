from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from report_examples import (
    COLLAPSE,
    DEFECT,
    FAILED,
    HOSTILE,
    LOWERED,
    PROJECTION,
    SHARPNESS,
    TEMPERED,
    diagnoses,
    findings,
    han_diagnosis,
    healthy_diagnosis,
    repaired_diagnosis,
)
from rich.cells import cell_len
from rich.console import Console

from diagnoser import vocabulary
from diagnoser.report import finding_line, print_diagnosis, terminal, wording
from diagnoser.types import Arm, Cause, Cost, Evidence, RankedCause, Repair, Where


def page(diagnosis, *, width=80, encoding="utf-8", terminal=False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(
        file=file,
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
    )
    print_diagnosis(diagnosis, console)
    file.flush()
    return raw.getvalue().decode(encoding)


def renamed(name):
    return replace(
        han_diagnosis(),
        run=name,
        reason=name,
        causes=(RankedCause("learning_rate_too_high", name),),
        findings=(replace(SHARPNESS, component=name, other=name, message=name),),
        unknown=tuple(
            replace(u, rule=name, component=name, missing=(name,), reason=name)
            for u in han_diagnosis().unknown
        ),
        checked=tuple(replace(c, title=name) for c in han_diagnosis().checked),
        repairs=tuple(
            replace(
                LOWERED,
                source=name,
                component=name,
                actions=(Repair("change_activation", name, {"to": name, name: name}),),
                derivation=name,
                guarantee=name,
                reason=name,
                kept=kept,
            )
            for kept in (False, True)
        ),
    )


def assert_harmless(text: str, width: int = 80):
    for line in text.split("\n"):
        assert cell_len(line) <= width
        assert line == line.rstrip()
        assert line.isprintable()


def test_the_verdict_comes_first_with_its_reason():
    first, second, *_ = page(han_diagnosis()).splitlines()
    assert first == "faulty: something is wrong with this run"
    assert second == han_diagnosis().reason


def test_every_section_is_there_in_its_order():
    text = page(han_diagnosis())
    headings = [
        *("likely causes", "also possible", "findings without a ranked cause"),
        *("checked and fine", "could not be judged", "cost"),
    ]
    assert [line for line in text.splitlines() if line in headings] == headings
    words = " ".join(text.split())
    for expected in (
        "1. The learning rate of word_attention.projection is too high.",
        "learning_rate_too_high in word_attention.projection; right in 91 % of 88 calibration runs",
        "high sharpness_instability in word_attention.projection from step 120",
        "- step_sharpness 14.2 ± 2.5 > 2 over steps 120 to 160",
        "- update_ratio 0.081 > 0.01 over steps 110 to 160",
        "- scale_learning_rate: Multiply the learning rate of word_attention.projection by 0.01",
        "2. missing_warmup in word_attention.projection",
        "possible causes: component_not_optimized",
        "7 rules found none of this: gradients reach the first layers;",
        "- concave-region in word_rnn and 1 more: no second derivative of a fused RNN",
        "400 steps, 41 measurements; training 40.1 s, monitoring 3.2 s (8.0 % of training)",
    ):
        assert expected in words


def test_explained_findings_stand_under_their_cause():
    lines = page(han_diagnosis()).splitlines()
    cause = next(i for i, line in enumerate(lines) if "is too high." in line)
    symptom = next(i for i, line in enumerate(lines) if "attention_entropy_collapse" in line)
    assert cause < symptom < lines.index("also possible")


def test_a_healthy_page_names_no_cause():
    text = page(healthy_diagnosis())
    assert text.startswith("healthy: nothing is wrong with this run")
    assert "causes" not in text


def test_what_is_of_low_severity_is_no_likely_cause_of_a_healthy_run():
    low = replace(SHARPNESS, severity="low")
    cause = RankedCause("learning_rate_too_high", SHARPNESS.component)
    lines = page(replace(healthy_diagnosis(), findings=(low,), causes=(cause,))).splitlines()
    assert "likely causes" not in lines
    assert "1." in lines[lines.index("worth a look, of low severity") + 1]


def test_a_large_diagnosis_still_fits_a_page():
    crowd = tuple(replace(SHARPNESS, component=f"layer.{i}") for i in range(200))
    causes = tuple(RankedCause("learning_rate_too_high", f"layer.{i}") for i in range(200))
    text = page(replace(han_diagnosis(), findings=crowd, causes=causes))
    assert len(text.splitlines()) < 90
    assert "and 196 more causes in diagnosis.json" in text


def section(text: str, heading: str) -> list[str]:
    lines = text.splitlines()
    start = lines.index(heading) + 1
    return lines[start : lines.index("", start)]


TRIED = "repairs that were tried"


def test_repairs_that_were_tried_say_what_was_done_and_what_came_of_it():
    text = page(repaired_diagnosis())
    assert text.index("also possible") < text.index(TRIED) < text.index("checked and fine")
    words = " ".join(" ".join(section(text, TRIED)).split())
    for expected in (
        "1. kept at step 160 in word_attention.projection - Restore the state",
        "- Multiply the learning rate of word_attention.projection by 0.01",
        f"loss 0.412 with it, 1.13 without it: -63.6 ± 4.1 %; {LOWERED.reason}",
        "2. rolled back at step 130 in word_attention.context - Clip the gradient norm to 1",
        f"loss NaN with it, 1.12 before; {FAILED.reason}",
        "3. rolled back at step 140",
        f"loss 1.11 with it, 1.13 without it: -1.95 ± 3.2 %; {TEMPERED.reason}",
        f"compared (1, 3): {LOWERED.guarantee} compared (2): {FAILED.guarantee}",
    ):
        assert expected in words
    assert TRIED not in page(han_diagnosis())


def test_how_repairs_were_compared_is_said_once():
    text = " ".join(page(replace(han_diagnosis(), repairs=(LOWERED, TEMPERED))).split())
    assert text.count(LOWERED.guarantee) == 1
    assert f"compared: {LOWERED.guarantee}" in text
    assert "compared" not in page(
        replace(han_diagnosis(), repairs=(replace(LOWERED, guarantee=""),))
    )


def test_of_many_repairs_those_that_were_kept_are_shown_first():
    many = tuple(replace(TEMPERED, step=k, kept=k in (17, 19)) for k in range(20))
    lines = section(page(replace(han_diagnosis(), repairs=many)), TRIED)
    starts = [line for line in lines if " at step " in line]
    assert len(starts) == terminal.TRIED
    assert [line.split(" at ")[1].split()[1] for line in starts] == ["17", "19", "0", "1", "2", "3"]
    assert "    and 14 more repairs in diagnosis.json" in lines
    assert len(page(replace(han_diagnosis(), repairs=many)).splitlines()) < 90


def test_a_repair_that_could_not_be_measured_has_the_loss_before_it():
    lost = replace(FAILED, after=None, reason="")
    assert wording.loss_sentence(lost) == "loss 1.12 before"
    assert "    loss 1.12 before" in page(replace(han_diagnosis(), repairs=(lost,))).splitlines()
    alone = replace(FAILED, after=None, twin=Arm(20, 0.5))
    assert wording.loss_sentence(alone) == "loss 0.5 without it, 1.12 before"


def test_many_actions_of_a_repair_are_counted():
    actions = (Repair("zero_gradients", "model"),) * (terminal.ACTIONS + 4)
    text = page(replace(han_diagnosis(), repairs=(replace(LOWERED, actions=actions),)))
    assert text.count("- Call optimizer.zero_grad()") == terminal.ACTIONS
    assert "and 4 more actions in diagnosis.json" in text


def test_a_log_gets_plain_text_and_a_terminal_colour():
    assert "\x1b" not in page(repaired_diagnosis())
    coloured = page(han_diagnosis(), terminal=True)
    assert "\x1b[1;31mfaulty" in coloured


def test_a_log_of_another_encoding_loses_nothing():
    text = page(han_diagnosis(), encoding="ascii")
    assert "step_sharpness 14.2 +/- 2.5 > 2" in text
    assert "caf\\xe9" in page(replace(han_diagnosis(), run="café"), encoding="ascii")
    assert "café" in page(replace(han_diagnosis(), run="café"), encoding="latin-1")


@pytest.mark.parametrize("width", [80, 200, 40])
def test_no_line_is_longer_than_the_page(width):
    assert_harmless(page(repaired_diagnosis(), width=width), min(width, 80))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_not_break_the_page(name):
    text = page(renamed(name))
    assert_harmless(text)
    assert len(text.splitlines()) < 90
    assert "\n1 step" not in text


def test_markup_in_a_name_is_printed_as_it_is():
    assert "[bold red]markup[/bold red][/]" in page(renamed("[bold red]markup[/bold red][/]"))


@given(diagnoses)
@settings(max_examples=40, deadline=None)
def test_any_diagnosis_can_be_printed(diagnosis):
    assert_harmless(page(diagnosis))


def test_the_live_notice_is_one_plain_line():
    assert finding_line(COLLAPSE) == (
        "diagnoser: step 150: high: attention_entropy_collapse in word_attention.context: "
        "Word attention puts nearly all its weight on a single word (entropy 0.04 of..."
    )
    whole = replace(SHARPNESS, component="model", message="Every step overshoots.")
    assert finding_line(whole) == (
        "diagnoser: step 120: high: sharpness_instability in the model: Every step overshoots."
    )


@given(findings)
@settings(max_examples=100, deadline=None)
def test_the_live_notice_is_short_whatever_the_names(finding):
    line = finding_line(finding)
    name = wording.subject(finding.component, finding.other)
    assert line.isprintable()
    assert len(line) <= 140 + len(name) * (
        2 if name in wording.visible(finding.message, 1000) else 1
    )


def test_every_cause_has_a_sentence():
    assert set(wording.CAUSE_SENTENCES) == set(vocabulary.CAUSE_CATEGORY)
    for cause in vocabulary.CAUSE_CATEGORY:
        for component in (PROJECTION, "model"):
            sentence = wording.cause_sentence(RankedCause(cause, component))
            assert sentence[0].isupper() or sentence.startswith(PROJECTION)
            assert sentence.endswith(".")
            assert "!" not in sentence


def test_epsilon_alone_has_a_sentence_of_its_own():
    said = wording.repair_sentence(Repair("change_betas", "model", {"eps": 1e-8}))
    assert said == "Set the optimizer's epsilon to 1e-8."


def test_every_repair_has_a_sentence_with_or_without_parameters():
    assert set(wording.REPAIR_SENTENCES) == set(vocabulary.REPAIRS)
    for name, (_, left_open) in wording.REPAIR_SENTENCES.items():
        given_values = dict.fromkeys(left_open, 0.125)
        for component in (PROJECTION, "model"):
            for parameters in ({}, given_values, {**given_values, "extra": "text"}):
                sentence = wording.repair_sentence(Repair(name, component, parameters))
                assert sentence[0].isupper()
                assert sentence.endswith(".")
                assert sentence.count("0.125") == len(parameters.keys() & left_open.keys())
                assert ("extra text" in sentence) == ("extra" in parameters)


def test_every_verdict_and_fault_has_words():
    assert set(wording.VERDICT_SENTENCES) == set(vocabulary.VERDICTS)
    for fault in vocabulary.FAULTS:
        assert fault in page(replace(han_diagnosis(), findings=(replace(SHARPNESS, fault=fault),)))


def test_a_finding_goes_to_its_own_first_cause_that_is_ranked_nearby():
    causes = (
        RankedCause("learning_rate_too_high", "encoder.0"),
        RankedCause("learning_rate_too_high", "encoder.1"),
        RankedCause("attention_mask", "model"),
    )
    inside = replace(
        SHARPNESS, component="encoder.1.attn", causes=(Cause("learning_rate_too_high"),)
    )
    sibling = replace(inside, component="encoder.10")  # a prefix by letters, not by path
    masked = replace(inside, causes=(Cause("attention_mask"), Cause("learning_rate_too_high")))
    lost = replace(inside, causes=(Cause("residual"),))
    diagnosis = replace(han_diagnosis(), causes=causes, findings=(inside, sibling, masked, lost))
    groups = wording.findings_by_cause(diagnosis)
    assert [cause for cause, _ in groups] == [*causes, None]
    assert [[position for position, _ in found] for _, found in groups] == [[2], [1], [3], [4]]


def test_a_possible_cause_that_a_likely_one_covers_is_not_said_again():
    whole = RankedCause("component_not_optimized", "encoder.0")
    part = RankedCause("component_not_optimized", "encoder.0.attn")
    other = RankedCause("component_not_optimized", "encoder.01")  # a prefix by letters only
    dead = replace(SHARPNESS, component="encoder.0", causes=(Cause("component_not_optimized"),))
    diagnosis = replace(han_diagnosis(), causes=(part, whole, other), findings=(dead,))
    groups = wording.findings_by_cause(diagnosis)
    assert wording.likely_and_possible(groups) == ([(part, [(1, dead)])], [whole, other])
    groups = wording.findings_by_cause(replace(diagnosis, causes=(whole, part, other)))
    assert wording.likely_and_possible(groups) == ([(whole, [(1, dead)])], [other])


def test_a_suggestion_is_made_once_for_the_whole_and_not_for_other_places():
    lower = [
        replace(SHARPNESS, repairs=(Repair("scale_learning_rate", name, {"factor": 0.1}),))
        for name in ("encoder", "encoder.0", "decoder", "encoder[query]", "model")
    ]
    numbered = list(enumerate(lower, start=1))

    def places(component):
        cause = None if component is None else RankedCause("learning_rate_too_high", component)
        return [repair.component for repair in wording.suggestions(cause, numbered)]

    assert places("encoder") == ["encoder"]
    assert places("encoder.0") == ["encoder"]
    assert places("model") == ["encoder", "decoder", "model"]
    assert places(None) == ["encoder", "decoder", "model"]


def test_the_place_in_the_program_stands_beside_its_cause_once():
    here = Where("train.py", 88)
    two = tuple(replace(finding, where=here) for finding in (SHARPNESS, COLLAPSE))
    text = " ".join(page(replace(han_diagnosis(), findings=two)).split())
    assert text.count("train.py, line 88") == 1
    assert "learning_rate_too_high in word_attention.projection; right in" in text
    assert text.index("train.py") < text.index("from step 120")
    lost = page(replace(han_diagnosis(), findings=(replace(DEFECT, where=here),)))
    assert "from step 0 (train.py, line 88)" in " ".join(lost.split())


def test_a_place_is_named_from_where_the_page_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, shown in ((str(tmp_path / "x" / "y.py"), "x/y.py"), ("/else/y.py", "/else/y.py")):
        finding = replace(SHARPNESS, where=Where(file, 7))
        text = page(replace(han_diagnosis(), findings=(finding,)))
        assert f"; {shown}, line 7" in " ".join(text.split())
    tmp_path.rmdir()
    assert "; /else/y.py, line 7" in " ".join(
        page(replace(han_diagnosis(), findings=(finding,))).split()
    )


def test_a_patch_can_be_copied_from_a_page_as_it_is():
    remark = "a remark that would wrap, and without its mark be read as code"
    patch = f"with no_grad():\n    x = attention(x, x, x)  # {remark}\n    y = x  # short\n"
    shown = page(replace(han_diagnosis(), findings=(replace(SHARPNESS, patch=patch),)))
    code = shown[shown.index("with no_grad") :]
    assert code.split("\n")[1:4] == [
        f"          # {remark}",
        "          x = attention(x, x, x)",
        "          y = x  # short",
    ]


@pytest.mark.parametrize(("extra", "says"), [(1, False), (2, True)])
def test_one_comparison_too_many_is_shown_instead_of_counted(extra, says):
    evidence = SHARPNESS.evidence[:1] * (terminal.EVIDENCE + extra)
    text = page(replace(han_diagnosis(), findings=(replace(SHARPNESS, evidence=evidence),)))
    assert ("more comparison" in text) is says
    assert text.count("- step_sharpness") == terminal.EVIDENCE + (0 if says else 1)


def test_modules_that_are_only_numbers_are_called_modules():
    text = page(replace(han_diagnosis(), causes=(RankedCause("initialization", "0"),), findings=()))
    assert "initialization in module 0" in text
    sentence = wording.cause_sentence(RankedCause("component_not_optimized", "2.0"))
    assert sentence.startswith("Module 2.0 does not learn")


@given(diagnoses)
@settings(max_examples=40, deadline=None)
def test_every_finding_stands_in_exactly_one_group(diagnosis):
    groups = wording.findings_by_cause(diagnosis)
    positions = sorted(position for _, found in groups for position, _ in found)
    assert positions == list(range(1, len(diagnosis.findings) + 1))


@pytest.mark.parametrize(
    ("own", "batch", "shown"),
    [
        (0.0, None, "x 3 > 1"),
        (3.0, 4.0, "x 3 ± 5 > 1"),
        (None, 0.5, "x 3 ± 0.5 > 1"),
        (None, None, "x 3 > 1"),
    ],
)
def test_both_errors_are_in_the_error_of_an_observation(own, batch, shown):
    evidence = Evidence("x", 3.0, ">", 1.0, (7, 7), own, batch)
    assert wording.observation(evidence) == f"{shown} at step 7"


def test_an_unknown_training_time_is_not_made_a_share():
    sentence = wording.cost_sentence(Cost(1, 2, float("nan"), 3.0))
    assert sentence == "1 step, 2 measurements; training time unknown, monitoring 3 s"
