"""What the engine benchmark trains, and how much arithmetic that is.

Every client takes the same number of SGD steps in every round, so client-steps are easily counted,
and nothing is evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data._batching import stream
from fedpeft.data._files import find
from fedpeft.plan import Plan
from fedpeft.rng import derive, derive_seed
from fedpeft.types import Population

if TYPE_CHECKING:
    from fedpeft.site import Site

NAMES = ("a1", "a2", "a8", "b4", "b16", "c")
"""(a) a language model on Shakespeare, 64 clients a round; (b) MiniLM on SST-2, 16 clients; both at
the batch size in the name; (c) a tiny random model, 100 of 1,000 clients a round."""
QUICK = "quick"
ROUNDS = 20

_ALWAYS: dict[str, Any] = {
    "rounds": ROUNDS,
    "holdout": 0.0,
    "evaluate": "none",
    "eval_every": 1000,
    "seed": 0,
}
_WORDS, _LIMIT = [f"w{i}" for i in range(200)], 32


def lines(name: str, folder: Path) -> dict[str, Any]:
    """Return the plan lines of a workload; the data of (c) are written to ``folder``."""
    if name in (QUICK, "c"):
        clients, size = (1000, 100) if name == "c" else (24, 8)
        return _ALWAYS | _random(folder, clients) | {"cohort": f"uniform(size={size})"}
    batch = int(name[1:])
    if name.startswith("a"):
        return _ALWAYS | {
            "model": "tiny-novels",
            "task": "causal_lm(max_length=128)",
            "data": f"jsonl(train={str(find('lm/shakespeare.train.jsonl.gz').resolve())!r})",
            "partition": 'by_field(field="client", min_size=8)',
            "adapter": 'lora(r=8, alpha=16, targets="all-linear")',
            "trainer": f'plain(optimizer="sgd", lr=0.2, steps=4, batch={batch})',
            "cohort": "uniform(size=64)",
        }
    return _ALWAYS | {
        "model": "minilm",
        "task": "classify(max_length=64)",
        "data": f"jsonl(train={str(find('cls/sst2.train.jsonl.gz').resolve())!r})",
        "partition": "dirichlet(alpha=0.5)",
        "clients": 16,
        "adapter": "lora(r=8, alpha=16)",
        "trainer": f'plain(optimizer="sgd", lr=0.05, steps=4, batch={batch})',
        "cohort": "uniform(size=16)",
    }


def work(plan: Plan, site: Site) -> dict[str, Any]:
    """Return what a round of the plan is: clients, steps, and the tokens of each round.

    A step on T real tokens (padding is no work) takes ``T * (4 P + 6 Q)`` FLOPs, where P are the
    weights of the base's linear layers, the language model's output layer among them, and Q those
    of the adapter without a classification head. A weight costs a multiplication and an addition
    per token in the forward pass, the same again in the backward pass to the layer's input, and,
    where it trains, once more for its own gradient. Attention's products are left out.
    """
    linear = sum(out * width for out, width in site.base.outline.linear.values())
    if plan.task.head == "causal-lm":
        model: Any = site.base.model
        linear += model.get_output_embeddings().weight.numel()
    adapter = sum(value.size for name, value in site.initial.items() if ".lora_" in name)
    tokens, steps = [], 0
    for round in range(plan.rounds):
        chosen = cohort(plan, site.federation.population, round)
        drawn = [_drawn(plan, site, client, round) for client in chosen]
        tokens.append(sum(map(sum, drawn)))
        steps = sum(map(len, drawn))
    per_token = 4 * linear + 6 * adapter
    return {"clients": len(chosen), "steps": steps, "tokens": tokens, "flops_per_token": per_token}


def tiny_bert(folder: Path) -> None:
    """Write a random BERT (width 32, 2 layers) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *_WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=_LIMIT
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=_LIMIT,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cohort(plan: Plan, population: Population, round: int) -> Sequence[str]:
    """Return the clients of a round."""
    return plan.cohort.choose(list(population), derive(plan.seed, round, "cohort"))


def order(
    plan: Plan, client: str, round: int, lengths: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    """Yield a client's batches of a round: those of ``fedpeft.trainers.plain``."""
    trainer: Any = plan.trainer
    seed = derive_seed(plan.seed, round, client, "train")
    return stream(lengths, trainer.batch, derive(seed, "order"), trainer.budget(len(lengths))[0])


def _drawn(plan: Plan, site: Site, client: str, round: int) -> list[int]:
    """Return the real tokens of each of a client's batches."""
    examples = site.train(client)
    lengths = [len(example["input_ids"]) for example in examples]
    return [sum(lengths[i] for i in rows) for rows in order(plan, client, round, lengths)]


def _random(folder: Path, clients: int) -> dict[str, Any]:
    """Write 8 random texts for each client; :func:`tiny_bert` writes the model."""
    rng = derive(0, "engine benchmark")
    rows = [
        {
            "text": " ".join(rng.choice(_WORDS, int(rng.integers(6, _LIMIT - 4)))),
            "label": ("no", "yes")[int(rng.integers(2))],
        }
        for _ in range(8 * clients)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "task": f"classify(max_length={_LIMIT})",
        "data": f"jsonl(train={str(path)!r})",
        "clients": clients,
        "adapter": "lora(r=4, alpha=8)",
        "trainer": 'plain(optimizer="sgd", lr=0.1, steps=2, batch=4)',
    }
