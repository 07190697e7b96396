"""A realistic diagnosis for the report tests: HAN with word attention at 100 times the rate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from diagnoser.report import ReportComponent, ReportData, render_report
from diagnoser.report.data import QUANTITIES
from diagnoser.types import (
    Arm,
    Attempt,
    Cause,
    Checked,
    Cost,
    Diagnosis,
    Estimate,
    Evidence,
    Finding,
    RankedCause,
    Repair,
    Unknown,
    Where,
)
from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, REPAIRS, SEVERITIES, VERDICTS

# Names that somebody's program might have, meant to break a terminal, a log or a page.
HOSTILE = (
    "line\nbreak\r\x1b[31mred\x1b]0;title\x07",
    "[bold red]markup[/bold red][/]",
    "right\u202eto\u2066left\u2069",
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "</title></style></script><!--",
    "\x00\u2028\u200b\ufeff\ud800",
    "wide" + "\u6ce8" * 60,
    "x" * 10_000,
    "",
)

PROJECTION = "word_attention.projection"
CONTEXT = "word_attention.context"

SHARPNESS = Finding(
    fault="sharpness_instability",
    component=PROJECTION,
    severity="high",
    since_step=120,
    source="rule:sharpness-instability",
    message=f"The learning rate times the largest preconditioned curvature of {PROJECTION} is "
    "14.2; above 2 every step overshoots.",
    causes=(Cause("learning_rate_too_high", 0.91), Cause("missing_warmup")),
    evidence=(
        Evidence("step_sharpness", 14.2, ">", 2.0, (120, 160), 1.3, 2.1, "lanczos"),
        Evidence("update_ratio", 0.081, ">", 0.01, (110, 160), 0.0),
    ),
    repairs=(
        Repair("roll_back", PROJECTION),
        Repair("scale_learning_rate", PROJECTION, {"factor": 0.01}),
    ),
    probability=0.93,
    n=88,
)

COLLAPSE = Finding(
    fault="attention_entropy_collapse",
    component=CONTEXT,
    severity="high",
    since_step=150,
    source="rule:attention-entropy-collapse",
    message="Word attention puts nearly all its weight on a single word (entropy 0.04 of at most "
    "2.9) and the loss no longer falls.",
    causes=(Cause("learning_rate_too_high"), Cause("attention_scale")),
    evidence=(
        Evidence("attention_entropy_ratio", 0.014, "<", 0.1, (150, 400), 0.002, 0.006),
        Evidence("loss_trend", 0.0031, ">=", 0.0, (150, 400), None, 0.0009, "theil-sen"),
    ),
    repairs=(
        Repair("scale_learning_rate", PROJECTION, {"factor": 0.01}),
        Repair("reinitialize", CONTEXT),
        Repair("temper_attention", CONTEXT, {"factor": 0.5}),
    ),
)

DEFECT = Finding(
    fault="dead_component",
    component="sentence_attention.context",
    severity="low",
    since_step=0,
    source="check:never-moves",
    message="sentence_attention.context has not moved since the first step.",
    causes=(Cause("component_not_optimized"),),
    evidence=(Evidence("update_ratio", 0.0, "==", 0.0, (0, 400), 0.0),),
)

CHECKED = tuple(
    Checked(rule, title, components, 41)
    for rule, title, components in (
        ("vanishing-gradient", "gradients reach the first layers", 1),
        ("exploding-gradient", "gradients stay bounded", 1),
        ("dying-relu", "no layer is silent", 1),
        ("coupled-components", "components learn apart", 45),
        ("uniform-attention", "attention discriminates", 2),
        ("non-finite", "all numbers are finite", 10),
        ("missing-zero-grad", "gradients are cleared before every step", 1),
    )
)

UNKNOWN = (
    Unknown("target-leak", "model", ("evaluation_loss",), "the script reports no evaluation"),
    Unknown("overfitting", "model", ("evaluation_loss",), "the script reports no evaluation"),
    Unknown("concave-region", "word_rnn", ("lambda_min",), "no second derivative of a fused RNN"),
    Unknown(
        "concave-region", "sentence_rnn", ("lambda_min",), "no second derivative of a fused RNN"
    ),
)


def han_diagnosis() -> Diagnosis:
    return Diagnosis(
        run="han-word-attention-lr-x100",
        verdict="faulty",
        reason="Two findings of severity high, both explained by one cause in word attention.",
        exit_code=0,
        causes=(
            RankedCause("learning_rate_too_high", PROJECTION, 0.91, 88),
            RankedCause("missing_warmup", PROJECTION),
        ),
        findings=(SHARPNESS, COLLAPSE, DEFECT),
        unknown=UNKNOWN,
        checked=CHECKED,
        cost=Cost(400, 41, 40.1, 3.2),
    )


def healthy_diagnosis() -> Diagnosis:
    return replace(
        han_diagnosis(),
        verdict="healthy",
        reason="Nothing above severity low in 41 measurements of 10 components.",
        causes=(),
        findings=(),
    )


SAME_BATCHES = "both from the same state, on the same 20 batches in the same order"
OTHER_BATCHES = "from the same state, but on other batches: the error holds their noise"


def arm(loss: float, sharpness: float, step: int, *firing: str) -> Arm:
    measured = replace(
        SHARPNESS.evidence[0], observed=sharpness, steps=(step, step), batch_std_error=None
    )
    update = replace(SHARPNESS.evidence[1], observed=sharpness / 175, steps=(step, step))
    return Arm(20, loss, (measured, update), firing)


LOWERED = Attempt(
    step=160,
    source=SHARPNESS.source,
    component=PROJECTION,
    actions=(
        Repair("roll_back", PROJECTION),
        Repair("scale_learning_rate", PROJECTION, {"factor": 0.01}),
    ),
    derivation="2 / 14.2, and once more by 10: the largest factor at which no step overshoots",
    guarantee=SAME_BATCHES,
    kept=True,
    reason="the finding is gone, and the loss is lower by more than twice its error",
    before=arm(1.12, 14.2, 160, SHARPNESS.source, COLLAPSE.source),
    after=arm(0.412, 0.31, 180),
    twin=arm(1.131, 13.8, 180, SHARPNESS.source, COLLAPSE.source),
    difference=Estimate(-0.6357, 0.041, None, 20, "paired"),
    batches=20,
)
TEMPERED = replace(
    LOWERED,
    step=140,
    component=CONTEXT,
    source=COLLAPSE.source,
    actions=(Repair("temper_attention", CONTEXT, {"factor": 0.5}),),
    derivation="half",
    kept=False,
    reason="the finding still holds",
    after=arm(1.109, 14.0, 160, SHARPNESS.source, COLLAPSE.source),
    difference=Estimate(-0.0195, 0.012, 0.03, 20, "paired"),
)
FAILED = replace(
    TEMPERED,
    step=130,
    actions=(Repair("clip_gradient", "model", {"max_norm": 1.0}),),
    guarantee=OTHER_BATCHES,
    reason="the loss is no number any more",
    after=Arm(3, math.nan),
    twin=None,
    difference=None,
    batches=3,
)


def repaired_diagnosis() -> Diagnosis:
    return replace(han_diagnosis(), repairs=(FAILED, TEMPERED, LOWERED))


HAN_COMPONENTS = (
    ReportComponent("embedding", "embedding", "embedding"),
    ReportComponent("word_rnn.weight_ih", "recurrent", "word_rnn"),
    ReportComponent("word_rnn.weight_hh", "recurrent", "word_rnn"),
    ReportComponent(PROJECTION, "attention_projection", "word_attention"),
    ReportComponent(CONTEXT, "attention_context", "word_attention"),
    ReportComponent("sentence_rnn.weight_ih", "recurrent", "sentence_rnn"),
    ReportComponent("sentence_rnn.weight_hh", "recurrent", "sentence_rnn"),
    ReportComponent("sentence_attention.projection", "attention_projection", "sentence_attention"),
    ReportComponent("sentence_attention.context", "attention_context", "sentence_attention"),
    ReportComponent("classifier", "head", "classifier"),
)


def report_data(
    components: tuple[ReportComponent, ...] = HAN_COMPONENTS, measured: int = 41, seed: int = 0
) -> ReportData:
    """A made-up history in which word attention breaks at step 120."""
    noise = np.random.default_rng(seed)
    loss_steps = np.arange(401)
    steps = np.arange(measured) * 400 // (measured - 1)
    rows, late = len(components), np.clip((steps - 110) / 40, 0, 1)
    broken = np.array([c.layer == "word_attention" for c in components])[:, None] * late[None, :]
    wiggle = noise.normal(0, 0.15, (rows, measured))
    level = noise.uniform(-1, 0.5, rows)[:, None]

    gradient = 10 ** (level - 1 + wiggle - 2 * broken - steps[None, :] / 900)
    update = 10 ** (-3 + wiggle + 2 * broken)
    sharpness = 10 ** (level / 2 + wiggle + 1.6 * broken - 0.5)
    dead = [c.name == "sentence_attention.context" for c in components]
    update[dead] = 0.0
    entropy = np.full((rows, measured), np.nan)
    attends = [c.kind == "attention_context" for c in components]
    entropy[attends] = (0.75 + wiggle / 5 - 0.74 * broken).clip(0.004)[attends]
    smallest = -sharpness * noise.uniform(0.02, 0.3, (rows, measured))
    recurrent = [c.kind == "recurrent" for c in components]
    sharpness[recurrent] = smallest[recurrent] = np.nan  # no second derivative there
    gradient[: rows // 2, 7] = np.nan  # a measurement that failed

    fall = 1.6 * np.exp(-loss_steps / 60)
    harm = 0.9 * np.clip((loss_steps - 120) / 30, 0, 1)
    loss = 0.25 + fall + harm + noise.normal(0, 0.06, 401) * (1 + 2 * harm)
    coupling = noise.normal(0, 0.04, (rows, rows))
    coupling = (coupling + coupling.T) / 2
    np.fill_diagonal(coupling, 1.0)
    if rows > 4:
        coupling[3, 4] = coupling[4, 3] = -0.62
    coupling[recurrent] = coupling[:, recurrent] = math.nan
    return ReportData(
        run="han-word-attention-lr-x100",
        loss_steps=loss_steps,
        loss_values=loss,
        accuracy_steps=np.array([100, 200, 300, 400]),
        accuracy_values=np.array([0.61, 0.42, 0.31, 0.30]),
        components=components,
        steps=steps,
        quantities={
            "gradient_norm": gradient,
            "update_ratio": update,
            "step_sharpness": sharpness * 0.7,
            "attention_entropy": entropy,
            "lambda_max": sharpness,
            "lambda_min": smallest,
        },
        coupling=coupling,
        coupling_step=400,
        cost=Cost(400, measured, 40.1, 3.2),
    )


LARGE = 200, 500  # components and measured steps of the largest run that a page is promised for


def large_data() -> ReportData:
    """A history of that size with every quantity at every step, all of it noise: nothing packs."""
    rows, measured = LARGE
    kinds = ("query", "key", "value", "output")
    components = tuple(
        ReportComponent(
            f"transformer.encoder.layer.{k // 10}.attention.self.{kinds[k % 4]}_projection[{k}]",
            kinds[k % 4],
            f"transformer.encoder.layer.{k // 10}",
        )
        for k in range(rows)
    )
    noise = np.random.default_rng(1)
    quantities = {name: 10 ** noise.normal(-2, 1, (rows, measured)) for name in QUANTITIES}
    quantities["gradient_cosine"] = noise.uniform(-1, 1, (rows, measured))
    return replace(report_data(components, measured), quantities=quantities)


def hostile_page(name: str) -> str:
    diagnosis = han_diagnosis()
    finding = replace(SHARPNESS, component=name, other=name, message=name, source=f"rule:{name}")
    finding = replace(
        finding, evidence=(replace(SHARPNESS.evidence[0], feature=name, method=name),)
    )
    diagnosis = replace(
        diagnosis,
        run=name,
        reason=name,
        causes=(RankedCause("learning_rate_too_high", name),),
        findings=(finding,),
        unknown=tuple(
            replace(u, rule=name, component=name, reason=name) for u in diagnosis.unknown
        ),
        checked=tuple(replace(c, title=name) for c in diagnosis.checked),
        repairs=(
            replace(
                LOWERED,
                source=name,
                component=name,
                actions=(Repair("change_activation", name, {"to": name, name: name}),),
                derivation=name,
                guarantee=name,
                reason=name,
                after=Arm(20, 1.0, finding.evidence, (name,) * 9),
            ),
        ),
    )
    components = (ReportComponent(name, "head", name), ReportComponent(f"{name}2", "head", name))
    data = report_data(components)
    return render_report(
        diagnosis,
        replace(data, quantities={**data.quantities, name: data.quantities["lambda_max"]}),
    )


names = st.text(max_size=30) | st.sampled_from(["model", PROJECTION, *HOSTILE])
floats = st.floats(width=64)  # NaN and infinities included
steps = st.integers(0, 10**9)
probabilities = st.none() | st.floats(0, 1)
counts = st.none() | st.integers(0, 10**6)
errors = st.none() | st.floats(0) | st.just(math.nan)
repairs = st.builds(
    Repair,
    name=st.sampled_from(sorted(REPAIRS)),
    component=names,
    parameters=st.dictionaries(names, floats | names, max_size=3),
)
evidences = st.builds(
    Evidence,
    feature=names,
    observed=floats,
    comparison=st.sampled_from([">", ">=", "<", "<=", "==", "!="]),
    threshold=floats,
    steps=st.tuples(steps, steps),
    std_error=errors,
    batch_std_error=errors,
    method=names,
)
arms = st.builds(
    Arm,
    steps=steps,
    loss=floats,
    evidence=st.lists(evidences, max_size=2).map(tuple),
    firing=st.lists(names, max_size=2).map(tuple),
)
attempts = st.builds(
    Attempt,
    step=steps,
    source=names,
    component=names,
    actions=st.lists(repairs, max_size=2).map(tuple),
    derivation=names,
    guarantee=names,
    kept=st.booleans(),
    reason=names,
    before=arms,
    after=st.none() | arms,
    twin=st.none() | arms,
    difference=st.none() | st.builds(Estimate, floats, errors, errors, counts, names, names),
    batches=steps,
)
findings = st.builds(
    Finding,
    fault=st.sampled_from(sorted(FAULTS)),
    component=names,
    severity=st.sampled_from(SEVERITIES),
    since_step=steps,
    source=st.sampled_from(["rule:a-rule", "check:a-check", "classifier"]),
    message=names,
    causes=st.lists(
        st.builds(Cause, st.sampled_from(sorted(CAUSE_CATEGORY)), probabilities), max_size=3
    ).map(tuple),
    evidence=st.lists(evidences, max_size=3).map(tuple),
    repairs=st.lists(repairs, max_size=3).map(tuple),
    other=st.none() | names,
    probability=probabilities,
    n=counts,
    where=st.none() | st.builds(Where, names, st.integers(1, 10**6)),
)
diagnoses = st.builds(
    Diagnosis,
    run=names,
    verdict=st.sampled_from(VERDICTS),
    reason=names,
    exit_code=st.none() | st.integers(0, 255),
    causes=st.lists(
        st.builds(
            RankedCause, st.sampled_from(sorted(CAUSE_CATEGORY)), names, probabilities, counts
        ),
        max_size=4,
    ).map(tuple),
    findings=st.lists(findings, max_size=4).map(tuple),
    unknown=st.lists(
        st.builds(Unknown, names, names, st.lists(names, max_size=2).map(tuple), names), max_size=3
    ).map(tuple),
    checked=st.lists(st.builds(Checked, names, names, steps, steps), max_size=3).map(tuple),
    cost=st.builds(Cost, steps, steps, floats, floats),
    repairs=st.lists(attempts, max_size=3).map(tuple),
)
