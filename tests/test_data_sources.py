"""The data sources: what they read, what they refuse, and what names their content."""

from __future__ import annotations

import csv as std_csv
import gzip
import hashlib
import json
import os
import pickle
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedpeft.data
from fedpeft.data import _files, embedded
from fedpeft.data.csv import Csv
from fedpeft.data.embedded import Embedded
from fedpeft.data.hub import Hub
from fedpeft.data.jsonl import Jsonl
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import build, describe
from fedpeft.types import Source

Write = Callable[[str, str | bytes], str]
ROWS = [{"text": "good", "label": 1}, {"text": "bad\u2028 news", "label": 0}]
LINES = '{"text": "good", "label": 1}\n{"text": "bad\u2028 news", "label": 0}\n'


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a file in the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDPEFT_DATA", raising=False)

    def put(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return put


# --- jsonl ---------------------------------------------------------------------------------------


def test_jsonl_reads_objects_and_cuts_lines_only_at_newlines(write: Write) -> None:
    splits = Jsonl(train=write("a.jsonl", LINES)).load()
    assert splits.train == ROWS
    assert splits.test is None


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
def test_gzip_is_known_by_its_content(write: Write, name: str) -> None:
    assert Jsonl(train=write(name, gzip.compress(LINES.encode()))).load().train == ROWS


def test_a_plain_file_may_be_called_gz(write: Write) -> None:
    assert Jsonl(train=write("a.jsonl.gz", LINES)).load().train == ROWS


def test_jsonl_skips_blank_lines_byte_order_mark_and_carriage_returns(write: Write) -> None:
    name = write("a.jsonl", '\ufeff{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert Jsonl(train=name).load().train == [{"a": 1}, {"a": 2}]


def test_several_files_follow_each_other(write: Write) -> None:
    write("a.jsonl", '{"a": 1}\n')
    write("b.jsonl", gzip.compress(b'{"a": 2}\n'))
    splits = Jsonl(train="b.jsonl, a.jsonl", test="a.jsonl").load()
    assert splits.train == [{"a": 2}, {"a": 1}]
    assert splits.test == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": nope}\n', r"^a.jsonl:3: not JSON \(Expecting value at column 7\): "),
        (b'{"a": NaN}\n', r"a.jsonl:1: not JSON \(NaN is no JSON number\)"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", r"a.jsonl:1: not JSON \(Exceeds the limit"),
        (b"[" * 100_000 + b"\n", r"a.jsonl:1: not JSON \(maximum recursion"),
        (b'{"a": 1}\n[1, 2]\n', r"a.jsonl:2: not an object but a list: '\[1, 2\]'; write"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl:2: byte 0xe9 is not UTF-8; save the file as"),
        (b'\xef\xbb\xbf\n\xff"}\n', r"a.jsonl:2: byte 0xff is not UTF-8"),
        (b"", r"a.jsonl: the file holds no records; take it out of train"),
        (b" \n\n", r"a.jsonl: the file holds no records"),
        (
            gzip.compress(LINES.encode(), mtime=0)[:-9],
            r"a.jsonl: damaged gzip data \(.+\); copy it again",
        ),
        (b"\x1f\x8bnothing", r"a.jsonl: damaged gzip data"),
    ],
)
def test_jsonl_names_the_line_it_cannot_read(write: Write, content: bytes, message: str) -> None:
    source = Jsonl(train=write("a.jsonl", content))
    with pytest.raises(DataError, match=message) as caught:
        source.load()
    assert "\n" not in str(caught.value)


def test_an_empty_test_file_is_refused(write: Write) -> None:
    source = Jsonl(train=write("a.jsonl", LINES), test=write("b.jsonl", ""))
    with pytest.raises(DataError, match=r"b.jsonl: the file holds no records; take it out of test"):
        source.load()


def test_records_are_read_off_the_text_when_asked_for(write: Write) -> None:
    text = ' {"a": 1}\r\n\n\t{"a": "\u2028\u00e4"} \n{"a": [2.5, null]}'
    whole = [{"a": 1}, {"a": "\u2028\u00e4"}, {"a": [2.5, None]}]
    rows = Jsonl(train=f"{write('a.jsonl', text)},{write('b.jsonl', text)}").load().train
    for found in (rows, pickle.loads(pickle.dumps(rows))):
        assert found == [*whole, *whole]
        assert found != whole
        assert len(found) == 6
        assert [found[i] for i in range(-6, 6)] == [*whole] * 4
        assert found[1:-1:2] == [whole[1], whole[0]]
        assert list(reversed(found)) == [*whole[::-1], *whole[::-1]]
        for wrong in (6, -7):
            with pytest.raises(IndexError):
                _ = found[wrong]


def test_records_take_little_more_than_their_text(write: Write) -> None:
    name = write("a.jsonl", '{"text": "a few words", "label": 1}\n' * 20_000)
    tracemalloc.start()
    rows = Jsonl(train=name).load().train
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(rows) == 20_000
    assert held < 20_000 * (36 + 20)


# --- csv -----------------------------------------------------------------------------------------


def test_csv_values_are_strings_under_the_header(write: Write) -> None:
    name = write("a.csv", '\ufefftext,label\r\n"so, ""so""\nlong",1\r\n\r\nbad,\r\n')
    assert Csv(train=name).load().train == [
        {"text": 'so, "so"\nlong', "label": "1"},
        {"text": "bad", "label": ""},
    ]


def test_csv_reads_gzip_and_other_delimiters(write: Write) -> None:
    name = write("a.tsv", gzip.compress(b"text\tlabel\na,b\t1\n"))
    splits = Csv(train=name, test=name, delimiter="\t").load()
    assert splits.train == splits.test == [{"text": "a,b", "label": "1"}]


def test_csv_reads_long_texts_and_leaves_the_readers_limit_alone(write: Write) -> None:
    before = std_csv.field_size_limit()
    long = "x" * (before + 1)
    assert Csv(train=write("a.csv", f"text\n{long}\n")).load().train == [{"text": long}]
    assert std_csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n"1\n2",3\n1,2,3\n', r"^a.csv:4: 3 values for the 2 columns a, b; quote values that"),
        ("a,b\n1,2\n3\n", r"a.csv:3: 1 values for the 2 columns"),
        ('a,b\n1,2\n3,"4\n5,6\n', r"a.csv:3: unexpected end of data; close every quote"),
        ('a,b\n"1"2,3\n', r"a.csv:2: ',' expected after '\"'"),
        (",b\n1,2\n", r"a.csv:1: column 1 has no name; .*index=False"),
        ("\na,b,a\n1,2,3\n", r"a.csv:2: column 'a' is there twice; rename one"),
        ("a,b\n", r"a.csv: the file holds no records"),
        ("", r"a.csv: the file holds no records"),
    ],
)
def test_csv_names_the_line_it_cannot_read(write: Write, content: str, message: str) -> None:
    source = Csv(train=write("a.csv", content))
    with pytest.raises(DataError, match=message):
        source.load()


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_csv_refuses_what_cannot_delimit(delimiter: str) -> None:
    with pytest.raises(SpecError, match=r"csv: delimiter=.* must be one character"):
        Csv(train="a.csv", delimiter=delimiter)


# --- where files lie -----------------------------------------------------------------------------


def test_a_relative_path_is_looked_for_here_then_in_the_data_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("there/cls/a.jsonl", '{"a": "there"}')
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "there"))
    assert Jsonl(train="cls/a.jsonl").load().train == [{"a": "there"}]
    write("cls/a.jsonl", '{"a": "here"}')
    assert Jsonl(train="cls/a.jsonl").load().train == [{"a": "here"}]
    assert Jsonl(train=str(tmp_path / "there/cls/a.jsonl")).load().train == [{"a": "there"}]


def test_the_data_folder_is_shared_data_beside_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("shared/data/a.jsonl", '{"a": 1}')
    write("main/empty", "")
    monkeypatch.chdir(tmp_path / "main")
    assert _files.find("a.jsonl") == Path("../shared/data/a.jsonl")


def test_a_tilde_is_the_home_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.jsonl", LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.find("~/a.jsonl") == tmp_path / "a.jsonl"


def test_a_missing_file_names_every_place_and_the_nearest_name(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("there/sst2.train.jsonl", LINES)
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "there"))
    here, there = tmp_path / "sst.train.jsonl", tmp_path / "there" / "sst.train.jsonl"
    expected = f"looked for {here} and {there}; did you mean 'sst2.train.jsonl'\\?"
    with pytest.raises(DataError, match=expected):
        Jsonl(train="sst.train.jsonl").load()
    with pytest.raises(DataError, match=r"looked for /no/such; check the name, or set FEDPEFT_D"):
        Jsonl(train="/no/such").load()
    with pytest.raises(DataError, match="there is a folder, name the files in it"):
        Jsonl(train="there").load()


def test_a_file_that_cannot_be_read_is_a_data_error(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    source = Jsonl(train=write("a.jsonl", LINES))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        source.load()


@pytest.mark.parametrize("train", ["", " ", "a.jsonl,", "a,,b"])
def test_empty_paths_are_refused_at_construction(train: str) -> None:
    with pytest.raises(SpecError, match=r"jsonl: train=.* must name a file"):
        Jsonl(train=train)
    with pytest.raises(SpecError, match=r"csv: test=.* must name a file"):
        Csv(train="a.csv", test=train)


# --- fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_is_of_bytes_in_order_not_of_paths(write: Write) -> None:
    one, two = b'{"a": 1}\n', b'{"a": 22}\n'
    for name, content in {"a": one, "b": two, "sub/c": one, "d": one + two}.items():
        write(name, content)

    def digest(train: str, test: str | None = None) -> str:
        return Jsonl(train=train, test=test).load().fingerprint

    expected = hashlib.sha256(b"train\n9\n" + one + b"test\n10\n" + two).hexdigest()
    assert digest("a", "b") == expected == digest("sub/c", "b")
    others = [digest("a,b"), digest("b,a"), digest("d"), digest("a"), digest("b", "a")]
    assert len({expected, *others}) == 6


def test_the_fingerprint_tells_delimiters_apart(write: Write) -> None:
    name = write("a.csv", "a,b;c\n1,2;3\n")
    found = {Csv(train=name, delimiter=each).load().fingerprint for each in ",;"}
    assert len(found) == 2


def test_the_fingerprint_of_rows_ignores_the_order_of_columns() -> None:
    rows = [{"a": 1, "b": datetime(2020, 1, 2), "c": b"\xff", "d": "é"}]
    turned = [dict(reversed(rows[0].items()))]
    text = r'{"a":1,"b":"2020-01-02 00:00:00","c":"ff","d":"\u00e9"}'
    expected = hashlib.sha256(f"train\n{text}\n".encode()).hexdigest()
    assert _files.fingerprint_rows(rows, None) == expected
    assert _files.fingerprint_rows(turned, None) == expected
    assert _files.fingerprint_rows(rows, rows) != expected
    with pytest.raises(DataError, match="a object cannot be fingerprinted; drop its column"):
        _files.fingerprint_rows([{"a": object()}], None)


_VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
_TABLES = st.lists(st.dictionaries(st.text(), _VALUES, max_size=3), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(rows=_TABLES, ascii_only=st.booleans())
def test_jsonl_returns_what_json_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_bytes(lines.encode("utf-8"))
    assert Jsonl(train=str(path)).load().train == rows


# --- embedded ------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the embedded sets ``toy`` and ``alone``, and a private module without rows."""
    (tmp_path / "_toy.py").write_text("def rows(): return [{'a': 1}, {'a': 2}], [{'a': 3}]\n")
    (tmp_path / "_alone.py").write_text("def rows(): return [{'a': 1}], []\n")
    (tmp_path / "_other.py").write_text("rows = 3\n")
    monkeypatch.setattr(fedpeft.data, "__path__", [*fedpeft.data.__path__, str(tmp_path)])
    for name in ("toy", "alone", "other"):
        monkeypatch.delitem(sys.modules, f"fedpeft.data._{name}", raising=False)


@pytest.mark.usefixtures("toy")
def test_embedded_takes_rows_from_the_module_of_that_name() -> None:
    splits = Embedded(name="toy").load()
    assert splits.train == [{"a": 1}, {"a": 2}]
    assert splits.test == [{"a": 3}]
    content = b'train\n{"a":1}\n{"a":2}\ntest\n{"a":3}\n'
    assert splits.fingerprint == hashlib.sha256(content).hexdigest()
    assert Embedded(name="alone").load().test is None


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["other", "files", "_toy", "", "csv"])
def test_embedded_lists_what_there_is(name: str) -> None:
    assert {"alone", "toy"} <= set(embedded.names())
    with pytest.raises(SpecError, match=f"embedded: there is no data set '{name}'; (there is|did)"):
        Embedded(name=name)
    with pytest.raises(SpecError, match="did you mean 'toy'"):
        Embedded(name="toyy")


def test_embedded_support_has_texts_and_labels() -> None:
    splits = build("data", 'embedded(name="support")').load()
    assert set(splits.train[0]) >= {"text", "label"}
    assert splits.test


# --- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the datasets library, with its cache in a temporary folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def test_hub_reads_a_local_folder_and_names_class_labels(datasets: Any, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "stars": datasets.Value("int64"),
        }
    )
    columns = {"text": ["x", "y", "z"], "label": [1, 0, -1], "stars": [5, 1, 3]}
    table = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))

    splits = Hub(name=str(tmp_path / "set"), test=None).load()
    assert splits.test is None
    assert splits.train == [
        {"text": "x", "label": "pos", "stars": 5},
        {"text": "y", "label": "neg", "stars": 1},
        {"text": "z", "label": None, "stars": 3},
    ]
    assert splits.fingerprint == _files.fingerprint_rows(splits.train, None)

    sliced = Hub(name=str(tmp_path / "set"), train="train[:2]", test="train[2:]").load()
    assert (sliced.train, sliced.test) == (splits.train[:2], splits.train[2:])
    with pytest.raises(DataError, match=r'hub: cannot read .* Unknown split "test". Should be one'):
        Hub(name=str(tmp_path / "set")).load()


def test_hub_refuses_a_split_without_records(datasets: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": []})
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(DataError, match=r'hub: cannot read .* "train" corresponds to no'):
        Hub(name=str(tmp_path / "set"), test=None).load()


def test_hub_without_a_network_is_one_clear_error(
    datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach\n'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    expected = r"hub: cannot reach 'a/b' \(Couldn't reach 'a/b' on the Hub\); check the network"
    with pytest.raises(DataError, match=expected):
        Hub(name="a/b").load()


def test_hub_without_the_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"hub: needs the datasets library .*pip install 'fedpeft\[hub\]'"
    ):
        Hub(name="a/b").load()


@pytest.mark.parametrize("field", ["name", "config", "train", "test", "revision"])
def test_hub_refuses_empty_names(field: str) -> None:
    with pytest.raises(SpecError, match=f"hub: {field} must not be empty"):
        Hub(**{"name": "a/b", field: ""})


# --- as a family ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "jsonl(train='a.jsonl')",
        "jsonl(train='a.jsonl,b.jsonl', test='c.jsonl')",
        "csv(train='a.tsv', delimiter='\\t')",
        "hub(name='a/b', config='c', test=None)",
        "embedded(name='support')",
    ],
)
def test_specs_build_sources_and_come_back(spec: str) -> None:
    source = build("data", spec)
    assert isinstance(source, Source)
    assert describe(source) == spec


def test_real_data_sst2() -> None:
    folder = Path(os.environ.get("FEDPEFT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"no data in {folder}")
    splits = Jsonl(train=str(folder / "cls" / "sst2.train.jsonl.gz")).load()
    assert len(splits.train) == 6_908
    assert Counter(row["label"] for row in splits.train) == {0: 3304, 1: 3604}
    assert set(splits.train[0]) == {"text", "label"}
