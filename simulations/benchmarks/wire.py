"""What an update costs on the wire, and how fast it is coded: codecs, Flower, zlib, Golomb.

The updates are those of one client after four local steps of MiniLM on SST-2 (on the support texts
where SST-2 is not at hand): all linear layers at rank 32, and query and value at rank 8. A packet
counts whole, its header included. ``to_entropy`` is its size over the empirical entropy of the
symbols in it, every other array as it is; below 1 the coder has used that parts of an update
differ. Speeds are in megabytes of float32 input, codec included, on one core. Golomb coding is
ComPEFT's (arXiv 2311.13171): gaps between the kept, one bit for each sign, one float16.
"""

from __future__ import annotations

import io
import math
import statistics
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedpeft.broadcasts import broadcast, header
from fedpeft.client_rounds import client_round
from fedpeft.coding import Coding
from fedpeft.data._files import find
from fedpeft.errors import DataError, FedPeftError
from fedpeft.federation import deal
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.site import Site
from fedpeft.spec import build, names
from fedpeft.state import start
from fedpeft.tables import limit
from fedpeft.tensors import shapes_of, size
from fedpeft.types import Codec, Scalar, Tensors
from fedpeft.wire import body, unpack
from simulations.benchmarks import _report

_T = TypeVar("_T")

ADAPTERS: Mapping[str, str] = {
    "query and value, rank 8": "lora(r=8, alpha=16)",
    "all-linear, rank 32": 'lora(r=32, alpha=64, targets="all-linear")',
}
LINES = {
    "model": "minilm",
    "partition": "dirichlet(alpha=0.5)",
    "clients": 10,
    "trainer": 'plain(optimizer="adamw", lr=3e-3, steps=4, batch=4, clip=1.0, '
    'schedule="linear", final=0.1)',
    "rounds": 1,
}
CHAINS = (
    *("topk(density=0.1)", "topk(density=0.01) | int8", "topk(density=0.1) | int8"),
    *("ternary(density=0.05)", "ternary(density=0.2)", "topk(density=0.1) | half"),
)
"""Beside every codec with its defaults."""
DENSITIES = (0.05, 0.1, 0.2)
SMALL = {
    f"encoder.layer.{i // 4}.attention.self.{('query', 'value')[i // 2 % 2]}.lora_{'AB'[i % 2]}": (
        (4, 16) if i % 2 == 0 else (16, 4)
    )
    for i in range(28)
}
"""28 tensors of rank 4, so small that Flower's records are half names and headers."""
TOLD: Mapping[str, Scalar] = {
    "run": "0" * 32,
    "round": 10,
    "steps": 4,
    "lr_sum": 0.0074,
    "seen": 16,
    "loss": 0.6931471805599453,
}
TARGETS = {
    "to_entropy, a million parameters or more": 1.01,
    "encode_mb_s": {"ternary, sign, topk": 100, "int8, int4": 50},
    "decode_mb_s": {"ternary, sign, topk": 200, "int8, int4": 80},
    "28 small tensors after int8, times smaller than Flower": 2.5,
}


@dataclass(frozen=True)
class Trained:
    """An update, and which of its tensors are the head."""

    name: str
    delta: Tensors
    head: Collection[str] = ()

    @property
    def parameters(self) -> int:
        """How many values there are."""
        return size(shapes_of(self.delta).values())


def trained(name: str, adapter: str) -> Trained:
    """Return what a client sends after a few steps."""
    try:
        find("cls/sst2.dev.jsonl.gz")
        data, task = 'jsonl(train="cls/sst2.dev.jsonl.gz")', "classify(max_length=64)"
    except DataError:
        data, task = 'embedded(name="support")', "classify"
    plan = Plan.from_lines({**LINES, "task": task, "data": data, "adapter": adapter})
    site = Site(plan, deal(plan))
    state, client = start(plan, site.tables, site.initial), min(site.federation.population)
    sent = broadcast(plan, site.tables, state).seal(header(state, "run", client))
    reply, _ = client_round(plan, site, client, sent, Memory())
    expected, coding = site.tables.up(0), site.tables.uplink
    sections = unpack(reply, coding.expected(expected), limit(expected)).sections
    head = site.base.outline.head
    delta = {k: v.copy() for k, v in coding.decode(sections, expected["adapter"]).items()}
    site.close()
    return Trained(name, delta, head)


def specs() -> list[str]:
    """Return every codec that needs no field, and the chains that there are."""
    found = []
    for spec in [*(name for name in names("codecs") if name != "chain"), *CHAINS]:
        try:
            build("codecs", spec)
            found.append(spec)
        except FedPeftError:
            continue
    return found


def ours(update: Trained, spec: str, seconds: float) -> dict[str, Any]:
    """Return what a packet of this codec costs and takes."""
    codec: Codec = build("codecs", spec)
    coding = Coding(codec, update.head)
    shapes = {"adapter": shapes_of(update.delta)}
    expected, most = coding.expected(shapes), limit(shapes)

    def encode() -> bytes:
        sections = coding.encode(update.delta, derive(0, "wire benchmark"))
        return bytes(body(sections, expected).seal(TOLD))

    def decode() -> Tensors:
        found = unpack(message, expected, most).sections
        return coding.decode(found, shapes["adapter"])

    message, encoding = _timed(encode, seconds)
    _, decoding = _timed(decode, seconds)
    arrays = [
        v for part in unpack(message, expected, most).sections.values() for v in part.values()
    ]
    least = sum(entropy(v) if v.dtype == np.uint8 else 8 * v.nbytes for v in arrays)
    row = _row(update, f"fedpeft {spec}", len(message), encoding, decoding)
    return row | {"to_entropy": round(8 * len(message) / least, 4)}


def entropy(symbols: np.ndarray) -> float:
    """Return the bits of all symbols at their empirical entropy; no bits where all are equal."""
    counts = np.bincount(symbols.reshape(-1))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def flower(update: Trained, seconds: float) -> dict[str, Any]:
    """Return what Flower's records of the float32 tensors cost."""
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    def encode() -> bytes:
        arrays = ArrayRecord({name: Array(value) for name, value in update.delta.items()})
        return bytes(recorddict_to_proto(RecordDict({"arrays": arrays})).SerializeToString())

    def decode() -> Any:
        record = recorddict_from_proto(Proto.FromString(message)).array_records["arrays"]
        return {name: array.numpy() for name, array in record.items()}

    message, encoding = _timed(encode, seconds)
    return _row(update, "Flower ArrayRecord", len(message), encoding, _timed(decode, seconds)[1])


def numpy_zlib(update: Trained, seconds: float) -> dict[str, Any]:
    """Return what the float32 tensors cost as an npz file, compressed as a whole."""

    def encode() -> bytes:
        file = io.BytesIO()
        np.savez(file, **update.delta)  # type: ignore[arg-type]
        return zlib.compress(file.getvalue())

    def decode() -> Any:
        return dict(np.load(io.BytesIO(zlib.decompress(message)), allow_pickle=False))

    message, encoding = _timed(encode, seconds)
    return _row(update, "numpy and zlib", len(message), encoding, _timed(decode, seconds)[1])


def golomb(update: Trained, density: float, seconds: float) -> dict[str, Any]:
    """Return what ComPEFT's ternary update costs; it is only written here, not read."""
    vector = np.concatenate([v.reshape(-1) for v in update.delta.values()])
    kept = max(1, round(density * len(vector)))
    golden = (math.sqrt(5) + 1) / 2
    low = max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - density))))

    def encode() -> bytes:
        limit = np.partition(np.abs(vector), len(vector) - kept)[len(vector) - kept]
        at = np.flatnonzero(np.abs(vector) >= limit)
        gaps = np.diff(at, prepend=-1) - 1
        ends = np.cumsum((gaps >> low) + 1 + low)
        bits = np.ones(int(ends[-1]), np.uint8)
        for place in range(low):
            bits[ends - 1 - place] = gaps >> place & 1
        bits[ends - 1 - low] = 0
        signs = np.packbits(vector[at] < 0)
        return np.float16(vector.std()).tobytes() + np.packbits(bits).tobytes() + signs.tobytes()

    message, encoding = _timed(encode, seconds)
    return _row(update, f"Golomb, density {density}", len(message), encoding, None)


def _row(
    update: Trained, side: str, nbytes: int, encoding: float, decoding: float | None
) -> dict[str, Any]:
    megabytes = 4 * update.parameters / 1e6
    return {
        "update": update.name,
        "parameters": update.parameters,
        "side": side,
        "bytes": nbytes,
        "bits_per_parameter": round(8 * nbytes / update.parameters, 4),
        "times_smaller_than_float32": round(4 * update.parameters / nbytes, 2),
        "encode_mb_s": round(megabytes / encoding, 1),
        "decode_mb_s": round(megabytes / decoding, 1) if decoding else None,
    }


def _timed(work: Callable[[], _T], seconds: float) -> tuple[_T, float]:
    """Return the result, and the median of at least three timings after a first."""
    result, found, end = work(), list[float](), time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - began)
    return result, statistics.median(found)


def measure(quick: bool) -> dict[str, Any]:
    """Return a row for each update and side."""
    seconds = 0.02 if quick else 1.0
    rng = derive(0, "wire benchmark", "small")
    small = {k: (3e-3 * rng.standard_normal(s)).astype(np.float32) for k, s in SMALL.items()}
    updates = [Trained("28 tensors, rank 4", small)]
    for name, adapter in [*ADAPTERS.items()][: 1 if quick else None]:
        updates.append(trained(name, adapter))
    rows = []
    for update in updates:
        rows += [ours(update, spec, seconds) for spec in specs()]
        rows += [flower(update, seconds), numpy_zlib(update, seconds)]
        rows += [golomb(update, density, seconds) for density in DENSITIES]
    return {"rows": rows, "targets": TARGETS}


if __name__ == "__main__":
    _report.main("wire", measure)
