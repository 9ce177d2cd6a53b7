"""What was answered is never played again for the same charge, and what promised nothing is known.

At nodes, where replies leave: whatever the server sends again, and whatever dies in between.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedpeft.broadcasts import messages
from fedpeft.cli import app
from fedpeft.durable import MOMENTS
from fedpeft.errors import BudgetError, RunError
from fedpeft.federation import deal
from fedpeft.flower.config import run_config
from fedpeft.ledger import (
    CLIENT,
    NOTHING,
    InProcessLedgers,
    Ledger,
    OnDiskLedgers,
    Release,
    answer,
    charge,
    spent,
    unpromised,
)
from fedpeft.node import Node
from fedpeft.site import Site
from fedpeft.state import ServerState, start
from fedpeft.warm.channel import Place
from fedpeft.wire import Body, Message, digest, peek
from tests.test_spending import BOTH, USER, guarded

ROOT = Path(__file__).parents[1]
RECORD = "record(noise_multiplier=0.7, clip=0.3)"
FIRST = Release("data", "run", 0, "broadcast", "record", 0.1, 1.0, 10)
WHO = "client-000"


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "process"])
def test_what_was_answered_counts_again_with_another_key(tmp_path: Path, kind: str) -> None:
    ledgers = OnDiskLedgers(tmp_path) if kind == "disk" else InProcessLedgers()
    key = charge(ledgers, "c", FIRST, rounds=3)
    answer(ledgers, "c", "another run")
    assert charge(ledgers, "c", FIRST, rounds=3) == key
    answer(ledgers, "c", "run")
    second = charge(ledgers, "c", FIRST, rounds=3)
    assert charge(ledgers, "c", FIRST, rounds=3) == second != key  # not answered: it counts once
    answer(ledgers, "c", "run")
    third = charge(ledgers, "c", FIRST, rounds=3)
    assert len({key, second, third}) == 3
    assert [r.again for r in ledgers.read("c").releases] == [0, 1, 2]
    answer(ledgers, "c", "run")
    with pytest.raises(BudgetError, match="has taken part in the 3 rounds"):
        charge(ledgers, "c", FIRST, rounds=3)


def test_a_ledger_of_before_is_read_and_nothing_in_it_was_answered(tmp_path: Path) -> None:
    ledgers = OnDiskLedgers(tmp_path)
    key = charge(ledgers, "c", FIRST, rounds=9)
    (path,) = tmp_path.glob("*.json")
    told = json.loads(path.read_text())
    for name in ("answered", "again", "timed"):
        del told["releases"][0][name]
    path.write_text(json.dumps(told))
    assert charge(ledgers, "c", FIRST, rounds=9) == key
    assert ledgers.read("c").answered == frozenset()


def test_who_has_spent_nothing_has_no_file(tmp_path: Path) -> None:
    answer(OnDiskLedgers(tmp_path), "c", "run")
    assert not list(tmp_path.glob("*.json"))


# --- at a node ----------------------------------------------------------------------------------


class Asking:
    """A server that sends a client of a node what it likes."""

    def __init__(self, model: Path, home: Path, **lines: Any) -> None:
        self.plan, self.home = guarded(model, **lines), home
        self._site = Site(self.plan, deal(self.plan))
        self._state = start(self.plan, self._site.tables, self._site.initial)

    def requests(self, round: int, run: str) -> list[tuple[str, Message]]:
        state: ServerState = replace(self._state, round=round)
        tables = self._site.tables
        return [*messages(self.plan, tables, state, run, [WHO], remote=True, bodies={})]

    def packet(self, round: int = 0, run: str = "r", **header: Any) -> bytes:
        ((_, made),) = self.requests(round, run)
        return bytes(made.body.seal({**peek(made), **header}))

    def play(self, packet: bytes, **node: Any) -> bytes:
        told = {"partition-id": 0, "num-partitions": 4, **node}
        return Node().train(Place(run_config(self.plan), told), WHO, packet)

    @property
    def releases(self) -> list[Release]:
        return [*OnDiskLedgers(self.home / "ledgers").read(WHO).releases]

    def lose_replies(self) -> None:
        for path in self.home.glob("replies/*/*"):
            path.unlink()


@pytest.fixture
def asking(bert: Path, tmp_path: Path, apart: None) -> Any:
    return lambda **lines: Asking(bert, tmp_path / "home", **lines)


@pytest.mark.parametrize("privacy", [USER, RECORD, BOTH], ids=["user", "record", "both"])
@pytest.mark.parametrize("header", [{"clip": 0.1}, {"ack": -7}, {"what": "ever"}], ids=str)
def test_another_header_over_the_same_tensors_is_another_release(
    asking: Any, privacy: str, header: dict[str, Any]
) -> None:
    server: Asking = asking(privacy=privacy, rounds=5, weighting=weighting(privacy))
    first = server.play(server.packet())
    each = len(server.releases)
    other = server.play(server.packet(**header))
    assert len(server.releases) == 2 * each == (4 if privacy == BOTH else 2)
    assert server.play(server.packet(**header)) == other  # this one was kept, and is no other
    assert len(server.releases) == 2 * each
    assert len({release.broadcast for release in server.releases}) == 2
    if privacy != USER:  # who hides records has other coins
        assert first != other


def weighting(privacy: str) -> str:
    return "uniform" if privacy == RECORD else "uniform(denominator='expected')"


@pytest.mark.parametrize("privacy", [USER, RECORD, BOTH], ids=["user", "record", "both"])
def test_a_round_that_is_sent_again_after_a_later_one_counts_again(
    asking: Any, privacy: str
) -> None:
    """Nothing is remembered of it but that it was answered: other coins, and another charge."""
    server: Asking = asking(privacy=privacy, rounds=4, weighting=weighting(privacy))
    first = server.play(server.packet(0))
    server.play(server.packet(1))
    again = server.play(server.packet(0))
    units = 2 if privacy == BOTH else 1
    assert [(r.round, r.again) for r in server.releases[::units]] == [(0, 0), (1, 0), (0, 1)]
    assert len(server.releases) == 3 * units
    if privacy != USER:
        assert first != again
    server.play(server.packet(1))
    with pytest.raises(BudgetError, match="has taken part in the 4 rounds"):
        server.play(server.packet(0))


def test_a_limit_bounds_what_is_sent_again(asking: Any) -> None:
    server: Asking = asking(privacy=USER, rounds=9)
    server.play(server.packet())
    (one,) = server.releases
    limit = Ledger(releases=[one, replace(one, round=1)]).epsilon(one.data, 1e-5, CLIENT)
    for round in (1, 0):
        bound = {"max-client-epsilon": 1.01 * limit}
        if round:
            server.play(server.packet(1), **bound)
            continue
        with pytest.raises(BudgetError, match="as a client, and its site allows"):
            server.play(server.packet(0), **bound)
    assert len(server.releases) == 2


@pytest.mark.parametrize("privacy", [USER, RECORD], ids=["user", "record"])
def test_a_reply_that_is_gone_is_made_anew_and_charged(asking: Any, privacy: str) -> None:
    server: Asking = asking(privacy=privacy, weighting=weighting(privacy))
    first = server.play(server.packet())
    assert server.play(server.packet()) == first
    assert len(server.releases) == 1
    server.lose_replies()
    assert (server.play(server.packet()) == first) == (privacy == USER)
    assert [release.again for release in server.releases] == [0, 1]


def test_a_reply_that_is_not_written_down_as_sent_does_not_leave(
    asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Asking = asking(privacy=RECORD, weighting="uniform")

    def full(*_: Any) -> None:
        raise RunError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("fedpeft.spending.answer", full)
        with pytest.raises(RunError, match="no room"):
            server.play(server.packet())
    kept = server.play(server.packet())
    assert server.play(server.packet()) == kept
    assert len(server.releases) == 1


def test_a_packet_has_one_digest_in_its_process_and_beyond(asking: Any) -> None:
    server: Asking = asking()
    ((_, made),) = server.requests(0, "r")
    assert digest(made) == digest(bytes(made)) == digest(made.body.seal(peek(made)))
    other = made.body.seal({**peek(made), "clip": 0.25})
    assert digest(bytes(other)) == digest(other) != digest(made)
    body = Body(made.body.sections, [memoryview(bytes(p)[::-1]) for p in made.body.pieces])
    assert digest(Message(made.head, body)) != digest(made)


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedpeft.durable import MOMENTS
from fedpeft.replies import Replies
from tests.test_ledger import BOTH, Asking

home, keep = Path(sys.argv[2]), Replies.keep
os.environ["FEDPEFT_HOME"] = str(home)
server = Asking(Path(sys.argv[1]), home, privacy=BOTH)

def noted(self, client, message, reply, *how, **named):
    (home / "made").write_bytes(reply)
    keep(self, client, message, reply, *how, **named)

for kind, count in (("spending", 1), ("spending", 2), ("reply", 1)):
    for moment in MOMENTS:
        packet = server.packet(run=f"{kind}-{moment}-{count}")
        before = len(server.releases)
        child = os.fork()
        if not child:
            Replies.keep = noted
            os.environ["FEDPEFT_FAULT"] = f"{kind}.{moment}:{count}"
            server.play(packet)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        made = home / "made"
        first = server.play(packet)
        same = made.read_bytes() == first if made.exists() else "unmade"
        made.unlink(missing_ok=True)
        kept = server.play(packet) == first
        print(kind, count, moment, ended, same, kept, len(server.releases) - before)
"""


@pytest.mark.slow
def test_a_node_killed_before_its_reply_left_trains_again_for_the_one_charge(
    bert: Path, tmp_path: Path
) -> None:
    """With the same bits; at every moment of the charge, of the reply and of the mark."""
    asked = [sys.executable, "-c", KILLED, str(bert), str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in told] == [
        [kind, count, moment]
        for kind, count in (("spending", "1"), ("spending", "2"), ("reply", "1"))
        for moment in MOMENTS
    ]
    for kind, count, moment, ended, same, kept, charged in told:
        assert ended == str(-signal.SIGKILL), (kind, count, moment)
        assert same == ("unmade" if (kind, count) == ("spending", "1") else "True")
        assert (kept, charged) == ("True", "2"), (kind, count, moment)


# --- what promised nothing ----------------------------------------------------------------------

SEEDED = "user(noise_multiplier=1.0, simulate_noise=true)"


@pytest.mark.parametrize("privacy", ["none", SEEDED], ids=["none", "seeded"])
def test_a_run_without_a_promise_is_written_down_once(asking: Any, privacy: str) -> None:
    server: Asking = asking(privacy=privacy, rounds=5)
    for round, run in ((0, "a"), (1, "a"), (0, "a"), (0, "b")):
        server.play(server.packet(round, run))
    data = server.releases[0].data
    assert server.releases == [unpromised(data, "a"), unpromised(data, "b")]
    (line,) = spent(server.home / "ledgers", 1e-5)
    assert (line["unit"], line["runs"], line["epsilon"]) == (NOTHING, 2, math.inf)
    told = CliRunner().invoke(app, ["spent", str(server.home / "ledgers")]).stdout
    assert told == f"{WHO}  epsilon unbounded: 2 runs promised nothing; data {data[:12]}\n"


@pytest.mark.parametrize(
    ("privacy", "limit"),
    [(RECORD, "max-epsilon"), (USER, "max-client-epsilon")],
    ids=["record", "user"],
)
def test_a_limit_knows_of_runs_that_promised_nothing_before_it(
    asking: Any, privacy: str, limit: str
) -> None:
    lines = {"privacy": privacy, "weighting": weighting(privacy)}
    asking(privacy="none").play(asking(privacy="none").packet(run="open"))
    server: Asking = asking(**lines)
    with pytest.raises(BudgetError, match=r"promised nothing.*no bound.*promised-only at a node"):
        server.play(server.packet(), **{limit: 90.0})
    assert [release.unit for release in server.releases] == [NOTHING]
    for wrong in ("yes", 1):
        with pytest.raises(RunError, match=r"promised-only=.* must be true or false"):
            server.play(server.packet(), **{limit: 90.0, "promised-only": wrong})
    server.play(server.packet(), **{limit: 90.0, "promised-only": True})
    assert len(server.releases) == 2
    with pytest.raises(BudgetError, match="and its site"):  # of what was promised it still is one
        server.play(server.packet(1), **{limit: 0.01, "promised-only": True})


def test_a_ledger_s_epsilon_is_infinite_once_something_was_not_promised() -> None:
    held = Ledger(releases=[FIRST, unpromised("data", "open")])
    assert held.epsilon("data", 1e-5) == math.inf
    assert held.epsilon("data", 1e-5, "record") == Ledger(releases=[FIRST]).epsilon("data", 1e-5)
    assert held.epsilon("other", 1e-5) == 0


# --- what is assumed ----------------------------------------------------------------------------

TIMES = "assumes that when the client was there, and when or whether its replies and errors came"
ADAPTS = "assumes that noise and batches of a run were not chosen by what earlier ones had released"


def test_what_a_promise_assumes_is_told_with_what_was_spent(asking: Any) -> None:
    def told() -> list[str]:
        found = CliRunner().invoke(app, ["spent", str(server.home / "ledgers")])
        return [*found.stdout.splitlines()]

    server: Asking = asking(privacy=USER)
    server.play(server.packet())
    assert all(words not in told()[0] for words in (TIMES, ADAPTS))
    turns = {"schedule": "buffered(size=2, concurrency=3)", "cohort": "everyone"}
    server = asking(privacy=USER.replace(")", ", participations=2)"), **turns)
    server.play(server.packet(run="turns"))
    (line,) = told()
    assert TIMES in line
    assert ADAPTS not in line
    server = asking(privacy=RECORD, weighting="uniform")
    server.play(server.packet(run="record"))
    assert sum(TIMES in line for line in told()) == 1
    assert not any(ADAPTS in line for line in told())
    server = asking(privacy=RECORD.replace("0.7", "0.9"), weighting="uniform")
    server.play(server.packet(run="other"))
    assert [ADAPTS in line for line in told() if "hidden: record" in line] == [True]
