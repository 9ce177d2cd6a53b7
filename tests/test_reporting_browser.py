"""A report in a real browser: it opens, asks nobody, sorts, filters, shows plans, on any screen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedpeft.plan import Plan
from fedpeft.reporting.all_runs import told
from fedpeft.reporting.command import report
from fedpeft.reporting.page import page as whole
from fedpeft.reporting.points import read_points
from tests import browser
from tests.browser import Browser
from tests.reported import HOSTILE, PRIVATE, lay, line, sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.found() is None and "CI" not in os.environ, reason="no chromium: apt-get install it"
    ),
]
READY = "document.body.dataset.ready === 'yes'"
SCORE, METHOD, PRIVACY, UPLINK = 1, 2, 3, 4
ROWS = "[...document.querySelectorAll('#points tbody tr')]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def about_sweep(folder: Path) -> str:
    return report(folder, None, pytest.fail).as_uri()


@pytest.fixture(scope="module")
def about_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    lines = [line(at, at / 10, 1000, refused={HOSTILE: HOSTILE}) for at in range(3)]
    path = lay(tmp_path_factory.mktemp("runs") / f"<b id=bold>{'x' * 60}", lines)
    return report(path, None, pytest.fail).as_uri()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    """A browser that must not have complained, nor asked for anything but the page."""
    with Browser(tmp_path / "home") as made:
        yield made
        assert made.problems == []
        assert {url.partition(":")[0] for url in made.asked} <= {"file", "data"}
        assert len({url for url in made.asked if url.startswith("file:")}) == 1


def cells(page: Browser, column: int) -> list[str]:
    return list(page.tell(f"{ROWS}.map((row) => row.cells[{column}].innerText)"))


def test_points_are_sorted_by_any_column(page: Browser, about_sweep: str) -> None:
    page.open(about_sweep)
    page.wait(READY)
    assert len(cells(page, SCORE)) == 10
    found = [float(text.split()[0]) for text in cells(page, SCORE) if text]
    assert found == sorted(found, reverse=True)
    assert cells(page, SCORE)[8:] == ["", ""]  # what was refused has no score and comes last
    button = f"document.querySelectorAll('#points thead button')[{SCORE}]"
    page.tell(f"{button}.click()")
    assert [float(text.split()[0]) for text in cells(page, SCORE) if text] == sorted(found)
    assert page.tell(f"{button}.parentNode.getAttribute('aria-sort')") == "ascending"
    page.tell(f"document.querySelectorAll('#points thead button')[{UPLINK}].click()")
    assert cells(page, UPLINK) == ["half"] * 5 + ["raw"] * 5


def test_points_are_filtered_in_table_and_charts(page: Browser, about_sweep: str) -> None:
    page.open(about_sweep)
    page.wait(READY)
    marks = "document.querySelectorAll('.scatter [data-at]').length"
    page.wait(f"{marks} === 24")
    page.tell("$('search').value = 'LORA HALF'; $('search').dispatchEvent(new Event('input'))")
    assert cells(page, UPLINK) == ["half", "half"]
    assert page.tell("$('points-count').innerText") == "2 of 10"
    assert page.tell(marks) == 6
    page.tell(
        "$('search').value = ''; $('search').dispatchEvent(new Event('input'));"
        "const box = document.querySelectorAll('#filters select')[1]; box.value = '=none';"
        "box.dispatchEvent(new Event('change'))"
    )
    assert len(cells(page, PRIVACY)) == 6
    assert {*cells(page, PRIVACY)} == {"none"}


def test_a_point_shows_its_plan_and_how_to_run_it_again(
    page: Browser, about_sweep: str, folder: Path, tmp_path: Path
) -> None:
    page.open(about_sweep)
    page.wait(READY)
    points = read_points(folder).points
    at = next(i for i, p in enumerate(points) if p.values["privacy"] == PRIVATE)
    page.tell(f"rowOf(points[{at}]).querySelector('.pick').click()")
    (tmp_path / "plan.yaml").write_text(page.tell("$('point-plan').textContent"))
    trial = points[at].trials[0]
    made, ran = (Plan.from_yaml(p / "plan.yaml") for p in (tmp_path, folder / trial.name))
    assert made.digest() == ran.digest()
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["seed"] == 0
    commands = page.tell("$('point-command').textContent").splitlines()
    assert len(commands) == 3
    assert commands[0].startswith(f"fedpeft run {folder}/{trial.name}/plan.yaml --out again ")
    assert page.tell("document.querySelectorAll('#point-pairs tbody tr').length") == 3
    page.wait("document.querySelectorAll('#point-curve path.band').length === 1")
    assert page.tell("document.activeElement.id") == "point-title"
    shown = ROWS + ".filter((row) => row.classList.contains('here')).length"
    assert page.tell(shown) == 1


def test_of_many_points_the_first_are_shown_until_all_are_wanted(
    page: Browser, folder: Path, tmp_path: Path
) -> None:
    found = told(read_points(folder))
    about = {"made": {"version": "0", "date": ""}, "points": found["points"] * 11}
    (tmp_path / "many.html").write_text(whole(found | about))
    page.open((tmp_path / "many.html").as_uri())
    page.wait(READY)
    assert len(cells(page, SCORE)) == 100
    assert page.tell("$('points-note').innerText") == "The first 100; show 10 more"
    page.tell("document.querySelector('#points-note button').click()")
    assert len(cells(page, SCORE)) == 110
    assert page.tell("$('points-note').innerText") == ""


def test_another_score_is_looked_at(page: Browser, about_sweep: str) -> None:
    page.open(about_sweep)
    page.wait(READY)
    page.tell("$('metric').value = '1'; $('metric').dispatchEvent(new Event('change'))")
    found = [float(text.split()[0]) for text in cells(page, SCORE) if text]
    assert found == sorted(found)  # of losses the lowest is the best
    assert "loss, test set" in page.tell("$('effects-note').innerText")
    assert page.tell("document.querySelector('.scatter').innerHTML.includes('loss, test set')")


def test_what_a_sweep_says_is_text(page: Browser, about_sweep: str) -> None:
    page.open(about_sweep)
    page.wait(READY)
    assert page.tell("document.querySelectorAll('main img, main b[id], main script').length") == 0
    assert f"diverged {HOSTILE}" in page.text()
    assert HOSTILE in page.tell("$('legend').innerText")
    page.tell(f"choose(points.findIndex((p) => p.values[0] === {HOSTILE!r}), true)")
    assert HOSTILE in page.tell("$('point-title').innerText")


def test_what_a_run_says_is_text(page: Browser, about_run: str) -> None:
    page.open(about_run)
    page.wait(READY)
    assert page.tell("document.querySelectorAll('#bold, main img').length") == 0
    assert "<b id=bold>" in page.tell("$('run-title').innerText")
    assert f"round 3: {HOSTILE}" in page.text()
    assert page.tell("document.querySelectorAll('figure').length") >= 7
    assert "each client alone (mean)" in page.text()
    page.tell("$('order').value = 'refused'; $('order').dispatchEvent(new Event('change'))")
    assert page.tell("document.querySelector('#clients tbody th').innerText") == HOSTILE
    page.tell("$('table').open = true")
    page.wait("document.querySelectorAll('#table tbody tr').length === 3")


@pytest.mark.parametrize("kind", ["sweep", "run"])
def test_it_fits_a_phone_in_light_and_dark(
    page: Browser, kind: str, request: pytest.FixtureRequest
) -> None:
    page.look(390, 844)
    page.open(request.getfixturevalue(f"about_{kind}"))
    page.wait(READY)
    if kind == "sweep":
        page.tell("choose(4, false)")
    assert page.tell("document.documentElement.scrollWidth") <= 390
    assert page.tell("innerWidth") == 390
    bright = page.tell("getComputedStyle(document.body).backgroundColor")
    page.look(390, 844, dark=True)
    assert page.tell("getComputedStyle(document.body).backgroundColor") != bright
    assert page.tell("document.documentElement.scrollWidth") <= 390


def test_everything_can_be_done_by_keyboard(page: Browser, about_sweep: str) -> None:
    page.open(about_sweep)
    page.wait(READY)
    page.tell(f"document.querySelectorAll('#points thead button')[{METHOD}].focus()")
    page.press("Enter")
    told = f"$('points').tHead.rows[0].cells[{METHOD}].getAttribute('aria-sort')"
    assert page.tell(told) == "ascending"
    page.tell(f"{ROWS}[0].querySelector('button').focus()")
    page.press("Enter")
    page.wait("$('point').hidden === false")
    assert page.tell("$('point-title').innerText") != ""
