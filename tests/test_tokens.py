"""Tokenised records: flat arrays that give every example back, and the cache they are kept in."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import site, token_cache
from fedpeft.data._batching import longest, several
from fedpeft.errors import DataError, RunError
from fedpeft.federation import deal
from fedpeft.models._base import load_tokenizer
from fedpeft.site import Site, Texts, encode
from fedpeft.token_cache import Tokenised, cached, key_of
from fedpeft.tokens import Tokens, pack
from fedpeft.types import Example
from tests.tiny import support_lines, support_plan
from tests.waiting import HANGS

ROOT = Path(__file__).parents[1]
RECORDS = 20


def example(i: int) -> Example:
    return {"input_ids": np.arange(i % 5, dtype=np.int64) + 250, "labels": np.array(-i, np.int64)}


def made() -> dict[str, Sequence[Example]]:
    train, test = pack([[example(i) for i in range(RECORDS)]]), pack([])
    assert train is not None
    assert test is not None
    return {"train": train, "test": test}


def never() -> Tokenised:
    raise AssertionError("tokenised again")


def check_same(found: Sequence[Example], expected: Sequence[Example]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, array in theirs.items():
            assert ours[name].dtype == np.int64
            np.testing.assert_array_equal(ours[name], array, strict=True)


# --- flat arrays -------------------------------------------------------------------------------

numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 200)
records = st.lists(
    st.tuples(st.lists(numbers, max_size=4), st.lists(numbers, max_size=3), numbers), max_size=12
)


@given(records, st.integers(1, 5))
def test_examples_come_back_bit_for_bit(drawn: list[tuple[Any, Any, int]], piece: int) -> None:
    given = [
        {
            "input_ids": np.array(ids, np.int64),
            "labels": np.array(labels, np.int64),
            "class": np.array(number, np.int64),
        }
        for ids, labels, number in drawn
    ]
    tokens = pack([given[i : i + piece] for i in range(0, len(given), piece)])
    assert tokens is not None
    check_same(tokens, given)
    check_same(pickle.loads(pickle.dumps(tokens)), given)
    assert tokens.lengths.tolist() == [len(ids) for ids, _, _ in drawn]
    order = np.random.default_rng(len(given)).permutation(len(given))
    view = tokens.rows(order)
    check_same(view, [given[i] for i in order])
    check_same(pickle.loads(pickle.dumps(view)), [given[i] for i in order])
    assert view.lengths.tolist() == tokens.lengths[order].tolist()
    check_same(tokens[1:4], given[1:4])
    check_same(view[::-2], [given[i] for i in order][::-2])


def test_rows_are_a_sequence() -> None:
    tokens = made()["train"]
    assert isinstance(tokens, Tokens)
    for found in (tokens, tokens.rows(np.arange(RECORDS))):
        check_same([found[-1]], [example(RECORDS - 1)])
        check_same([found[np.int64(3)]], [example(3)])  # type: ignore[call-overload]
        for wrong in (RECORDS, -RECORDS - 1):
            with pytest.raises(IndexError):
                _ = found[wrong]
    view = tokens.rows(np.array([4]))
    assert view[0] is view[0], "trainers ask for the same example in every pass"
    assert view
    assert not tokens.rows(np.zeros(0, np.int64))


@pytest.mark.parametrize("width", [0, 3])
def test_several_are_the_same_as_one_by_one(width: int) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (2, 3), np.uint8) for _ in range(RECORDS)]
    kinds: dict[int, list[Example]] = {
        0: [example(i) for i in range(RECORDS)],
        3: [{"pixel_values": image, "labels": np.array(3)} for image in images],
    }
    packed = pack([kinds[width]])
    assert packed is not None
    rows, chosen = packed.rows(rng.permutation(RECORDS)), rng.integers(0, RECORDS, 7)
    found = several(rows, chosen)
    for ours, i in zip(found, chosen.tolist(), strict=True):
        assert list(ours) == list(rows[i])
        for name, array in rows[i].items():
            assert ours[name].dtype == array.dtype
            np.testing.assert_array_equal(ours[name], array)
            assert width == 0 or array.ndim == 0 or not ours[name].flags.writeable
    lengths = [len(rows[i].get("input_ids", [0])) for i in chosen.tolist()]
    assert longest(rows, chosen) == longest([*rows], chosen) == max(lengths)
    assert [e["labels"] for e in several([*rows], chosen)] == [e["labels"] for e in found]


def test_an_example_shares_no_memory() -> None:
    tokens = made()["train"]
    tokens[4]["input_ids"][:] = 0
    check_same(tokens, [example(i) for i in range(RECORDS)])


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, "u1"),
        (0, 256, "u2"),
        (0, 65536, "u4"),
        (-1, 127, "i1"),
        (-100, 128, "i2"),
        (-100, 50_000, "i4"),
        (-1, 2**63 - 1, "i8"),
    ],
)
def test_values_take_the_smallest_type(low: int, high: int, dtype: str) -> None:
    tokens = pack([[{"input_ids": np.array([low, high])}]])
    assert tokens is not None
    assert tokens.columns["input_ids"].values.dtype == dtype
    assert tokens[0]["input_ids"].tolist() == [low, high]


IDS = np.arange(3)


@pytest.mark.parametrize(
    "pieces",
    [
        [[{"labels": IDS}]],
        [[{"input_ids": IDS, "weight": np.array(0.5)}]],
        [[{"input_ids": IDS.reshape(3, 1)}]],
        [[{"input_ids": IDS}, {"input_ids": IDS, "labels": IDS}]],
        [[{"input_ids": IDS}], [{"input_ids": IDS, "labels": IDS}]],
        [[{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": np.array(1)}]],
        [[{"input_ids": IDS, "labels": IDS}], [{"input_ids": IDS, "labels": np.array(1)}]],
    ],
)
def test_what_is_no_record_of_tokens_is_not_packed(pieces: list[list[Example]]) -> None:
    assert pack(pieces) is None


# --- images ------------------------------------------------------------------------------------


def image(i: int) -> Example:
    pixels = np.arange(i, i + 2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    return {"pixel_values": pixels, "labels": np.array(-i, np.int64)}


def check_images(found: Sequence[Example], expected: Sequence[Example]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, strict=True)


@pytest.mark.parametrize("piece", [1, 3, 20])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f4"])
def test_images_come_back_with_their_type(piece: int, dtype: str) -> None:
    kind = np.dtype(dtype)
    given = [{**image(i), "pixel_values": image(i)["pixel_values"].astype(kind)} for i in range(7)]
    tokens = pack([given[i : i + piece] for i in range(0, len(given), piece)])
    assert tokens is not None
    native = [
        {**e, "pixel_values": e["pixel_values"].astype(kind.newbyteorder("="))} for e in given
    ]
    check_images(tokens, native)
    check_images(pickle.loads(pickle.dumps(tokens)), native)
    assert tokens.lengths.tolist() == [1] * 7
    view = tokens.rows(np.array([4, 0, 4]))
    check_images(view, [native[i] for i in (4, 0, 4)])
    assert view.lengths.tolist() == [1] * 3
    check_images(tokens[5:], native[5:])


def test_images_are_bytes_that_are_not_copied() -> None:
    tokens = pack([[image(i) for i in range(5)]])
    assert tokens is not None
    values = tokens.columns["pixel_values"].values
    assert (values.nbytes, values.dtype) == (5 * 24, np.dtype(np.uint8))
    assert np.shares_memory(tokens[3]["pixel_values"], values)
    with pytest.raises(ValueError, match="read-only"):
        tokens[3]["pixel_values"][:] = 0
    turned = np.moveaxis(np.zeros((4, 3, 2), np.uint8), -1, 0)
    found = pack([[{"pixel_values": turned}] * 2])
    assert found is not None
    assert found.columns["pixel_values"].values.flags.c_contiguous


PIXELS = image(0)["pixel_values"]


@pytest.mark.parametrize(
    "pieces",
    [
        [[{"pixel_values": PIXELS}, {"pixel_values": PIXELS[:, 1:]}]],
        [[{"pixel_values": PIXELS}], [{"pixel_values": PIXELS[:, 1:]}]],
        [[{"pixel_values": PIXELS}, {"pixel_values": PIXELS.astype(np.int64)}]],
        [[{"pixel_values": PIXELS}], [{"pixel_values": PIXELS.astype(np.int64)}]],
        [[{"pixel_values": PIXELS}, {"pixel_values": np.array(1)}]],
        [[{"pixel_values": PIXELS}], [{"pixel_values": np.array(1)}]],
        [[{"pixel_values": PIXELS.astype(object)}]],
        [[{"pixel_values": PIXELS[:0]}]],
        [[{"pixel_values": PIXELS, "labels": np.array(0.5)}]],
        [[{"input_ids": PIXELS}]],
    ],
)
def test_images_that_differ_are_not_packed(pieces: list[list[Example]]) -> None:
    assert pack(pieces) is None


def test_images_are_kept_on_disk(folder: Path) -> None:
    given = [image(i) for i in range(9)]

    def make() -> Tokenised:
        train, test = pack([given]), pack([])
        assert train is not None
        assert test is not None
        return {"train": train, "test": test}

    cached("key", make)
    assert (folder / "key" / "train-0.values").stat().st_size == 9 * 24
    found = cached("key", never)["train"]
    check_images(found, given)
    check_images(pickle.loads(pickle.dumps(found)), given)
    with pytest.raises(ValueError, match="read-only"):
        found[0]["pixel_values"][:] = 0


def test_an_entry_of_another_shape_is_made_again(folder: Path) -> None:
    cached("key", made)
    path = folder / "key" / "manifest.json"
    text = path.read_text().partition("\n")[2]
    for old in (
        text.replace('"shape"', '"count"'),
        re.sub(r'"shape": \[\s*20', '"shape": [7', text),
    ):
        assert old != text
        path.write_text(f"{xxhash.xxh3_64_hexdigest(old.encode())}\n{old}")
        check_same(cached("key", made)["train"], made()["train"])
        check_same(cached("key", never)["train"], made()["train"])


# --- the cache ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_what_is_kept_is_not_made_again(folder: Path) -> None:
    for _ in range(2):
        found = cached("key", made if not folder.exists() else never)
        check_same(found["train"], made()["train"])
        assert len(found["test"]) == 0
    assert [p.name for p in folder.iterdir()] == ["key"]
    assert folder.stat().st_mode & 0o77 == 0, "the texts can be read off the tokens"


def test_nothing_is_kept_without_a_key(folder: Path) -> None:
    check_same(cached(None, made)["train"], made()["train"])
    assert not folder.exists()


def test_lists_are_handed_through(folder: Path) -> None:
    split = {"train": [example(1)], "test": made()["test"]}
    assert cached("key", lambda: split) is split
    assert not folder.exists()


def test_a_kept_split_is_pickled_as_its_place(folder: Path) -> None:
    tokens = cached("key", made)["train"]
    text = pickle.dumps(tokens)
    assert len(text) < 400
    check_same(pickle.loads(text), made()["train"])
    shutil.rmtree(folder)
    check_same(tokens, made()["train"])  # the mapped files are still there
    with pytest.raises(RunError, match=r"key: removed or damaged .*; start the run again"):
        pickle.loads(text)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("damage", [_shorten, _lengthen, _flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["manifest.json", "train-0.values", "train-0.offsets", "train-1.values"]
)
def test_a_damaged_entry_is_made_again(
    folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    cached("key", made)
    damage(folder / "key" / name)
    check_same(cached("key", made)["train"], made()["train"])
    check_same(cached("key", never)["train"], made()["train"])
    assert [p.name for p in folder.iterdir()] == ["key"]


@pytest.mark.parametrize("text", ["", "{}", "0" * 16 + "\n{}", "[]", "\xff"])
def test_a_manifest_of_something_else_is_made_again(folder: Path, text: str) -> None:
    (folder / "key").mkdir(parents=True)
    (folder / "key" / "manifest.json").write_bytes(text.encode("latin-1"))
    check_same(cached("key", made)["train"], made()["train"])
    check_same(cached("key", never)["train"], made()["train"])


def test_where_nothing_can_be_written_arrays_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / place))
        found = cached("key", made)["train"]
        check_same(pickle.loads(pickle.dumps(found)), made()["train"])


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "_write", full)
    check_same(cached("key", made)["train"], made()["train"])
    assert list(folder.iterdir()) == []


def test_who_comes_second_takes_what_the_first_has_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: int) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr("fcntl.flock", fails)

    def overtaken() -> Tokenised:
        cached("key", made)
        return made()

    check_same(cached("key", overtaken)["train"], made()["train"])
    assert [p.name for p in folder.iterdir()] == ["key"]


def test_what_a_killed_writer_left_is_in_nobodys_way(folder: Path) -> None:
    cached("key", made)
    (folder / "key").rename(folder / ".new-killed")
    check_same(cached("key", made)["train"], made()["train"])


def test_errors_of_the_maker_are_raised(folder: Path) -> None:
    def fails() -> Tokenised:
        raise DataError("row 3 is empty")

    with pytest.raises(DataError, match="row 3 is empty"):
        cached("key", fails)
    assert not folder.exists()


RACE = """
import sys
from tests.test_tokens import RECORDS, check_same, example, made
from fedpeft.token_cache import cached

print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    found = cached(f"key-{number}", made)
    check_same(found["train"], [example(i) for i in range(RECORDS)])
"""


def test_processes_may_write_at_once(folder: Path) -> None:
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RACE], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=HANGS)[1] for process in both] == ["", ""]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"key-{i}" for i in range(50))


WAITS = """
import pathlib, sys, time
from tests.test_tokens import made
from fedpeft.token_cache import cached

def slowly():
    with pathlib.Path(sys.argv[1]).open("a") as file:
        file.write("made ")
    time.sleep(1)
    return made()

cached("key", slowly)
"""


def test_of_several_processes_one_makes_it(folder: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = [sys.executable, "-c", WAITS, str(count)]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=HANGS) for process in both] == [0, 0]
    assert count.read_text() == "made "
    assert [p.name for p in folder.iterdir()] == ["key"]


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    cached("key", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached("key", made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEFT_CACHE", "mine")
    kept = cached("key", made)["train"]
    monkeypatch.chdir(tmp_path / "home")
    check_same(pickle.loads(pickle.dumps(kept)), made()["train"])
    for place in ("home/.cache/fedpeft", "xdg/fedpeft", "mine"):
        assert (tmp_path / place / "tokens" / "key" / "manifest.json").is_file()


def test_looking_at_some_records_does_not_read_them_all(folder: Path) -> None:
    many = [{"input_ids": np.full(10, 70_000), "labels": np.array(1)}] * 100_000

    def make() -> Tokenised:
        packed = pack([many])
        assert packed is not None
        return {"train": packed, "test": made()["test"]}

    cached("key", make)
    tokens = cached("key", never)["train"]
    assert isinstance(tokens, Tokens)
    tracemalloc.start()
    view = tokens.rows(np.arange(5, 100_000, 10_000))
    assert view.lengths.tolist() == [10] * 10
    assert view[3]["input_ids"].tolist() == [70_000] * 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


# --- a plan's tokens ---------------------------------------------------------------------------


def key(lines: dict[str, Any], data: str = "data", limit: int = 128) -> str | None:
    from fedpeft import Plan

    return key_of(Plan.from_lines(lines), data, ("a", "b"), limit)


def test_the_key_says_all_that_decides_the_tokens(bert: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    lines = support_lines(model)
    keys = [
        key(lines),
        key(lines | {"task": "classify(max_length=9)"}),
        key(lines, data="other"),
        key(lines, limit=64),
        key_of(support_plan(model), "data", ("b", "a"), 128),
        key(lines | {"data": f"csv(train={str(tmp_path / 'a.csv')!r})"}),
    ]
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("lowercase", "lowercase "))
    keys.append(key(lines))
    assert len(set(keys)) == len(keys)
    assert None not in keys


def test_the_key_leaves_out_what_does_not(bert: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    lines = support_lines(model)
    before = key(lines)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert key(lines) == before
    assert key(lines | {"seed": 3, "partition": "iid", "adapter": "full"}) == before
    (tmp_path / "moved").mkdir()
    shutil.move(model, tmp_path / "moved" / "model")
    assert key(lines | {"model": str(tmp_path / "moved" / "model")}) == before


def test_the_key_reads_the_file_of_a_chat_template(llama: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    lines = support_lines(llama, partition="iid")
    lines["task"] = f"causal_lm(chat_template={str(template)!r})"
    before = key(lines)
    template.write_text("{{ messages }}!")
    assert key(lines) != before


def test_a_task_without_a_source_has_no_key(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = support_plan(bert)
    monkeypatch.setattr(type(plan.task), "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert key_of(plan, "data", ("a", "b"), 128) is None


@pytest.mark.parametrize("piece", [1, 7, 4096])
@pytest.mark.parametrize("task", ["classify", "classify(max_length=6)", "causal_lm"])
def test_a_plan_is_tokenised_as_its_task_does(
    bert: Path, llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, piece: int
) -> None:
    monkeypatch.setattr(site, "_PIECE", piece)
    plan = support_plan(llama if task == "causal_lm" else bert, task=task, partition="iid")
    federation = deal(plan)
    splits, tokenizer = federation.splits, load_tokenizer(plan.model)
    found = encode(plan, federation)
    for split, rows in ((found.train, splits.train), (found.test, splits.test or [])):
        assert isinstance(split, Tokens)
        check_same(split, plan.task.encode(rows, tokenizer, 128, federation.classes))


def test_a_pair_that_some_rows_lack_is_refused_as_before(
    bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "_PIECE", 2)
    pair = '{"text": "a", "text_pair": "b", "label": "%d"}\n'
    single = '{"text": "a", "label": "1"}\n'
    path = tmp_path / "pairs.jsonl"
    for text, row in ((single + pair % 0 * 4, 1), (pair % 0 * 4 + single, 5)):
        path.write_text(text)
        plan = support_plan(bert, data=f"jsonl(train={str(path)!r})", clients=1, partition="iid")
        with pytest.raises(DataError, match=rf"data: train: row {row} .*text_pair"):
            encode(plan, deal(plan))


def test_an_unusable_text_is_named_by_split_and_row(
    bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "_PIECE", 4)
    good = '{"text": "a bill", "label": "0"}\n{"text": "a bill", "label": "1"}\n' * 5
    long = '{"text": "%s", "label": "1"}\n' % ("bill " * 200)
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(good)
    test.write_text(good + long)
    data = f"jsonl(train={str(train)!r}, test={str(test)!r})"
    plan = support_plan(bert, data=data, partition="iid")
    with pytest.raises(DataError, match="data: test: row 11 is 202 tokens long"):
        encode(plan, deal(plan))
    assert not folder.exists()


def test_a_worker_needs_neither_rows_nor_the_models_files(
    bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = support_plan(bert)
    first = Site(plan, deal(plan))
    told = pickle.dumps((first.federation, first.texts))
    assert len(told) < 6000
    federation, texts = pickle.loads(told)
    assert isinstance(texts, Texts)

    def fails(*_: object) -> None:
        raise AssertionError("loaded again")

    client = next(iter(federation.population))
    records = list(first.train(client)), list(first.held(client)), list(first.test())
    first.close()
    for name in ("load_base", "load_tokenizer"):
        monkeypatch.setattr(site, name, fails)
    for at_hand in (texts, None):  # without texts they are in the cache
        second = Site(plan, federation, "cpu", at_hand, base=first.base)
        check_same(second.train(client), records[0])
        check_same(second.held(client), records[1])
        check_same(second.test(), records[2])
        second.close()
    shutil.rmtree(folder)
    with pytest.raises((RunError, AssertionError)):
        Site(plan, federation, base=first.base)
    assert os.environ["FEDPEFT_CACHE"] == str(folder.parent)
