"""``fedpeft report``: writes a page, plots and tables about a run or a sweep.

::

    report.html     the page: one file, which asks nobody for anything
    figures/        plots, as PNG and SVG
    tables/         all numbers, as CSV and Parquet
    report.json     of what and when: the mark of a report

The folder appears as a whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedpeft.durable import make_folder, remove_folder, replace_folder
from fedpeft.errors import RunError
from fedpeft.reporting import all_runs, one_run, tables
from fedpeft.reporting.page import page
from fedpeft.reporting.points import Sweep, problems, read_points, reason

PAGE, MARK = "report.html", "report.json"
_NEEDS = {"matplotlib": "plots", "pyarrow": "Parquet tables"}

Tell = Callable[[str], None]
Draw = Callable[[Path], object]


def report(folder: Path, out: Path | None, tell: Tell, *, overwrite: bool = False) -> Path:
    """Report on a run's folder, or a folder of runs; return the page's path.

    ``tell`` is told what is left out since a package is missing. Raises ``RunError`` where there is
    nothing to report, ``out`` exists, or the disk does not take it.
    """
    place = out or folder / "report"
    _check_free(place, overwrite=overwrite)
    told, found, draw = _read(folder)
    told["made"] = {
        "version": version("fedpeft"),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    lacking = [package for package in _NEEDS if not _is_there(package)]
    for package in lacking:
        tell(f"no {_NEEDS[package]} without {package}: pip install 'fedpeft[report]'")
    try:
        _write(place, told, found, draw, lacking)
    except OSError as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        remove_folder(_temporary(place))
        why = getattr(cause, "strerror", None) or error
        raise RunError(f"{place}: cannot be written ({why}); choose another --out") from error
    return place / PAGE


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tables.Table], Draw]:
    """Return what the page shows, the tables, and what draws the plots into a folder."""
    from fedpeft.reporting import figures

    if (folder / "run.json").exists():
        run = one_run.read(folder)
        told = one_run.told(run) | {"folder": str(folder)}
        return (
            told,
            tables.of_run(run.followed, run.gains),
            lambda place: figures.of_run(told, place),
        )
    sweep = read_points(folder)
    _check_scores(sweep)
    told = all_runs.told(sweep)
    return told, tables.of_sweep(sweep), lambda place: figures.of_sweep(told, sweep, place)


def _check_scores(sweep: Sweep) -> None:
    if any(point.finished for point in sweep.points):
        return
    _, first = next(problems(sweep))
    raise RunError(
        f"{sweep.path}: none of its {len(sweep.trials)} runs has finished, so there is nothing to "
        f"report; the first one: {reason(first)}"
    )


def _check_free(place: Path, *, overwrite: bool) -> None:
    if place.is_dir() and not any(place.iterdir()):
        return
    if not (place.exists() or place.is_symlink()):
        return
    if place.is_symlink() or not (place / MARK).is_file():
        raise RunError(f"{place}: exists and is no report; choose another --out")
    if not overwrite:
        raise RunError(f"{place}: holds a report; add --overwrite, or choose another --out")


def _write(
    place: Path,
    told: Mapping[str, Any],
    found: Mapping[str, tables.Table],
    draw: Draw,
    lacking: list[str],
) -> None:
    temporary = _temporary(place)
    make_folder(place.parent)
    remove_folder(temporary)
    for name in ("figures", "tables"):
        (temporary / name).mkdir(parents=True)
    (temporary / PAGE).write_text(page(told), encoding="utf-8")
    for name, table in found.items():
        (temporary / "tables" / f"{name}.csv").write_bytes(tables.as_csv(table))
        if "pyarrow" not in lacking and table:
            tables.write_parquet(table, temporary / "tables" / f"{name}.parquet")
    if "matplotlib" not in lacking:
        draw(temporary / "figures")
    about = {"of": str(told["folder"]), "kind": told["kind"], **told["made"]}
    (temporary / MARK).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    replace_folder(place, temporary, "result")


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.new")


def _is_there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
