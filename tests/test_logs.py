from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.driver import Result, simulate
from fedpeft.errors import RunError
from fedpeft.logs import JsonLog, RunLog
from tests.tiny import support_lines, support_plan

ROOT = Path(__file__).parents[1]


def told(stream: io.StringIO) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in stream.getvalue().splitlines()]
    for each in found:
        assert each.pop("time").endswith("+00:00")
    return found


def test_an_event_is_one_line_of_json() -> None:
    stream = io.StringIO()
    JsonLog(stream).write("odd", level="error", text="a\nb", number=math.nan, of={1: math.inf})
    JsonLog(stream).write("path", place=Path("a"))
    assert told(stream) == [
        {"level": "error", "event": "odd", "text": "a\nb", "number": None, "of": {"1": None}},
        {"level": "info", "event": "path", "place": "a"},
    ]


def test_a_run_is_logged_as_its_ledger_tells_it(bert: Path, tmp_path: Path) -> None:
    stream, plan = io.StringIO(), support_plan(bert, rounds=2, compare="central")
    with RunLog(tmp_path / "run", JsonLog(stream)) as log:
        result: Result = simulate(plan, out=tmp_path / "run", watch=log)
        log.finish(result)
    found = told(stream)
    assert {each.pop("folder") for each in found} == {str(tmp_path / "run")}
    assert [each["event"] for each in found] == [
        *("preparing", "begin", "round", "round", "compared", "finished")
    ]
    rounds = [each for each in found if each["event"] == "round"]
    for line, logged in zip(result.history, rounds, strict=True):
        assert logged["loss"] == line["loss"]
        assert logged["replied"] == len(line["replied"])
        assert not {"traffic", "per_client"} & set(logged)
    assert found[-1]["last"] == dict(result.table["last"])


def test_refusals_warnings_and_the_end_are_logged(tmp_path: Path) -> None:
    stream = io.StringIO()

    def run() -> None:
        with RunLog(tmp_path, JsonLog(stream)) as log:
            log.warn("beware")
            log.round({"round": 0, "replied": ["a"], "refused": {"b": "too long"}})
            log.round({"round": 1, "epsilon": 1.5})
            raise RunError("no more")

    with pytest.raises(RunError, match="no more"):
        run()
    found = [{k: v for k, v in each.items() if k != "folder"} for each in told(stream)][1:]
    assert found == [
        {"level": "warning", "event": "warning", "reason": "beware"},
        {"level": "info", "event": "round", "round": 0, "replied": 1},
        {"level": "warning", "event": "refused", "round": 0, "client": "b", "reason": "too long"},
        {"level": "info", "event": "round", "round": 1, "epsilon": 1.5},
        {"level": "error", "event": "stopped", "kind": "RunError", "reason": "no more"},
    ]


@pytest.mark.slow
def test_the_command_logs_on_request(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(support_lines(bert, rounds=1, evaluate="none")))
    line = [sys.executable, "-m", "fedpeft", "run", str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run([*line, "--log", "json"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")
    events = [json.loads(text)["event"] for text in done.stderr.splitlines()]
    assert events == ["preparing", "begin", "round", "finished"]
