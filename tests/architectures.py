"""Tiny random models of many architectures, as checkpoints of many kinds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.models._base import Base, load_base
from fedpeft.types import Tensors

VOCABULARY, LIMIT = 90, 64
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LIMIT,
}
_LLAMA = _BERT | {"num_key_value_heads": 1, "pad_token_id": 0}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": LIMIT,
}
_ELECTRA = _BERT | {"embedding_size": 8}

SIDE = 8
"""Height and width of the images of vision models, in pixels."""
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIDE,
    "patch_size": 4,
}
_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
_SWIN |= {"image_size": SIDE, "patch_size": 2}
_CONVNEXT = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "image_size": SIDE}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _BERT),
    "bert-mlm": ("BertForMaskedLM", _BERT),
    "bert-classifier": ("BertForSequenceClassification", _BERT | {"num_labels": 3}),
    "roberta": ("RobertaModel", _BERT),
    "roberta-mlm": ("RobertaForMaskedLM", _BERT),
    "distilbert": ("DistilBertModel", _DISTILBERT),
    "distilbert-mlm": ("DistilBertForMaskedLM", _DISTILBERT),
    "albert": ("AlbertModel", _ELECTRA),
    "electra": ("ElectraForPreTraining", _ELECTRA),
    "mpnet": ("MPNetModel", _BERT),
    "deberta-v2": ("DebertaV2Model", _BERT | {"relative_attention": True, "pos_att_type": "c2p"}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
}
"""Name to the ``transformers`` class that is saved, and its configuration."""

IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", _VIT),
    "vit-masked": ("ViTForMaskedImageModeling", _VIT | {"encoder_stride": 4}),
    "vit-classifier": ("ViTForImageClassification", _VIT | {"num_labels": 4}),
    "vit-grey": ("ViTForImageClassification", _VIT | {"num_channels": 1}),
    "deit": ("DeiTModel", _VIT),
    "deit-classifier": ("DeiTForImageClassification", _VIT),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", _VIT),
    "vit-msn": ("ViTMSNModel", _VIT),
    "ijepa": ("IJepaModel", _VIT),
    "dinov2": ("Dinov2Model", _VIT | {"mlp_ratio": 2}),
    "swin": ("SwinModel", _SWIN),
    "convnext": ("ConvNextModel", _CONVNEXT),
}
"""Those that take images."""


def checkpoint(kind: str, folder: Path, tokenizer_of: Path | None = None) -> Path:
    """Save a random model of this kind, with an image processor or another folder's tokenizer."""
    import transformers

    name, fields = (CHECKPOINTS | IMAGES)[kind]
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = cls(cls.config_class(**fields))
        for parameter in model.parameters():  # biases and norms are not left at 0 and 1
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if tokenizer_of is None:
        grey = {"image_mean": [0.3], "image_std": [0.4]}
        spread = {"image_mean": [0.3, 0.5, 0.6], "image_std": [0.4, 0.3, 0.2]}
        values: Any = grey if fields.get("num_channels") == 1 else spread
        size = {"height": SIDE, "width": SIDE}
        transformers.ViTImageProcessorPil(size=size, **values).save_pretrained(folder)
        return folder
    for path in tokenizer_of.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def fresh_base(
    folder: Path | str, head: str, classes: tuple[str, ...] = (), double: bool = True
) -> Base:
    """Load a base that no other test shares, in double precision unless told otherwise."""
    base: Base = load_base.__wrapped__(str(folder), head, classes, "cpu")
    if double:
        base.model.double()
    return base


def randomised(tensors: Tensors, seed: int = 0, scale: float = 0.3) -> Tensors:
    """Add noise to every tensor: an adapter as after training."""
    rng = np.random.default_rng(seed)
    return {
        k: (v + scale * rng.standard_normal(v.shape)).astype(np.float32) for k, v in tensors.items()
    }


def inputs(rows: int, width: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return token ids and an attention mask [rows, width], padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = np.r_[width, rng.integers(2, width + 1, rows - 1)]
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(3, VOCABULARY, (rows, width)) * mask
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
