"""What ``deploy/`` holds: its files parse, and the commands in them exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from fedpeft.cli import app

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_there_is_a_unit_for_each_side() -> None:
    assert [path.name for path in UNITS] == ["fedpeft-client@.service", "fedpeft-server.service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_exists_and_starts_it_again(path: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    service = unit["Service"]
    program, command, file = service["ExecStart"].split()
    assert program.endswith("/bin/fedpeft")
    assert command in COMMANDS
    assert file.endswith(".yaml")
    assert service["Restart"] == "always"
    assert service["User"] == "fedpeft"
    assert service["UMask"] == "0077"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_caches_are_where_a_unit_may_write(path: Path) -> None:
    """``ProtectHome`` hides ~/.cache, ``ProtectSystem=strict`` leaves the state's folder alone."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    service = unit["Service"]
    assert (service["ProtectHome"], service["ProtectSystem"]) == ("true", "strict")
    set_there = dict(word.split("=") for word in service["Environment"].split())
    assert set(set_there) == {"HF_HOME", "XDG_CACHE_HOME"}
    for place in set_there.values():
        assert Path(place).is_relative_to(f"/var/lib/{service['StateDirectory']}")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_knows_every_line_of_a_unit(path: Path, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")

    def said(text: str) -> str:
        unit = tmp_path / path.name.replace("@", "@a")
        unit.write_text(text.replace("/opt/fedpeft/bin/fedpeft", "/bin/true"))
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return found.stderr if unit.name in found.stderr or found.returncode else ""

    text = path.read_text(encoding="utf-8")
    assert said(text) == ""
    assert "NoNewPrivilege" in said(text.replace("NoNewPrivileges=", "NoNewPrivilege="))


def test_the_compose_file_starts_commands_that_exist() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    services = found["services"]
    assert set(services) == {"server", "site"}
    for service in services.values():
        command, file = service["command"]
        assert command in COMMANDS
        assert file.endswith(".yaml")
        assert {v.split(":")[0] for v in service["volumes"] if not v.startswith(".")} <= set(
            found["volumes"]
        )
    assert services["server"]["ports"] == ["9092:9092"]
    built = DEPLOY / services["server"]["build"]["context"]
    assert (built / services["server"]["build"]["dockerfile"]).is_file()


def test_the_image_installs_from_the_repository() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^RUN pip install .* /src ", text, re.MULTILINE)
    assert 'ENTRYPOINT ["fedpeft"]' in text
    copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
    assert " ".join(copied).split() == [
        *("pyproject.toml", "README.md", "LICENSE", "fedpeft", "client", "server")
    ]  # never keys, records or state that lie beside the compose file
    assert all((DEPLOY.parent / name).exists() for name in " ".join(copied).split())
    assert "-o fedpeft -g fedpeft -m 700 /state" in text  # else the volume is root's
