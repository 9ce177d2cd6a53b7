"""Packets that no honest client sends, and what the server makes of them.

Run by itself for as long as wanted::

    python -m tests.fuzz_wire --mutants 1000000 --seed 1
    python -m tests.fuzz_wire --atheris -max_total_time=600

The second is guided by coverage, where ``atheris`` is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import re
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import numpy as np
import xxhash

from fedpeft import entropy
from fedpeft.admission import admit
from fedpeft.errors import FedPeftError, WireError
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.spec import names
from fedpeft.tables import Tables, limit
from fedpeft.types import Scalar, Shapes, Update, Weights
from fedpeft.wire import body

SHAPES: Shapes = {
    "layer.0.lora_A.weight": (4, 64),
    "layer.0.lora_B.weight": (48, 4),
    "layer.1.lora_A.weight": (4, 96),
    "layer.1.lora_B.weight": (64, 4),
    "score.weight": (3, 64),
    "score.bias": (3,),
}
HEAD = ("score.weight", "score.bias")
LINES = {
    "model": "tiny-novels",
    "task": "causal_lm",
    "data": "embedded(name='support')",
    "trainer": "plain(steps=2, batch=4)",
    "rounds": 3,
    "clients": 2,
}
TOLD: dict[str, Scalar] = {
    "run": "r",
    "round": 1,
    "steps": 2,
    "seen": 8,
    "lr_sum": 0.1,
    "loss": 0.5,
}
SPECS = (
    "half(dtype='bfloat16')",
    "topk(density=0.1)",
    "topk(density=0.1) | int8",
    "int8(block=16)",
)
"""Beside every codec with its defaults."""
_MEASURED = 5
"""Memory is measured in one batch of so many: it takes five times the time."""
SECONDS = 2.0
"""Of CPU: no packet of this size may keep the server longer."""
ODD: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 65_535, 1 << 31, 1 << 40, 1 << 62, 1 << 63),
    *(-(1 << 63), 10**40, 0.5, -0.0, 1e300, 5e-324, "", "x", "f4", "f2", "f8", "u1", "i1", "i8"),
    *("u2", "r", "adapter", "head", "\ud800", [], {}, [0], [[]], [None], {"a": 1}, "é" * 50),
)
_LARGE = 100_000
"""More is no packet of these shapes: mutants claim it, but do not send it."""
FLOATS = (np.nan, np.inf, -np.inf, 3e38, -1e20, 1e-45, 65_504.0, 0.0, 1e16)


@dataclass(frozen=True)
class Case:
    """A plan's uplink, and an honest reply under it."""

    spec: str
    plan: Plan = field(repr=False)
    tables: Tables = field(repr=False)

    @classmethod
    def of(cls, spec: str) -> Case:
        plan = Plan.from_lines({**LINES, "uplink": spec})
        return cls(spec, plan, Tables(plan, SHAPES, HEAD))

    @cached_property
    def bound(self) -> int:
        return limit(self.tables.up(1))

    @cached_property
    def honest(self) -> bytes:
        rng = np.random.default_rng(0)
        delta = {k: (rng.standard_normal(s) ** 3).astype(np.float32) for k, s in SHAPES.items()}
        coding, expected = self.tables.uplink, self.tables.up(1)
        sections = coding.encode(delta, derive(0, "fuzz"))
        return bytes(body(sections, coding.expected(expected)).seal(TOLD))

    def admit(self, message: bytes) -> Update:
        weights = Weights({"a": 2.0}, 4.0)
        return admit(self.plan, self.tables, ("r", 1), "a", message, {"a": 20}, weights)


def cases() -> list[Case]:
    """Every codec by itself where it needs no field, and some chains."""
    found = []
    for spec in [*(name for name in names("codecs") if name != "chain"), *SPECS]:
        try:
            found.append(Case.of(spec))
        except FedPeftError:  # it needs a field, or parts that this plan lacks
            continue
    return found


@dataclass
class Parsed:
    """A packet taken apart: the head as values, the body as the bytes of each array."""

    head: Any
    pieces: list[bytes]

    @classmethod
    def of(cls, message: bytes, tables: Tables) -> Parsed:
        length = struct.unpack_from("<I", message, 4)[0]
        head, at, pieces = json.loads(message[32 : 32 + length]), 32 + length, []
        expected = tables.uplink.expected(tables.up(1))
        for section, index, kinds, *coded in head["s"]:
            shapes = (
                [*expected[section].values()]
                if isinstance(index, str)
                else [shape for _, *shape in index]
            )
            kinds = [kinds] * len(shapes) if isinstance(kinds, str) else kinds
            lengths = coded[0] if coded else [0] * len(shapes)
            for shape, kind, short in zip(shapes, kinds, lengths, strict=True):
                size = short or math.prod(shape) * int(kind[1:])
                pieces.append(message[at : at + size])
                at += size
        return cls(head, pieces)

    def sealed(self) -> bytes:
        text = json.dumps(self.head, separators=(",", ":")).encode()
        return sealed(text, b"".join(self.pieces))


def sealed(head: bytes, content: bytes, magic: bytes = b"FPW1") -> bytes:
    """A message whose lengths and checksums are right, whatever it says."""
    sums = xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(content)
    return struct.pack("<4sIQQQ", magic, len(head), len(content), *sums) + head + content


# --- damage on the way -----------------------------------------------------------------------


def flipped(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, most) if found else 0):
        at = rng.randrange(len(found))
        found[at] = rng.choice((found[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(found)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits, cuts, additions and repetitions, of anything."""
    kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + rng.randbytes(rng.randint(1, 40))
    end = min(len(data), at + rng.randint(1, 30))
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:end] + data[at:]
    return flipped(data, rng)


# --- a sender that seals what it says ----------------------------------------------------------


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _in_head(parsed: Parsed, rng: random.Random) -> None:
    where, key = rng.choice([*_places(parsed.head)])
    value, kind = where[key], rng.randrange(5)
    if kind == 0 and isinstance(value, int) and not isinstance(value, bool):
        where[key] = value + rng.choice((-2, -1, 1, 2, 4, 255, -value, value))
    elif kind == 1 and isinstance(where, list):
        where.insert(rng.randrange(len(where) + 1), deepcopy(rng.choice((value, rng.choice(ODD)))))
    elif kind == 2:
        del where[key]
    elif kind == 3 and isinstance(where, dict):
        where[rng.choice(("x", "loss", "run", "seen"))] = rng.choice(ODD)
    else:
        where[key] = deepcopy(rng.choice(ODD))


def _entry(parsed: Parsed, rng: random.Random) -> tuple[list[Any], int, int]:
    """Return an entry of the head, the number of an array in it, and that of its bytes."""
    at, which = 0, rng.randrange(len(parsed.pieces))
    for entry in parsed.head["s"]:
        count = len(entry[1]) if isinstance(entry[1], list) else len(SHAPES) - len(HEAD)
        if entry[0] == "head" and isinstance(entry[1], str):
            count = len(HEAD)
        if which < at + count:
            return entry, which - at, which
        at += count
    return parsed.head["s"][-1], 0, len(parsed.pieces) - 1


def _resize(parsed: Parsed, entry: list[Any], at: int, piece: int, content: bytes) -> None:
    """Put other bytes in the place of an array's, and say so where its length is declared."""
    if len(entry) == 4 and at < len(entry[3]) and entry[3][at]:
        entry[3][at] = len(content)
    parsed.pieces[piece] = content


def _in_bytes(parsed: Parsed, rng: random.Random) -> None:
    piece = rng.randrange(len(parsed.pieces))
    parsed.pieces[piece] = flipped(parsed.pieces[piece], rng, 12)


def _in_front(parsed: Parsed, rng: random.Random) -> None:
    """The first bytes of an array: models and frequencies, where it is coded."""
    piece = rng.randrange(len(parsed.pieces))
    content = parsed.pieces[piece]
    parsed.pieces[piece] = flipped(content[:12], rng) + content[12:]


def _in_length(parsed: Parsed, rng: random.Random) -> None:
    entry, at, piece = _entry(parsed, rng)
    _resize(parsed, entry, at, piece, damaged(parsed.pieces[piece], rng))


def _in_symbols(parsed: Parsed, rng: random.Random) -> None:
    """Other symbols, well coded: what reaches the codecs themselves."""
    entry, at, piece = _entry(parsed, rng)
    if len(entry) < 4 or at >= len(entry[3]) or not entry[3][at]:
        return _in_floats(parsed, rng)
    count = math.prod(entry[1][at][1:])
    if count > _LARGE:
        return None
    symbols = entropy.decode(parsed.pieces[piece], count).copy()
    if rng.random() < 0.3:
        symbols = symbols[: rng.randrange(len(symbols))]
        entry[1][at] = [entry[1][at][0], len(symbols)]
    for _ in range(rng.randint(0, 6) if len(symbols) else 0):
        symbols[rng.randrange(len(symbols))] = rng.choice((0, 1, 2, 254, 255, rng.randrange(256)))
    coded = entropy.encode(symbols) if rng.random() < 0.7 else None
    entry[3][at] = len(coded) if coded else 0
    parsed.pieces[piece] = coded or symbols.tobytes()
    return None


def _in_floats(parsed: Parsed, rng: random.Random) -> None:
    entry, at, piece = _entry(parsed, rng)
    kind = entry[2] if isinstance(entry[2], str) else entry[2][min(at, len(entry[2]) - 1)]
    if len(entry) == 4 and at < len(entry[3]) and entry[3][at]:
        return
    width = int(kind[1:])
    values = np.frombuffer(parsed.pieces[piece][: len(parsed.pieces[piece]) // width * width], kind)
    values = values.copy()
    for _ in range(rng.randint(1, 3) if len(values) else 0):
        with np.errstate(over="ignore", invalid="ignore"):
            odd = np.float64(rng.choice(FLOATS))
            fits = kind[0] == "f" or math.isfinite(odd)
            values[rng.randrange(len(values))] = (
                odd.astype(kind) if fits and kind[0] == "f" else rng.randrange(128)
            )
    parsed.pieces[piece] = values.tobytes()


def _in_dtype(parsed: Parsed, rng: random.Random) -> None:
    """Another dtype or shape of the same bytes, or of as many as it asks for."""
    entry, at, piece = _entry(parsed, rng)
    kind = rng.choice(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
    if isinstance(entry[2], list) and at < len(entry[2]):
        entry[2][at] = kind
    else:
        entry[2] = kind
    if not isinstance(entry[1], list) or at >= len(entry[1]):
        return
    name, *shape = entry[1][at]
    shape = rng.choice(([*shape, 1], [1, *shape], shape[::-1], [0], [], [rng.randrange(3000)]))
    entry[1][at] = [name, *shape]
    if rng.random() < 0.7:
        if len(entry) == 4 and at < len(entry[3]):
            entry[3][at] = 0
        width, content = int(kind[1:]), parsed.pieces[piece]
        size = min(_LARGE, math.prod(shape) * width)
        parsed.pieces[piece] = (content * (size // max(1, len(content)) + 1))[:size]


def _bomb(parsed: Parsed, rng: random.Random) -> None:
    """Few coded bytes that claim as many symbols as they can."""
    entry, at, piece = _entry(parsed, rng)
    if not isinstance(entry[1], list):
        expected = {k: s for k, s in SHAPES.items() if (k in HEAD) == (entry[0] == "head")}
        entry[1] = [[k, *s] for k, s in expected.items()]
    if isinstance(entry[2], str):
        entry[2] = [entry[2]] * len(entry[1])
    if len(entry) == 3:
        entry.append([0] * len(entry[1]))
    most = rng.choice((3000, 60_000, 80_000, 90_000, 1 << 20, 1 << 30))
    coded = bytes([rng.choice((0, 1, 255)), rng.choice((1, 4, 16))])
    coded += rng.randbytes(4 * rng.choice((0, 0, 1, 3)))
    entry[1][at], entry[2][at], entry[3][at] = [entry[1][at][0], most], "u1", len(coded)
    parsed.pieces[piece] = coded


def _many(parsed: Parsed, rng: random.Random) -> None:
    """Far more arrays than were asked for."""
    entry = rng.choice(parsed.head["s"])
    count = rng.choice((10, 300, 1000))
    entry[1:] = [[[f"{i}", 0] for i in range(count)], "u1"]


def _order(parsed: Parsed, rng: random.Random) -> None:
    entry = rng.choice(parsed.head["s"])
    rng.shuffle(entry[1] if isinstance(entry[1], list) and rng.random() < 0.7 else parsed.head["s"])


SEALED: Sequence[Callable[[Parsed, random.Random], None]] = (
    *(_in_head, _in_head, _in_bytes, _in_bytes, _in_front, _in_front, _in_length, _in_length),
    *(_in_symbols, _in_symbols, _in_symbols, _in_floats, _in_dtype, _bomb, _many, _order),
)


def mutant(case: Case, others: Sequence[Case], rng: random.Random) -> tuple[bytes, bool]:
    """Return a packet, and whether its lengths and checksums are right."""
    kind = rng.random()
    if kind < 0.15:
        return damaged(case.honest, rng), False
    if kind < 0.2:
        return rng.choice(others).honest, True
    length = struct.unpack_from("<I", case.honest, 4)[0]
    head, content = case.honest[32 : 32 + length], case.honest[32 + length :]
    if kind < 0.3:
        return sealed(damaged(head, rng), content), True
    if kind < 0.35:
        return sealed(head, damaged(content, rng)), True
    parsed = Parsed.of(case.honest, case.tables)
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            rng.choice(SEALED)(parsed, rng)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, WireError):
            break  # what was changed first left nothing to change here
    return parsed.sealed(), True


# --- what the server makes of them --------------------------------------------------------------


def check(update: Update) -> None:
    """Raise unless an accepted update keeps every promise; written anew, not taken from fedpeft."""
    found = {name: value.shape for name, value in update.delta.items()}
    fine = found == dict(SHAPES) and update.weight == 2.0 and not update.extras
    for value in update.delta.values():
        norm = math.sqrt(sum(float(x) ** 2 for x in value.reshape(-1).tolist()))
        fine = fine and value.dtype == np.float32 and norm <= 1.0001e15
    fine = fine and 0 < update.metrics["steps"] <= 2 and 0 < update.metrics["seen"] <= 8
    fine = fine and 0 < update.lr_sum < math.inf and 0 <= update.metrics["loss"] < math.inf
    if not fine:
        raise RuntimeError(f"accepted what breaks a promise: {found}")


@dataclass
class Tally:
    """What became of the mutants: reasons are without what they name."""

    mutants: int = 0
    resealed: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: float = 0.0
    """Most memory, over the bound on what was expected."""


def attack(case: Case, message: bytes, tally: Tally) -> None:
    """Hand a packet to the server. Raises whatever is no ``WireError``."""
    began = time.process_time()
    try:
        update = case.admit(message)
    except WireError as error:
        tally.reasons[re.sub(r"'.*?'|[-\d.]+", "..", str(error))[:40]] += 1
        update = None
    tally.slowest = max(tally.slowest, time.process_time() - began)
    if update is not None:
        tally.accepted += 1
        check(update)


def fuzz(mutants: int, seed: int, batch: int = 50) -> Tally:
    """Attack every case in turn. Raises ``RuntimeError`` naming codec, seed and packet."""
    tally, all_cases = Tally(), cases()
    for case in all_cases:
        check(case.admit(case.honest))  # and warm up what is cached
    for number in range(-(-mutants // batch)):
        rng = random.Random(f"{seed} {number}")
        case = all_cases[number % len(all_cases)]
        made = [mutant(case, all_cases, rng) for _ in range(batch)]
        if number // len(all_cases) % _MEASURED:
            _batch(case, made, tally, seed)
        else:
            _measured(case, made, tally, seed)
    return tally


def _batch(case: Case, made: Sequence[tuple[bytes, bool]], tally: Tally, seed: int) -> None:
    for message, resealed in made:
        tally.mutants += 1
        tally.resealed += resealed
        try:
            attack(case, message, tally)
        except BaseException as error:
            told = f"{case.spec}, seed {seed}: {error!r} for {message.hex()}"
            raise RuntimeError(told) from error


def _measured(case: Case, made: Sequence[tuple[bytes, bool]], tally: Tally, seed: int) -> None:
    tracemalloc.start()
    try:
        _batch(case, made, tally, seed)
        tally.largest = max(tally.largest, tracemalloc.get_traced_memory()[1] / case.bound)
    finally:
        tracemalloc.stop()


READERS = ("fedpeft.wire", "fedpeft.entropy", "fedpeft.admission", "fedpeft.codecs")
"""What reads a packet; to follow the rest as well would take minutes to set up and tell nothing."""


def readers() -> list[FunctionType]:
    """Every function of the modules that read a packet, those of classes and inner ones as well."""
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is FunctionType and (thing.__module__ or "").startswith(READERS)
    ]


def seeds(all_cases: Sequence[Case]) -> list[bytes]:
    """Return the honest packet of every codec, as :func:`read` takes it apart."""
    return [written(number, case.honest) for number, case in enumerate(all_cases)]


def written(number: int, message: bytes) -> bytes:
    """Return what :func:`read` reads: the checksums are left out, so nothing has to guess them."""
    length = struct.unpack_from("<I", message, 4)[0]
    return bytes([number]) + struct.pack("<H", length) + message[32:]


def read(data: bytes, all_cases: Sequence[Case]) -> tuple[Case, bytes]:
    """The first byte is the codec's number, two are the head's length; then head and body."""
    case, length = all_cases[data[0] % len(all_cases)], int.from_bytes(data[1:3], "little")
    return case, sealed(data[3 : 3 + length], data[3 + length :])


def mutated(data: bytes, longest: int, seed: int, all_cases: Sequence[Case]) -> bytes | None:
    """Return a packet changed as :func:`mutant` changes it, where ``data`` can be taken apart."""
    rng = random.Random(seed)
    try:
        case, message = read(data, all_cases)
        parsed = Parsed.of(message, case.tables)
        rng.choice(SEALED)(parsed, rng)
        found = written(data[0], parsed.sealed())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error):
        return None
    return found if len(found) <= longest else None


def _guided(arguments: Sequence[str]) -> None:
    """Fuzz by coverage; ``arguments`` are libFuzzer's. Does not return."""
    atheris = import_module("atheris")
    all_cases, tally = cases(), Tally()
    for case in all_cases:
        check(case.admit(case.honest))  # what is imported late is there to be instrumented

    def one(data: bytes) -> None:
        if len(data) >= 3:
            attack(*read(data, all_cases), tally)

    def change(data: bytes, longest: int, seed: int) -> bytes:
        """Half of the mutants are changed as packets are, the others as any bytes."""
        found = mutated(data, longest, seed, all_cases) if seed % 2 else None
        return found or atheris.Mutate(data, longest)

    for function in readers():
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=change)
    atheris.Fuzz()


def guided(arguments: Sequence[str]) -> int | None:
    """Fuzz by coverage from the honest packets on, in a process that libFuzzer may end."""
    with TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds(cases())):
            Path(folder, f"{number}").write_bytes(seed)
        process = get_context("spawn").Process(target=_guided, args=([*arguments, folder],))
        process.start()
        process.join()
    return process.exitcode


def main() -> None:
    """Fuzz, and say what became of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_wire")
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; takes its options")
    options, rest = parser.parse_known_args()
    if options.atheris:
        sys.exit(guided(rest))
    began = time.process_time()
    tally = fuzz(options.mutants, options.seed)
    print(f"{tally.mutants} mutants, {tally.resealed} resealed, {tally.accepted} accepted")
    print(f"slowest {tally.slowest:.3f} s, memory {tally.largest:.2f} of the bound")
    print(f"{time.process_time() - began:.1f} s of CPU")
    for reason, count in tally.reasons.most_common():
        print(f"{count:8} {reason}")


if __name__ == "__main__":
    main()
