"""Sentences for the closed vocabularies, and how names and numbers are written for people.

Every label of the vocabulary has one sentence here, shared by the terminal and the HTML page. Names
come from somebody else's program: `visible` makes each of them harmless to a terminal and a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from diagnoser.types import (
    Attempt,
    Cost,
    Diagnosis,
    Estimate,
    Evidence,
    Finding,
    RankedCause,
    Repair,
    Unknown,
)
from diagnoser.vocabulary import MODEL

Numbered: TypeAlias = tuple[int, Finding]  # a finding with its rank, from 1
Tried: TypeAlias = tuple[int, Attempt]  # the same for a repair that was tried

RULES: Final = 4  # that could not be judged for one reason, by name

# {of}: " of NAME", {at}: " in NAME", both empty for the whole model.
CAUSE_SENTENCES: Final[dict[str, str]] = {
    "learning_rate_too_high": "The learning rate{of} is too high.",
    "learning_rate_too_low": "The learning rate{of} is too low.",
    "missing_warmup": "The learning rate{of} starts at its full value, without a warm-up.",
    "optimizer_misconfigured": "The settings of the optimizer do not suit the training{of}.",
    "missing_zero_grad": "Gradients{of} are not cleared, so they add up over steps.",
    "gradient_clipping": "Gradient clipping{at} is missing, or cuts too much.",
    "excessive_weight_decay": "Weight decay{at} is stronger than the gradient.",
    "component_not_optimized": (
        "{name_first} does not learn: frozen, cut off from the loss, or not in the optimizer."
    ),
    "insufficient_training": "The training{of} stopped before it had converged.",
    "attention_scale": "The attention logits{at} are scaled wrongly.",
    "attention_mask": "The attention mask{at} is missing, inverted or on the wrong axis.",
    "softmax_axis": "The softmax{at} normalises over the wrong axis.",
    "positional_encoding": "The positional encoding{at} is missing or wrong.",
    "attention_wiring": "Queries, keys, values or heads{at} are connected wrongly.",
    "initialization": "The initial weights{of} are badly scaled.",
    "normalization": "Normalisation{at} is missing, misplaced or has no effect.",
    "residual": "A residual connection{at} is missing or badly scaled.",
    "activation_function": "The activation function{at} blocks the gradient.",
    "perturbed_parameters": "The weights{of} were changed outside the optimizer.",
    "loss_function": "The loss does not fit what {name} returns.",
    "label_noise": "Many training labels are wrong.",
    "input_scaling": "Inputs or targets{of} are out of scale.",
    "data_order": "The training data come in an order that hurts.",
    "train_eval_mode": "{name_first} is in the wrong mode: train() or eval().",
    "numeric_precision": "The number format{of} is too coarse or overflows.",
}

# A sentence to act on, and what stands in it for a parameter that a suggestion leaves open.
REPAIR_SENTENCES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "scale_learning_rate": (
        "Multiply the learning rate{of} by {factor}{own_group}.",
        {"factor": "a constant"},
    ),
    "clip_gradient": (
        "Clip the gradient norm{of} to {max_norm} before every optimizer step.",
        {"max_norm": "its usual size"},
    ),
    "add_warmup": (
        "Raise the learning rate{of} linearly from zero over the first {steps} steps.",
        {"steps": "few hundred"},
    ),
    "change_betas": (
        "Set the optimizer's averaging factors{of} to beta1 = {beta1} and beta2 = {beta2}.",
        {"beta1": "0.9", "beta2": "0.999"},  # Kingma and Ba 2015, algorithm 1
    ),
    "reset_optimizer_state": (
        "Clear the optimizer's running averages{of}; they remember the disturbance.",
        {},
    ),
    "reinitialize": (
        "Draw the weights{of} anew from their initial distribution, as a restart does.",
        {},
    ),
    "temper_attention": (
        "Multiply the attention logits{of} by {factor} before the softmax.",
        {"factor": "a factor below 1"},
    ),
    "register_parameters": (
        "Pass the parameters{of} to the optimizer when it is built.",
        {},
    ),
    "unfreeze": ("Set requires_grad = True on the parameters{of}.", {}),
    "roll_back": ("Restore the state{of} that was saved before the trouble began.", {}),
    "zero_gradients": ("Call optimizer.zero_grad() before every backward().", {}),
    "remove_softmax": (
        "Pass the logits{of}, not probabilities, to the loss: it applies the softmax itself.",
        {},
    ),
    "fix_attention_mask": (
        "Have the attention mask{of} hide what must not be seen, and leave at least one position "
        "visible in every row.",
        {},
    ),
    "fix_softmax": ("Take the softmax of the attention{of} over the keys.", {}),
    "fix_attention_scale": (
        "Divide the scores of the attention{of} by the root of a head's width: once, before the "
        "softmax.",
        {},
    ),
    "fix_attention_wiring": (
        "Take queries, keys and values{of} from where they belong, head by head.",
        {},
    ),
    "add_positions": ("Add positions to what attention is given.", {}),
    "add_residual": ("Add the input of {name} to its output.", {}),
    "set_mode": ("Call train() before training, and eval() before evaluating.", {}),
    "fix_loss_inputs": ("Give the loss what it expects.", {}),
    "shift_labels": ("Compare the outputs with the next inputs, not with their own.", {}),
    "ignore_padding": ("Leave padding out of the loss.", {}),
    "detach_target": ("Detach the target from its graph.", {}),
    "scale_inputs": ("Scale inputs and targets to about unit variance.", {}),
    "shuffle_batches": ("Draw the batches at random.", {}),
    "fix_schedule": (
        "Advance the schedule once for each step, after the optimizer, and have it fit the run.",
        {},
    ),
    "unscale_first": ("Unscale the gradients before they are clipped.", {}),
    "untie": ("Give {name} weights of its own.", {}),
    "change_activation": (
        "Replace the activation function{at} by {to}.",
        {"to": "one that passes gradients, for example GELU"},
    ),
    "add_normalization": ("Add {kind} {where_}.", {"kind": "layer normalisation"}),
    "change_optimizer": (
        "Train {name} with another optimizer: {to}.",
        {"to": "Adam in place of SGD, or the reverse"},
    ),
    "change_batch_size": (
        "Train with a batch size of {size}.",
        {"size": "twice or half the present one"},
    ),
}

REASONS: Final = 4  # who says a cause, by name

LOW_SEVERITY: Final = "worth a look, of low severity"  # heads the causes of a healthy run
VERDICT_SENTENCES: Final[dict[str, str]] = {
    "faulty": "something is wrong with this run",
    "healthy": "nothing is wrong with this run, as far as was measured",
    "inconclusive": "too little was seen to judge this run",
}


def visible(text: str, limit: int = 60) -> str:
    r"""Returns ``text`` on one line, with nothing in it that acts on a terminal or turns the text.

    Control and format characters (escape sequences, right-to-left overrides, zero-width joiners),
    separators other than the plain space, lone surrogates and unassigned code points become
    escapes; more than ``limit`` characters lose their middle.

    >>> visible("fc\x1b[31m")
    'fc\\x1b[31m'
    >>> visible("encoder.layer.attention", limit=15)
    'encode...ention'
    """
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def number(value: float, digits: int = 3) -> str:
    """Returns ``value`` with three significant digits; NaN and infinities keep their names.

    >>> number(14.23), number(1200), number(3.2e-05), number(1234567.0), number(float("nan"))
    ('14.2', '1200', '3.2e-5', '1.23e6', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if 1 <= abs(value) < 1e6 and abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"  # whole numbers such as steps keep their digits
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def total_error(measured: Evidence | Estimate) -> float | None:
    """Returns one standard error of a number with both sources in it, None where unknown."""
    known = [error for error in (measured.std_error, measured.batch_std_error) if error is not None]
    return math.hypot(*known) if known else None


def observation(evidence: Evidence) -> str:
    """Returns a line such as ``step_sharpness 14.2 ± 1.3 > 2 over steps 100 to 160``."""
    error = total_error(evidence)
    first, last = evidence.steps
    spread = f" ± {number(error, digits=2)}" if error else ""  # an exact number needs no error
    steps = f"at step {first}" if first == last else f"over steps {first} to {last}"
    return (
        f"{visible(evidence.feature)} {number(evidence.observed)}{spread} "
        f"{evidence.comparison} {number(evidence.threshold)} {steps}"
    )


def subject(component: str, other: str | None = None) -> str:
    """Returns the name to print: a component, a pair, or «the model».

    >>> subject("model"), subject("encoder", "head"), subject("0")  # nn.Sequential counts its parts
    ('the model', 'encoder and head', 'module 0')
    """
    name = "the model" if component == MODEL else _named(component)
    return name if other is None else f"{name} and {_named(other)}"


def cause_sentence(cause: RankedCause) -> str:
    """Returns what is wrong, in one sentence."""
    return CAUSE_SENTENCES[cause.cause].format(**_phrases(cause.component))


def cause_label(cause: RankedCause) -> str:
    """Returns a cause by its label, with its place where it can have one.

    >>> cause_label(RankedCause("residual", "encoder")), cause_label(RankedCause("data_order", "a"))
    ('residual in encoder', 'data_order')
    """
    if "{" not in CAUSE_SENTENCES[cause.cause]:  # wrong labels are wrong for every component
        return cause.cause
    return f"{cause.cause} in {subject(cause.component)}"


_EPSILON: Final = ("Set the optimizer's epsilon{of} to {eps}.", {"eps": "1e-8"})


def repair_sentence(repair: Repair) -> str:
    """Returns what to do, in one sentence with the parameters of the suggestion filled in.

    A parameter that has no place in the sentence is added in brackets.
    """
    of_epsilon = repair.name == "change_betas" and set(repair.parameters) == {"eps"}
    template, left_open = _EPSILON if of_epsilon else REPAIR_SENTENCES[repair.name]
    given = {
        name: visible(value) if isinstance(value, str) else number(value)
        for name, value in sorted(repair.parameters.items())
    }
    placed = {name: given.get(name, phrase) for name, phrase in left_open.items()}
    sentence = template.format(**_phrases(repair.component), **placed)
    extra = [f"{visible(name)} {value}" for name, value in given.items() if name not in left_open]
    return f"{sentence[:-1]} ({', '.join(extra)})." if extra else sentence


def kept_first(attempts: Sequence[Attempt]) -> list[Tried]:
    """Numbers repairs that were tried from 1: those that were kept, then the others."""
    return list(enumerate(sorted(attempts, key=lambda attempt: not attempt.kept), start=1))


def outcome(attempt: Attempt) -> str:
    """Returns whether a repair was kept, in words."""
    return "kept" if attempt.kept else "rolled back"


def loss_sentence(attempt: Attempt) -> str:
    """Returns the loss with and without a repair, and how far apart they are.

    Where the two were not compared, the loss before it is all there is to compare with.
    """
    arms = [(attempt.after, "with it"), (attempt.twin, "without it")]
    if attempt.after is None or attempt.twin is None:
        arms.append((attempt.before, "before"))
    losses = ", ".join(f"{number(arm.loss)} {words}" for arm, words in arms if arm is not None)
    apart = "" if attempt.difference is None else f": {percent(attempt.difference)}"
    return f"loss {losses}{apart}"


def percent(share: Estimate) -> str:
    """Returns a share in per cent, with its sign and its error.

    >>> percent(Estimate(-0.634, 0.041)), percent(Estimate(0.05)), percent(Estimate(0.05, None))
    ('-63.4 ± 4.1 %', '+5 %', '+5 % (error unknown)')
    """
    sign = "+" if share.value > 0 else ""
    error = total_error(share)
    spread = f" ± {number(100 * error, digits=2)}" if error else ""
    unknown = " (error unknown)" if error is None else ""
    return f"{sign}{number(100 * share.value)}{spread} %{unknown}"


def comparisons(attempts: Sequence[Tried]) -> list[tuple[str, str]]:
    """Returns how repairs were compared, each way once: ``(numbers of the repairs, guarantee)``.

    The numbers are left out where all were compared in the same way.
    """
    ways: dict[str, list[str]] = {}
    for position, attempt in attempts:
        if attempt.guarantee:
            ways.setdefault(visible(attempt.guarantee, limit=240), []).append(str(position))
    if len(ways) == 1:
        return [("", guarantee) for guarantee in ways]
    return [(", ".join(numbers), guarantee) for guarantee, numbers in ways.items()]


def confidence(probability: float | None, n: int | None) -> str:
    """Returns the measured precision in words, empty while there is none."""
    if probability is None:
        return ""
    share = f"right in {100 * probability:.0f} % of"
    return f"{share} {n} calibration runs" if n is not None else f"{share} calibration runs"


def cost_sentence(cost: Cost) -> str:
    """Returns what watching took, with the monitoring as a percentage of the training time."""
    if cost.training_s > 0:
        percent = 100 * cost.monitoring_s / cost.training_s
        training, part = f"training {number(cost.training_s)} s", f" ({percent:.1f} % of training)"
    else:
        training, part = "training time unknown", ""
    extent = f"{count(cost.steps, 'step')}, {count(cost.measurements, 'measurement')}"
    trials = f", trials of repairs {number(cost.repairing_s)} s" if cost.repairing_s else ""
    return f"{extent}; {training}, monitoring {number(cost.monitoring_s)} s{part}{trials}"


def count(n: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun in the right form.

    >>> count(1, "step"), count(3, "step"), count(2, "batch", "batches")
    ('1 step', '3 steps', '2 batches')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {plural or f'{noun}s'}"


def findings_by_cause(
    diagnosis: Diagnosis,
) -> list[tuple[RankedCause | None, list[Numbered]]]:
    """Groups the findings (numbered from 1 in their rank) under the cause that explains them.

    The first of a finding's own causes that is ranked for its component, for a part of it or for
    the whole it belongs to, explains it; else the first that is ranked for any component: a symptom
    may show elsewhere. Findings that no ranked cause explains come last, under None; causes that
    explain no finding best keep an empty list.
    """
    groups: dict[int, list[Numbered]] = {k: [] for k in range(len(diagnosis.causes))}
    unexplained: list[Numbered] = []
    for position, finding in enumerate(diagnosis.findings, start=1):
        named = [
            k
            for cause in finding.causes
            for k, ranked in enumerate(diagnosis.causes)
            if ranked.cause == cause.cause
        ]
        near = [k for k in named if _related(diagnosis.causes[k].component, finding)]
        best = next(iter(near or named), None)
        (unexplained if best is None else groups[best]).append((position, finding))
    grouped: list[tuple[RankedCause | None, list[Numbered]]] = [
        (diagnosis.causes[k], findings) for k, findings in groups.items()
    ]
    return [*grouped, (None, unexplained)] if unexplained else grouped


def likely_and_possible(
    groups: Sequence[tuple[RankedCause | None, list[Numbered]]],
) -> tuple[list[tuple[RankedCause, list[Numbered]]], list[RankedCause]]:
    """Splits grouped causes into those with findings and those that are only possible.

    Of the second, one that a likely cause of its name covers is left out: it says nothing new.
    """
    likely = [(cause, found) for cause, found in groups if cause is not None and found]
    possible = [
        cause
        for cause, found in groups
        if cause is not None
        and not found
        and not any(
            c.cause == cause.cause and _covers(c.component, cause.component) for c, _ in likely
        )
    ]
    return likely, possible


def unknown_by_reason(unknown: Sequence[Unknown]) -> list[tuple[str, str]]:
    """Groups what could not be judged: ``(rules and components, reason)``, each reason once.

    A reason names what is missing where that helps; the full list stands in diagnosis.json.
    """
    rules: dict[str, dict[str, list[str]]] = {}
    for entry in unknown:
        reason = visible(entry.reason, limit=200)
        rules.setdefault(reason, {}).setdefault(visible(entry.rule), []).append(entry.component)
    grouped = []
    for reason, by_rule in rules.items():
        named = [f"{rule}{_places(names)}" for rule, names in by_rule.items()]
        more = f" and {len(named) - RULES} more" if len(named) > RULES else ""
        grouped.append(("; ".join(named[:RULES]) + more, reason))
    return grouped


def suggestions(cause: RankedCause | None, findings: Sequence[Numbered]) -> list[Repair]:
    """Returns the repairs that the findings under a cause suggest, in ranked order.

    One that an earlier one covers, at the same place or at the whole it belongs to, is left out.
    So is one for another place than the cause's: a symptom there goes with its cause.
    """
    repairs: list[Repair] = []
    for _, finding in findings:
        for repair in finding.repairs:
            covered = any(
                repair.name == earlier.name and _covers(earlier.component, repair.component)
                for earlier in repairs
            )
            if not covered and (cause is None or _near(cause.component, repair.component)):
                repairs.append(repair)
    return repairs


def because_sentence(cause: RankedCause) -> str:
    """Returns who says that something is the cause, the strongest first.

    >>> because_sentence(RankedCause("residual", "model", because=("rule:x", "classifier")))
    'said by rule:x, classifier'
    """
    named = [visible(source) for source in cause.because[:REASONS]]
    more = len(cause.because) - len(named)
    return f"said by {', '.join(named)}{f' and {more} more' if more else ''}"


def place(findings: Sequence[Numbered], start: Path | None = None) -> str:
    """Returns ``file, line n`` of the first finding that knows its place, empty if none does.

    A file below ``start`` is named from there.
    """
    where = next((finding.where for _, finding in findings if finding.where), None)
    if where is None:
        return ""
    file = where.file
    if start is not None and Path(file).is_relative_to(start):
        file = str(Path(file).relative_to(start))
    return f"{visible(file, limit=120)}, line {where.line}"


def _phrases(component: str) -> dict[str, str]:
    whole = component == MODEL
    name = subject(component)
    return {
        "name": name,
        "name_first": name if name == visible(component) else name[0].upper() + name[1:],
        "of": "" if whole else f" of {name}",
        "at": "" if whole else f" in {name}",
        "where_": "to the model" if whole else f"to {name}",
        "own_group": "" if whole else " (give it a parameter group of its own)",
    }


def _related(component: str, finding: Finding) -> bool:
    """Tells whether a cause in ``component`` is about a finding: same place, part or whole."""
    places = [name for name in (finding.component, finding.other) if name is not None]
    return any(_near(component, name) for name in places)


def _near(cause: str, name: str) -> bool:
    """The model as a whole is near only to a cause in it all, not to one in some part."""
    return _covers(cause, name) or (name != MODEL and _covers(name, cause))


def _covers(whole: str, name: str) -> bool:
    inside = name.startswith((f"{whole}.", f"{whole}[", f"{whole}:"))
    return whole in (MODEL, name) or inside


def _named(component: str) -> str:
    name = visible(component)
    return f"module {name}" if name[:1].isdigit() else name


def _places(components: Sequence[str]) -> str:
    if components[0] == MODEL:
        return ""
    more = f" and {len(components) - 1} more" if len(components) > 1 else ""
    return f" in {_named(components[0])}{more}"
