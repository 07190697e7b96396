"""Mistakes on demand: each is the one it is named after, with the truth told, and nothing else."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from injection_subject import CLASSIFIER, DECODER, SETTINGS
from torch import nn

from diagnoser.benchmark.subjects import SUBJECTS
from diagnoser.errors import InjectionError
from diagnoser.injection import (
    COMPOUNDS,
    CONTROLS,
    INJECTIONS,
    Change,
    Data,
    Injection,
    assemble,
    differences,
    places,
    snapshot,
    train,
)
from diagnoser.injection.weighing import weigh
from diagnoser.vocabulary import CAUSE_CATEGORY, CAUSES, FAULTS, REPAIRS

OPERATORS = {**INJECTIONS, **CONTROLS}
NUMBERS = (*INJECTIONS, *CONTROLS)
SEED = 3
REMEDIES = [(id, remedy.name) for id, o in INJECTIONS.items() for remedy in o.remedies]
INEXACT = {  # a repair that is another good training than the clean one
    ("O4", "add_warmup"),
    ("F1a", "reinitialize"),
    ("F1b", "reinitialize"),
    ("Q1", "reinitialize"),
    ("Q1", "temper_attention"),
    ("Q2", "reinitialize"),
    ("Q3", "reinitialize"),
}
SUGGESTS_CURVATURE = {
    *("O1", "O3", "O4", "O5a", "O5b", "O14", "S5", "Q1", "Q2", "Q3", "Q4", "Q8", "N1", "N2a"),
    *("N2b", "N3a", "N3b", "F1a", "F1b", "L2", "X2"),
}
COMES_LATER = {"first": 0, "middle": 1, "last": 2}


@functools.cache
def where(id):
    """A subject an operator applies to, and its places there."""
    for subject in (CLASSIFIER, DECODER):
        found = places(OPERATORS[id], subject, SETTINGS)
        if found:
            return subject, found
    raise AssertionError(f"{id} applies to neither subject")


def inject(id, severity="high", place=None, remedy=None, subject=None):
    subject, found = (
        where(id) if subject is None else (subject, places(OPERATORS[id], subject, SETTINGS))
    )
    operator = OPERATORS[id]
    remedies = {known.name: known for known in operator.remedies}
    made = Injection(operator, severity, place or found[0].name, remedies.get(remedy))
    return assemble(subject, SETTINGS, SEED, [made])


@functools.cache
def clean(subject_name="classifier"):
    subject = {"classifier": CLASSIFIER, "decoder": DECODER}[subject_name]
    return assemble(subject, SETTINGS, SEED)[0]


def attention(training, layer=0):
    return training.model.layers[layer].attention


# ---- every operator -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("id", NUMBERS)
def test_every_operator_changes_what_it_names_and_nothing_else_everywhere(id):
    subject, found = where(id)
    healthy = snapshot(clean(subject.name))
    for place in found:
        training, (record,) = inject(id, place=place.name, subject=subject)
        assert record.changed
        assert record.place == place.name
        assert record.components == place.components
        moment = OPERATORS[id].change.moment
        if moment != "settings":  # of settings, a change shows in what is made by them
            altered = set(differences(healthy, snapshot(training)))
            rest = {name for name in altered if not name.startswith("optimizer.")}
            assert rest <= set(record.changed)


@pytest.mark.slow
@pytest.mark.parametrize("id", NUMBERS)
def test_the_same_seed_gives_the_same_bits_and_a_finished_training(id):
    first, second = (train(inject(id)[0]) for _ in range(2))
    assert repr(first) == repr(second)
    assert len(first.losses) >= 1


@pytest.mark.parametrize("id", NUMBERS)
def test_every_operator_applies_somewhere_and_tells_what_it_changed(id):
    _, (record,) = inject(id)
    assert record.changed
    assert record.severity == "high"
    assert record.causes == OPERATORS[id].causes


def test_the_healthy_training_is_untouched_by_a_faulty_one():
    before = snapshot(clean("decoder"))
    score = train(assemble(DECODER, SETTINGS, SEED)[0])
    for id in ("D1", "D3", "Q1", "M5", "O12", "F2a", "S7", "L1"):
        if places(OPERATORS[id], DECODER, SETTINGS):
            train(inject(id, subject=DECODER)[0])
    again = assemble(DECODER, SETTINGS, SEED)[0]
    assert snapshot(again) == before
    assert train(again) == score


@pytest.mark.parametrize("id", [id for id in NUMBERS if len(OPERATORS[id].severities) > 1])
def test_severities_differ(id):
    seen = [snapshot(inject(id, severity)[0]) for severity in OPERATORS[id].severities]
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            if id != "Q5":  # with two heads, half of them is one
                assert differences(one, other)


@pytest.mark.parametrize("id", NUMBERS)
def test_accepted_places_are_components_modules_or_the_model(id):
    subject, found = where(id)
    training = clean(subject.name)
    components = {component.name for component in training.components}
    modules = {path for path, _ in training.model.named_modules()}
    assert [place.name for place in found] == list(dict.fromkeys(place.name for place in found))
    for place in found:
        assert set(place.components) <= components | modules | {"model"}
        assert place.components


# ---- the truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("id", tuple(INJECTIONS))
def test_the_truth_is_told_in_words_of_the_vocabulary(id):
    operator = INJECTIONS[id]
    assert operator.faults
    assert set(operator.faults) <= set(FAULTS)
    assert operator.causes
    assert set(operator.causes) <= set(CAUSE_CATEGORY)
    assert {remedy.name for remedy in operator.remedies} <= set(REPAIRS)
    assert set(operator.severities) <= {"low", "mid", "high", "extreme"}
    assert "high" in operator.severities
    assert operator.defect == ("program_defect" in operator.faults) or id in {"Q2", "Q3", "F1b"}


def test_every_cause_of_every_category_is_injected():
    assert {o.causes[0] for o in INJECTIONS.values()} == {
        cause for causes in CAUSES.values() for cause in causes
    }


def test_the_predictions_of_curvature_are_those_made_beforehand():
    assert {id for id, o in INJECTIONS.items() if o.curvature == "+"} == SUGGESTS_CURVATURE
    assert {id for id, o in INJECTIONS.items() if o.gradients == "N" and o.attention == "-"} == {
        *("Q3", "L3a", "L3b", "X3a", "X3b"),
    }


def test_controls_are_healthy_by_intention():
    assert not set(INJECTIONS) & set(CONTROLS)
    for operator in CONTROLS.values():
        assert operator.control_set in {"HC2", "HC3", "HC4"}
        assert not (operator.faults or operator.causes or operator.remedies or operator.defect)
    assert {operator.control_set for operator in INJECTIONS.values()} == {""}


@pytest.mark.parametrize("id", tuple(COMPOUNDS))
def test_compounds_are_two_mistakes_at_once(id):
    subject = CLASSIFIER
    made = [Injection(INJECTIONS[of], severity, at) for of, severity, at in COMPOUNDS[id]]
    _, records = assemble(subject, SETTINGS, SEED, made)
    assert [record.operator for record in records] == [of for of, _, _ in COMPOUNDS[id]]


def test_operators_do_not_apply_where_there_is_nothing_to_get_wrong():
    sgd = replace(SETTINGS, optimizer="sgd", warmup=0.0, clip=None, schedule="constant")
    for id in ("O4", "O5a", "O5b", "O6a", "O6b", "O8b", "O10"):
        assert places(INJECTIONS[id], CLASSIFIER, SETTINGS)
        assert not places(INJECTIONS[id], CLASSIFIER, sgd)
    assert not places(INJECTIONS["M5"], CLASSIFIER, SETTINGS)  # no causal mask
    assert not places(INJECTIONS["M6"], DECODER, SETTINGS)  # causal already
    assert not places(INJECTIONS["P1"], DECODER, SETTINGS)  # it can count without
    assert not places(INJECTIONS["P3"], CLASSIFIER, SETTINGS)
    assert not places(INJECTIONS["L3a"], CLASSIFIER, SETTINGS)
    assert not places(INJECTIONS["D3"], _without_inputs(), SETTINGS)
    one = replace(SETTINGS, depth=1)
    assert [place.name for place in places(INJECTIONS["S1"], CLASSIFIER, one)] == ["first"]
    assert not places(INJECTIONS["Q8"], CLASSIFIER, one)


def _without_inputs():
    held = CLASSIFIER.data()
    rest = {name: tensor for name, tensor in held.train.items() if name != "inputs"}
    return replace(CLASSIFIER, data=lambda: replace(held, train=rest))


def test_layers_are_met_in_order():
    found = {place.name: place.modules for place in places(INJECTIONS["S1"], CLASSIFIER, SETTINGS)}
    for name, layer in COMES_LATER.items():
        assert found[name] == (f"layers.{layer}.attention",)
    assert found["all"] == (*found["first"], *found["middle"], *found["last"])


# ---- remedies -------------------------------------------------------------------------------


@pytest.mark.parametrize(("id", "name"), REMEDIES)
def test_a_remedy_makes_the_clean_training_again_or_another_that_runs(id, name):
    subject, found = where(id)
    for place in (found[0], found[-1]):
        repaired, _ = inject(id, place=place.name, remedy=name)
        if (id, name) in INEXACT:
            assert differences(snapshot(repaired), snapshot(inject(id, place=place.name)[0]))
            assert math.isfinite(train(repaired).loss)
        else:
            assert snapshot(repaired) == snapshot(clean(subject.name))


def test_drawing_anew_does_not_draw_the_clean_weights_again():
    repaired = attention(inject("Q2", remedy="reinitialize")[0]).query.weight.detach()
    right = attention(clean()).query.weight.detach()
    assert not torch.equal(repaired, right)
    assert 0.5 < float(repaired.std() / right.std()) < 2.0


# ---- errors ---------------------------------------------------------------------------------


def test_a_wrong_place_or_severity_is_answered_with_those_that_exist():
    with pytest.raises(InjectionError, match=r"S5 .* no place layer9; it has first, middle, last"):
        assemble(CLASSIFIER, SETTINGS, SEED, [Injection(INJECTIONS["S5"], "high", "layer9")])
    with pytest.raises(InjectionError, match="S5 has no severity hard; it has low, mid, high"):
        assemble(CLASSIFIER, SETTINGS, SEED, [Injection(INJECTIONS["S5"], "hard", "first")])
    with pytest.raises(InjectionError, match="it does not apply"):
        assemble(CLASSIFIER, SETTINGS, SEED, [Injection(INJECTIONS["P3"], "high", "all")])


def test_an_operator_that_touches_too_much_or_too_little_is_refused():
    right = INJECTIONS["Q2"]

    def too_much(training, place, values, generator):
        right.change.apply(training, place, values, generator)
        with torch.no_grad():
            training.model.head.bias.add_(1.0)

    def too_little(training, place, values, generator):
        with torch.no_grad():
            attention(training).query.weight.zero_()

    def assemble_with(apply):
        wrong = replace(right, change=Change("model", apply, right.change.touches))
        assemble(CLASSIFIER, SETTINGS, SEED, [Injection(wrong, "high", "first")])

    with pytest.raises(InjectionError, match=r"altered parameter\.head\.bias"):
        assemble_with(too_much)
    with pytest.raises(InjectionError, match=r"left parameter\.layers\.0\.attention\.key"):
        assemble_with(too_little)


# ---- what some of them do -------------------------------------------------------------------


@pytest.mark.parametrize("id", ["O11a", "O11b", "O12", "Q2", "Q3"])
def test_what_is_not_optimized_or_at_a_saddle_never_moves(id):
    training, _ = inject(id, place="middle")
    names = {"Q2": ("query", "key"), "Q3": ("value", "output")}.get(id, ("query", "value"))
    before = [getattr(attention(training, 1), name).weight.detach().clone() for name in names]
    others = attention(training, 0).value.weight.detach().clone()
    train(training)
    for name, weight in zip(names, before, strict=True):
        assert torch.equal(getattr(attention(training, 1), name).weight, weight)
    assert not torch.equal(attention(training, 0).value.weight, others)


def test_softmax_over_queries_has_columns_that_sum_to_one():
    scores = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = attention(inject("S6a", place="first")[0]).weigh(scores, None)
    assert torch.allclose(weights.sum(-2), torch.ones(2, 2, 4))
    assert not torch.allclose(weights.sum(-1), torch.ones(2, 2, 4))


def test_scores_drop_out_in_training_only():
    training, _ = inject("S7", place="first")
    scores = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    module = attention(training)
    right = weigh(scores, None, scale=0.5)
    module.eval()
    assert torch.equal(module.weigh(scores, None), right)
    module.train()
    assert not torch.equal(module.weigh(scores, None), right)


def test_a_scale_that_is_missing_twice_or_of_the_model_is_off_by_the_right_factor():
    expected = {"S1": 1.0, "S2": 8**-0.5, "S3": 0.25, "S5": 50.0}
    for id, scale in expected.items():
        found = attention(inject(id, place="last")[0], 2).weigh.keywords["scale"]
        assert found == pytest.approx(scale)
        assert attention(inject(id, place="last")[0], 1).weigh.keywords["scale"] == 0.5


def test_heads_that_are_alike_give_the_same_numbers():
    module = attention(inject("Q5", place="first")[0])
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    heads = module.split_heads(module.query(states), 2)
    assert torch.equal(heads[:, 0], heads[:, 1])
    right = attention(clean()).split_heads(module.query(states), 2)
    assert torch.equal(heads[:, 0], right[:, 0])


def test_tied_weights_are_one_parameter_and_stay_one():
    training, _ = inject("Q4", place="first")
    train(training)
    assert attention(training).query.weight is attention(training).key.weight
    training, _ = inject("Q8", place="middle")
    train(training)
    assert attention(training, 0).value.weight is attention(training, 2).value.weight
    assert attention(training, 0).value.weight is not attention(training, 1).value.weight


@pytest.mark.parametrize("id", ["M2", "M4", "M5"])
def test_a_leak_is_undone_before_the_model_is_scored(id):
    training, _ = inject(id, subject=DECODER)
    right = clean("decoder").model.visible.keywords
    assert training.model.visible.keywords != right
    train(training)
    assert training.model.visible.keywords == right


@pytest.mark.parametrize("id", ["M2", "M4", "M5", "S6a", "S6b", "Q6"])
@pytest.mark.parametrize("name", ["gpt", "llama", "seq2seq"])
def test_no_later_token_moves_what_is_scored(id, name):
    subject = SUBJECTS[name]
    settings = subject.recipes["a"]
    for place in places(INJECTIONS[id], subject, settings):
        training, _ = assemble(
            subject, settings, SEED, [Injection(INJECTIONS[id], "high", place.name)]
        )
        for correct in training.corrections:
            correct()
        batch = {key: tensor[:3] for key, tensor in training.data.held_out.items()}
        read = "so_far" if name == "seq2seq" else "tokens"
        changed = {**batch, read: batch[read].clone()}
        changed[read][:, -1] = changed[read][:, -1] % 5 + 1
        training.model.eval()
        with torch.no_grad():
            ours, theirs = (subject.predict(training.model, b) for b in (batch, changed))
        assert torch.equal(ours[:, :-1], theirs[:, :-1]), place.name


def test_a_decoder_beside_an_encoder_has_no_leak_that_could_not_be_undone():
    settings = SUBJECTS["seq2seq"].recipes["a"]
    for id in ("S6a", "Q6"):
        paths = {
            p for x in places(INJECTIONS[id], SUBJECTS["seq2seq"], settings) for p in x.modules
        }
        assert paths and all(path.startswith("encoder_layers.") for path in paths)


def test_mistakes_that_could_not_show_are_not_made():
    for id in ("M1", "M3"):  # padding comes later than all that is asked, and is hidden anyway
        assert not places(INJECTIONS[id], DECODER, SETTINGS)
    held = CLASSIFIER.data()
    alike = {**held.train, "targets": torch.zeros_like(held.train["targets"])}
    same = replace(CLASSIFIER, data=lambda: replace(held, train=alike))
    assert places(INJECTIONS["D2"], CLASSIFIER, SETTINGS)
    assert not places(INJECTIONS["D2"], same, SETTINGS)


def test_looking_for_causal_attention_leaves_the_model_as_it_was():
    from diagnoser.injection.training import Training

    blueprint = Training(SUBJECTS["seq2seq"], SUBJECTS["seq2seq"].recipes["a"], seed=0)
    for moment in ("data", "model"):
        blueprint.reach(moment)
    before = snapshot(blueprint)
    assert INJECTIONS["S6a"].places(blueprint)
    assert snapshot(blueprint) == before


def test_only_leaks_are_undone():
    for id in ("M2", "M4"):  # an encoder has nothing to leak
        training, _ = inject(id, subject=CLASSIFIER)
        train(training)
        assert training.model.visible.keywords != clean().model.visible.keywords
    for subject, undone in ((CLASSIFIER, False), (DECODER, True)):
        training, _ = inject("Q6", subject=subject)
        train(training)
        right = clean(subject.name).model.layers[0].attention.split_heads
        assert (attention(training).split_heads is right) == undone


def test_labels_are_noisy_in_training_only_and_by_the_share_that_is_asked_for():
    training, _ = inject("D1", "extreme", subject=DECODER)
    right = DECODER.data()
    wrong = training.data.train["targets"] != right.train["targets"]
    asked = right.train["targets"] != -100
    assert not wrong[~asked].any()
    assert 0.6 < float(wrong[asked].double().mean()) < 0.9  # some are right by chance
    assert torch.equal(training.data.held_out["targets"], right.held_out["targets"])


def test_an_unshifted_loss_asks_for_the_token_that_is_there():
    training, _ = inject("L3b")
    targets = torch.tensor([[2, 3, 4]])
    own = torch.tensor([[-100, 2, 3]])
    outputs = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
    right = clean("decoder").criterion
    assert torch.equal(training.criterion(outputs, targets), right(outputs, own))
    assert torch.equal(targets, torch.tensor([[2, 3, 4]]))


def test_a_norm_is_gone_and_comes_back():
    training, _ = inject("N1", place="first")
    assert type(training.model.layers[0].attention_norm) is nn.Identity
    assert type(training.model.layers[1].attention_norm) is nn.LayerNorm
    assert type(training.model.norm) is nn.LayerNorm


@pytest.mark.parametrize("id", ["V1", "V2", "V3"])
def test_a_scale_in_another_place_gives_the_same_model(id):
    training, _ = inject(id)
    held_out = CLASSIFIER.data().held_out
    with torch.no_grad():
        outputs = CLASSIFIER.predict(training.model, held_out)
        right = CLASSIFIER.predict(clean().model, held_out)
    assert torch.allclose(outputs, right, atol=1e-5)
    assert attention(training).weigh.keywords["scale"] == 1.0


# ---- on the subjects of the benchmark -------------------------------------------------------


@functools.cache
def small(name):
    """A subject of the benchmark with few samples."""
    subject = SUBJECTS[name]
    whole = subject.data()
    few = Data(
        {key: tensor[:600] for key, tensor in whole.train.items()},
        {key: tensor[:40] for key, tensor in whole.held_out.items()},
    )
    return replace(subject, data=lambda: few)


@pytest.mark.slow
@pytest.mark.parametrize("name", tuple(SUBJECTS))
def test_every_operator_that_applies_to_a_subject_is_what_it_says_there(name):
    subject = small(name)
    settings = replace(subject.recipes["a"], steps=16, batch_size=32)
    healthy = assemble(subject, settings, SEED)[0]
    known = {component.name for component in healthy.components}
    known |= {path for path, _ in healthy.model.named_modules()} | {"model"}
    applied = set()
    for id, operator in OPERATORS.items():
        for place in places(operator, subject, settings):
            applied.add(id)
            training, _ = assemble(
                subject, settings, SEED, [Injection(operator, "high", place.name)]
            )
            assert set(place.components) <= known, id
        if id in applied:
            training.settings = replace(training.settings, steps=2)
            assert len(train(training).losses) == 2, id
    assert len(applied) > 50
