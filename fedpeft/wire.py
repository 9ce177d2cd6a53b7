"""A packet as bytes: preamble, JSON head, arrays back to back. No pickle, nothing is executed.

::

    preamble   magic "FPW1" | head length u32 | body length u64 | xxh3-64 of head | xxh3-64 of body
    head       {"h": header, "s": [[section, table, dtypes, index], ...]}
    body       the arrays in the order of the table or the index, little-endian, without gaps

Both sides know from the plan which tensors a section holds, so names and shapes travel only as the
id of their table; an array list that differs from the table travels in ``index``. A receiver passes
what it expects and how much it will take, and nothing is allocated before the sizes agree.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xxhash

from fedpeft.errors import WireError
from fedpeft.types import Packet, Scalar, Shapes, Tensors

Buffers: TypeAlias = Sequence[bytes | memoryview]
"""A message in pieces, so that large arrays need not be copied; joined, it is the message."""

_MAGIC = b"FPW1"
_PREAMBLE = struct.Struct("<4sIQQQ")
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_MAX_HEAD = 1 << 20
_MAX_HEADER_ITEMS = 256


@dataclass(frozen=True, slots=True)
class Body:
    """The sections of a packet, serialised once and sent under many headers."""

    sections: Sequence[Sequence[Any]]
    pieces: Sequence[memoryview]
    checksum: int

    def seal(self, header: Mapping[str, Scalar]) -> list[bytes | memoryview]:
        """Return the message with this header."""
        text = json.dumps({"h": dict(header), "s": self.sections}, separators=(",", ":"))
        head = text.encode()
        length = sum(piece.nbytes for piece in self.pieces)
        sums = xxhash.xxh3_64_intdigest(head), self.checksum
        return [_PREAMBLE.pack(_MAGIC, len(head), length, *sums), head, *self.pieces]


def body(sections: Mapping[str, Tensors], expected: Mapping[str, Shapes]) -> Body:
    """Serialise ``sections``; ``expected`` maps a section to the table that the receiver holds."""
    entries, pieces = [], list[memoryview]()
    for section, tensors in sections.items():
        table = expected.get(section, {})
        same = list(tensors) == list(table) and all(
            value.shape == table[name] for name, value in tensors.items()
        )
        kinds = [value.dtype.str[1:] for value in tensors.values()]
        if unknown := set(kinds) - set(_DTYPES):
            raise WireError(f"section {section!r} holds dtype {sorted(unknown)[0]!r}")
        index = None if same else [[name, *value.shape] for name, value in tensors.items()]
        uniform = kinds[0] if len(set(kinds)) == 1 else kinds
        entries.append([section, table_id(table) if same else None, uniform, index])
        pieces += [_flat(value) for value in tensors.values() if value.size]
    return Body(entries, pieces, _checksum(pieces))


def pack(packet: Packet, expected: Mapping[str, Shapes]) -> list[bytes | memoryview]:
    """Serialise a packet with its header."""
    return body(packet.sections, expected).seal(packet.header)


def peek(message: Buffers | bytes) -> Mapping[str, Scalar]:
    """Return the header alone, once the head's checksum has been checked. Raises ``WireError``."""
    return _read_head(_head(_pieces(message)))[0]


def size(buffers: Buffers) -> int:
    """Bytes of a message: what it costs to send it."""
    return sum(len(b) if isinstance(b, bytes) else b.nbytes for b in buffers)


def unpack(message: Buffers | bytes, expected: Mapping[str, Shapes], limit: int) -> Packet:
    """Parse and check. Raises ``WireError`` for anything but a whole packet of expected sections.

    ``limit`` bounds the bytes of the body. Arrays are read-only views of the message.
    """
    pieces = _pieces(message)
    header, sections = _read_head(_head(pieces))
    _, _, declared, _, checksum = _PREAMBLE.unpack(pieces[0])
    parts = pieces[2:]
    found = sum(memoryview(part).nbytes for part in parts)
    if found != declared:
        raise WireError(f"declares a body of {declared} bytes, has {found}")
    if found > limit:
        raise WireError(f"holds {found} bytes where at most {limit} were expected")
    if _checksum(parts) != checksum:
        raise WireError("checksum does not match: damaged on the way")
    if [entry[0] for entry in sections] != list(expected):
        raise WireError(f"holds sections {[s[0] for s in sections]}, expected {list(expected)}")
    layout = [
        (s, _entries(s, table, kinds, index, expected)) for s, table, kinds, index in sections
    ]
    total = sum(math.prod(shape) * kind.itemsize for _, es in layout for _, shape, kind in es)
    if total != found:
        raise WireError(f"arrays of {total} bytes in a body of {found}")
    return Packet(_views(layout, parts), header)


def table_id(shapes: Shapes) -> str:
    """Return the id of a list of names and shapes."""
    text = json.dumps([[name, *shape] for name, shape in shapes.items()], separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode())


_Entry: TypeAlias = tuple[str, tuple[int, ...], "np.dtype[Any]"]


def _flat(value: np.ndarray) -> memoryview:
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _checksum(pieces: Buffers) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _pieces(message: Buffers | bytes) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = [message] if isinstance(message, bytes) else [*message]
    if len(pieces) < 2 or len(pieces[0]) != _PREAMBLE.size:  # whole, as from a network
        pieces = _cut(b"".join(pieces))
    return pieces


def _head(pieces: Buffers) -> bytes:
    preamble, head = pieces[0], bytes(pieces[1])
    if len(preamble) != _PREAMBLE.size:
        raise WireError("message too short for a packet")
    magic, length, _, checksum, _ = _PREAMBLE.unpack(preamble)
    if magic != _MAGIC:
        raise WireError(f"not a packet of this version (starts with {bytes(magic)!r})")
    if len(head) != length or length > _MAX_HEAD:
        raise WireError(f"declares a head of {length} bytes, has {len(head)}")
    if xxhash.xxh3_64_intdigest(head) != checksum:
        raise WireError("checksum of the head does not match: damaged on the way")
    return head


def _cut(data: bytes) -> list[bytes | memoryview]:
    view = memoryview(data)
    at = _PREAMBLE.size
    length = int.from_bytes(data[4:8], "little")
    return [data[:at], data[at : at + length], view[at + length :]]


def _read_head(head: bytes) -> tuple[dict[str, Scalar], list[list[Any]]]:
    try:
        parsed = json.loads(head, parse_constant=_refuse)
        header, sections = parsed["h"], parsed["s"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"head cannot be read ({type(error).__name__})") from None
    if not isinstance(header, dict) or len(header) > _MAX_HEADER_ITEMS:
        raise WireError("header is no mapping of at most 256 items")
    for name, value in header.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise WireError(f"header {name[:40]!r} is no number or string")
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"header {name[:40]!r} is not finite")
    if not isinstance(sections, list) or not all(
        isinstance(s, list) and len(s) == 4 and isinstance(s[0], str) for s in sections
    ):
        raise WireError("section list is malformed")
    return header, sections


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed")


def _entries(
    section: str, table: Any, kinds: Any, index: Any, expected: Mapping[str, Shapes]
) -> list[_Entry]:
    if index is None:
        if table != table_id(expected[section]):
            raise WireError(f"section {section!r} follows a table this receiver does not hold")
        names_shapes = list(expected[section].items())
    else:
        names_shapes = _index(section, index)
    kinds = [kinds] * len(names_shapes) if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or len(kinds) != len(names_shapes):
        raise WireError(f"section {section!r} declares another number of dtypes than arrays")
    if any(kind not in _DTYPES for kind in kinds):
        raise WireError(f"section {section!r} declares an unknown dtype")
    return [
        (name, shape, np.dtype(f"<{kind}"))
        for (name, shape), kind in zip(names_shapes, kinds, strict=True)
    ]


def _index(section: str, index: Any) -> list[tuple[str, tuple[int, ...]]]:
    if not isinstance(index, list):
        raise WireError(f"section {section!r} has a malformed index")
    found: dict[str, tuple[int, ...]] = {}
    for entry in index:
        if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            raise WireError(f"section {section!r} has a malformed index")
        name, *shape = entry
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
            raise WireError(f"section {section!r}: impossible shape {shape[:8]}")
        if len(shape) > 8 or name in found:
            raise WireError(f"section {section!r}: array {name[:80]!r} twice or of rank > 8")
        found[name] = tuple(shape)
    return list(found.items())


def _views(layout: Sequence[tuple[str, Sequence[_Entry]]], parts: Buffers) -> dict[str, Tensors]:
    whole = parts[0] if len(parts) == 1 else None
    if whole is None and len(parts) != sum(1 for _, es in layout for e in es if math.prod(e[1])):
        whole = b"".join(parts)
    pieces, at = iter(parts), 0
    sections: dict[str, Tensors] = {}
    for section, entries in layout:
        arrays: dict[str, np.ndarray] = {}
        for name, shape, kind in entries:
            count = math.prod(shape)
            if whole is not None:
                array = np.frombuffer(whole, kind, count, at) if count else np.empty(0, kind)
                at += count * kind.itemsize
            else:
                array = np.frombuffer(next(pieces) if count else b"", kind)
            if array.size != count:
                raise WireError(f"array {name[:80]!r} has {array.size} entries, not {count}")
            array.flags.writeable = False
            arrays[name] = array.reshape(shape)
        sections[section] = arrays
    return sections
