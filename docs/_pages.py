"""Pages of the site that follow from other files: methods, the reference, what was measured.

``mkdocs build`` calls what begins with ``on_`` (see ``hooks`` in ``mkdocs.yml``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fedpeft import catalogue
from fedpeft.spec import find

ROOT = Path(__file__).parents[1]
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
_NOT_SHOWN = {"_app"}
_TRAITS = {
    "offers": "others may rely on",
    "needs": "needs of another line",
    "refuses": "refuses beside it",
}


def on_config(config: Any) -> Any:
    """Put the generated pages where ``nav`` names their folder."""
    made = {
        "methods/": [path for path, _ in methods()],
        "measured/": [path for path, _ in measured() if path.count("/") == 1],
        "reference/": [path for path, _ in reference()],
    }

    def filled(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: made.get(str(where)) or filled(where) for title, where in entry.items()}
        return [filled(each) for each in entry] if isinstance(entry, list) else entry

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each family of methods, each study and each part of the library."""
    for path, content in [*methods(), *measured(), *reference()]:
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


def measured() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each study's page, then of its table and its plots."""
    for readme in sorted((ROOT / "simulations").glob("*/README.md")):
        study, text = readme.parent.name, readme.read_text(encoding="utf-8")
        results = readme.parent / "results"
        table = results / "table.md"
        plots = sorted(results.glob("*.svg"))
        if not table.exists() and "|---" not in text:
            continue  # tells how something is run, and has no figures
        shown = [f"![{plot.stem}]({study}/{plot.name})" for plot in plots]
        linked = re.sub(r"\]\(results/(\w+\.\w+)\)", rf"]({study}/\1)", text)
        every = [f"[Every figure]({study}/table.md)"] if table.exists() else []
        yield f"measured/{study}.md", "\n\n".join([linked, *shown, *every, ""])
        for made in [table, *plots]:
            if made.exists():
                yield f"measured/{study}/{made.name}", made.read_text(encoding="utf-8")


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
    shown = f"## {name}\n\n```python\n{call}\n```\n\n{text}"
    return "\n\n".join([shown, *_traits(family, name)])


def _traits(family: str, name: str) -> Iterator[str]:
    """Yield what a method declares of itself, where that does not follow from its fields."""
    if family == "models":
        return
    for attribute, title in _TRAITS.items():
        declared = inspect.getattr_static(find(family, name), attribute, None)
        if isinstance(declared, Mapping) and declared:
            told = [f"- `{trait}`: {reason}" for trait, reason in declared.items()]
            yield "\n".join([f"*{title.capitalize()}*", "", *told])
