"""Program checks on models that people use: silent where all is well, and the same bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diagnoser.runlog import Recording
from diagnoser.session import watch

transformers = pytest.importorskip("transformers")
VOCABULARY, STEPS = 50, 22
Batch = Callable[[int], Mapping[str, Tensor]]


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def language(step: int) -> Mapping[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (8, 12), generator=generator(step))
    return {"input_ids": tokens, "labels": tokens}


def padded(step: int) -> Mapping[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (8, 12), generator=generator(step))
    mask = torch.ones_like(tokens)
    mask[:4, 8:] = 0
    labels = torch.randint(3, (8,), generator=generator(step))
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def pictures(step: int) -> Mapping[str, Tensor]:
    labels = torch.randint(3, (8,), generator=generator(step))
    return {"pixel_values": torch.randn(8, 3, 16, 16, generator=generator(step)), "labels": labels}


def reversal(step: int) -> Mapping[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (8, 12), generator=generator(step))
    return {"input_ids": tokens, "labels": tokens.flip(1)}


def bert(**options: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=3, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def albert() -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64, num_labels=3,
    )  # fmt: skip
    return transformers.AlbertForSequenceClassification(config)


# model, batches, what must have been measured
MODELS: Mapping[str, tuple[Callable[[], nn.Module], Batch, set[str]]] = {
    "bert": (bert, padded, {"padding_weight", "padding_influence", "position_share"}),
    "bert, eager": (
        lambda: bert(attn_implementation="eager"),
        padded,
        {"padding_weight", "mask_leak", "position_share"},
    ),
    "gpt2": (gpt2, language, {"future_weight", "future_influence"}),
    "llama": (llama, language, {"future_weight", "future_influence"}),
    "vit": (vit, pictures, {"position_share", "input_largest"}),
    "t5": (t5, reversal, {"attention_excess"}),
    "albert": (albert, padded, {"padding_weight"}),
}


def trained(
    model: nn.Module, batches: Batch, out: Path | None
) -> tuple[list[float], Recording | None]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []

    def loop() -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(**batches(step)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    if out is None:
        loop()
        return losses, None
    with watch(model, optimizer, out=out, verbose=False) as watched:
        loop()
    found = [f for f in watched.diagnose().findings if f.severity != "low"]
    assert [f.source for f in found if f.source.startswith("check:")] == []
    return losses, watched.log


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_right_are_silent_and_train_to_the_same_bits(name, tmp_path):
    make, batches, wanted = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers about its own future
        model = make().train()
        twin = copy.deepcopy(model)
        expected, _ = trained(model, batches, None)
        losses, log = trained(twin, batches, tmp_path / "run")
    assert losses == expected
    assert log is not None
    seen = {log.measurements.quantities[code] for code in set(log.measurements.quantity.tolist())}
    usual = {"attention_scale", "sample_leak", "attention_sum_error"}
    assert usual | wanted <= seen
    reasons = [f.data["reason"] for f in log.facts if f.name == "unknown"]
    assert not [reason for reason in reasons if "failed" in reason]
    assert not [event.message for event in log.events if event.kind == "monitor_error"]
