"""Pages of the site that follow from the code: every method a plan can name, and the reference.

``mkdocs build`` calls what begins with ``on_`` (see ``hooks`` in ``mkdocs.yml``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fedpeft import catalogue

ROOT = Path(__file__).parents[1]
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
_NOT_SHOWN = {"_app"}


def on_config(config: Any) -> Any:
    """Put the generated pages where ``nav`` names their folder."""
    made = {"methods/": [path for path, _ in methods()], "reference/": [p for p, _ in reference()]}
    for entry in config.nav:
        for title, where in entry.items() if isinstance(entry, dict) else ():
            if isinstance(where, str) and where in made:
                entry[title] = made[where]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each family of methods, and one for each part of the library."""
    for path, content in [*methods(), *reference()]:
        files.append(File.generated(config, path, content=content))
    return files


def methods() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each family's page, and of the page that lists them."""
    families = catalogue.families()
    rows = [f"| [`{family}`]({family}.md) | {_listed(family)} |" for family in families]
    head = ["# Methods", "", "Each line of a plan takes a method of a family.", ""]
    table = ["| family | methods |", "|---|---|", *rows, ""]
    yield "methods/index.md", "\n".join([*head, *table])
    for family in families:
        parts = [_method(family, name) for name in catalogue.listed(family)]
        yield f"methods/{family}.md", "\n\n".join([f"# {family.capitalize()}", *parts, ""])


def reference() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of a page for each public module, by folder."""
    package = ROOT / "fedpeft"
    folders = {path.parent for path in package.rglob("*.py")} - {package / n for n in _NOT_SHOWN}
    shown = []
    for folder in sorted(folders):
        where = folder.relative_to(ROOT)
        modules = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")]
        if not modules or any(part.startswith("_") for part in where.parts):
            continue
        dotted = ".".join(where.parts)
        blocks = [f"::: {dotted}.{path.stem}" for path in modules]
        name = dotted.removeprefix("fedpeft").removeprefix(".") or "fedpeft"
        shown.append(name)
        yield f"reference/{name}.md", "\n\n".join([f"# {dotted}", *blocks, ""])
    listed = [f"- [`{name}`]({name}.md)" for name in shown]
    yield "reference/index.md", "\n".join(["# Reference", "", *listed, ""])


def _listed(family: str) -> str:
    return ", ".join(f"[`{n}`]({family}.md#{n})" for n in catalogue.listed(family))


def _method(family: str, name: str) -> str:
    call, *paragraphs = catalogue.about(family, name).split("\n\n")
    text = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", "\n\n".join(paragraphs))
    return f"## {name}\n\n```python\n{call}\n```\n\n{text}"
