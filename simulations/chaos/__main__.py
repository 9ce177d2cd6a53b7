"""``python -m simulations.chaos``: kill the processes of a federation, and compare its adapter.

A server and sites of their own processes run a plan with control variates, so that clients
remember something, while processes are killed with SIGKILL: any of them at random, and whoever
first comes to each moment of writing and sending. All must go on by itself, and the adapter must be
that of the same plan in simulation, where nobody was killed, bit for bit. Exit status 1 where it is
not.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations._machines.federation import ROLES, Federation
from simulations._machines.plans import CORRECTED, is_as_simulated, write_plan
from simulations.chaos._kills import LAST_POINTS, Killer, order

_PATIENCE = 150.0
"""Seconds for which nobody comes to a point before another is tried."""
_LONGEST = 5400.0
_AHEAD = 2.5
"""Rounds by which kills may be ahead of an even pace: towards the end rounds must not run out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, kill, compare; 0 where the adapters are the same."""
    parser = argparse.ArgumentParser(prog="python -m simulations.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--seed", type=int, help="of what is killed [default: any]")
    parser.add_argument("--short", action="store_true", help="6 rounds, 3 sites, 8 kills")
    parser.add_argument("--keep", type=Path, help="a new folder in which all is left to look at")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.short:
        asked.rounds, asked.sites, asked.kills = 6, 3, 8
    asked.seed = secrets.randbelow(10**6) if asked.seed is None else asked.seed
    print(f"seed {asked.seed}", file=sys.stderr, flush=True)
    if asked.keep:
        asked.keep.mkdir(parents=True)
        return _report(_chaos(asked, asked.keep.absolute()), asked.json)
    with tempfile.TemporaryDirectory(prefix="fedpeft-chaos-") as folder:
        return _report(_chaos(asked, Path(folder)), asked.json)


def _chaos(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    told = folder / "fault"
    sites = write_plan(folder / "plan.yaml", CORRECTED, asked.sites, asked.rounds)
    began = time.monotonic()
    with Federation(folder, sites, {"FEDPEFT_FAULT_FILE": str(told)}) as federation:
        run = federation.submit(folder / "plan.yaml", "chaos", every=True)
        killer = Killer(federation, told, random.Random(asked.seed))
        _kill_all_along(federation, run, killer, asked)
        seconds = time.monotonic() - began
    found = {
        "seed": asked.seed,
        "rounds": len((run / "rounds.jsonl").read_text().splitlines()),
        "sites": asked.sites,
        "seconds": round(seconds),
        "kills": len(killer.done),
        "killed": dict(Counter(kill.what for kill in killer.done).most_common()),
    }
    same = is_as_simulated(federation, run, CORRECTED)
    return {**found, "same": same, "enough": len(killer.done) >= asked.kills}


def _kill_all_along(
    federation: Federation, run: Path, killer: Killer, asked: argparse.Namespace
) -> None:
    """Kill one after the other until the run is over."""
    rng, until = random.Random(asked.seed), time.monotonic() + _LONGEST
    left = order(asked.kills, rng, short=asked.short)
    each = len(left) / asked.rounds
    last = list(LAST_POINTS[:1] if asked.short else LAST_POINTS)
    armed, since = "", 0.0
    while not (run / "result.json").exists():
        if time.monotonic() > until:
            raise RuntimeError(f"no end after {_LONGEST:g} s: {federation.told('server')[-3000:]}")
        federation.revive()
        federation.check(run)
        done = _rounds(run)
        if armed and killer.fell(armed, done):
            _say(done, f"died at {armed}")
            armed = ""
        if armed and time.monotonic() - since > _PATIENCE:
            killer.disarm()
            _say(done, f"nobody came to {armed}")
            armed = ""
        if not armed and left and len(killer.done) < each * (done + _AHEAD):
            armed, since = _next(killer, left.pop(0), done), time.monotonic()
        elif not armed and not left and done >= asked.rounds - 1 and last:
            armed, since = last.pop(0), time.monotonic()
            killer.arm(armed)
        time.sleep(0.2)
    killer.disarm()


def _next(killer: Killer, what: str, done: int) -> str:
    """Kill somebody of a role now; or return the point at which somebody will die."""
    if what not in ROLES:
        killer.arm(what)
        return what
    found = killer.at_random([what], done)
    _say(done, f"killed a {what}" if found else f"found no {what}")
    time.sleep(2.0 if found else 0.0)
    return ""


def _say(done: int, text: str) -> None:
    print(f"round {done}: {text}", file=sys.stderr, flush=True)


def _rounds(run: Path) -> int:
    ledger = run / "rounds.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def _report(found: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{found['kills']} kills in {found['rounds']} rounds of {found['sites']} sites, "
              f"{found['seconds']} s, seed {found['seed']}")  # fmt: skip
        for what, count in found["killed"].items():
            print(f"  {count:3d}  {what}")
        print("the adapter is that of the run without kills, bit for bit" if found["same"]
              else "the adapter DIFFERS from that of the run without kills")  # fmt: skip
    return 0 if found["same"] and found["enough"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
