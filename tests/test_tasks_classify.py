"""Classification: labels, tokens, padding, losses that leave other records alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedpeft.errors import DataError, SpecError
from fedpeft.spec import build, describe
from fedpeft.tasks.classify import Classify
from fedpeft.types import Task

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "a"]
ROWS = [
    {"text": "a good film", "label": 1},
    {"text": "bad", "label": 0},
    {"text": "a bad bad film", "label": 0},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer of eight words that writes ``[CLS] a [SEP] b [SEP]``."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def bare() -> Any:
    """Return a tokenizer without special tokens."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_it_is_a_task_whose_records_have_labels() -> None:
    task: Task = Classify()

    assert isinstance(task, Task)
    assert task.head == "sequence-classification"
    assert Classify.offers == {
        "labels": "every record has one",
        "cross-entropy": "a record's loss is that of its label",
    }
    assert task.labels(ROWS) == ["1", "0", "0"]
    assert describe(build("tasks", "classify(label='y', max_length=8)")) == (
        "classify(label='y', max_length=8)"
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([10, 9, 2, 9], ["2", "9", "10"]),
        (["10", "-1", "9"], ["-1", "9", "10"]),
        (["pos", "neg", "pos"], ["neg", "pos"]),
        ([10, "x", 9], ["10", "9", "x"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_sorted_by_number_if_all_are_whole(
    labels: list[Any], expected: list[str]
) -> None:
    assert Classify().classes([{"label": label} for label in labels]) == expected


@pytest.mark.parametrize("names", ["1, 0,2", ["1", "0", "2"], ("1", "0", "2"), [1, 0, 2]])
def test_explicit_classes_keep_their_order(names: Any) -> None:
    assert Classify(names=names).classes(ROWS) == ("1", "0", "2")


def test_one_text_becomes_ids_with_special_tokens(tokenizer: Any) -> None:
    examples = Classify().encode(ROWS, tokenizer, 16, ["0", "1"])

    assert [e["input_ids"].tolist() for e in examples] == [
        [1, 7, 4, 6, 2],
        [1, 5, 2],
        [1, 7, 5, 5, 6, 2],
    ]
    assert [int(e["labels"]) for e in examples] == [1, 0, 0]
    assert all(set(e) == {"input_ids", "labels"} for e in examples)
    assert all(v.dtype == np.int64 for e in examples for v in e.values())
    assert examples[0]["labels"].shape == ()
    assert Classify().encode([], tokenizer, 16, ["0", "1"]) == []


def test_a_pair_is_found_by_its_column_and_keeps_token_types(tokenizer: Any) -> None:
    rows = [{"text": "good", "text_pair": "a film", "q": "bad", "label": 0}]

    def only(task: Classify) -> dict[str, list[int]]:
        (example,) = task.encode(rows, tokenizer, 16, ["0", "1"])
        return {k: v.tolist() for k, v in example.items()}

    assert only(Classify()) == {
        "input_ids": [1, 4, 2, 7, 6, 2],
        "token_type_ids": [0, 0, 0, 1, 1, 1],
        "labels": 0,
    }
    assert only(Classify(pair="q"))["input_ids"] == [1, 4, 2, 5, 2]
    assert only(Classify(pair="")) == {"input_ids": [1, 4, 2], "labels": 0}
    rows[0]["text_pair"] = None
    assert only(Classify()) == {"input_ids": [1, 4, 2], "labels": 0}


def test_max_length_cuts_and_keeps_the_special_tokens(tokenizer: Any) -> None:
    examples = Classify(max_length=4).encode(ROWS, tokenizer, 16, ["0", "1"])

    assert [e["input_ids"].tolist() for e in examples] == [[1, 7, 4, 2], [1, 5, 2], [1, 7, 5, 2]]


def test_collate_pads_on_the_right_to_the_longest(tokenizer: Any) -> None:
    rows = [
        {"text": "good", "text_pair": "a film", "label": 1},
        {"text": "bad", "text_pair": "a", "label": 0},
    ]
    task = Classify()
    inputs, labels = task.collate(task.encode(rows, tokenizer, 16, ["0", "1"]), pad=9)

    assert inputs["input_ids"].tolist() == [[1, 4, 2, 7, 6, 2], [1, 5, 2, 7, 2, 9]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 1, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert labels.tolist() == [1, 0]
    assert all(t.dtype == torch.int64 for t in [*inputs.values(), labels])


def test_losses_are_cross_entropy_in_float32_whatever_the_logits_are() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    labels = torch.tensor([1, 0])

    assert Classify().losses(logits, labels).tolist() == pytest.approx([0.287682, 1.386294])
    half = Classify().losses(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert Classify().losses(logits.double(), labels).dtype == torch.float64


def test_tallies_add_up_to_metrics() -> None:
    task = Classify()
    # truth 0 0 1 2, guesses 0 1 1 1; class 3 neither occurs nor is guessed
    guesses = torch.eye(4)[[0, 1, 1, 1]] * 100
    labels = torch.tensor([0, 0, 1, 2])
    parts = [task.tally(guesses[:1], labels[:1]), task.tally(guesses[1:], labels[1:])]
    total = {k: parts[0][k] + parts[1][k] for k in parts[0]}

    assert parts[0].keys() == parts[1].keys()
    assert total == pytest.approx(task.tally(guesses, labels))
    metrics = task.metrics(total)
    assert metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(50.0)
    assert metrics["f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_a_record_loses_the_same_beside_longer_records(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    task = Classify()
    examples = task.encode(ROWS, tokenizer, 16, ["0", "1"])

    def losses(chosen: list[int]) -> torch.Tensor:
        inputs, labels = task.collate([examples[i] for i in chosen], 0)
        with torch.no_grad():
            return task.losses(model(**inputs).logits, labels)

    alone = torch.cat([losses([i]) for i in range(3)])
    torch.testing.assert_close(losses([0, 1, 2]), alone, rtol=0, atol=1e-5)
    assert len({round(float(x), 4) for x in alone}) == 3


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (Classify(), {"txt": "a", "label": 0}, r"row 2 has no column 'text'; did you mean 'txt'\?"),
        (Classify(), {"text": "a"}, r"row 2 has no column 'label'; there is text$"),
        (Classify(), {"text": "a", "label": None}, r"row 2: column 'label' is None, not one label"),
        (Classify(), {"text": "a", "label": ""}, r"row 2: column 'label' is '', not one label"),
        (Classify(), {"text": "a", "label": math.nan}, r"column 'label' is nan, not one label"),
        (Classify(), {"text": "a", "label": [0, 1]}, r"column 'label' is a list, not one label"),
        (
            Classify(),
            {"text": None, "label": 0},
            r"row 2: column 'text' is None, not text; convert",
        ),
        (Classify(), {"text": 3, "label": 0}, r"row 2: column 'text' is 3, not text"),
        (
            Classify(),
            {"text": "a", "label": 7},
            r"row 2: label '7' is not a known class; there is ",
        ),
        (Classify(pair="b"), {"text": "a", "label": 0}, r"row 1 has no column 'b'"),
        (
            Classify(),
            {"text": "a", "text_pair": "a", "label": 0},
            r"row 1 has no column 'text_pair'",
        ),
        (Classify(max_length=17), {}, r"max_length=17 is more than the 16 tokens the model takes"),
        (
            Classify(max_length=2),
            {"text": "a", "label": 0},
            r"no room for text beside 2 special to",
        ),
        (
            Classify(),
            {"text": "a " * 15, "label": 0},
            r"row 2 is 17 tokens long and the model takes 16; set max_length=16 to cut",
        ),
    ],
)
def test_unusable_rows_are_named(tokenizer: Any, task: Classify, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.encode([ROWS[0], row], tokenizer, 16, ["0", "1"])


def test_a_text_without_tokens_is_refused(bare: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 has no token; remove the row"):
        Classify().encode([{"text": " ", "label": 0}], bare, 16, ["0", "1"])


def test_unusable_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"'label' holds 1 different labels \(1\) and classifying"):
        Classify().classes(ROWS[:1])
    with pytest.raises(DataError, match=r"holds 0 different labels \(there are no rows\)"):
        Classify().classes([])
    with pytest.raises(DataError, match=r"row 1: label '1' is not a known class; there is yes, no"):
        Classify(names="yes,no").classes(ROWS)
    with pytest.raises(SpecError, match=r"names='a' must be two or more different classes"):
        Classify(names="a")
    with pytest.raises(SpecError, match=r"names=\['a', 'a'\] must be two or more different"):
        Classify(names=["a", "a"])
    with pytest.raises(SpecError, match=r"max_length=0 must be at least 1"):
        Classify(max_length=0)
    with pytest.raises(DataError, match=r"no record to evaluate"):
        Classify().metrics({})
