"""What the README promises: its table has every command, its refusal and its Python are real."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpeft.cli import app
from tests.tiny import support_lines
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(
        r"\b[A-Z]{3,}_(?:TABLE|SECONDS|COMMANDS)\b|^FIGURES$", README, re.MULTILINE
    )


def test_every_command_exists() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name for name, command in commands.items() if not command.hidden}
    used = set(re.findall(r"^(?:\$ )?fedpeft (\w+)", "\n".join(blocks("bash")), re.MULTILINE))
    table = set(re.findall(r"^\| `fedpeft (\w+)", README, re.MULTILINE))
    assert used <= known
    assert table == known


def test_the_refusal_shown_is_the_refusal_given(bert: Path, tmp_path: Path) -> None:
    (shown,) = blocks("console")
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(support_lines(bert)))
    command = [sys.executable, "-m", "fedpeft", "plan", str(path), "correction=scaffold"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert " ".join(shown.split("\n", 1)[1].split()) == " ".join(done.stderr.split())


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.slow
def test_the_python_runs(tmp_path: Path) -> None:
    for text in blocks("python"):
        text = text.replace("runs/notebook", str(tmp_path / "run"))
        done = subprocess.run(
            [sys.executable, "-W", "error::FutureWarning:fedpeft", "-c", text],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert 0 <= float(done.stdout.split()[-1]) <= 1


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(bert: Path, tmp_path: Path) -> None:
    lines = support_lines(bert, rounds=400, evaluate="none")
    path, out = tmp_path / "plan.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(lines))
    command = [sys.executable, "-m", "fedpeft", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ledger = out / "rounds.jsonl"
    wait_until(lambda: ledger.exists() and ledger.read_text().count("\n") > 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert "--resume goes on" in output
    assert "Traceback" not in output
    done = ledger.read_text().count("\n")
    again = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: ledger.read_text().count("\n") > done)
    again.kill()
    again.communicate()
