"""Models that people train, each from a small configuration, with its batches and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, LENGTH, BATCH, CLASSES, WIDTH = 23, 7, 6, 3, 16

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, what draws a fresh batch for it, and the loss of a batch.

    ``loss`` is given the model, which may by then be wrapped or compiled.
    """

    model: nn.Module
    draw: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def labels() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def padding() -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[::2, -2:] = 0
    return mask


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def classifier_of_text(name: str, **config: Any) -> Subject:
    import transformers

    settings = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, num_labels=CLASSES, pad_token_id=0, **config
    )
    model = getattr(transformers, f"{name}ForSequenceClassification")(settings)

    def draw() -> Batch:
        ids = tokens()
        return {"input_ids": ids, "attention_mask": padding(), "labels": ids[:, 0] % CLASSES}

    return Subject(model, draw, own_loss)


def language_model(name: str, head: str, **config: Any) -> Subject:
    import transformers

    settings = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, bos_token_id=1, eos_token_id=2, pad_token_id=0, **config
    )
    model = getattr(transformers, head)(settings)

    def draw() -> Batch:
        ids = tokens()
        return {"input_ids": ids, "labels": ids}

    return Subject(model, draw, own_loss)


LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 16,
}


def vit() -> Subject:
    import transformers

    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=CLASSES,
        )
    )

    def draw() -> Batch:
        return {"pixel_values": torch.randn(BATCH, 1, 8, 8), "labels": labels()}

    return Subject(model, draw, own_loss)


def t5() -> Subject:
    import transformers

    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=WORDS,
            d_model=WIDTH,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    return Subject(model, lambda: {"input_ids": tokens(), "labels": tokens(4)}, own_loss)


class Translator(nn.Module):
    """`nn.Transformer` between an embedding and a map to words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, batch_first=True)
        self.words = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask)
        return self.words(hidden)


def translator() -> Subject:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        target = batch["target"]
        return F.cross_entropy(model(batch["source"], target[:, :-1]).mT, target[:, 1:])

    return Subject(Translator(), lambda: {"target": tokens(), "source": tokens()}, loss)


class Stack(nn.Module):
    """An encoder or a decoder of torch's own between an embedding and a head."""

    def __init__(self, decodes: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        if decodes:
            layer: nn.Module = nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True)
            self.blocks: nn.Module = nn.TransformerDecoder(layer, 2)
        else:
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decodes = decodes
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        return self.head((self.blocks(x, x) if self.decodes else self.blocks(x)).mean(1))


def classified(model: nn.Module, inputs: Callable[[], Tensor]) -> Subject:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]), batch["labels"])

    return Subject(model, lambda: {"inputs": inputs(), "labels": labels()}, loss)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(words))[0].mean(1))


def convolutions(dims: int) -> Subject:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = nn.Sequential(
        convolution(2, 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        convolution(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 4**dims, CLASSES),
    )
    return classified(model, lambda: torch.randn(BATCH, 2, *[6] * dims))


class Perceiver(nn.Module):
    """Latents that are bare parameters attend to what comes in (Jaegle et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, WIDTH) * 0.02)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.cross_attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.self_attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        data, latents = self.embedding(words), self.latents.expand(len(words), -1, -1)
        latents = latents + self.cross_attention(latents, data, data, need_weights=False)[0]
        latents = latents + self.self_attention(latents, latents, latents)[0]
        return self.head(self.norm(latents).mean(1))


class Adapted(nn.Module):
    """A frozen projection with a low-rank addition that is trained (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


def lora() -> Subject:
    subject = classifier_of_text(
        "DistilBert", dim=WIDTH, n_heads=2, n_layers=1, hidden_dim=32, max_position_embeddings=16
    )
    model: Any = subject.model.requires_grad_(False)
    attention = model.distilbert.transformer.layer[0].attention
    attention.q_lin, attention.v_lin = Adapted(attention.q_lin), Adapted(attention.v_lin)
    model.classifier.requires_grad_(True)
    return subject


class Experts(nn.Module):
    """Two of four experts for every sample, by a learned gate (Shazeer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(1)
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sample, rank = (chosen == number).nonzero(as_tuple=True)
            if len(sample):  # an expert that nobody asks gets no gradient
                added = weight[sample, rank, None] * expert(x[sample])
                out = out.index_add(0, sample, added.to(out.dtype))
        return self.head(x + out)


class GraphAttention(nn.Module):
    """Attention over the edges of a graph, normalised by scatter (Velickovic et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, WIDTH) * 0.3)
        self.att_source = nn.Parameter(torch.randn(WIDTH) * 0.3)
        self.att_target = nn.Parameter(torch.randn(WIDTH) * 0.3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = nodes @ self.weight
        source, target = edges
        score = F.leaky_relu((x @ self.att_source)[source] + (x @ self.att_target)[target], 0.2)
        grown = (score - score.max()).float().exp()
        total = torch.zeros(len(nodes)).index_add(0, target, grown)
        share = grown / total[target]
        seen = torch.zeros(x.shape).index_add(0, target, share[:, None] * x[source])
        return self.head(seen)


def graph() -> Subject:
    def draw() -> Batch:
        loops = torch.arange(BATCH)
        edges = torch.cat([torch.randint(BATCH, (2, 12)), torch.stack([loops, loops])], 1)
        return {"nodes": torch.randn(BATCH, 5), "edges": edges, "labels": labels()}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["nodes"], batch["edges"]), batch["labels"])

    return Subject(GraphAttention(), draw, loss)


ATTENDING = {  # whose attention the graph shows
    "BERT", "DistilBERT", "RoBERTa", "GPT-2", "Llama", "Mixtral", "ViT", "T5", "nn.Transformer",
    "nn.TransformerEncoder", "nn.TransformerDecoder", "Perceiver", "LoRA",
}  # fmt: skip

MODELS: dict[str, Callable[[], Subject]] = {
    "BERT": lambda: classifier_of_text("Bert", **BERT),
    "DistilBERT": lambda: classifier_of_text(
        "DistilBert", dim=WIDTH, n_heads=2, n_layers=2, hidden_dim=32, max_position_embeddings=16
    ),
    "RoBERTa": lambda: classifier_of_text("Roberta", **BERT),
    "GPT-2": lambda: language_model(
        "GPT2", "GPT2LMHeadModel", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16
    ),
    "Llama": lambda: language_model("Llama", "LlamaForCausalLM", **LLAMA),
    "Mixtral": lambda: language_model(
        "Mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **LLAMA
    ),
    "ViT": vit,
    "T5": t5,
    "nn.Transformer": translator,
    "nn.TransformerEncoder": lambda: classified(Stack(decodes=False), tokens),
    "nn.TransformerDecoder": lambda: classified(Stack(decodes=True), tokens),
    "GRU": lambda: classified(Recurrent(nn.GRU), tokens),
    "LSTM": lambda: classified(Recurrent(nn.LSTM), tokens),
    "RNN": lambda: classified(Recurrent(nn.RNN), tokens),
    "Conv1d": lambda: convolutions(1),
    "Conv2d": lambda: convolutions(2),
    "Conv3d": lambda: convolutions(3),
    "Perceiver": lambda: classified(Perceiver(), tokens),
    "LoRA": lora,
    "mixture of experts": lambda: classified(Experts(), tokens),
    "graph attention": graph,
}
