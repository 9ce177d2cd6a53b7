"""Language modelling: which tokens are learned, read back by decoding them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpeft.errors import DataError, SpecError
from fedpeft.spec import build, describe
from fedpeft.tasks.causal_lm import CausalLm
from fedpeft.types import Example, Task

MODELS = Path(os.environ.get("FEDPEFT_MODELS", Path(__file__).parents[2] / "shared" / "models"))
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
UNMARKED = PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>"
    "{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}<u>{{ m.content }}{% endif %};{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "no"},
]


def _bytes(bos: bool = False, eos: bool = True, trim: bool = False) -> Any:
    """Make a tokenizer with one token for each byte, but for " b"; ids start with ``<pad>`` 0."""
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb"]
    inner = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, [("Ġ", "b")]))
    inner.add_special_tokens([AddedToken(name, special=True) for name in letters[:3]])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    elif trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        **({"bos_token": "<s>"} if bos else {}),
        **({"eos_token": "</s>"} if eos else {}),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tokenizer of bytes, with an end-of-text token and no BOS."""
    return _bytes()


def _encode(row: Any, tokenizer: Any, limit: int = 512, **fields: Any) -> Example:
    (example,) = CausalLm(**fields).encode([row], tokenizer, limit, [])
    return example


def _read(example: Example, tokenizer: Any) -> tuple[str, list[str]]:
    """Return the whole text, and each run of learned tokens, decoded."""
    ids, labels = example["input_ids"], example["labels"]
    learn = labels != -100
    assert ids.dtype == labels.dtype == np.int64
    assert (labels[learn] == ids[learn]).all()
    edges = np.flatnonzero(np.diff(np.r_[False, learn, False].astype(int))).reshape(-1, 2)
    return tokenizer.decode(ids), [tokenizer.decode(ids[low:high]) for low, high in edges]


def test_it_is_a_task_without_labels() -> None:
    task: Task = CausalLm()

    assert isinstance(task, Task)
    assert task.head == "causal-lm"
    assert task.labels([{"text": "a"}]) is None
    assert task.classes([{"text": "a"}]) == []
    assert describe(build("tasks", "causal_lm(max_length=8)")) == "causal_lm(max_length=8)"


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"text": "once"}, "once</s>", ["once</s>"]),
        ({"text": "end</s>"}, "end</s>", ["end</s>"]),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4</s>", ["4</s>"]),
        ({"prompt": "", "completion": "4"}, "4</s>", ["4</s>"]),
        (
            {"instruction": "Add.", "input": "2+2 ", "output": "4"},
            "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n4</s>",
            ["4</s>"],
        ),
        (
            {"instruction": "Go.", "input": " ", "output": "ok", "text": "Go. ok"},
            "### Instruction:\nGo.\n\n### Response:\nok</s>",
            ["ok</s>"],
        ),
        (
            {"instruction": "Go.", "output": "ok"},
            "### Instruction:\nGo.\n\n### Response:\nok</s>",
            ["ok</s>"],
        ),
    ],
)
def test_only_what_should_be_said_is_learned(
    tokenizer: Any, row: Any, whole: str, learned: list[str]
) -> None:
    assert _read(_encode(row, tokenizer), tokenizer) == (whole, learned)


def test_the_format_and_the_column_can_be_given(tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b", "text": "c", "body": "d"}

    assert _read(_encode(row, tokenizer, format="text"), tokenizer)[0] == "c</s>"
    assert _read(_encode(row, tokenizer, format="text", text="body"), tokenizer)[0] == "d</s>"
    assert CausalLm().encode([], tokenizer, 8, []) == []


def test_bos_and_eos_are_the_tokenizers_business() -> None:
    row = {"prompt": "q", "completion": "a"}

    with_bos, without_eos = _bytes(bos=True), _bytes(eos=False)
    assert _read(_encode(row, with_bos), with_bos) == ("<s>qa</s>", ["a</s>"])
    assert _read(_encode(row, without_eos), without_eos) == ("qa", ["a"])
    assert _read(_encode({"text": "xy"}, with_bos), with_bos) == ("<s>xy</s>", ["xy</s>"])


def test_a_prompt_keeps_the_tokens_it_has_by_itself(tokenizer: Any) -> None:
    joint = tokenizer.convert_tokens_to_ids("Ġb")
    apart = _encode({"prompt": "a ", "completion": "b"}, tokenizer)
    inside = _encode({"prompt": "a", "completion": " b"}, tokenizer)

    assert _read(apart, tokenizer) == ("a b</s>", ["b</s>"])
    assert joint not in apart["input_ids"]
    assert _read(inside, tokenizer) == ("a b</s>", [" b</s>"])
    assert inside["input_ids"][1] == joint


@pytest.mark.parametrize(
    ("template", "whole", "learned"),
    [
        (MARKED, "<u>hi;<a>yo!;<u>and;<a>no!;", ["yo!", "no!"]),
        (UNMARKED, "<user>hi;<assistant>yo;<user>and;<assistant>no;", ["yo;", "no;"]),
        (
            "chatml",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
            "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
            ["yo<|im_end|>", "no<|im_end|>"],
        ),
        (
            "plain",
            "### User:\nhi\n\n### Assistant:\nyo</s>\n\n"
            "### User:\nand\n\n### Assistant:\nno</s>\n\n",
            ["yo</s>", "no</s>"],
        ),
    ],
)
def test_only_assistant_turns_of_a_chat_are_learned(
    tokenizer: Any, template: str, whole: str, learned: list[str]
) -> None:
    example = _encode({"messages": CHAT}, tokenizer, chat_template=template)

    assert _read(example, tokenizer) == (whole, learned)


def test_a_template_comes_from_the_tokenizer_or_a_file(tmp_path: Path) -> None:
    own = _bytes()
    own.chat_template = UNMARKED
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED, encoding="utf-8")

    assert _read(_encode({"messages": CHAT}, own), own)[1] == ["yo;", "no;"]
    filed = _encode({"messages": CHAT}, own, chat_template=str(path))
    assert _read(filed, own)[1] == ["yo!", "no!"]


def test_a_token_across_the_border_of_a_turn_is_learned(tokenizer: Any) -> None:
    turns = [CHAT[0], {"role": "assistant", "content": "b"}]
    spaced = UNMARKED.replace(">{{ m.content }}", "> {{ m.content }}").replace(
        "<assistant>", "<assistant> "
    )
    example = _encode({"messages": turns}, tokenizer, chat_template=spaced)

    assert _read(example, tokenizer) == ("<user> hi;<assistant> b;", [" b;"])


@pytest.mark.parametrize(
    ("row", "cap", "whole", "learned"),
    [
        ({"text": "abcdef"}, 4, "abcd", ["abcd"]),
        ({"text": "abc"}, 4, "abc</s>", ["abc</s>"]),
        ({"prompt": "pq", "completion": "abcdef"}, 4, "pqab", ["ab"]),
        ({"prompt": "pqr", "completion": "abc"}, 4, "qrab", ["ab"]),
        ({"prompt": "pqrs", "completion": "abc"}, 4, "rsab", ["ab"]),
        ({"prompt": "pqrst", "completion": "a"}, 4, "sta</s>", ["a</s>"]),
        ({"prompt": "pqrst", "completion": "abc"}, 3, "sta", ["a"]),
        ({"prompt": "pqrstuvw", "completion": "abc"}, 2, "wa", ["a"]),
        ({"messages": CHAT}, 24, "<u>hi;<a>yo!;<u>and;<a>n", ["yo!", "n"]),
        ({"messages": CHAT}, 6, "<a>yo!", ["yo!"]),
        ({"messages": CHAT}, 5, "<a>yo", ["yo"]),
    ],
)
def test_cutting_leaves_half_of_the_room_to_the_completion(
    tokenizer: Any, row: Any, cap: int, whole: str, learned: list[str]
) -> None:
    example = _encode(row, tokenizer, max_length=cap, chat_template=MARKED)

    assert len(example["input_ids"]) == cap
    assert _read(example, tokenizer) == (whole, learned)


def test_cutting_a_prompt_keeps_bos() -> None:
    with_bos = _bytes(bos=True)
    row = {"prompt": "pqrs", "completion": "abc"}

    assert _read(_encode(row, with_bos, max_length=4), with_bos) == ("<s>sab", ["ab"])
    assert _read(_encode(row, with_bos, max_length=2), with_bos) == ("<s>a", ["a"])


def test_collate_pads_on_the_right_and_ignores_padding(tokenizer: Any) -> None:
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "pq", "completion": "ab"}]
    task = CausalLm()
    examples = task.encode(rows, tokenizer, 16, [])
    inputs, labels = task.collate(examples, pad=0)
    p, q, a, b = (tokenizer.convert_tokens_to_ids(x) for x in "pqab")

    assert inputs["input_ids"].tolist() == [[p, a, 2, 0, 0], [p, q, a, b, 2]]
    assert inputs.keys() == {"input_ids"}  # a causal model needs no mask to the right
    assert labels.tolist() == [[-100, a, 2, -100, -100], [-100, -100, a, b, 2]]
    assert all(t.dtype == torch.int64 for t in [*inputs.values(), labels])


def test_a_loss_is_the_mean_over_a_records_own_tokens() -> None:
    # token losses: ln 4 and ln 4/3 in record 0, whose last logits predict nothing; ln 4 in 1
    ln3 = math.log(3)
    logits = torch.tensor(
        [[[0.0, ln3], [0.0, ln3], [9.0, 9.0]], [[5.0, 0.0], [0.0, ln3], [0.0, 0.0]]]
    )
    labels = torch.tensor([[1, 0, 1], [1, -100, 0]])
    task = CausalLm()

    expected = [math.log(16 / 3) / 2, math.log(4)]
    assert task.losses(logits, labels).tolist() == pytest.approx(expected)
    tally = task.tally(logits, labels)
    assert tally == pytest.approx({"loss_sum": math.log(64 / 3), "tokens": 3.0, "correct": 1.0})
    assert task.metrics(tally) == pytest.approx(
        {"loss": math.log(64 / 3) / 3, "perplexity": (64 / 3) ** (1 / 3), "token_accuracy": 1 / 3}
    )
    assert task.losses(logits.bfloat16(), labels).dtype == torch.float32
    assert task.losses(logits.double(), labels).dtype == torch.float64


def test_losses_and_their_gradients_match_one_record_at_a_time_in_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4], labels[1, 5:] = -100, -100
    losses = CausalLm().losses(logits, labels)
    (gradient,) = torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 3.0])).sum(), logits)

    for i in range(3):
        single = logits[i].detach().clone().requires_grad_()
        oracle = torch.nn.functional.cross_entropy(single[:-1], labels[i, 1:])
        (expected,) = torch.autograd.grad(oracle * (i + 1), single)
        torch.testing.assert_close(losses[i], oracle)
        torch.testing.assert_close(gradient[i], expected)


def test_a_record_loses_the_same_beside_longer_records(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64,
        initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = [
        {"prompt": "one", "completion": "two"},
        {"prompt": "a prompt that is longer", "completion": "yes"},
        {"prompt": "", "completion": "a completion that is longer"},
    ]
    task = CausalLm()
    examples = task.encode(rows, tokenizer, 64, [])

    def losses(chosen: list[int]) -> torch.Tensor:
        inputs, labels = task.collate([examples[i] for i in chosen], 0)
        with torch.no_grad():
            return task.losses(model(**inputs).logits, labels)

    alone = torch.cat([losses([i]) for i in range(3)])
    torch.testing.assert_close(losses([0, 1, 2]), alone, rtol=0, atol=1e-5)
    assert len({round(float(x), 3) for x in alone}) == 3
    torch.testing.assert_close(losses([2, 0]), alone[[2, 0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({}, {"body": "a"}, r"row 1 has the columns body, not 'text', 'prompt' and 'completion', "),
        ({"format": "text"}, {"txt": "a"}, r"row 1 has no column 'text'; did you mean 'txt'\?"),
        ({"format": "instruct"}, {"instruction": "a"}, r"row 1 has no column 'output'; there is "),
        ({}, {"text": None}, r"row 1: column 'text' is None, not text; convert it or remove"),
        ({}, {"prompt": ["a"], "completion": "a"}, r"column 'prompt' is a list, not text"),
        ({}, {"instruction": "a", "input": 5, "output": "a"}, r"column 'input' is 5, not text"),
        ({"max_length": 17}, {"text": "a"}, r"max_length=17 is more than the 16 tokens the model"),
        (
            {},
            {"prompt": "a" * 12, "completion": "a" * 6},
            r"row 1 is 19 tokens long and the model takes 16; set max_length=16 to cut longer rows",
        ),
        ({}, {"text": ""}, r"row 1 has no token to learn; remove the row"),
        ({}, {"messages": "hi"}, r"column 'messages' is a str, not a list of messages"),
        ({}, {"messages": ["hi"]}, r"message 1 has None as its 'role', not text; write \{'role'"),
        ({}, {"messages": [{"role": "user"}]}, r"message 1 has None as its 'content', not text"),
        ({}, {"messages": CHAT[:1]}, r"row 1 has no message of the role 'assistant'"),
        ({}, {"messages": CHAT}, r"row 1 is a chat and the tokenizer has no chat template; set"),
    ],
)
def test_unusable_rows_are_named(tokenizer: Any, fields: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _encode(row, tokenizer, 16, **fields)


def test_a_later_row_is_counted_from_one(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 2 has no column 'completion'"):
        CausalLm().encode([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], tokenizer, 9, [])


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}#{% endif %}{% endfor %}",
            CHAT,
            r"row 1: the chat template writes message 2 differently when messages follow; use a",
        ),
        (UNMARKED, CHAT[1:], r"row 1 starts with the assistant; put a user's message before it"),
        ("{{ raise_exception('no') }}", CHAT, r"row 1: the chat template fails: no$"),
        ("{% if %}", CHAT, r"row 1: the chat template fails: "),
    ],
)
def test_templates_that_cannot_be_followed_are_refused(
    tokenizer: Any, template: str, turns: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _encode({"messages": turns}, tokenizer, chat_template=template)


def test_turns_that_transformers_would_drop_without_a_word_are_refused() -> None:
    trimming = _bytes(trim=True)
    turns = [*CHAT[:3], {"role": "assistant", "content": " b"}]

    with pytest.raises(DataError, match=r"row 1: the chat template marks 1 of 2 assistant turns"):
        _encode({"messages": turns}, trimming, chat_template=MARKED)
    unmarked = _encode({"messages": turns}, trimming, chat_template=UNMARKED)
    assert _read(unmarked, trimming)[1] == ["yo;", " b;"]


def test_wrong_settings_are_refused_at_construction() -> None:
    with pytest.raises(SpecError, match=r"chat_template='chatm' is no file.*mean 'chatml'\?"):
        CausalLm(chat_template="chatm")


@pytest.mark.parametrize("kind", ["long", "bytes"])
def test_a_chat_template_that_cannot_be_read_is_a_mistake_in_the_plan(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / ("x" * 300 if kind == "long" else "template.jinja")
    if kind == "bytes":
        path.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(SpecError, match=r"chat_template=.* cannot be read"):
        CausalLm(chat_template=str(path))


def test_the_text_of_a_chat_template_travels_in_place_of_its_path(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}\n")
    there = CausalLm(chat_template=str(path), max_length=9)
    carried = there.carried()
    assert carried == CausalLm(chat_template=path.read_text(), max_length=9)
    assert build("tasks", describe(carried, full=True)) == carried
    for own in (None, "plain", "{{ messages }}"):
        assert CausalLm(chat_template=own).carried() == CausalLm(chat_template=own)
    with pytest.raises(SpecError, match=r"max_length=1 must be at least 2"):
        CausalLm(max_length=1)
    with pytest.raises(SpecError, match=r"format='alpaca' must be one of 'auto', 'text'"):
        build("tasks", "causal_lm(format='alpaca')")
    with pytest.raises(DataError, match=r"no record to evaluate"):
        CausalLm().metrics({})
    assert (
        CausalLm().metrics({"loss_sum": 1e6, "tokens": 1.0, "correct": 0.0})["perplexity"] < 1e305
    )


@pytest.mark.skipif(not (MODELS / "tiny-novels-llama").is_dir(), reason="set FEDPEFT_MODELS")
def test_a_real_tokenizer_gives_back_the_text() -> None:
    real = AutoTokenizer.from_pretrained(MODELS / "tiny-novels-llama")
    row = {"instruction": "Name the ship.", "input": "", "output": "It was the Pequod."}
    text, learned = _read(_encode(row, real), real)

    assert text.endswith("### Response:\nIt was the Pequod.</s>")
    assert learned == ["It was the Pequod.</s>"]
    chatting = _encode({"messages": CHAT}, real, chat_template="plain")
    assert _read(chatting, real)[1] == ["yo</s>", "no</s>"]
