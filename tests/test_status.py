"""What is told of sites and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.status import ago, as_text, run_rows, site_rows, status
from fedpeft.deployment.submissions import State, submit
from fedpeft.flower.control import GONE, Site


@pytest.fixture
def file(tmp_path: Path) -> ServerFile:
    return ServerFile(keys=None, home=tmp_path / "home")


def site(name: str, state: str, heard: float = 0.0) -> Site:
    return Site(7, name, state, b"", heard)


def test_sites() -> None:
    found = [
        site("b", "online", 995.0),
        site("a", "registered"),
        site("", "offline", 1000.0 - 7200),
        site("c", GONE, 10.0),
    ]
    assert site_rows(found, 1000.0) == [
        {"site": "node 7", "state": "offline", "heard": "2 h ago"},
        {"site": "a", "state": "never seen", "heard": ""},
        {"site": "b", "state": "online", "heard": "5 s ago"},
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s ago"),
        (119.0, "119 s ago"),
        (120.0, "2 min ago"),
        (7300.0, "2 h ago"),
        (200000.0, "2 d ago"),
    ],
)
def test_how_long_ago(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def begun(file: ServerFile, name: str, state: State, lines: list[dict[str, Any]]) -> None:
    out = file.runs / name
    made = submit(file.home, name, {"out": str(out), "rounds": 5}, b"app")
    made.state = state
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"lines": {"rounds": 5}}))
    (out / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs(file: ServerFile) -> None:
    line = {"up_bytes": 1_500_000, "down_bytes": 500_000, "epsilon": 1.25, "seconds": 1.0}
    begun(file, "a", State("running", 3, 2), [{"round": i, **line} for i in range(2)])
    begun(file, "b", State("failed", reason="no client was there"), [])
    submit(file.home, "c", {"out": str(file.runs / "c"), "rounds": 3}, b"app")
    one, two, three = run_rows(file)
    assert one == {
        "run": "a",
        "state": "running",
        "starts": 2,
        "reason": "",
        "round": 2,
        "rounds": 5,
        "epsilon": 1.25,
        "up_bytes": 3_000_000,
        "down_bytes": 1_000_000,
        "out": str(file.runs / "a"),
    }
    assert (two["state"], two["reason"], two["epsilon"]) == ("failed", "no client was there", None)
    assert (three["state"], three["round"], three["rounds"]) == ("waiting", 0, 3)
    text = "\n".join(as_text(status(file)))
    assert text.splitlines() == [
        f"server: not running (home: {file.home}); start it with fedpeft server",
        "",
        "run  state    round   epsilon  MB up  MB down  reason",
        "a    running  2 of 5  1.250    3.00   1.00     started again once",
        "b    failed   0 of 5           0.00   0.00     no client was there",
        "c    waiting  0 of 3           0.00   0.00",
    ]


def test_a_damaged_run_hides_no_other(file: ServerFile) -> None:
    begun(file, "a", State(), [])
    begun(file, "b", State(), [])
    (file.home / "submitted" / "a" / "state.json").write_text("{")
    (file.home / "submitted" / "b" / "state.json").write_text('{"mood": 1}')
    submit(file.home, "c", {"out": str(file.runs / "c"), "rounds": 3}, b"app")
    assert [row["state"] for row in run_rows(file)] == ["damaged", "damaged", "waiting"]
    assert any("damaged; take the folder away" in line for line in as_text(status(file)))


def test_nothing_yet(file: ServerFile) -> None:
    told = status(file)
    assert (told["server"], told["sites"], told["runs"]) == ("not running", None, [])
    assert list(as_text(told))[-1] == "no runs yet"


def test_a_server_that_does_not_answer(file: ServerFile) -> None:
    told = {**status(file), "server": "running", "problem": "1.2.3.4:5: does not answer"}
    assert list(as_text(told))[1] == "sites: unknown: 1.2.3.4:5: does not answer"


def test_who_lacks_a_result_and_who_tells_of_a_gain(file: ServerFile) -> None:
    begun(file, "a", State("finished", 3, 1), [])
    sites = {
        "x": {"kept": False, "why": "its node is away", "gain": None, "later": False},
        "y": {"kept": True, "why": "", "gain": {"accuracy": 0.125, "loss": -0.5}, "later": False},
        "z": {"kept": True, "why": "", "gain": None, "later": True},
    }
    (file.runs / "a" / "kept.json").write_text(json.dumps({"sites": sites}))
    told = status(file)
    assert told["runs"][0]["results"] == sites
    assert list(as_text(told))[-3:] == [
        "",
        "a: x does not have the result yet: its node is away",
        "a: against training alone y has gained accuracy +12.5 points, loss -0.5000",
    ]
