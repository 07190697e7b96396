from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from report_examples import LOWERED, SHARPNESS, diagnoses, han_diagnosis, repaired_diagnosis

from diagnoser import vocabulary
from diagnoser.report import diagnosis_schema, diagnosis_to_json
from diagnoser.types import Cost, Repair

VALIDATOR = jsonschema.Draft202012Validator(diagnosis_schema())


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=refuse)


def with_observed(value: float):
    evidence = (replace(SHARPNESS.evidence[0], observed=value),)
    return replace(han_diagnosis(), findings=(replace(SHARPNESS, evidence=evidence),))


def test_the_example_reads_as_the_contract_says():
    document = strict(diagnosis_to_json(han_diagnosis()))
    assert list(document) == [
        *("schema", "run", "verdict", "script", "causes", "findings", "unknown", "repairs", "cost")
    ]
    assert document["schema"] == "diagnoser.diagnosis/1"
    assert document["script"] == {"exit_code": 0}
    assert document["repairs"] == []
    assert document["causes"][0] == {
        "cause": "learning_rate_too_high",
        "component": "word_attention.projection",
        "probability": 0.91,
        "n": 88,
        "because": [],
    }
    finding = document["findings"][0]
    assert list(finding) == [
        *("fault", "component", "other", "severity", "probability", "n", "since_step", "source"),
        *("causes", "evidence", "message", "where", "patch", "repairs"),
    ]
    assert finding["evidence"][0] == {
        "feature": "step_sharpness",
        "observed": 14.2,
        "std_error": 1.3,
        "batch_std_error": 2.1,
        "method": "lanczos",
        "comparison": ">",
        "threshold": 2.0,
        "steps": [120, 160],
    }
    assert finding["repairs"][1] == {
        "name": "scale_learning_rate",
        "component": "word_attention.projection",
        "parameters": {"factor": 0.01},
    }
    assert document["cost"] == {
        "steps": 400,
        "measurements": 41,
        "training_s": 40.1,
        "monitoring_s": 3.2,
        "repairing_s": 0.0,
    }


def test_a_repair_that_was_tried_reads_as_the_contract_says():
    document = strict(diagnosis_to_json(replace(han_diagnosis(), repairs=(LOWERED,))))
    (tried,) = document["repairs"]
    assert list(tried) == [
        *("step", "before", "after", "twin", "difference", "verdict", "reason"),
    ]
    assert tried["step"] == {
        "at": 160,
        "finding": "rule:sharpness-instability",
        "component": "word_attention.projection",
        "actions": [
            {"name": "roll_back", "component": "word_attention.projection", "parameters": {}},
            {
                "name": "scale_learning_rate",
                "component": "word_attention.projection",
                "parameters": {"factor": 0.01},
            },
        ],
        "derivation": LOWERED.derivation,
        "guarantee": LOWERED.guarantee,
        "batches": 20,
    }
    finding = document["findings"][0]
    for name, observed in (("before", 14.2), ("after", 0.31), ("twin", 13.8)):
        arm = tried[name]
        assert list(arm) == ["steps", "loss", "evidence", "firing"]
        assert list(arm["evidence"][0]) == list(finding["evidence"][0])
        assert arm["evidence"][0]["observed"] == observed
    assert tried["after"]["firing"] == []
    assert tried["twin"]["firing"][0] == finding["source"]
    assert tried["difference"] == {
        "value": -0.6357,
        "std_error": 0.041,
        "batch_std_error": None,
        "samples": 20,
        "method": "paired",
        "dtype": "float32",
    }
    assert (tried["verdict"], tried["reason"]) == ("kept", LOWERED.reason)


def test_what_was_not_compared_is_null():
    failed = strict(diagnosis_to_json(repaired_diagnosis()))["repairs"][0]
    assert failed["verdict"] == "rolled_back"
    assert failed["twin"] is failed["difference"] is None
    assert failed["after"]["loss"] == "NaN"


def test_the_order_of_findings_and_causes_is_kept():
    diagnosis = han_diagnosis()
    document = strict(diagnosis_to_json(diagnosis))
    assert [f["fault"] for f in document["findings"]] == [f.fault for f in diagnosis.findings]
    turned = replace(diagnosis, findings=diagnosis.findings[::-1], causes=diagnosis.causes[::-1])
    turned_document = strict(diagnosis_to_json(turned))
    assert turned_document["findings"] == document["findings"][::-1]
    assert turned_document["causes"] == document["causes"][::-1]


@given(diagnoses)
@settings(max_examples=60, deadline=None)
def test_every_diagnosis_is_strict_json_that_satisfies_the_schema(diagnosis):
    text = diagnosis_to_json(diagnosis)
    VALIDATOR.validate(strict(text))
    assert text.isascii()
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (np.float64("nan"), "NaN"),
    ],
)
def test_what_is_no_json_number_is_text(value, written):
    document = strict(diagnosis_to_json(with_observed(value)))
    assert document["findings"][0]["evidence"][0]["observed"] == written


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22])
def test_floats_come_back_exactly(value):
    document = strict(diagnosis_to_json(with_observed(value)))
    assert repr(document["findings"][0]["evidence"][0]["observed"]) == repr(value)


def test_numpy_numbers_give_the_same_bytes_as_python_numbers():
    finding = replace(SHARPNESS, since_step=np.int64(120))
    evidence = replace(
        SHARPNESS.evidence[0], observed=np.float64(14.2), steps=tuple(np.array([120, 160]))
    )
    finding = replace(finding, evidence=(evidence, *SHARPNESS.evidence[1:]))
    diagnosis = han_diagnosis()
    numpy = replace(
        diagnosis,
        findings=(finding, *diagnosis.findings[1:]),
        cost=Cost(np.int64(400), np.int64(41), np.float64(40.1), np.float64(3.2)),
    )
    assert diagnosis_to_json(numpy) == diagnosis_to_json(diagnosis)


def test_the_same_diagnosis_gives_the_same_bytes():
    def repaired(parameters):
        finding = replace(SHARPNESS, repairs=(Repair("change_betas", "model", parameters),))
        return replace(han_diagnosis(), findings=(finding,))

    one, other = repaired({"beta1": 0.9, "beta2": 0.99}), repaired({"beta2": 0.99, "beta1": 0.9})
    assert one == other
    assert diagnosis_to_json(one) == diagnosis_to_json(other)


def test_the_schema_is_itself_valid():
    jsonschema.Draft202012Validator.check_schema(diagnosis_schema())


def test_the_schema_speaks_the_vocabulary():
    schema = diagnosis_schema()
    definitions = schema["$defs"]
    assert schema["properties"]["verdict"]["enum"] == list(vocabulary.VERDICTS)
    assert definitions["fault"]["enum"] == list(vocabulary.FAULTS)
    assert definitions["cause"]["enum"] == list(vocabulary.CAUSE_CATEGORY)
    assert definitions["severity"]["enum"] == list(vocabulary.SEVERITIES)
    assert definitions["repair_name"]["enum"] == list(vocabulary.REPAIRS)


def objects(schema):
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_the_schema_allows_no_other_keys_and_asks_for_all():
    found = list(objects(diagnosis_schema()))
    assert len(found) >= 10
    for schema in found:
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "broken"),
        (("findings", 0, "fault"), "learning_rate_too_high"),
        (("findings", 0, "severity"), "bad"),
        (("findings", 0, "since_step"), -1),
        (("findings", 0, "source"), "rule:"),
        (("findings", 0, "evidence", 0, "observed"), "nan"),
        (("findings", 0, "evidence", 0, "steps"), [1]),
        (("findings", 0, "repairs", 0, "name"), "pray"),
        (("causes", 0, "cause"), "sharpness_instability"),
        (("causes", 0, "probability"), 1.5),
        (("cost", "seconds"), 1.0),
        (("repairs", 0, "verdict"), "undone"),
        (("repairs", 0, "before"), None),
        (("repairs", 0, "step", "at"), -1),
        (("repairs", 0, "step", "actions", 0, "name"), "pray"),
        (("repairs", 0, "after", "loss"), "nan"),
        (("repairs", 1, "twin", "accuracy"), 1.0),
    ],
)
def test_the_schema_refuses(path, value):
    document = strict(diagnosis_to_json(repaired_diagnosis()))
    *parents, last = path
    place = document
    for key in parents:
        place = place[key]
    place[last] = value
    assert not VALIDATOR.is_valid(document)
