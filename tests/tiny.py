"""Tiny random models and a small support data set: whole runs in seconds, without any download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedpeft.data import _support
from fedpeft.plan import Plan

LABELS = ("billing", "cancel", "delivery", "login")
TRAIN, TEST = 120, 40
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LIMIT = 128


def tiny_bert(folder: Path) -> Path:
    """Write a random BERT (hidden size 32, 2 layers, no classifier) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = _vocabulary()
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.normalizer = BertNormalizer(lowercase=True)
    made.pre_tokenizer = BertPreTokenizer()
    made.post_processor = BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=_LIMIT,
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=_LIMIT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
    return _saved(folder, model, tokenizer)


def tiny_llama(folder: Path) -> Path:
    """Write a random Llama (hidden size 32, 2 layers) and its byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(BPE(unk_token=None))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=_LIMIT,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=_LIMIT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return _saved(folder, model, tokenizer)


def support_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return 120 training and 40 test messages, labelled with 4 intents in equal parts."""
    train, test = _embedded()
    return _even(train, TRAIN), _even(test, TEST)


def support_files(folder: Path) -> tuple[Path, Path]:
    """Write :func:`support_rows` as ``support.train.jsonl`` and ``support.test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "support.train.jsonl", folder / "support.test.jsonl"
    for path, rows in zip(paths, support_rows(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def support_lines(model_folder: Path, **lines: Any) -> dict[str, Any]:
    """Return the lines of :func:`support_plan`; ``lines`` replace or add whole lines."""
    train, test = support_files(model_folder.parent)
    return {
        "model": str(model_folder),
        "task": "classify",
        "data": f"jsonl(train={str(train)!r}, test={str(test)!r})",
        "partition": "dirichlet(alpha=1.0)",
        "clients": 4,
        "adapter": "lora(r=4, alpha=8)",
        "trainer": "plain(optimizer='adamw', lr=5e-3, steps=2, batch=4)",
        "rounds": 2,
        "seed": 0,
    } | lines


def support_plan(model_folder: Path, **lines: Any) -> Plan:
    """Return a plan of 4 clients and 2 rounds; its data lie beside the model's folder."""
    return Plan.from_lines(support_lines(model_folder, **lines))


@lru_cache(maxsize=1)
def _embedded() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return _support.rows()


def _even(rows: Sequence[dict[str, str]], total: int) -> list[dict[str, str]]:
    each = {label: [r for r in rows if r["label"] == label] for label in LABELS}
    return [each[LABELS[i % len(LABELS)]][i // len(LABELS)] for i in range(total)]


def _texts() -> list[str]:
    return [row["text"] for row in support_rows()[0]]


def _vocabulary() -> dict[str, int]:
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normal, cut = BertNormalizer(lowercase=True), BertPreTokenizer()
    found = {word for t in _texts() for word, _ in cut.pre_tokenize_str(normal.normalize_str(t))}
    return {word: i for i, word in enumerate((*_SPECIAL, *sorted(found)))}


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
