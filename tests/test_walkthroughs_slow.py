"""Pages of the site that are followed from top to bottom, as somebody would who reads them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import support_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMAND = 'fedpeft() { python -m fedpeft "$@"; }\n'


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of each block of a page of ``docs/``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def follow(command: list[str], folder: Path) -> str:
    """Return what a command prints, which must succeed."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout


def test_a_first_federation(tmp_path: Path) -> None:
    said = []
    for kind, text in blocks("first-run.md"):
        if kind == "yaml":
            (tmp_path / "plan.yaml").write_text(text)
        elif kind == "bash":
            said.append(follow(["bash", "-ec", COMMAND + text], tmp_path))
        elif kind == "python":
            said.append(follow([sys.executable, "-c", text], tmp_path))
    plan, run, resumed, used, piped, compared = said
    assert "76,808 trained" in plan
    assert (tmp_path / "runs/first/adapter/adapter_model.safetensors").exists()
    table = re.compile(r"base model, untrained .* federated adapter .*", re.DOTALL)
    assert table.search(run)[0] == table.search(resumed)[0]  # type: ignore[index]
    assert used.count('"probability"') == 2
    assert '"records": 800' in used
    assert "'score'" in piped
    assert re.search("first.*frozen", compared, re.DOTALL)


def test_a_notebook(tmp_path: Path) -> None:
    cells = [text for kind, text in blocks("notebooks.md") if kind == "python"]
    said = follow([sys.executable, "-c", "\n".join(cells)], tmp_path)
    assert "scaffold reads the mean gradient" in said
    assert "\nTrue\n" in said
    scores = [float(line) for line in said.splitlines() if re.fullmatch(r"0\.\d+", line)]
    assert len(scores) == 2
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_method_of_one_s_own(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(support_lines(bert)))
    (method,) = (text for kind, text in blocks("adding-a-method.md") if kind == "python")
    (tmp_path / "robust.py").write_text(method)
    (commands,) = (text for kind, text in blocks("adding-a-method.md") if kind == "bash")
    said = follow(["bash", "-ec", COMMAND + commands], tmp_path)
    assert re.search(r"^aggregator +robust:Median\(rate=0\.9\)$", said, re.MULTILINE)
    assert "robust:Median(rate=0.9)" in (tmp_path / "runs/median/plan.yaml").read_text()
    assert (tmp_path / "runs/median/adapter/adapter_model.safetensors").exists()
