"""The video case: clips move as they say, attention is as written down, a layer comes too late."""

import math
from pathlib import Path

import pytest
import torch

from diagnoser.cases import load_case, missing_names
from tests.case_modules import load

FOLDER = Path(__file__).parents[1] / "cases" / "video"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        yield {name: load("video", name, patch) for name in ("moving_digits", "model")}


@pytest.fixture(scope="module")
def silent(modules):
    """The same clips without noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules["moving_digits"], "NOISE", 0.0)
        return modules["moving_digits"].load()


def test_every_digit_moves_as_its_class_says(modules, silent):
    steps = modules["moving_digits"].STEPS
    for part in silent.values():
        frames = part.frames[:, 0]
        for motion, step in enumerate(steps.tolist()):
            own = frames[part.motions == motion]
            assert len(own) > 30
            moved = torch.roll(own[:, :-1], shifts=step, dims=(2, 3))
            assert torch.equal(own[:, 1:], moved)


def test_parts_show_different_digits(silent):
    seen = {
        name: {tuple(sorted(frame.flatten().tolist())) for frame in part.frames[:, 0, 0]}
        for name, part in silent.items()
    }
    assert len(seen["train"]) > 700
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & (seen["test"] | seen["train"])


def test_which_digit_it_is_says_nothing_of_the_motion(silent):
    """Clips of one motion show as many different digits as there are draws from all of them."""
    first = silent["train"].frames[silent["train"].motions == 0, 0, 0]
    assert len(torch.unique(first.flatten(1), dim=0)) > 0.8 * len(first)


def test_clips_are_the_same_each_time(modules):
    one, two = (modules["moving_digits"].load() for _ in range(2))
    assert all(torch.equal(one[name].frames, two[name].frames) for name in one)


def test_attention_is_softmax_of_scaled_products_by_head(modules):
    attention = modules["model"].Attention(8, heads=2)
    queries, source = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    q, k, v = (
        p(x).view(3, -1, 2, 4)
        for p, x in (
            (attention.q_proj, queries),
            (attention.k_proj, source),
            (attention.v_proj, source),
        )
    )
    weights = (torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(4)).softmax(-1)
    mixed = torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)
    torch.testing.assert_close(attention(queries, source), attention.out_proj(mixed))


def test_the_late_form_is_the_same_network_that_no_optimizer_gets_whole(modules):
    model = modules["model"].VideoModel(7, cross_attention="lazy")
    before = {id(p) for p in model.parameters()}
    assert model(torch.randn(2, 1, 8, 20, 20)).shape == (2, 7)
    late = [name for name, p in model.named_parameters() if id(p) not in before]
    assert {name.partition(".")[0] for name in late} == {"cross_attention"}
    whole = modules["model"].VideoModel(7)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }


def test_the_case_file_names_what_the_model_has(modules):
    names = [name for name, _ in modules["model"].VideoModel(7).named_parameters()]
    case = load_case("video")
    assert missing_names(case, names) is None
    assert set(names) >= {name for group in case.groups.values() for name in group}
