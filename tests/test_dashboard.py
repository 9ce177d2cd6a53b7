"""The page about runs: what it reads while others write, what it shows, what it refuses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.dashboard import ledger as ledgers
from fedpeft.dashboard import prometheus, runs, server
from fedpeft.dashboard.guard import is_ours
from fedpeft.dashboard.ledger import Ledger
from fedpeft.dashboard.runs import Followed, Runs
from fedpeft.durable import acquire, is_held, replace_file
from fedpeft.errors import RunError
from fedpeft.plan import Plan
from fedpeft.releases import published
from tests.test_run_folder import opened

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert('x')</script>"


def line(round: int, **more: Any) -> dict[str, Any]:
    """Return what a ledger tells of a round in which one reply was used and one was not."""
    sizes = {"up_bytes": 1_000_000, "down_bytes": 2_000_000}
    return {
        "round": round,
        "asked": 2,
        "replied": ["a"],
        "refused": {EVIL: "too long"},
        "traffic": {"a": sizes, EVIL: {"down_bytes": 2_000_000}},
        "per_client": {"a": {"accuracy": 0.5}},
        "loss": 2.0 - round / 10,
        "test/accuracy": 0.25 + round / 100,
        **sizes,
        "seconds": 1.5,
        "participants": 1,
        **more,
    }


def text(*rounds: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rounds)


def begun(path: Path, *rounds: Mapping[str, Any], **lines: Any) -> Path:
    """Leave a run's folder as a run that was stopped does."""
    with opened(path, **lines):
        pass
    (path / "rounds.jsonl").write_bytes(text(*rounds))
    return path


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look each time, as if seconds had passed."""
    monkeypatch.setattr(runs, "_LOOK", 0.0)
    monkeypatch.setattr(runs, "_SEARCH", 0.0)


class Visitor:
    """Asks an application without a network."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, **how))

    async def _request(self, method: str, path: str, **how: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            return await client.request(method, path, **how)

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.request("GET", path, **how)


def visit(root: Path, **how: Any) -> Visitor:
    return Visitor(server.application(root, **how))


def shown(root: Path, run: str = ".", **query: Any) -> Any:
    return visit(root).get("/api/run", params={"run": run, **query}).json()


# --- the ledger, while it is written -------------------------------------------------------------


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    path, whole = tmp_path / "rounds.jsonl", text(line(0), line(1))
    found = Ledger(path)
    found.poll()
    assert (found.rounds, found.length) == (0, 0)
    path.write_bytes(whole[:-1])
    found.poll()
    epoch = found.epoch
    assert found.rounds == 1
    path.write_bytes(whole)
    found.poll()
    assert (found.rounds, found.epoch, found.problems) == (2, epoch, [])
    assert list(found.columns["loss"]) == [2.0, 1.9]


@given(st.lists(st.integers(1, 700), max_size=12), st.integers(16, 3000))
def test_it_reads_the_same_however_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], piece: int
) -> None:
    whole = text(*(line(i, **{"test/f1": 0.5} if i == 2 else {}) for i in range(5)))
    path = tmp_path_factory.mktemp("ledger") / "rounds.jsonl"
    found = Ledger(path)
    with pytest.MonkeyPatch.context() as patch, path.open("wb", buffering=0) as file:
        patch.setattr(ledgers, "_PIECE", piece)
        at = 0
        for step in [*steps, len(whole)]:
            file.write(whole[at : at + step])
            at += step
            found.poll()
    assert found.problems == []
    assert [each for each in found.columns["test/f1"] if each == each] == [0.5]
    assert list(found.columns["round"]) == [0, 1, 2, 3, 4]
    assert (found.clients["a"].used, found.clients[EVIL].refused) == (5, 5)
    assert found.clients["a"].up == 5_000_000


def test_a_ledger_that_was_cut_is_read_again(tmp_path: Path) -> None:
    """As a resumed run does: it drops the rounds that its checkpoint does not have."""
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(text(line(0), line(1), line(2)) + b'{"round": 3, "lo')
    found = Ledger(path)
    found.poll()
    before = found.epoch
    replace_file(path, [text(line(0), line(1))], "ledger")
    found.poll()
    assert (found.rounds, found.clients["a"].used) == (2, 2)
    assert found.epoch != before
    path.unlink()
    found.poll()
    assert (found.rounds, found.clients) == (0, {})


def test_other_content_of_the_same_or_a_greater_length_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(text(line(0, loss=1.5), line(1, loss=1.5)))
    found = Ledger(path)
    found.poll()
    path.write_bytes(text(line(0, loss=3.5), line(1, loss=3.5), line(2, loss=3.5)))
    found.poll()
    assert list(found.columns["loss"]) == [3.5, 3.5, 3.5]


def test_damaged_lines_are_named_and_the_others_shown(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"\n"
    damaged = b'{"half\n' + b"[1]\n" + b'{"round": "x"}\n' + deep
    run = begun(tmp_path / "run")
    (run / "rounds.jsonl").write_bytes(text(line(0)) + damaged + text(line(5)))
    found = shown(run)
    assert found["columns"]["round"] == [0, 5]
    assert [told.partition(" ")[0] for told in found["told"]] == [
        f"rounds.jsonl:{n}:" for n in (2, 3, 4, 5, 6)
    ]
    assert found["problems"] == 5


def test_what_is_no_number_is_no_number(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    odd = b'{"round": 0, "loss": NaN, "test/loss": 1e999, "a/b": true, "c/d": 1' + b"0" * 400
    (run / "rounds.jsonl").write_bytes(
        odd
        + b', "replied": 3, "refused": [], "traffic": {"a": 7}, "staleness": {"x": 1, "2": 1}}\n'
    )
    found = shown(run)
    assert found["columns"] == {
        "round": [0],
        "replied": [0],
        "refused": [0],
        "staleness": [2],
        "staleness_most": [2],
    }


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_runs_while_its_lock_is_held(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", line(0))
    followed = Followed(path, ".", "run")
    with opened(path, resume=True) as folder:
        followed.look()
        assert (followed.state, followed.planned) == ("running", 3)
        folder.finish({"rounds": 3})
        followed.look()
        assert followed.state == "finished"
    (path / "result.json").unlink()
    followed.look()
    assert followed.state == "stopped"
    (path / "run.json").write_text("[")
    followed.look()
    assert followed.problems == ["run.json: damaged"]


def test_who_looks_keeps_nobody_from_starting(tmp_path: Path) -> None:
    os.close(acquire(tmp_path, "run"))
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_held(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for each in lookers:
        each.start()
    try:
        for _ in range(200):
            os.close(acquire(tmp_path, "run"))
    finally:
        over.set()
        for each in lookers:
            each.join()


def test_runs_are_found_in_folders_but_not_behind_links_or_in_runs(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("a", "grid/b", "x/y/z", "x/y/z/w", "too/deep/to/look", ".hidden"):
        begun(root / name)
    begun(root / "a" / "inside")
    (root / "link").symlink_to(begun(tmp_path / "elsewhere"))
    found = visit(root).get("/api/runs").json()["runs"]
    assert {run["run"] for run in found} == {"a", "grid/b", "x/y/z"}
    begun(root / "new", line(0))
    listed = visit(root).get("/api/runs").json()["runs"]
    (new,) = [run for run in listed if run["run"] == "new"]
    assert (new["state"], new["done"], new["rounds"]) == ("stopped", 1, 3)
    assert new["score"] == {"label": "accuracy", "value": "25.0 %", "of": "test set"}


def test_only_the_newest_of_many_runs_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_MOST", 2)
    for i in range(3):
        begun(tmp_path / f"run{i}")
        os.utime(tmp_path / f"run{i}" / "run.json", (i, i))
    found = visit(tmp_path).get("/api/runs").json()
    assert [run["run"] for run in found["runs"]] == ["run2", "run1"]
    assert found["note"] == "the newest 2 of 3 runs"


def test_a_key_is_looked_up_and_never_a_path(tmp_path: Path) -> None:
    root = begun(tmp_path / "runs" / "a", line(0)).parent
    begun(tmp_path / "secret", line(0))
    client = visit(root)
    assert client.get("/api/run", params={"run": "a"}).status_code == 200
    for key in ("../secret", "a/../../secret", str(tmp_path / "secret"), "", "a/", "\0", "%2e%2e"):
        assert client.get("/api/run", params={"run": key}).status_code == 404
    for path in ("/../secret/run.json", "/%2e%2e/secret/run.json", "/a/run.json", "/page.js"):
        assert client.get(path).status_code == 404


def test_nothing_is_written_and_nothing_of_the_server_s_own_is_read(tmp_path: Path) -> None:
    root = begun(tmp_path / "runs" / "a", line(0)).parent
    (root / "a" / "checkpoints").mkdir()
    (root / "a" / "checkpoints" / "state-000001.safetensors").write_text("the coins")

    def state() -> list[tuple[Any, ...]]:
        every = sorted(root.rglob("*"))
        return [(p, p.stat().st_mtime_ns, p.stat().st_size, p.stat().st_ino) for p in every]

    before = state()
    client = visit(root, metrics=True)
    answers = [client.get(path) for path in ("/", "/api/runs", "/api/run?run=a", "/metrics")]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert "coins" not in "".join(answer.text for answer in answers)
    assert state() == before


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(RunError, match=r"no folder; give a run's folder, or a folder of runs"):
            Runs(tmp_path / name)


# --- what is shown -------------------------------------------------------------------------------


def test_a_run_is_shown_with_charts_tiles_and_clients(tmp_path: Path) -> None:
    found = shown(begun(tmp_path / "run", line(0), line(1), clients=4))
    assert [chart["title"] for chart in found["charts"]] == [
        *("Accuracy", "Loss", "Participation", "Traffic of a round", "Time of a round")
    ]
    accuracy = found["charts"][0]
    assert (accuracy["unit"], accuracy["scale"]) == ("%", 100)
    assert accuracy["series"] == [{"column": "test/accuracy", "label": "test set"}]
    assert found["columns"]["test/accuracy"] == [0.25, 0.26]
    tiles = {tile["label"]: (tile["value"], tile["of"]) for tile in found["tiles"]}
    assert tiles["rounds over"] == ("2", "of 3")
    assert tiles["accuracy"] == ("26.0 %", "test set")
    assert tiles["MB up"] == ("2.00", "all rounds")
    assert tiles["clients that took part"] == ("1", "of 4")
    assert tiles["replies not used"] == ("2", "all rounds")
    assert found["clients"]["total"] == 2
    evil, plain = found["clients"]["rows"]
    assert (plain["name"], plain["used"], plain["recent"]) == ("a", 2, "++")
    assert (plain["up"], plain["metric"], plain["value"]) == (2_000_000, "accuracy", 0.5)
    assert (evil["name"], evil["refused"], evil["recent"]) == (EVIL, 2, "xx")
    assert evil["reason"] == "round 2: too long"
    by_use = shown(tmp_path / "run", order="refused")["clients"]["rows"]
    assert [row["name"] for row in by_use] == [EVIL, "a"]


def test_of_a_run_that_goes_on_come_the_new_rounds_only(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", line(0), line(1))
    client = visit(run)

    def get(**query: Any) -> Any:
        return client.get("/api/run", params={"run": ".", **query})

    first = get().json()
    known = {"epoch": first["epoch"], "after": first["length"]}
    same = get(**known)
    assert same.json()["columns"]["round"] == []
    tag = same.headers["etag"]
    query = {"run": ".", **known}
    assert client.get("/api/run", params=query, headers={"If-None-Match": tag}).status_code == 304
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(text(line(2)))
    found = get(**known).json()
    assert (found["after"], found["columns"]["round"]) == (2, [2])
    replace_file(run / "rounds.jsonl", [text(line(0, loss=7.0), line(1, loss=7.0))], "ledger")
    found = get(**known).json()
    assert (found["after"], found["columns"]["loss"]) == (0, [7.0, 7.0])
    assert get(after=-1).status_code == 422


def test_of_a_private_run_nothing_is_shown_that_its_ledger_lacks(tmp_path: Path) -> None:
    """Not who replied, no bytes, no times, and no zeros in their place."""
    lines = {
        "privacy": "user(noise_multiplier=1.0, clip=0.5)",
        "cohort": "poisson(rate=0.5)",
        "weighting": "uniform(denominator='expected')",
        "evaluate": "test",
        "model": "nowhere",
        "task": "classify",
        "data": "jsonl(train='train.jsonl')",
        "rounds": 3,
        "clients": 4,
    }
    plan = Plan.from_lines(lines)
    told = [published(plan, line(i, epsilon=1.0 + i, clip=0.5)) for i in range(2)]
    run = begun(tmp_path / "run", *told, **lines)
    (run / "memory").mkdir()
    (run / "memory" / "a-1234").touch()
    client = visit(run, metrics=True)
    found = shown(run)
    assert set(found["columns"]) == {"round", "epsilon", "clip", "test/accuracy"}
    assert found["clients"] == {"total": 0, "rows": []}
    assert [tile["label"] for tile in found["tiles"]] == [
        "rounds over",
        "accuracy",
        "epsilon spent",
    ]
    assert found["written"] is None, "when a round was over tells how long clients took"
    assert [chart["title"] for chart in found["charts"]] == [
        *("Accuracy", "Privacy spent", "Norm of updates")
    ]
    scraped = {
        each.split("{")[0]
        for each in client.get("/metrics").text.splitlines()
        if not each.startswith("#")
    }
    assert scraped == {
        f"fedpeft_{name}"
        for name in ("run_state", "rounds_done", "rounds_planned", "metric", "epsilon")
    }


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_is_for_reading(tmp_path: Path, method: str) -> None:
    answer = visit(tmp_path).request(method, "/api/runs")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:8765", True),
        ("localhost:8765", True),
        ("LOCALHOST", True),
        ("[::1]:8765", True),
        ("192.168.1.7:8765", True),
        ("watch.example", True),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8765", False),
        ("evil.example:80@127.0.0.1", False),
        ("", False),
        ("[::1", False),
        ("localhost:8765:1", False),
    ],
)
def test_names_that_others_gave_this_machine_are_refused(
    tmp_path: Path, host: str, ours: bool
) -> None:
    assert is_ours(host, "watch.example") == ours
    answer = visit(tmp_path, name="watch.example").get("/api/runs", headers={"Host": host})
    assert answer.status_code == (200 if ours else 421)


def test_the_page_is_whole_and_only_its_own_texts_run(tmp_path: Path) -> None:
    answer = visit(tmp_path).get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", answer.text, re.DOTALL)
    styles = re.findall(r"<style([^>]*)>(.*?)</style>", answer.text, re.DOTALL)
    assert [attributes for attributes, _ in scripts + styles] == ["", ""]
    for kind, (_, content) in zip(("script-src", "style-src"), scripts + styles, strict=True):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert set(re.findall(r"https?://[^\"' ]*", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"\bon\w+=|\bstyle=|javascript:", answer.text)
    (_, script), *_ = scripts
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", script
    )


def test_requests_are_told_where_that_is_wanted(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    client = visit(tmp_path, tell=lambda event, **fields: told.append({"event": event, **fields}))
    client.get("/api/runs")
    client.request("POST", "/")
    shown = [(each["event"], each["method"], each["path"], each["status"]) for each in told]
    assert shown == [("request", "GET", "/api/runs", 200), ("request", "POST", "/", 405)]


def test_another_command_serves_it_beside_its_work_and_says_who_is_there(tmp_path: Path) -> None:
    there = [{"site": "hospital-a", "state": "online"}, {"site": EVIL, "state": "gone"}]
    app = server.application(tmp_path, sites=lambda: there)
    with (
        server.listen("127.0.0.1", 0) as listening,
        server.serving(app, listening) as url,
        urlopen(url + "api/runs", timeout=60) as answer,
    ):
        assert json.load(answer)["sites"] == there
    with pytest.raises(OSError, match="refused"):
        urlopen(url, timeout=60)


# --- Prometheus ----------------------------------------------------------------------------------


def test_prometheus_reads_what_it_is_told(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    odd = 'a "quoted"\\ name'
    begun(tmp_path / odd, line(0), line(1, epsilon=2.5))
    begun(tmp_path / "b")
    answer = visit(tmp_path, metrics=True).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    run = ("run", odd)
    assert found["fedpeft_rounds_done", run] == 2
    assert found["fedpeft_rounds_planned", run] == 3
    assert found["fedpeft_up_bytes_sum", run] == 2_000_000
    assert found["fedpeft_refused_sum", run] == 2
    assert found["fedpeft_epsilon", run] == 2.5
    assert found["fedpeft_metric", ("metric", "test/accuracy"), run] == 0.26
    assert found["fedpeft_run_state", ("run", "b"), ("state", "stopped")] == 1
    assert ("fedpeft_epsilon", ("run", "b")) not in found
    assert "script" not in answer.text, "who took part is no series"


def test_metrics_are_served_on_request_and_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visit(tmp_path).get("/metrics").status_code == 404
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(RunError, match=r"pip install 'fedpeft\[metrics\]'"):
        prometheus.check()
    with pytest.raises(RunError, match=r"pip install"):
        visit(tmp_path, metrics=True)


# --- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "fedpeft", "watch", *arguments]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    begun(tmp_path / "run", line(0))
    with command(str(tmp_path), "--port", "0") as process:
        assert process.stdout is not None
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        try:
            yield process, url
        finally:
            process.kill()


def test_the_command_serves_until_interrupted(
    watching: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = watching
    with urlopen(url + "api/runs", timeout=60) as answer:
        assert [run["run"] for run in json.load(answer)["runs"]] == ["run"]
    taken = re.findall(r":(\d+)/", url)[0]
    refused = command(str(ROOT), "--port", taken).communicate(timeout=60)
    assert re.fullmatch(
        rf"error: 127\.0\.0\.1:{taken}: .*; choose another --host or --port\n", refused[1]
    )
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == ""
    assert process.returncode in (0, 130, -signal.SIGINT)


def test_a_folder_that_is_missing_is_one_line() -> None:
    with command("nowhere") as process:
        assert process.communicate(timeout=60)[1].startswith("error: nowhere: no folder")
        assert process.returncode == 2


def test_other_machines_are_let_in_with_a_warning_only(tmp_path: Path) -> None:
    with command(str(tmp_path), "--host", "0.0.0.0", "--port", "0", "--log", "json") as process:
        assert process.stderr is not None
        told = [json.loads(process.stderr.readline()) for _ in range(2)]
        process.kill()
    assert [(each["event"], each["level"]) for each in told] == [
        *(("warning", "warning"), ("serving", "info"))
    ]
    assert "without a password and unencrypted" in told[0]["reason"]


def test_watching_loads_no_model_library(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import fedpeft.cli
import fedpeft.dashboard.command
from fedpeft.dashboard.server import application
from fedpeft.dashboard.runs import Runs
from fedpeft.dashboard.shown import detail

root = Path({str(begun(tmp_path, line(0)))!r})
application(root)
(run,) = Runs(root).all()
assert detail(run, "", 0, "name")["done"] == 1
print(*sorted(name for name in sys.modules if "." not in name))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"torch", "transformers", "peft", "datasets", "flwr", "scipy", "dp_accounting"}
    assert not set(done.stdout.split()) & heavy
