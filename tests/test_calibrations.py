"""Calibrated noise on disk: worked out once, and believed after one evaluation alone."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft import calibrations
from fedpeft.privacy import _accountant
from fedpeft.types import Sampling
from tests.test_ledger import Asking

COINS = Sampling("coins", 1, 0.1)
GIVEN = COINS, 3.0, 50, 1e-5


class Process:
    """One that begins with nothing in memory; it counts how often epsilon is worked out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._exact, self._coarse = patch, _accountant.epsilon, _accountant._roughly
        self.looks = 0
        patch.setattr(_accountant, "epsilon", self._epsilon)
        patch.setattr(_accountant, "_roughly", self._roughly)
        self.begin()

    def begin(self) -> None:
        self.looks = 0
        self._patch.setattr(_accountant, "KNOWN", {})
        _accountant.calibrated.cache_clear()
        self._exact.cache_clear()

    def _epsilon(self, *given: Any) -> float:
        self.looks += 1
        return self._exact(*given)

    def _roughly(self, *given: Any) -> float:
        self.looks += 1
        return self._coarse(*given)

    def calibrate(self, path: Path, *given: Any) -> tuple[float, int]:
        self.begin()
        with calibrations.kept(path):
            return _accountant.calibrated(*given or GIVEN), self.looks


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    yield Process(monkeypatch)
    _accountant.calibrated.cache_clear()


@pytest.mark.parametrize(
    "given",
    [
        GIVEN,
        (Sampling("fixed", 9, 0.5, 4), 8.0, 20, 1e-5),
        (Sampling("turns", 9, size=3, most=2), 1.0, 20, 1e-6),
    ],
    ids=["coins", "fixed", "turns"],
)
def test_the_next_process_looks_once(process: Process, tmp_path: Path, given: Any) -> None:
    path = tmp_path / "noise.json"
    noise, looks = process.calibrate(path, *given)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert process.calibrate(path, *given) == (noise, 1)
    assert path.read_bytes() == before
    if given == GIVEN:
        assert looks > 1
    else:  # the noise of another plan is another's, and both are kept
        other, _ = process.calibrate(path, *GIVEN)
        assert set(json.loads(path.read_text()).values()) == {noise, other}


def test_the_least_noise_there_is_may_be_far_below_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_accountant, "epsilon", lambda *_: 0.1)
    assert _accountant._fits(_accountant.LEAST_NOISE, *GIVEN)
    assert not _accountant._fits(2 * _accountant.LEAST_NOISE, *GIVEN)


@pytest.mark.parametrize(
    "lie", [0.5, 0.997, 1.02, 9.0, -1.0, float("nan"), float("inf"), "1.0", True, None, [1.0]]
)
def test_a_lie_is_not_believed_and_is_replaced(process: Process, tmp_path: Path, lie: Any) -> None:
    path = tmp_path / "noise.json"
    noise, _ = process.calibrate(path)
    (of,) = json.loads(path.read_text())
    path.write_text(json.dumps({of: noise * lie if type(lie) is float else lie}))
    assert process.calibrate(path)[0] == noise
    assert json.loads(path.read_text()) == {of: noise}
    assert process.calibrate(path) == (noise, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": '])
def test_a_damaged_file_is_made_anew(process: Process, tmp_path: Path, text: str) -> None:
    path = tmp_path / "noise.json"
    path.write_text(text)
    noise, _ = process.calibrate(path)
    assert process.calibrate(path) == (noise, 1)


def test_a_disk_that_does_not_take_it_is_said_and_no_more(process: Process, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = list[str]()
    with calibrations.kept(tmp_path / "file" / "noise.json", said.append):
        noise = _accountant.calibrated(*GIVEN)
    assert noise > 0
    assert len(said) == 1
    assert "calibrated noise is not kept" in said[0]


def test_a_file_does_not_grow_without_end(process: Process, tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    path.write_text(json.dumps({f"other {n}": 1.0 for n in range(5000)}))
    noise, _ = process.calibrate(path)
    held = json.loads(path.read_text())
    assert len(held) == 200
    assert [*held.values()][-1] == noise


@pytest.mark.parametrize("privacy", ["user(epsilon=8)", "record(epsilon=3)"])
def test_a_node_s_next_process_has_its_noise(
    process: Process, bert: Path, tmp_path: Path, apart: None, privacy: str
) -> None:
    """One evaluation for a message, not a search; and the same noise is written down."""
    weighting = "uniform" if "record" in privacy else "uniform(denominator='expected')"
    server = Asking(bert, tmp_path / "home", privacy=privacy, rounds=3, weighting=weighting)
    looks = []
    for round in range(3):
        process.begin()
        server.play(server.packet(round))
        looks.append(process.looks)
    assert looks[0] > looks[1] == looks[2] == 1
    assert len({release.noise for release in server.releases}) == 1
    assert len([*(tmp_path / "home").glob("noise.json")]) == 1
