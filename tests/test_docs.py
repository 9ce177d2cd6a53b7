"""The site: it builds without a warning, has all methods and modules, and fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedpeft import catalogue

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


class _Page(HTMLParser):
    """What a page shows: ids of its elements, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.loaded = set[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        source = {"script": "src", "img": "src", "iframe": "src"}.get(tag)
        if source and given.get(source):
            self.loaded.add(given[source])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.add(given["href"])


def test_every_method_of_every_family_is_told(site: Path) -> None:
    for family in catalogue.families():
        ids = _Page(site / "methods" / family / "index.html").ids
        assert set(catalogue.listed(family)) <= ids, family


def test_the_reference_has_every_public_module(site: Path) -> None:
    ids = {i for page in (site / "reference").rglob("index.html") for i in _Page(page).ids}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "fedpeft").rglob("*.py")
        if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
    }
    assert len(modules) > 150
    assert modules <= ids


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        assert not [url for url in _Page(page).loaded if re.match(r"(https?:)?//", url)], page


def test_every_written_page_can_be_reached(site: Path) -> None:
    home = (site / "index.html").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        if path.stem != "index":
            assert f'href="{path.stem}/"' in home, path.name
