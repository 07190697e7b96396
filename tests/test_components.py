"""Components: names, kinds and the law that every parameter element is in exactly one."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from diagnoser.components import free_component, layers_of, parameters_of, split_components
from diagnoser.types import Component
from diagnoser.vocabulary import KINDS, MODEL


def assert_lawful(models: dict[str, nn.Module]) -> tuple[Component, ...]:
    """Each element once, unique names, definition order, known kinds, honest element counts."""
    components = split_components(models)
    parameters = parameters_of(models)
    covered = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for component in components:
        for part in component.parts:
            part.view(covered[part.parameter]).add_(1)
        views = [part.view(parameters[part.parameter]) for part in component.parts]
        assert component.elements == sum(view.numel() for view in views)
        assert component.kind in KINDS
    assert all(bool((count == 1).all()) for count in covered.values())
    names = [component.name for component in components]
    names += [layer.name for layer in layers_of(components)]
    assert len(set(names)) == len(names)
    assert MODEL not in names
    assert [component.order for component in components] == list(range(len(components)))
    return components


def kinds_of(model: nn.Module) -> dict[str, str]:
    return {component.name: component.kind for component in assert_lawful({"net": model})}


def layers(model: nn.Module) -> dict[str, str]:
    return {component.name: component.layer for component in split_components({"net": model})}


def attention(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module called ``attn`` with these parts, followed by a classifier."""
    block = nn.Module()
    for name, part in parts.items():
        setattr(block, name, part)
    return nn.Sequential(nn.ModuleDict({"attn": block, "classifier": nn.Linear(4, 2)}))


class Han(nn.Module):
    """Two levels of recurrent encoder and additive attention (Yang et al. 2016)."""

    class Level(nn.Module):
        def __init__(self, context: nn.Module | nn.Parameter):
            super().__init__()
            self.projection = nn.Linear(6, 5)
            self.context = context

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.word_rnn = nn.GRU(4, 3, bidirectional=True)
        self.word_attention = self.Level(nn.Linear(5, 1, bias=False))
        self.sentence_rnn = nn.LSTM(6, 3, bidirectional=True)
        self.sentence_attention = self.Level(nn.Parameter(torch.zeros(5)))
        self.fc = nn.Linear(6, 2)


class HierarchicalAttentionNetwork(nn.Module):
    """The nesting and names of a widely used tutorial: a level holds the level below."""

    class WordAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(7, 4)
            self.word_rnn = nn.GRU(4, 3, bidirectional=True)
            self.word_attention = nn.Linear(6, 5)
            self.word_context_vector = nn.Linear(5, 1, bias=False)

    class SentenceAttention(nn.Module):
        def __init__(self, words: nn.Module) -> None:
            super().__init__()
            self.word_attention = words
            self.sentence_rnn = nn.GRU(6, 3, bidirectional=True)
            self.sentence_attention = nn.Linear(6, 5)
            self.sentence_context_vector = nn.Linear(5, 1, bias=False)

    def __init__(self) -> None:
        super().__init__()
        self.sentence_attention = self.SentenceAttention(self.WordAttention())
        self.fc = nn.Linear(6, 2)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class VisionTransformer(nn.Module):
    """Bare tokens and positions, PreNorm wrappers, fused qkv, a Sequential output."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm()
            self.to_qkv = nn.Linear(4, 18, bias=False)
            self.to_out = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1))

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def __init__(self) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.latents = nn.Parameter(torch.zeros(3, 4))
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.layers = nn.ModuleList([nn.ModuleList([self.Attention(), self.FeedForward()])])
        self.mlp_head = nn.Linear(4, 2)


def distilbert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=11, dim=8, n_heads=2, n_layers=1, hidden_dim=16, max_position_embeddings=6
        )
    )


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=6,
        )
    )


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=11,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=6,
            add_cross_attention=True,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


EXPECTED = {
    distilbert: {
        "distilbert.embeddings.word_embeddings": "embedding",
        "distilbert.embeddings.position_embeddings": "embedding",
        "distilbert.embeddings.LayerNorm": "norm",
        "distilbert.transformer.layer.0.attention.q_lin": "query",
        "distilbert.transformer.layer.0.attention.k_lin": "key",
        "distilbert.transformer.layer.0.attention.v_lin": "value",
        "distilbert.transformer.layer.0.attention.out_lin": "attention_output",
        "distilbert.transformer.layer.0.sa_layer_norm": "norm",
        "distilbert.transformer.layer.0.ffn.lin1": "feed_forward",
        "distilbert.transformer.layer.0.ffn.lin2": "feed_forward",
        "distilbert.transformer.layer.0.output_layer_norm": "norm",
        "pre_classifier": "head",
        "classifier": "head",
    },
    bert: {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "embedding",
        "bert.embeddings.token_type_embeddings": "embedding",
        "bert.embeddings.LayerNorm": "norm",
        "bert.encoder.layer.0.attention.self.query": "query",
        "bert.encoder.layer.0.attention.self.key": "key",
        "bert.encoder.layer.0.attention.self.value": "value",
        "bert.encoder.layer.0.attention.output.dense": "attention_output",
        "bert.encoder.layer.0.attention.output.LayerNorm": "norm",
        "bert.encoder.layer.0.intermediate.dense": "feed_forward",
        "bert.encoder.layer.0.output.dense": "feed_forward",
        "bert.encoder.layer.0.output.LayerNorm": "norm",
        "bert.pooler.dense": "feed_forward",
        "classifier": "head",
    },
    gpt2: {  # the language-model head is tied to wte and so no component of its own
        "transformer.wte": "embedding",
        "transformer.wpe": "embedding",
        "transformer.h.0.ln_1": "norm",
        "transformer.h.0.attn.c_attn[query]": "query",
        "transformer.h.0.attn.c_attn[key]": "key",
        "transformer.h.0.attn.c_attn[value]": "value",
        "transformer.h.0.attn.c_proj": "attention_output",
        "transformer.h.0.ln_2": "norm",
        "transformer.h.0.crossattention.c_attn[key]": "key",
        "transformer.h.0.crossattention.c_attn[value]": "value",
        "transformer.h.0.crossattention.q_attn": "query",
        "transformer.h.0.crossattention.c_proj": "attention_output",
        "transformer.h.0.ln_cross_attn": "norm",
        "transformer.h.0.mlp.c_fc": "feed_forward",
        "transformer.h.0.mlp.c_proj": "feed_forward",
        "transformer.ln_f": "norm",
    },
    Han: {
        "embedding": "embedding",
        "word_rnn": "recurrent",
        "word_attention.projection": "attention_projection",
        "word_attention.context": "attention_context",
        "sentence_rnn": "recurrent",
        "sentence_attention.context": "attention_context",
        "sentence_attention.projection": "attention_projection",
        "fc": "head",
    },
    HierarchicalAttentionNetwork: {
        "sentence_attention.word_attention.embeddings": "embedding",
        "sentence_attention.word_attention.word_rnn": "recurrent",
        "sentence_attention.word_attention.word_attention": "attention_projection",
        "sentence_attention.word_attention.word_context_vector": "attention_context",
        "sentence_attention.sentence_rnn": "recurrent",
        "sentence_attention.sentence_attention": "attention_projection",
        "sentence_attention.sentence_context_vector": "attention_context",
        "fc": "head",
    },
    VisionTransformer: {
        "pos_embedding": "embedding",
        "cls_token": "embedding",
        "latents": "other",
        "patches": "convolution",
        "layers.0.0.norm": "norm",
        "layers.0.0.to_qkv[query]": "query",
        "layers.0.0.to_qkv[key]": "key",
        "layers.0.0.to_qkv[value]": "value",
        "layers.0.0.to_out.0": "attention_output",
        "layers.0.1.net.0": "norm",
        "layers.0.1.net.1": "feed_forward",
        "layers.0.1.net.3": "feed_forward",
        "mlp_head": "head",
    },
    lambda: nn.TransformerEncoderLayer(8, 2, 16): {
        "self_attn.in_proj[query]": "query",
        "self_attn.in_proj[key]": "key",
        "self_attn.in_proj[value]": "value",
        "self_attn.out_proj": "attention_output",
        "linear1": "feed_forward",
        "linear2": "head",  # nothing but the root itself says that this is no whole model
        "norm1": "norm",
        "norm2": "norm",
    },
    lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3), nn.Linear(3, 2)
    ): {
        "0": "convolution",
        "1": "norm",
        "2": "feed_forward",
        "3": "head",
    },
    lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.GroupNorm(1, 2), nn.LSTMCell(2, 3)): {
        "0": "convolution",
        "1": "norm",
        "2": "recurrent",
    },
}


@pytest.mark.parametrize("build", EXPECTED)
def test_names_kinds_and_order_of_known_models(build):
    assert list(kinds_of(build()).items()) == list(EXPECTED[build].items())


@pytest.mark.parametrize(
    ("build", "component", "layer"),
    [
        (distilbert, "distilbert.transformer.layer.0.attention.q_lin", None),
        (distilbert, "classifier", "classifier"),
        (bert, "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention"),
        (bert, "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.attention"),
        (gpt2, "transformer.h.0.attn.c_attn[value]", "transformer.h.0.attn"),
        (Han, "word_attention.context", "word_attention"),
        (Han, "word_rnn", "word_rnn"),
        (VisionTransformer, "layers.0.0.to_out.0", "layers.0.0"),
        (VisionTransformer, "layers.0.1.net.1", "layers.0.1.net"),
        (VisionTransformer, "cls_token", "cls_token"),
    ],
)
def test_layer_is_the_enclosing_block(build, component, layer):
    assert layers(build())[component] == (layer or component.rpartition(".")[0])


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], None),
        (["query", "key", "value", "dense"], None),
        (["w_qs", "w_ks", "w_vs", "fc"], None),
        (["W_Q", "W_K", "W_V", "W_O"], None),
        (["toqueries", "tokeys", "tovalues", "unifyheads"], None),
        (["to_q", "to_k", "to_v", "to_out"], None),
        (["linear_q", "linear_k", "linear_v", "linear_out"], None),
    ],
)
@pytest.mark.parametrize("block", ["attn", "plain"])  # query beside key is an attention in itself
def test_spellings_of_separate_projections(names, kinds, block):
    model = nn.ModuleDict({block: nn.ModuleDict({name: nn.Linear(4, 4) for name in names})})
    assert list(kinds_of(model).values()) == ["query", "key", "value", "attention_output"]


def test_a_name_counts_only_in_its_surroundings():
    critic = nn.ModuleDict({"body": nn.Linear(4, 4), "value": nn.Linear(4, 1)})
    assert kinds_of(critic) == {"body": "feed_forward", "value": "head"}


def test_hand_written_weights_of_an_attention_are_a_component_each():
    square = {name: nn.Parameter(torch.zeros(4, 4)) for name in ("W_Q", "W_K", "W_V", "W_O")}
    assert list(kinds_of(attention(**square)).items())[:4] == [
        ("0.attn.W_Q", "query"),
        ("0.attn.W_K", "key"),
        ("0.attn.W_V", "value"),
        ("0.attn.W_O", "attention_output"),
    ]


def test_list_of_linears_in_an_attention_is_query_key_value_output():
    linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    kinds = kinds_of(attention(linears=linears))
    assert list(kinds.values()) == ["query", "key", "value", "attention_output", "head"]


def test_additive_attention_in_a_sequential():
    model = nn.ModuleDict({"attention": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))})
    assert kinds_of(model) == {
        "attention.0": "attention_projection",
        "attention.2": "attention_context",
    }


def test_linear_that_is_itself_the_attention():
    model = nn.ModuleDict({"attn": nn.Linear(4, 3), "attn_score": nn.Linear(4, 1)})
    assert kinds_of(model) == {"attn": "attention_projection", "attn_score": "attention_context"}


def test_embedding_called_attention_is_an_embedding():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(3, 2)})
    assert kinds_of(model) == {"relative_attention_bias": "embedding"}


def test_feed_forward_inside_a_block_called_attention():
    kinds = kinds_of(attention(qkv=nn.Linear(4, 12), mlp=nn.Sequential(nn.Linear(4, 4))))
    assert kinds["0.attn.mlp.0"] == "feed_forward"


def slices(model: nn.Module) -> dict[str, list[tuple[str, int | None, int, int]]]:
    return {
        component.name: [(p.parameter, p.dim, p.start, p.length) for p in component.parts]
        for component in assert_lawful({"net": model})
    }


def test_fused_projection_of_keys_and_values():
    cut = slices(attention(to_q=nn.Linear(4, 6), to_kv=nn.Linear(4, 12), to_out=nn.Linear(6, 4)))
    assert cut["0.attn.to_kv[key]"] == [
        ("0.attn.to_kv.weight", 0, 0, 6),
        ("0.attn.to_kv.bias", 0, 0, 6),
    ]
    assert cut["0.attn.to_kv[value]"][0] == ("0.attn.to_kv.weight", 0, 6, 6)


def test_fused_projection_of_grouped_queries_follows_the_output_projection():
    cut = slices(attention(qkv_proj=nn.Linear(8, 12, bias=False), o_proj=nn.Linear(8, 8)))
    assert [cut[f"0.attn.qkv_proj[{kind}]"][0][2:] for kind in ("query", "key", "value")] == [
        (0, 8),
        (8, 2),
        (10, 2),
    ]


def test_fused_order_is_the_one_the_name_gives():
    cut = slices(attention(kqv=nn.Linear(4, 12)))
    assert [name for name in cut if "kqv" in name] == [
        "0.attn.kqv[key]",
        "0.attn.kqv[query]",
        "0.attn.kqv[value]",
    ]


def test_fused_projection_that_does_not_come_out_even_stays_whole():
    assert "0.attn.qkv" in kinds_of(attention(qkv=nn.Linear(4, 13)))


def test_fused_columns_of_gpt2_hold_what_the_forward_splits():
    model = gpt2()
    parameters = parameters_of({"net": model})
    fused = model.transformer.h[0].attn.c_attn
    wanted = fused.weight.split(8, dim=1)
    found = [c for c in split_components({"net": model}) if ".attn.c_attn" in c.name]
    for component, columns in zip(found, wanted, strict=True):
        part = component.parts[0]
        assert torch.equal(part.view(parameters[part.parameter]), columns)


@pytest.mark.parametrize("kdim", [None, 3])
def test_multihead_attention_with_bias_rows_and_other_key_sizes(kdim):
    cut = slices(nn.MultiheadAttention(4, 2, kdim=kdim, vdim=kdim, add_bias_kv=True))
    weight = ("in_proj_weight", 0, 4, 4) if kdim is None else ("k_proj_weight", None, 0, 0)
    assert set(cut["in_proj[key]"]) == {weight, ("in_proj_bias", 0, 4, 4), ("bias_k", None, 0, 0)}
    assert list(cut) == ["in_proj[query]", "in_proj[key]", "in_proj[value]", "out_proj"]


def test_views_of_gradients_are_views():
    model = nn.MultiheadAttention(4, 2)
    x = torch.ones(3, 1, 4)
    model(x, x, x)[0].sum().backward()
    component = split_components({"net": model})[2]
    parameters = parameters_of({"net": model})
    for part in component.parts:
        part.view(parameters[part.parameter].grad).zero_()
    assert not model.in_proj_weight.grad[8:].any()
    assert model.in_proj_bias.grad is not None


def test_several_models_get_prefixes_and_share_tied_parameters_once():
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    second[1].weight = first.weight
    models = {"generator": nn.Sequential(first), "critic": second}
    components = assert_lawful(models)
    assert [component.name for component in components] == [
        "generator:0",
        "critic:0",
        "critic:1",
    ]
    assert [part.parameter for part in components[2].parts] == ["critic:1.bias"]
    assert [component.layer for component in components][0] == "generator:0"


def test_repeated_module_is_one_component():
    shared = nn.Linear(3, 3)
    assert list(kinds_of(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]


class DistributedDataParallel(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_wrappers_change_parameter_names_only():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wanted = kinds_of(plain)
    compiled = torch.compile(plain, backend="eager")
    assert kinds_of(DistributedDataParallel(compiled)) == wanted
    parts = [part for c in split_components({"net": compiled}) for part in c.parts]
    assert parts[0].parameter == "_orig_mod.0.weight"
    assert kinds_of(nn.Sequential(torch.compile(plain[0], backend="eager"), plain[1])) == wanted
    assert list(kinds_of(DistributedDataParallel(nn.Linear(2, 2)))) == ["Linear"]


def test_low_rank_adapters_have_the_kind_of_what_they_adapt():
    adapted = nn.ModuleDict(
        {
            "base_layer": nn.Linear(4, 4),
            "lora_A": nn.ModuleDict({"default": nn.Linear(4, 1, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(1, 4, bias=False)}),
        }
    )
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": adapted})})
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": block})})
    assert kinds_of(model) == {
        "self_attn.q_proj": "query",
        "self_attn.q_proj.lora_A.default": "query",
        "self_attn.q_proj.lora_B.default": "query",
    }


def test_reserved_name_of_the_whole_model_is_given_to_no_component_or_layer():
    model = nn.ModuleDict({"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert layers(model) == {"model.0": "model.0", "model.1": "model.1"}
    assert list(kinds_of(nn.ModuleDict({"model": nn.Linear(2, 2)}))) == ["model#2"]


def test_parametrized_weights_belong_to_their_module():
    linear = parametrizations.weight_norm(nn.Linear(4, 12))
    cut = slices(attention(qkv=linear))
    assert [p[0].rpartition("qkv.")[2] for p in cut["0.attn.qkv[key]"]] == [
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]


def test_lazy_parameters_are_left_out_until_they_are_initialised():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    assert kinds_of(model) == {"0": "feed_forward"}
    model(torch.zeros(1, 2))
    assert kinds_of(model) == {"0": "feed_forward", "1": "head"}


def test_frozen_parameters_are_components():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    assert list(kinds_of(model)) == ["0", "1"]


def test_layers_hold_the_union_of_their_components():
    components = split_components({"net": nn.TransformerEncoderLayer(8, 2, 16)})
    (layer,) = layers_of(components)
    members = [component for component in components if component.layer == "self_attn"]
    assert (layer.name, layer.kind, layer.order) == ("self_attn", "other", members[0].order)
    assert layer.elements == sum(component.elements for component in members)
    assert layer.parts == tuple(part for component in members for part in component.parts)


def test_free_component():
    component = free_component("param_groups[0][1]", torch.zeros(2, 3), order=4)
    assert (component.name, component.kind, component.layer) == (
        "param_groups[0][1]",
        "other",
        "param_groups[0][1]",
    )
    assert (component.elements, component.order) == (6, 4)
    assert component.parts[0].parameter == "param_groups[0][1]"


# --- Any model ------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["attn", "attention", "self", "qkv", "c_attn", "to_kv", "q_proj", "k_proj", "v", "out"]
    + ["mlp", "fc", "head", "model", "module", "_orig_mod", "base_layer", "context", "x", "in_proj"]
)
SIZES = st.sampled_from([0, 1, 2, 6])
LEAVES = st.one_of(
    st.builds(
        nn.Linear, st.sampled_from([1, 4]), st.sampled_from([1, 2, 6, 9]), bias=st.booleans()
    ),
    st.builds(nn.MultiheadAttention, st.just(4), st.just(2), kdim=st.sampled_from([None, 3])),
    st.builds(nn.Conv1d, st.just(2), st.just(6), st.sampled_from([1, 3])),
    st.builds(nn.Embedding, st.just(3), st.just(2)),
    st.builds(nn.LayerNorm, st.just(2)),
    st.builds(nn.GRU, st.just(2), st.just(3)),
    st.builds(nn.ReLU),
)


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    """Nested modules with bare, tied and scalar parameters, and modules used twice."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(LEAVES)
    children = [draw(trees(depth=depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        children.append(draw(st.sampled_from(children)))
    if draw(st.integers(0, 4)) == 0:
        return nn.ModuleList(children)
    module = nn.Module()
    names = draw(st.lists(NAMES, min_size=len(children), max_size=len(children), unique=True))
    for name, child in zip(names, children, strict=True):
        setattr(module, name, child)
    for name in draw(st.lists(NAMES, max_size=2, unique=True)):
        if name not in names:
            shape = draw(st.lists(SIZES, max_size=2))
            tied = draw(st.booleans()) and next(module.parameters(), None)
            fresh = nn.Parameter(torch.zeros(shape))
            module.register_parameter(name, fresh if not isinstance(tied, nn.Parameter) else tied)
    return module


def module_of(parameter: str) -> str:
    return re.split(r"[^.:]*$", parameter)[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=2))
def test_laws_hold_for_any_models(roots):
    models = {f"net{index}": root for index, root in enumerate(roots)}
    components = assert_lawful(models)
    assert components == split_components(models)
    modules = list(dict.fromkeys(map(module_of, parameters_of(models))))
    order = [modules.index(module_of(part.parameter)) for c in components for part in c.parts]
    assert order == sorted(order)
    for layer in layers_of(components):
        inside = [component for component in components if component.layer == layer.name]
        assert layer.elements == sum(component.elements for component in inside)
