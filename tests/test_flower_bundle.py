"""The app bundle: the same bytes each time, from a checkout and from an installed wheel."""

from __future__ import annotations

import io
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from fedpeft.deployment.signing import hash_of
from fedpeft.errors import SiteError
from fedpeft.flower.bundle import as_seen, bundle
from fedpeft.flower.config import LINES, Settings

ROOT = Path(__file__).parents[1]


def test_it_holds_both_sides_and_no_library() -> None:
    app = bundle()
    assert hash_of(bundle()) == hash_of(app)
    with zipfile.ZipFile(io.BytesIO(app)) as files:
        names = set(files.namelist())
        assert files.read("server/app.py") == (ROOT / "server" / "app.py").read_bytes()
    assert {n for n in names if n.endswith(".py")} == {
        *("client/__init__.py", "client/app.py", "server/__init__.py", "server/app.py")
    }
    every = {
        str(p.relative_to(ROOT))
        for side in ("client", "server")
        for p in (ROOT / side).rglob("*.py")
    }
    assert every == {n for n in names if n.endswith(".py")}, "name new files in flower/bundle.py"


def test_a_wheel_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wheel is told to hold makes the same bundle as the checkout."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    held = told["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, place in held.items():
        assert place.startswith("fedpeft/_app/")
        target = tmp_path / Path(place).relative_to("fedpeft")
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    here = bundle()
    monkeypatch.setattr("fedpeft.flower.bundle._PLACES", (tmp_path / "_app", tmp_path / "none"))
    assert bundle() == here
    monkeypatch.setattr("fedpeft.flower.bundle._PLACES", (tmp_path / "none",))
    with pytest.raises(SiteError, match="the app is not there; install fedpeft from its wheel"):
        bundle()


def test_what_nodes_see_is_the_app_s_lines_under_our_own() -> None:
    app = bundle()
    seen = as_seen(app, {"rounds": 3, "wait": 5.0})
    assert (seen["rounds"], seen["wait"], seen["model"]) == (3, 5.0, "minilm")
    assert {*LINES, *Settings.__dataclass_fields__} <= {*seen, "version"}
    with pytest.raises(SiteError, match="the app does not take this run-config"):
        as_seen(app, {"rouns": 3})
