from __future__ import annotations

import ast
import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import WireError
from fedpeft.tensors import shapes_of
from fedpeft.types import Packet, Scalar, Shapes, Tensors
from fedpeft.wire import body, pack, peek, table_id, unpack

DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
LIMIT = 1 << 20


def sealed(head: bytes, content: bytes = b"", magic: bytes = b"FPW1") -> bytes:
    """A message whose lengths and checksums are right, whatever it says."""
    sums = xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(content)
    return struct.pack("<4sIQQQ", magic, len(head), len(content), *sums) + head + content


def said(sections: Any, content: bytes = b"", header: Any = None) -> bytes:
    return sealed(json.dumps({"h": header or {}, "s": sections}).encode(), content)


def bits(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Names, dtypes, shapes and little-endian bytes, in order."""
    little = {k: v.astype(v.dtype.newbyteorder("<")) for k, v in tensors.items()}
    return [(k, v.dtype.str, v.shape, v.tobytes()) for k, v in little.items()]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from("<>")) + draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = int(np.prod(shape))
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    value = np.frombuffer(content, dtype, count).reshape(shape) if count else np.empty(shape, dtype)
    layout = draw(st.sampled_from(("plain", "transposed", "reversed", "strided", "broadcast")))
    if layout == "transposed":
        return value.T
    if value.ndim and layout == "reversed":
        return value[::-1]
    if value.ndim and layout == "strided":
        return value[::2]
    return np.broadcast_to(value, (2, *value.shape)) if layout == "broadcast" else value


names = st.text(st.characters(codec="utf-8"), max_size=8)
sections_of = st.dictionaries(names, st.dictionaries(names, arrays(), max_size=4), max_size=3)
headers = st.dictionaries(
    names,
    st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names,
    max_size=4,
)


@given(sections_of, headers, st.booleans())
def test_what_is_packed_is_unpacked(
    sections: dict[str, Tensors], header: dict[str, Scalar], known: bool
) -> None:
    held: dict[str, Shapes] = {
        s: shapes_of(ts) if known else {"other": (1,)} for s, ts in sections.items()
    }
    message = pack(Packet(sections, header), held)
    for form in (message, bytes(message)):
        packet = unpack(form, held, LIMIT)
        assert packet.header == header
        assert {s: bits(ts) for s, ts in packet.sections.items()} == {
            s: bits(ts) for s, ts in sections.items()
        }
        assert not any(v.flags.writeable for ts in packet.sections.values() for v in ts.values())
    assert message.nbytes == len(bytes(message))
    assert peek(message) == peek(bytes(message)) == header


def test_the_format_is_this() -> None:
    tensors = {"w": np.array([1.0, -2.0], ">f4"), "n": np.array(3, "u1")}
    message = pack(Packet({"a": tensors}, {"round": 2}), {"a": {"w": (2,), "n": ()}})
    head = b'{"h":{"round":2},"s":[["a","1f67e79bd38496bc",["f4","u1"]]]}'
    content = bytes.fromhex("0000803f000000c003")
    assert bytes(message) == sealed(head, content)
    assert bytes(message)[:16] == b"FPW1" + bytes([60, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])


GOLDEN = (
    "46505731820000001e0000000000000051e45c4d066ba3c1b447d96eb48d3c85"
    "7b2268223a7b2272756e223a2272222c22726f756e64223a327d2c2273223a5b"
    "5b2261646170746572222c5b5b226c6576656c73222c3230305d2c5b22736361"
    "6c6573222c315d5d2c5b227531222c226634225d2c5b31382c305d5d2c5b2263"
    "6f6e74726f6c222c2234616366343736626531613634363732222c226634225d"
    "5d7d0201edf5b0d35944370c878ffa8e08e52f000000003f0000803f000000c0"
)
"""``docs/wire.md`` takes it apart."""


def golden() -> tuple[dict[str, Tensors], dict[str, Shapes], dict[str, Scalar]]:
    levels = np.zeros(200, np.uint8)
    levels[::20] = 2
    sections: dict[str, Tensors] = {
        "adapter": {"levels": levels, "scales": np.array([0.5], "f4")},
        "control": {"w": np.array([1.0, -2.0], "f4")},
    }
    return sections, {"adapter": {"w": (200,)}, "control": {"w": (2,)}}, {"run": "r", "round": 2}


def test_the_format_stays_what_it_is() -> None:
    sections, held, header = golden()
    assert bytes(pack(Packet(sections, header), held)).hex() == GOLDEN
    packet = unpack(bytes.fromhex(GOLDEN), held, LIMIT)
    assert {s: bits(ts) for s, ts in packet.sections.items()} == {
        s: bits(ts) for s, ts in sections.items()
    }
    assert (packet.header, packet.sizes) == (header, {"adapter": 22, "control": 8})


def test_the_documentation_s_example_is_the_pinned_packet() -> None:
    text = (Path(__file__).parents[1] / "docs" / "wire.md").read_text("utf-8")
    shown = text[text.index("## An example") :].replace(" ", "").replace("\n", "")
    preamble, body_at = GOLDEN[:64], 2 * (32 + 130)
    assert preamble in shown
    head = bytes.fromhex(GOLDEN[64:body_at]).decode()
    assert head in shown
    assert GOLDEN[body_at : body_at + 36] in shown
    assert table_id({"w": (2,)}) in head


def test_names_do_not_travel_when_the_table_matches() -> None:
    tensors = {f"layer.{i}.lora_A.weight": np.zeros((2, 3), "f4") for i in range(50)}
    same = bytes(pack(Packet({"adapter": tensors}), {"adapter": shapes_of(tensors)}))
    assert b"lora" not in same
    assert len(same) == 32 + len('{"h":{},"s":[["adapter","0123456789abcdef","f4"]]}') + 1200
    other = bytes(pack(Packet({"adapter": tensors}), {"adapter": {"x": (1,)}}))
    assert other.count(b"lora_A") == 50


@pytest.mark.parametrize(
    "table",
    [
        {"b": (2,), "a": (3,)},
        {"a": (3,)},
        {"a": (3,), "b": (2,), "c": ()},
        {"a": (3, 1), "b": (2,)},
        {"a": (2,), "b": (3,)},
        {},
    ],
)
def test_another_order_name_or_shape_is_another_table(table: Shapes) -> None:
    tensors = {"a": np.arange(3), "b": np.arange(2)}
    message = bytes(pack(Packet({"s": tensors}), {"s": table}))
    assert b'[["a",3],["b",2]]' in message
    assert bits(unpack(message, {"s": table}, LIMIT).sections["s"]) == bits(tensors)
    assert table_id(table) != table_id({"a": (3,), "b": (2,)})


def test_one_body_under_many_headers_is_serialised_once() -> None:
    made = body({"s": {"a": np.arange(4)}}, {"s": {"a": (4,)}})
    first, second = made.seal({"to": "x"}), made.seal({"to": "y"})
    assert first.body is second.body is made
    assert [peek(m)["to"] for m in (first, second)] == ["x", "y"]


def test_peek_does_not_look_at_the_body() -> None:
    whole = bytes(pack(Packet({"s": {"a": np.arange(9)}}, {"k": 1}), {}))
    assert peek(whole[:-1]) == {"k": 1}


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 252))
def test_few_symbols_travel_as_they_are_where_coding_them_is_no_shorter(
    symbols: list[int], offset: int
) -> None:
    tensors = {"symbols": np.array(symbols, np.uint8) + np.uint8(offset)}
    held = {"s": shapes_of(tensors)}
    message = bytes(pack(Packet({"s": tensors}), held))
    assert bits(unpack(message, held, LIMIT).sections["s"]) == bits(tensors)


# --- what a sender may not say -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["?", "c8", "O", "U1", "S3", "M8[s]", "g", "V2"])
def test_other_dtypes_do_not_travel(dtype: str) -> None:
    with pytest.raises(WireError, match="section 's' holds dtype"):
        body({"s": {"a": np.zeros(2, dtype)}}, {})


def test_ranks_above_8_travel_only_by_table() -> None:
    tensors = {"a": np.zeros((1,) * 9, "f4")}
    with pytest.raises(WireError, match="'s' holds an array of rank > 8"):
        body({"s": tensors}, {})
    held = {"s": shapes_of(tensors)}
    packet = unpack(bytes(pack(Packet({"s": tensors}), held)), held, LIMIT)
    assert packet.sections["s"]["a"].shape == (1,) * 9


BAD_HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"lr": float("nan")}, "header 'lr' is not finite"),
    ({"lr": float("inf")}, "header 'lr' is not finite"),
    ({"n": 1 << 63}, "header 'n' does not fit 64 bits"),
    ({"n": -(1 << 63) - 1}, "header 'n' does not fit 64 bits"),
    ({"ok": True}, "header 'ok' is no number or string"),
    ({"who": None}, "header 'who' is no number or string"),
    ({"who": ["a"]}, "header 'who' is no number or string"),
    ({"who": {"a": 1}}, "header 'who' is no number or string"),
    ({"who": "\ud800"}, "header 'who' is not Unicode text"),
    ({"\udfff": 1}, r"header '\\udfff' is not Unicode text"),
    ({"x" * 99: None}, "header '" + "x" * 40 + "' is no number"),
    ({str(i): i for i in range(257)}, "header has 257 items, at most 256"),
]


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS)
def test_headers_hold_numbers_and_text(header: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        body({}, {}).seal(header)
    for read in (peek, lambda m: unpack(m, {}, LIMIT)):
        with pytest.raises(WireError, match="not finite|cannot be read|" + message):
            read(said([], header=header))


def test_numpy_numbers_are_no_header() -> None:
    with pytest.raises(WireError, match="'seen' is no number or string"):
        body({}, {}).seal({"seen": np.int64(3)})  # type: ignore[dict-item]


def test_a_head_is_at_most_a_mebibyte() -> None:
    with pytest.raises(WireError, match="head of 1060139 bytes is longer than 1048576"):
        body({}, {}).seal({str(i): "x" * 62500 for i in range(16)} | {"y": "x" * 60000})
    with pytest.raises(WireError, match="head of 2000000 bytes is longer than 1048576"):
        peek(sealed(b" " * 2_000_000))


# --- damage on the way ---------------------------------------------------------------------------

HELD: dict[str, Shapes] = {"adapter": {"w": (2, 2), "b": ()}, "control": {}}


def small() -> bytes:
    tensors = {"w": np.arange(4, dtype="f4").reshape(2, 2), "b": np.array(5, "i2")}
    return bytes(pack(Packet({"adapter": tensors, "control": {}}, {"k": "v"}), HELD))


def test_cut_short_at_every_length() -> None:
    whole = small()
    assert list(unpack(whole, HELD, LIMIT).sections) == ["adapter", "control"]
    for length in range(len(whole)):
        expected = "too short" if length < 32 else "declares a (head|body) of"
        with pytest.raises(WireError, match=expected):
            unpack(whole[:length], HELD, LIMIT)


@pytest.mark.parametrize("more", [b"\0", b"x" * 100])
def test_longer_than_declared(more: bytes) -> None:
    with pytest.raises(WireError, match=f"declares a body of 18 bytes, has {18 + len(more)}"):
        unpack(small() + more, HELD, LIMIT)


def test_every_single_bit_flipped() -> None:
    whole = small()
    for at in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(
            WireError, match=r"not a packet|declares|checksum|too short|longer than"
        ):
            unpack(bytes(flipped), HELD, LIMIT)


@pytest.mark.parametrize("message", [b"", b"FPW1", b"\0" * 32, b"PK\x03\x04" + b"\0" * 99])
def test_no_packet_at_all(message: bytes) -> None:
    with pytest.raises(WireError, match=r"too short|not a packet of this version"):
        unpack(message, HELD, LIMIT)
    with pytest.raises(WireError, match=r"too short|not a packet of this version"):
        peek(message)


@given(st.binary(max_size=200), st.sampled_from((b"", b"FPW1")))
def test_noise_is_refused(noise: bytes, magic: bytes) -> None:
    with pytest.raises(WireError):
        unpack(magic + noise, HELD, LIMIT)


# --- a sender that seals nonsense ----------------------------------------------------------------

TABLE = table_id({"w": (2,)})
HEADS: list[tuple[bytes, str]] = [
    (b"", "head cannot be read"),
    (b"null", "head cannot be read"),
    (b"[]", "head cannot be read"),
    (b'"h"', "head cannot be read"),
    (b"{}", "head cannot be read"),
    (b'{"h":{}}', "head cannot be read"),
    (b'{"h":{},"s":[]', "head cannot be read"),
    (b'{"h":{},"s":[]}x', "head cannot be read"),
    (b'{"h":{},"s":[]}\xff', "head cannot be read"),
    ('{"h":{},"s":[]}'.encode("utf-16"), "head cannot be read"),
    (b'{"h":{"a":NaN},"s":[]}', "head cannot be read"),
    (b'{"h":{"a":-Infinity},"s":[]}', "head cannot be read"),
    (b'{"h":{"a":1e999},"s":[]}', "header 'a' is not finite"),
    (b'{"h":{"a":' + b"9" * 5000 + b'},"s":[]}', "head cannot be read"),
    (b'{"h":{"a":' + b"9" * 4000 + b'},"s":[]}', "header 'a' does not fit 64 bits"),
    (b'{"h":[],"s":[]}', "header is no mapping"),
    (b'{"h":null,"s":[]}', "header is no mapping"),
    (b'{"h":{"a":"\\ud800"},"s":[]}', "header 'a' is not Unicode text"),
    (b'{"h":{},"s":{}}', "section list is malformed"),
    (b'{"h":{},"s":null}', "section list is malformed"),
    (b'{"h":{},"s":[1]}', "section list is malformed"),
    (b'{"h":{},"s":[["a",[]]]}', "section list is malformed"),
    (b'{"h":{},"s":[[["a"],[],"f4"]]}', "section list is malformed"),
    (b'{"h":{},"s":[]}', r"holds sections \[\], expected \['s'\]"),
    (b'{"h":{},"s":[["\\ud800",[],[]]]}', r"holds sections \['\\ud800'\], expected"),
]


@pytest.mark.parametrize(("head", "message"), HEADS)
def test_heads_that_are_nonsense(head: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(sealed(head), {"s": {"w": (2,)}}, LIMIT)


HUGE = 10**4000
ENTRIES: list[tuple[list[Any], str]] = [
    (["s", "", "f4"], "'s' follows a table this receiver does not hold"),
    (["s", None, "f4"], "'s' has a malformed index"),
    (["s", table_id({"w": (4,)}), "f4"], "'s' follows a table"),
    (["s", TABLE.upper() + " ", "f4"], "'s' follows a table"),
    (["s", [TABLE], "f4"], "'s' has a malformed index"),
    (["s", 0, "f4"], "'s' has a malformed index"),
    (["s", {"w": 2}, "f4"], "'s' has a malformed index"),
    (["s", ["w"], "f4"], "'s' has a malformed index"),
    (["s", [[]], "f4"], "'s' has a malformed index"),
    (["s", [[2]], "f4"], "'s' has a malformed index"),
    (["s", [["w", -2]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", -1, -2]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", 2.0]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", True]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", "2"]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", None]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", [2]]], "f4"], "'s': array 'w' has an impossible shape"),
    (["s", [["w", *[1] * 9]], "f4"], "'w' comes twice or is of rank > 8"),
    (["s", [["w", 1], ["w", 1]], "f4"], "'w' comes twice or is of rank > 8"),
    (["s", [["w", 1 << 60]], "f4"], "'w' is larger than the 1048576 bytes"),
    (["s", [["w", *[HUGE // 10**3200] * 8]], "f4"], "'w' is larger than the 1048576 bytes"),
    (["s", [["w", 0, 1 << 62]], "f4"], "'w' is larger than the 1048576 bytes"),
    (["s", [["w", 1 << 40, 0]], "f4"], "'w' is larger than the 1048576 bytes"),
    (["s", [["w", 0, 1 << 20, 2]], "f4"], "'w' is larger than the 1048576 bytes"),
    (["s", [["w", 3]], "f4"], "arrays of 12 bytes in a body of 8"),
    (["s", [["w", 0]], "f4"], "arrays of 0 bytes in a body of 8"),
    (["s", [], "f4"], "arrays of 0 bytes in a body of 8"),
    (["s", TABLE, "f8"], "arrays of 16 bytes in a body of 8"),
    (["s", TABLE, "O"], "'s' declares an unknown dtype"),
    (["s", TABLE, ">f4"], "'s' declares an unknown dtype"),
    (["s", TABLE, "f4,f4"], "'s' declares an unknown dtype"),
    (["s", TABLE, ""], "'s' declares an unknown dtype"),
    (["s", TABLE, [["f4"]]], "'s' declares an unknown dtype"),
    (["s", TABLE, [{"f4": 1}]], "'s' declares an unknown dtype"),
    (["s", TABLE, [4]], "'s' declares an unknown dtype"),
    (["s", TABLE, []], "'s' declares another number of dtypes than arrays"),
    (["s", TABLE, ["f4", "f4"]], "'s' declares another number of dtypes"),
    (["s", TABLE, None], "'s' declares another number of dtypes"),
    (["s", TABLE, {"w": "f4"}], "'s' declares another number of dtypes"),
    (["t", TABLE, "f4"], r"holds sections \['t'\], expected \['s'\]"),
    (["t" * 999, TABLE, "f4"], r"holds sections \['t{40}'\], expected \['s'\]"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES)
def test_sections_that_are_nonsense(entry: list[Any], message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        unpack(said([entry], b"\0" * 8), {"s": {"w": (2,)}}, LIMIT)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "order", [["b", "a"], ["a"], ["a", "b", "c"], ["a", "a"], ["a", "b", "a"], []]
)
def test_sections_come_once_and_in_order(order: list[str]) -> None:
    entries: list[Any] = [[name, [], []] for name in order]
    with pytest.raises(WireError, match=r"expected \['a', 'b'\]"):
        unpack(said(entries), {"a": {}, "b": {}}, LIMIT)


@pytest.mark.parametrize("depth", [2, 50, 400, 900, 5_000, 100_000])
@pytest.mark.parametrize("where", ["head", "header", "index", "kinds", "shape", "name"])
def test_nested_bombs(where: str, depth: int) -> None:
    bomb = "[" * depth + "]" * depth
    section = {
        "index": f'["s",{bomb},"f4"]',
        "kinds": f'["s","{TABLE}",{bomb}]',
        "shape": f'["s",[["w",{bomb}]],"f4"]',
        "name": f'["s",[[{bomb}]],"f4"]',
    }.get(where, "")
    header = f'{{"a":{bomb}}}' if where == "header" else "{}"
    head = bomb if where == "head" else f'{{"h":{header},"s":[{section}]}}'
    with pytest.raises(WireError):
        unpack(sealed(head.encode(), b"\0" * 8), {"s": {"w": (2,)}}, LIMIT)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["s", "w", "f4", "u1", TABLE, 0, 1, 2, 1 << 63, HUGE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
entries_like = st.lists(
    st.tuples(
        st.sampled_from(["s", "w"]) | json_values,
        st.just(TABLE)
        | st.lists(st.lists(st.sampled_from(["w", 0, 1, 2]) | json_values))
        | json_values,
        st.sampled_from(DTYPES) | st.lists(st.sampled_from(DTYPES), max_size=2) | json_values,
    )
    | json_values,
    max_size=2,
)


@given(st.dictionaries(st.text(max_size=2), json_values) | json_values, entries_like, st.binary())
def test_whatever_is_sealed_is_read_or_refused(header: Any, entries: Any, content: bytes) -> None:
    message = said(entries, content, header)
    try:
        packet = unpack(message, {"s": {"w": (2,)}}, LIMIT)
    except WireError:
        return
    assert sum(v.nbytes for v in packet.sections["s"].values()) == len(content)


# --- bounds --------------------------------------------------------------------------------------


def test_no_more_than_the_limit_is_taken() -> None:
    held: Mapping[str, Shapes] = {"s": {"a": (4,)}}
    message = pack(Packet({"s": {"a": np.arange(4, dtype="f4")}}), held)
    assert unpack(message, held, 16).sections["s"]["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(WireError, match="holds 16 bytes where at most 15 were expected"):
        unpack(message, held, 15)
    with pytest.raises(WireError, match="holds 16 bytes where at most 15 were expected"):
        unpack(bytes(message), held, 15)


def test_no_entries_within_a_limit_of_nothing() -> None:
    held: Mapping[str, Shapes] = {"s": {"other": ()}}
    message = bytes(pack(Packet({"s": {"a": np.empty((0, 1), "f4")}}), held))
    assert unpack(message, held, 0).sections["s"]["a"].shape == (0, 1)


@pytest.mark.parametrize("shape", [[1 << 60], [1 << 30, 1 << 30], [0, 1 << 60], [1 << 20]])
def test_declared_sizes_allocate_nothing(shape: list[int]) -> None:
    message = said([["s", [["w", *shape]], "f8"]], b"\0" * 8)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=r"larger than|in a body of 8"):
            unpack(message, {"s": {"w": (2,)}}, 1 << 61)
        with pytest.raises(WireError, match=r"larger than|in a body of 8"):
            unpack(message, {"s": {"w": (2,)}}, 1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_declared_lengths_allocate_nothing() -> None:
    message = struct.pack("<4sIQQQ", b"FPW1", (1 << 32) - 1, (1 << 64) - 1, 0, 0) + b"{}"
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="declares a head of 4294967295 bytes, has 2"):
            unpack(message, {}, 1 << 61)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


# --- nothing that comes from outside is executed -------------------------------------------------

PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unpicklers(source: str) -> list[str]:
    """What in ``source`` could load a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(str(node.module))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] if ast.unparse(node.value) != "False" else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from joblib.numpy_pickle import load",
        "torch.load(path)",
        "load = torch.load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_unpicklers_are_found(source: str) -> None:
    assert len(unpicklers(source)) == 1


def test_there_is_no_pickle() -> None:
    root = Path(__file__).resolve().parent.parent
    paths = [p for part in ("fedpeft", "client", "server") for p in (root / part).rglob("*.py")]
    assert root / "fedpeft" / "wire.py" in paths
    paths.remove(root / "fedpeft" / "engine" / "_parcel.py")  # from a process to those it starts
    assert {str(p): found for p in paths if (found := unpicklers(p.read_text("utf-8")))} == {}
