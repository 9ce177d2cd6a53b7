"""A federation of processes on this machine: what a message costs a site, a round, and the wire.

A site's time for a message is how long the process lives that Flower starts for it, read off the
processes of the machine; MiniLM is trained for two steps. ``stock`` sites are Flower's SuperNode
alone, whose process imports torch and loads the base every time; ``warm`` ones are ``fedpeft
client``. Bytes are those that pass between sites and server, TLS and requests included, less what
passes in the same time while nothing runs; packed bytes are those of ``rounds.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from simulations._machines.federation import Federation
from simulations._machines.plans import LINES, write_plan
from simulations.benchmarks import _report

ADAPTER = "lora(r=8, alpha=16)"
LARGE = "lora(r=64, alpha=64)"
"""An adapter of which an update takes more than 1 MB."""
_IDLE = 20.0
"""Seconds for which the wire is watched while nothing runs."""


def measure(quick: bool) -> dict[str, Any]:
    """Return a row for each kind of site, and one for the wire."""
    sites, rounds = (1, 2) if quick else (3, 8)
    rows = [_timed(kind, sites, rounds) for kind in ("stock", "warm")]
    stock, warm = (row["message_s"] for row in rows)
    rows.append({"what": "a message, stock / warm", "ratio": round(stock / warm, 1)})
    if not quick:
        rows.append(_weighed(sites, rounds))
    targets = {"message ratio": 5.0, "round_s with trivial training": 5.0, "wire / packed": 1.05}
    return {"rows": rows, "targets": targets}


def _timed(kind: str, sites: int, rounds: int) -> dict[str, Any]:
    """Return the medians of a run on sites of a kind, without its first round."""
    with _federation(sites, rounds, ADAPTER, stock=kind == "stock") as federation:
        run = _submit(federation)
        lives = _lives(federation, run)
        ledger = _ledger(run)
    messages = lives[sites * 2 :]  # the greeting, and the first round
    return {
        "what": kind,
        "sites": sites,
        "message_s": round(statistics.median(messages), 2),
        "messages": len(messages),
        "round_s": round(statistics.median(line["seconds"] for line in ledger[1:]), 2),
        "first_round_s": round(ledger[0]["seconds"], 2),
    }


def _weighed(sites: int, rounds: int) -> dict[str, Any]:
    """Return what passes the wire for what is packed, beyond what passes anyway."""
    with _federation(sites, rounds, LARGE) as federation:
        relay = federation.relay
        time.sleep(3.0)  # who has just joined has more to say
        before, began = relay.up + relay.down, time.monotonic()
        time.sleep(_IDLE)
        idle = (relay.up + relay.down - before) / (time.monotonic() - began)
        run = _submit(federation)
        while not (run / "rounds.jsonl").exists():  # the bundle and the greeting have passed
            time.sleep(0.02)
        before, began = relay.up + relay.down, time.monotonic()
        first = len(_ledger(run))
        while not (run / "result.json").exists():
            time.sleep(0.1)
        passed = relay.up + relay.down - before - idle * (time.monotonic() - began)
        ledger = _ledger(run)[first:]
    packed = sum(line["up_bytes"] + line["down_bytes"] for line in ledger)
    return {
        "what": "wire",
        "update_mb": round(ledger[0]["up_bytes"] / sites / 1e6, 2),
        "packed_mb": round(packed / 1e6, 1),
        "wire_mb": round(passed / 1e6, 1),
        "ratio": round(passed / packed, 3),
        "idle_bytes_s": round(idle / sites),
    }


@contextlib.contextmanager
def _federation(
    sites: int, rounds: int, adapter: str, *, stock: bool = False
) -> Iterator[Federation]:
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as temporary:
        folder = Path(temporary)
        rows = write_plan(folder / "plan.yaml", {**LINES, "adapter": adapter}, sites, rounds)
        with Federation(folder, rows, stock=stock) as federation:
            yield federation


def _submit(federation: Federation) -> Path:
    return federation.submit(federation.folder / "plan.yaml", "bench")


def _lives(federation: Federation, run: Path) -> list[float]:
    """Return how long each process lived that was started for a message, in the order of births."""
    seen: dict[int, Future[tuple[float, float]]] = {}
    with ThreadPoolExecutor(64) as waiting:  # to look at all processes takes a while by itself
        while not (run / "result.json").exists():
            for process in federation.processes("client app"):
                if process.pid not in seen:
                    seen[process.pid] = waiting.submit(_life, process)
            time.sleep(0.05)
    lives = sorted(future.result() for future in seen.values())
    return [ended - born for born, ended in lives if born]


def _life(process: psutil.Process) -> tuple[float, float]:
    """Return when a process was born and when it ended; zeros where it was gone already."""
    try:
        born = process.create_time()
        process.wait()
    except psutil.Error:
        return 0.0, 0.0
    return born, time.time()


def _ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    _report.main("deployment", measure)
