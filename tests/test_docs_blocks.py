"""What README and pages show: commands and options that exist, files that can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedpeft import Plan
from fedpeft.cli import app
from fedpeft.deployment.client_file import load_client
from fedpeft.deployment.server_file import _KEYS as KEYS
from fedpeft.deployment.server_file import load_server
from fedpeft.spec import build
from fedpeft.sweep.search_file import read_search
from fedpeft.sweep.sweep_file import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLEST = {
    "model": "minilm",
    "task": "classify",
    "data": 'embedded(name="support")',
    "clients": 4,
    "rounds": 2,
    "evaluate": "test",
    "weighting": "uniform",
}
"""The lines that a page leaves out where it shows some of a plan."""


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        texts = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        found += [pytest.param(t, id=f"{page.stem}-{i}") for i, t in enumerate(texts)]
    return found


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_and_their_options_exist(text: str) -> None:
    group = typer.main.get_command(app)
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" > ")[0].rstrip("& "), comments=True)
        if words[:1] != ["fedpeft"]:
            continue
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        context = click.Context(command, info_name=words[1])
        command.make_parser(context).parse_args(words[2:])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_files_can_be_read(text: str, tmp_path: Path) -> None:
    lines = yaml.safe_load(text)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    if "search" in lines and "axes" not in lines:
        assert build("search", lines["search"]).trials > 1
    elif "axes" in lines:
        (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(SMALLEST))
        search = read_search(file)
        assert len(read_sweep(file) if search is None else search.ends()) > 1
    elif "listen" in lines:
        (tmp_path / lines["keys"]).mkdir(parents=True)
        for name in KEYS:
            (tmp_path / lines["keys"] / name).touch()
        assert str(load_server(file).port) == lines["listen"].rpartition(":")[2]
    elif "site" in lines:
        assert load_client(file).site == lines["site"]
    else:
        whole = lines if "model" in lines else {**SMALLEST, **lines}
        assert Plan.from_lines(whole).rounds > 0
