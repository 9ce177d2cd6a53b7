"""The page about runs, in a real browser, while a run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.dashboard import server
from tests import browser
from tests.browser import Browser
from tests.test_dashboard import EVIL, begun, line, text
from tests.test_run_folder import opened

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.found() is None and "CI" not in os.environ, reason="no chromium: apt-get install it"
    ),
]
SOON = 10.0
"""Seconds within which a new round is shown, on a busy machine; the page asks every 2."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "home") as made:
        yield made


@contextlib.contextmanager
def served(folder: Path, port: str = "0") -> Iterator[str]:
    command = [sys.executable, "-m", "fedpeft", "watch", str(folder), "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield re.findall(r"http://[^ ]*", process.stdout.readline())[0]
        finally:
            process.kill()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "runs").mkdir()
    with served(tmp_path / "runs") as found:
        yield found


def append(run: Path, *rounds: Mapping[str, Any]) -> None:
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(text(*rounds))


def test_a_run_is_watched_from_its_begin_to_its_end(
    page: Browser, url: str, tmp_path: Path
) -> None:
    page.open(url)
    page.wait("document.getElementById('none').hidden === false")
    run = begun(tmp_path / "runs" / "a")
    with opened(run, resume=True) as folder:
        page.wait("document.body.innerText.includes('running · round 0 of 3')", SOON)
        assert page.tell("document.querySelectorAll('figure').length") == 0
        append(run, line(0))
        page.wait("document.body.innerText.includes('round 1 of 3')", SOON)
        half = text(line(1, **{"test/accuracy": 0.75}))
        with (run / "rounds.jsonl").open("ab", buffering=0) as file:
            file.write(half[:40])
            time.sleep(3)
            assert "round 1 of 3" in page.text()
            file.write(half[40:])
        page.wait("document.body.innerText.includes('75.0 %')", SOON)
        append(run, line(2))
        folder.finish({"rounds": 3})
    page.wait("document.body.innerText.includes('finished · round 3 of 3')", SOON)
    assert page.tell("document.querySelectorAll('figure').length") == 5
    assert page.tell("document.title") == "a · fedpeft"
    assert page.problems == []
    assert {asked.split("?")[0] for asked in page.asked} == {
        *(url, url + "api/runs", url + "api/run")
    }


def test_what_runs_say_is_text(page: Browser, url: str, tmp_path: Path) -> None:
    bold = "<b id=bold>bold<b>"
    run = begun(tmp_path / "runs" / bold, line(0, refused={EVIL: bold}), model=bold)
    append(run, line(1, **{"refused": {}, f"test/{EVIL}": 1.0}))
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(b"<b id=bold>\n")
    page.open(url)
    page.wait(f"document.querySelector('#clients tbody')?.innerText.includes({json.dumps(EVIL)})")
    page.tell("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    shown = page.text()
    assert f"round 1: {bold}" in shown
    assert shown.count(bold) >= 3
    assert page.tell("document.querySelectorAll('#bold, main script').length") == 0
    assert page.problems == []


def test_sites_are_a_table_of_text(page: Browser, tmp_path: Path) -> None:
    there = [{"site": "a", "state": "online"}, {"site": EVIL, "state": "gone"}]
    app = server.application(tmp_path, sites=lambda: there)
    with server.listen("127.0.0.1", 0) as listening, server.serving(app, listening) as url:
        page.open(url)
        rows = "document.querySelectorAll('#sites tbody tr')"
        page.wait(f"{rows}.length === 2")
        assert page.tell(f"{rows}[1].cells[0].textContent") == EVIL
        there.pop()
        page.wait(f"{rows}.length === 1", SOON)
    assert page.problems == []


def test_a_ledger_written_anew_is_shown_anew(page: Browser, url: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "runs" / "a", line(0), line(1))
    page.open(url)
    page.wait("document.body.innerText.includes('round 2 of 3')")
    (run / "rounds.jsonl").write_bytes(text(line(0)))
    page.wait("document.body.innerText.includes('round 1 of 3')", SOON)
    assert page.tell("run.columns.round.length") == 1


def test_it_is_used_by_keyboard_on_a_phone_and_in_the_dark(
    page: Browser, url: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        begun(tmp_path / "runs" / name, *(line(i) for i in range(3)))
    page.look(390, 800)
    page.open(url)
    page.wait("document.querySelectorAll('figure').length === 5")
    assert page.tell("document.documentElement.scrollWidth") <= 390
    bright = page.tell("getComputedStyle(document.body).backgroundColor")
    page.look(390, 800, dark=True)
    assert page.tell("getComputedStyle(document.body).backgroundColor") != bright
    other = page.tell("document.querySelector('#runs tr:not(.here) a').textContent")
    page.tell("document.querySelector('#runs tr:not(.here) a').focus()")
    page.press("Enter")
    page.wait(f"document.getElementById('run-title').textContent === '{other}'", SOON)
    page.tell("document.querySelector('.plot').focus()")
    spoken = "document.querySelector('.plot').getAttribute('aria-valuetext')"
    assert page.tell(spoken) == "round 3: test set 27.00 %"
    page.press("ArrowLeft")
    page.wait(f"{spoken} === 'round 2: test set 26.00 %'", SOON)
    page.press("Home")
    page.wait(f"{spoken} === 'round 1: test set 25.00 %'", SOON)
    page.press("Tab")
    assert (
        page.tell("document.activeElement.getAttribute('aria-label')") == "Loss, in nats, by round"
    )
    assert page.problems == []


def test_a_server_that_goes_away_is_noticed(page: Browser, tmp_path: Path) -> None:
    begun(tmp_path / "runs" / "a", line(0))
    with served(tmp_path / "runs") as url:
        page.open(url)
        page.wait("document.getElementById('live').innerText === 'live'")
    page.wait("document.getElementById('live').innerText.startsWith('no answer since')", SOON)
    assert "round 1 of 3" in page.text()
    with served(tmp_path / "runs", url.rstrip("/").rpartition(":")[2]):
        page.wait("document.getElementById('live').innerText === 'live'")
