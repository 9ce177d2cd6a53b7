"""Sweeps that are interrupted, fill the disk, or meet another one or what is not theirs."""

from __future__ import annotations

import csv
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.durable import acquire, replace_file
from fedpeft.errors import RunError
from fedpeft.sweep import command
from fedpeft.sweep.place import Place
from fedpeft.sweep.readings import Readings
from fedpeft.sweep.sweep_file import read_sweep
from tests.test_sweep import run, simulated, statuses, write
from tests.tiny import support_lines
from tests.waiting import HANGS, wait_until

PLACE = Place("inline", "inline", threads=1)


def started(path: Path, out: Path, *more: str, **where: Any) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "fedpeft", "sweep", str(path), "--out", str(out), *more]
    return subprocess.Popen([*line, "--threads", "1"], **where)


def rounds(out: Path) -> int:
    return sum(len(p.read_bytes().splitlines()) for p in out.glob("*/rounds.jsonl"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def below(pid: int) -> list[int]:
    """Return the processes that this one has started, and those that these have."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_on_a_terminal_loses_nothing(bert: Path, tmp_path: Path, workers: int) -> None:
    """The terminal sends SIGINT to the whole group: the command, and all that it has started."""
    lines = support_lines(bert, rounds=30, evaluate="test")
    path, out = write(tmp_path, plan=lines, seeds=[0, 1, 2]), tmp_path / "out"
    ours, theirs = pty.openpty()
    where: dict[str, Any] = {
        "stdin": theirs,
        "stdout": theirs,
        "stderr": theirs,
        "start_new_session": True,
    }
    take = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    line = f"{take}; sys.argv = sys.argv[1:]; from fedpeft.cli import main; main()"
    words = ["fedpeft", "sweep", str(path), "--out", str(out), "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", line, *words, "--workers", str(workers)], **where
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    said = bytearray()

    def heard() -> bytes:
        try:
            while piece := os.read(ours, 65536):
                said.extend(piece)
        except OSError:  # nothing more for now, or nobody writes any more
            pass
        return bytes(said)

    wait_until(lambda: (heard(), rounds(out))[1] > 3)
    started_by_it = below(process.pid)
    os.write(ours, b"\x03")
    wait_until(lambda: (heard(), process.poll())[1] is not None)
    wait_until(lambda: not any(map(alive, started_by_it)))
    text = heard().decode(errors="replace")
    os.close(ours)
    assert process.returncode == 130, text
    assert re.search(r"stopped after \d of 3 runs; the same command goes on", text), text
    assert "Traceback" not in text
    assert "failed" not in text
    done = rounds(out)
    assert done > 3
    place = Place("inline", "inline", threads=1)
    assert command.sweep(path, out, place)
    assert rounds(out) == 90  # those that were done are among them
    first = sorted(p.read_bytes() for p in out.glob("*/adapter/adapter_model.safetensors"))
    assert command.sweep(path, tmp_path / "whole", place)
    whole = (tmp_path / "whole").glob("*/adapter/adapter_model.safetensors")
    assert first == sorted(p.read_bytes() for p in whole)


def test_a_full_disk_under_the_table_is_one_line(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1]), tmp_path / "out"
    calls = list[Path]()

    def full(target: Path, *rest: Any, **more: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise RunError(f"{target}: cannot be written (No space left on device)")
        replace_file(target, *rest, **more)

    monkeypatch.setattr("fedpeft.sweep.running.replace_file", full)
    with pytest.raises(RunError, match=r"sweep\.csv: cannot be written \(No space left"):
        run(path, out)
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["done"]  # the table from before is whole
    assert statuses(run(path, out)) == ["kept", "kept"]  # and both runs are there


def test_a_second_sweep_in_a_folder_ends_with_a_line(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1)), tmp_path / "out"
    lock = acquire(out, "sweep")
    try:
        process = started(path, out, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=HANGS)
    finally:
        os.close(lock)
    assert process.returncode == 2
    (line,) = said.decode().splitlines()
    assert line.startswith("error: ")
    assert str(out) in line
    assert not list(out.glob("*/run.json"))


def test_results_of_another_version_are_a_failed_row_and_stay(bert: Path, tmp_path: Path) -> None:
    lines, out = support_lines(bert, rounds=1), tmp_path / "out"
    path = write(tmp_path, plan=lines, seeds=[0, 1])
    names = Readings()
    first, _ = read_sweep(path)
    table = out / names.folder(first) / "result.json"
    table.parent.mkdir(parents=True)
    table.write_text('{"accuracy": 0.5}')
    found = run(path, out)
    assert statuses(found) == ["failed", "done"]
    assert "no final table of this version; take" in found[0].problem
    assert table.read_text() == '{"accuracy": 0.5}'
    assert not command.sweep(path, out, PLACE)  # the status says so, too


def test_a_run_begun_by_another_plan_under_the_same_name_is_not_overwritten(
    bert: Path, tmp_path: Path
) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1)), tmp_path / "out"
    (cell,) = read_sweep(path)
    folder = out / Readings().folder(cell)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    (outcome,) = run(path, out)
    assert outcome.status == "failed"
    assert "not empty and no run of fedpeft" in outcome.problem
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_file_that_is_changed_while_it_runs_is_read_once(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1]), tmp_path / "out"

    def change(plan: Any, folder: Path) -> Any:
        path.write_text(yaml.safe_dump({"plan": {}, "axes": "none"}))
        return simulated(plan, folder)

    assert statuses(run(path, out, change)) == ["done", "done"]


@pytest.mark.slow
def test_sigterm_loses_nothing(bert: Path, tmp_path: Path) -> None:
    lines = support_lines(bert, rounds=300, evaluate="none")
    path, out = write(tmp_path, plan=lines), tmp_path / "out"
    process = started(path, out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: rounds(out) > 2)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=HANGS)
    done = rounds(out)
    assert 2 < done < 300
    again = started(path, out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: rounds(out) > done)
    again.kill()
    again.wait()
