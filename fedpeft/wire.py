"""A packet as bytes: preamble, JSON head, arrays back to back. No pickle, nothing is executed.

::

    preamble   magic "FPW1" | head length u32 | body length u64 | xxh3-64 of head | xxh3-64 of body
    head       {"h": header, "s": [[section, table, dtypes], [section, index, dtypes, coded], ...]}
    body       the arrays in the order of the table or the index, little-endian, without gaps

Both sides know from the plan which tensors a section holds, so names and shapes travel only as the
id of their ``table``; a list of arrays that differs from it travels as an ``index``. Arrays of
bytes are symbols, which travel entropy-coded (``entropy.py``) where that is shorter; ``coded`` then
lists the bytes that each array takes, 0 for those that travel as they are. A receiver passes what
it expects and how much it will take, and nothing is allocated before the sizes agree. All of it,
byte by byte: ``docs/wire.md``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fedpeft import entropy
from fedpeft.errors import WireError
from fedpeft.types import Packet, Scalar, Shapes, Tensors

_MAGIC = b"FPW1"
_PREAMBLE = struct.Struct("<4sIQQQ")
_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_DTYPES = {kind: np.dtype(f"<{kind}") for kind in _KINDS}
_MAX_HEAD = 1 << 20
_SPARE_HEAD, _MAX_ENTRIES = 8192, 8
"""What a head may hold in bytes beside its index, and how many times the tables' own index."""
_MAX_HEADER_ITEMS = 256
_MAX_RANK = 8


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """The sections of a packet, serialised once and sent under many headers.

    ``sizes`` are the bytes of each section, where this process has made it.
    """

    sections: Sequence[Sequence[Any]]
    pieces: Sequence[memoryview]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def seal(
        self,
        header: Mapping[str, Scalar],
        spared: Mapping[str, int] | None = None,
        instead: Message | None = None,
    ) -> Message:
        """Return the message with this header. Raises ``WireError`` for one no receiver takes."""
        _check_header(header)
        head = _dump({"h": dict(header), "s": self.sections})
        if len(head) > _MAX_HEAD:
            raise WireError(f"head of {len(head)} bytes is longer than {_MAX_HEAD}")
        return Message(head, self, spared or {}, instead)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A sealed packet that has not left this process: nothing is copied or summed until it does.

    ``spared`` are bytes of its sections that a receiver on another machine would hold already;
    ``instead`` is what that one would be sent, where it is something else.
    """

    head: bytes
    body: Body
    spared: Mapping[str, int] = field(default_factory=dict)
    instead: Message | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """The bytes of each section, of what would be sent."""
        if self.instead:
            return self.instead.sizes
        return {name: n - self.spared.get(name, 0) for name, n in self.body.sizes.items()}

    @property
    def nbytes(self) -> int:
        """What it costs to send it: the length of ``bytes(message)``, but for what is spared."""
        if self.instead:
            return self.instead.nbytes
        return (
            _PREAMBLE.size + len(self.head) + _length(self.body.pieces) - sum(self.spared.values())
        )

    def __bytes__(self) -> bytes:
        pieces = self.body.pieces
        sums = _checksum([self.head]), _checksum(pieces)
        preamble = _PREAMBLE.pack(_MAGIC, len(self.head), _length(pieces), *sums)
        return b"".join([preamble, self.head, *pieces])


def body(sections: Mapping[str, Tensors], expected: Mapping[str, Shapes]) -> Body:
    """Serialise ``sections``; ``expected`` maps a section to the table that the receiver holds.

    Raises ``WireError`` for arrays that cannot travel (booleans, complex numbers, objects).
    """
    entries, pieces, sizes = [], list[memoryview](), dict[str, int]()
    for section, tensors in sections.items():
        table = expected.get(section, {})
        same = list(tensors) == list(table) and all(
            value.shape == table[name] for name, value in tensors.items()
        )
        kinds = [value.dtype.str[1:] for value in tensors.values()]
        if unknown := set(kinds) - set(_DTYPES):
            raise WireError(f"section {section!r} holds dtype {sorted(unknown)[0]!r}")
        if not same and any(value.ndim > _MAX_RANK for value in tensors.values()):
            raise WireError(f"section {section!r} holds an array of rank > {_MAX_RANK}")
        index = [[name, *value.shape] for name, value in tensors.items()]
        uniform = kinds[0] if len(set(kinds)) == 1 else kinds
        found = [_piece(value) for value in tensors.values()]
        coded = [piece.nbytes if shorter else 0 for piece, shorter in found]
        entry = [section, table_id(table) if same else index, uniform]
        entries.append([*entry, coded] if any(coded) else entry)
        pieces += [piece for piece, _ in found if piece.nbytes]
        sizes[section] = sum(piece.nbytes for piece, _ in found)
    return Body(entries, pieces, sizes)


def pack(packet: Packet, expected: Mapping[str, Shapes]) -> Message:
    """Serialise a packet with its header."""
    return body(packet.sections, expected).seal(packet.header)


def peek(message: Message | bytes) -> Mapping[str, Scalar]:
    """Return the header alone, once the head's checksum has been checked. Raises ``WireError``."""
    head = message.head if isinstance(message, Message) else _cut(message)[0]
    return _read_head(head)[0]


def digest(message: Message | bytes) -> bytes:
    """Return 32 bytes that stand for the whole packet: header, table and arrays.

    They are the same for a message that has left its process. Raises ``WireError`` for no packet.
    """
    if isinstance(message, Message):
        head, pieces = message.head, message.body.pieces
    else:
        head, _, _, rest = _cut(message)
        pieces = [rest]
    found = hashlib.blake2b(b"%d:" % len(head) + head, digest_size=32)
    for piece in pieces:
        found.update(piece)
    return found.digest()


def unpack(message: Message | bytes, expected: Mapping[str, Shapes], limit: int) -> Packet:
    """Parse and check. Raises ``WireError`` for anything but a whole packet of expected sections.

    ``limit`` bounds the bytes of the body, and those of what it decodes to. Arrays are read-only,
    and views of the message where they are not coded. What never left this process was not damaged
    on the way, so only ``bytes`` have their checksums compared.
    """
    if isinstance(message, Message):
        head, parts = message.head, message.body.pieces
    else:
        head, declared, checksum, rest = _cut(message)
        parts = [rest]
        if rest.nbytes != declared:
            raise WireError(f"declares a body of {declared} bytes, has {rest.nbytes}")
    found = _length(parts)
    if found > limit:
        raise WireError(f"holds {found} bytes where at most {limit} were expected")
    if isinstance(message, bytes) and _checksum(parts) != checksum:
        raise WireError("checksum does not match: damaged on the way")
    if len(head) > (most := _longest_head(expected)):
        raise WireError(f"head of {len(head)} bytes where at most {most} were expected")
    header, sections = _read_head(head)
    if [entry[0] for entry in sections] != list(expected):
        names = ", ".join(repr(s[0][:40]) for s in sections[:8])
        raise WireError(f"holds sections [{names}], expected {list(expected)}")
    layout = [
        (section, _entries(section, expected[section], limit, *entry))
        for section, *entry in sections
    ]
    total = sum(entry.length for _, entries in layout for entry in entries)
    if total != found:
        raise WireError(f"arrays of {total} bytes in a body of {found}")
    whole = sum(entry.nbytes for _, entries in layout for entry in entries)
    if whole > limit:
        raise WireError(f"decodes to {whole} bytes where at most {limit} were expected")
    sizes = {section: sum(e.length for e in entries) for section, entries in layout}
    return Packet(_views(layout, parts), header, sizes)


def table_id(shapes: Shapes) -> str:
    """Return the id of a list of names and shapes."""
    return _table_id(tuple(shapes.items()))


@lru_cache(maxsize=64)
def _table_id(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return xxhash.xxh3_64_hexdigest(_dump([[name, *shape] for name, shape in shapes]))


def _longest_head(expected: Mapping[str, Shapes]) -> int:
    """Return the most bytes of a head that a receiver reads: an index names what it expects."""
    return _SPARE_HEAD + _MAX_ENTRIES * sum(
        len(name) + 4 * len(shape) + 8
        for table in expected.values()
        for name, shape in table.items()
    )


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Entry(NamedTuple):
    """An array, and the bytes that it takes: as many as it has, or fewer where it is coded."""

    name: str
    shape: tuple[int, ...]
    kind: np.dtype[Any]
    length: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.kind.itemsize

    @property
    def is_coded(self) -> bool:
        return self.length != self.nbytes


def _length(pieces: Sequence[memoryview]) -> int:
    return sum(piece.nbytes for piece in pieces)


def _piece(value: np.ndarray) -> tuple[memoryview, bool]:
    """Return what travels of an array, and whether it is coded: bytes are, where it is shorter."""
    flat = _flat(value)
    coded = entropy.encode(np.frombuffer(flat, np.uint8)) if value.dtype == np.uint8 else None
    return (flat, False) if coded is None else (memoryview(coded), True)


def _flat(value: np.ndarray) -> memoryview:
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _checksum(pieces: Sequence[bytes | memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _cut(data: bytes) -> tuple[bytes, int, int, memoryview]:
    """Return the head, the length and checksum that are declared of the body, and the body."""
    at = _PREAMBLE.size
    if len(data) < at:
        raise WireError("message too short for a packet")
    magic, length, body_length, checksum, body_checksum = _PREAMBLE.unpack(data[:at])
    if magic != _MAGIC:
        raise WireError(f"not a packet of this version (starts with {magic!r})")
    head = data[at : at + length]
    if len(head) != length:
        raise WireError(f"declares a head of {length} bytes, has {len(head)}")
    if length > _MAX_HEAD:
        raise WireError(f"head of {length} bytes is longer than {_MAX_HEAD}")
    if _checksum([head]) != checksum:
        raise WireError("checksum of the head does not match: damaged on the way")
    return head, body_length, body_checksum, memoryview(data)[at + length :]


def _read_head(head: bytes) -> tuple[dict[str, Scalar], list[list[Any]]]:
    try:
        parsed = json.loads(
            head.decode(), parse_constant=_refuse, object_pairs_hook=_without_repetition
        )
        header, sections = parsed["h"], parsed["s"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"head cannot be read ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise WireError("header is no mapping")
    _check_header(header)
    if not isinstance(sections, list) or not all(
        isinstance(s, list) and len(s) in (3, 4) and isinstance(s[0], str) for s in sections
    ):
        raise WireError("section list is malformed")
    return header, sections


def _check_header(header: Mapping[str, Any]) -> None:
    if len(header) > _MAX_HEADER_ITEMS:
        raise WireError(f"header has {len(header)} items, at most {_MAX_HEADER_ITEMS} are allowed")
    for name, value in header.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise WireError(f"header {name[:40]!r} is no number or string")
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"header {name[:40]!r} is not finite")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise WireError(f"header {name[:40]!r} does not fit 64 bits")
        if not (_is_text(name) and (isinstance(value, int | float) or _is_text(value))):
            raise WireError(f"header {name[:40]!r} is not Unicode text")


def _is_text(value: str) -> bool:
    """Tell whether a string can be printed and stored: JSON can spell half a character."""
    return value.isascii() or not any(0xD800 <= ord(c) <= 0xDFFF for c in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed")


def _entries(
    section: str, table: Shapes, limit: int, index: Any, kinds: Any, *coded: Any
) -> list[_Entry]:
    if isinstance(index, str):
        if index != table_id(table):
            raise WireError(f"section {section!r} follows a table this receiver does not hold")
        names_shapes = list(table.items())
    else:
        names_shapes = _index(section, index, limit)
    kinds = [kinds] * len(names_shapes) if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or len(kinds) != len(names_shapes):
        raise WireError(f"section {section!r} declares another number of dtypes than arrays")
    if any(not isinstance(kind, str) or kind not in _DTYPES for kind in kinds):
        raise WireError(f"section {section!r} declares an unknown dtype")
    found = [
        _Entry(name, shape, _DTYPES[kind], math.prod(shape) * _DTYPES[kind].itemsize)
        for (name, shape), kind in zip(names_shapes, kinds, strict=True)
    ]
    return _shorter(section, found, coded[0]) if coded else found


def _shorter(section: str, entries: Sequence[_Entry], coded: Any) -> list[_Entry]:
    """Return the arrays with the bytes that they take where they are coded."""
    if not isinstance(coded, list) or len(coded) != len(entries):
        raise WireError(f"section {section!r} declares another number of codings than arrays")
    for entry, length in zip(entries, coded, strict=True):
        if type(length) is not int or not 0 <= length < max(1, entry.nbytes):
            raise WireError(f"section {section!r}: array {entry.name[:80]!r} has no shorter coding")
        if length and entry.kind != np.uint8:
            raise WireError(
                f"section {section!r}: array {entry.name[:80]!r} is coded, not of bytes"
            )
    return [
        entry._replace(length=length) if length else entry
        for entry, length in zip(entries, coded, strict=True)
    ]


def _index(section: str, index: Any, limit: int) -> list[tuple[str, tuple[int, ...]]]:
    if not isinstance(index, list):
        raise WireError(f"section {section!r} has a malformed index")
    found: dict[str, tuple[int, ...]] = {}
    for entry in index:
        if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            raise WireError(f"section {section!r} has a malformed index")
        name, *shape = entry
        array = f"section {section!r}: array {name[:80]!r}"
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
            raise WireError(f"{array} has an impossible shape")
        if len(shape) > _MAX_RANK or name in found:
            raise WireError(f"{array} comes twice or is of rank > {_MAX_RANK}")
        if math.prod(max(n, 1) for n in shape) > max(limit, 1):
            raise WireError(f"{array} is larger than the {limit} bytes that were expected")
        found[name] = tuple(shape)
    return list(found.items())


def _views(
    layout: Sequence[tuple[str, Sequence[_Entry]]], parts: Sequence[memoryview]
) -> dict[str, Tensors]:
    sizes = [entry.length for _, entries in layout for entry in entries if entry.length]
    if [part.nbytes for part in parts] != sizes:  # one piece, as it came from a network
        whole = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        ends = list(itertools.accumulate(sizes))
        parts = [whole[end - n : end] for n, end in zip(sizes, ends, strict=True)]
    pieces = iter(parts)
    return {
        section: {entry.name: _view(entry, pieces) for entry in entries}
        for section, entries in layout
    }


def _view(entry: _Entry, pieces: Iterator[memoryview]) -> np.ndarray:
    if entry.is_coded:
        array = entropy.decode(next(pieces), math.prod(entry.shape))
    else:
        array = np.frombuffer(next(pieces) if entry.length else b"", entry.kind)
    array.flags.writeable = False
    return array.reshape(entry.shape)
