"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedpeft.driver import Result
from fedpeft.logs import RunLog
from fedpeft.plan import Plan
from fedpeft.watching import Line

_ROWS = {
    "base": "base model, untrained",
    "alone": "each client alone (mean)",
    "federated": "federated adapter",
    "central": "centralised, pooled data",
}


class RunScreen:
    """Shows a run; see ``driver.Watch``."""

    def __init__(self, console: Console, folder: Path) -> None:
        self._console, self._folder = console, folder
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=not self._live,
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None
        self._extra: dict[str, TaskID] = {}
        self.round_done = 0
        self._pace = _Pace()

    def __enter__(self) -> RunScreen:
        self._console.print(f"preparing {self._folder} ...", style="dim")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._console.print(f"warning: {text}", style="yellow", highlight=False)

    def begin(self, plan: Plan, round: int) -> None:
        """Open the bars."""
        self.round_done = round
        self._rounds = self._progress.add_task(
            "rounds", total=plan.rounds, completed=round, rate=""
        )
        self._clients = self._progress.add_task("clients", total=None, rate="")
        self._pace = _Pace()
        if round and not self._live:
            self._console.print(f"resuming after round {round} of {plan.rounds}")

    def client(self, done: int, cohort: int) -> None:
        """Move the clients' bar."""
        self._pace.client(done)
        if self._clients is not None:
            rate = self._pace.text()
            self._progress.update(self._clients, completed=done, total=cohort, rate=rate)

    def seen(self, records: int) -> None:
        """Show how fast records go by."""
        self._pace.seen += records
        if self._clients is not None and self._live:
            self._progress.update(self._clients, rate=self._pace.text())

    def round(self, line: Line) -> None:
        """Move the rounds' bar, or print a line."""
        self.round_done = line["round"] + 1
        self._pace.seen = max(self._pace.seen, int(line.get("seen", 0)))
        told = "  ".join(filter(None, [note(line), self._pace.text(whole=True)]))
        self._pace = _Pace()
        if self._rounds is not None:
            self._progress.update(self._rounds, advance=1)
        self._console.print(f"round {self.round_done}  {told}", highlight=False)
        for client, reason in line.get("refused", {}).items():
            self._console.print(f"refused {client}: {reason}", style="yellow")

    def compare(self, name: str, done: int, total: int) -> None:
        """Move the bar of a comparison."""
        if name not in self._extra:
            self._extra[name] = self._progress.add_task(_ROWS[name], total=total, rate="")
        self._progress.update(self._extra[name], completed=done)

    def finish(self, result: Result) -> None:
        """Print the table."""
        self._progress.stop()
        show_result(self._console, result)


@dataclass
class _Pace:
    """How fast a round trains: from its begin to its last client."""

    seen: int = 0
    clients: int = 0
    begun: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    def client(self, done: int) -> None:
        """Take note of the time."""
        self.clients, self.last = done, time.perf_counter() - self.begun

    def text(self, whole: bool = False) -> str:
        """Return clients and examples per second so far, or of the whole round."""
        seconds = self.last if whole else time.perf_counter() - self.begun
        if not seconds:
            return ""
        rates = (self.clients, "clients/s"), (self.seen, "examples/s")
        return "  ".join(f"{n / seconds:,.3g} {unit}" for n, unit in rates if n)


@contextmanager
def show_run(folder: Path, form: str = "text") -> Iterator[RunScreen | RunLog]:
    """Show a run, or log it where the ``form`` is "json"; Ctrl-C says how to go on."""
    if form == "json":
        with RunLog(folder) as log:
            yield log
        return
    console = Console(soft_wrap=True, markup=False)
    try:
        with RunScreen(console, folder) as screen:
            yield screen
    except KeyboardInterrupt:
        console.print(
            f"stopped after round {screen.round_done}; the same command with --resume goes on",
            style="yellow",
        )
        raise SystemExit(130) from None


def show_result(console: Console, result: Result) -> None:
    """Print the final table and where things are."""
    table = result.table
    rows: Mapping[str, Any] = table["rows"] or {"federated": _server_metrics(table["last"])}
    columns = [c for c in next(iter(rows.values()), {}) if not c.endswith("_worst_decile")]
    if columns:
        shown = Table(title=f"test set, after {table['rounds']} rounds, {table['clients']} clients")
        shown.add_column("")
        for column in columns:
            shown.add_column(column, justify="right")
        for name, metrics in rows.items():
            shown.add_row(_ROWS.get(name, name), *(_cell(c, metrics.get(c)) for c in columns))
        console.print(shown)
    for where, whose in (("clients/", ""), ("personal/", ", personal adapters")):
        if held := _held_out(table["last"], where):
            console.print(f"held-out records of the clients{whose}: {held}", highlight=False)
    if "epsilon" in table:
        console.print(f"epsilon spent: {table['epsilon']:.3f}", highlight=False)
    if "seconds" not in table:  # what would tell of clients stays at the server
        _show_place(console, result)
        return
    up, down, held, of_up, of_down = (
        f"{table.get(name, 0) / 1e6:,.2f}"
        for name in ("up_bytes", "down_bytes", "eval_bytes", "up_head_bytes", "down_head_bytes")
    )
    head = f" (of them {of_up} and {of_down} the head)" if table.get("down_head_bytes") else ""
    console.print(
        f"{up} MB up, {down} MB down{head}, {held} MB for federated evaluation; "
        f"{table['seconds']:,.1f} s of rounds",
        highlight=False,
    )
    _show_place(console, result)


def _show_place(console: Console, result: Result) -> None:
    if result.folder is not None:
        console.print(f"adapter: {result.folder / 'adapter'}", highlight=False)


def show_columns(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print runs as columns; on a narrow terminal what is long is wrapped."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for row, values in rows.items():
        table.add_row(row, *values)
    Console(markup=False, highlight=False).print(table)


def _held_out(last: Mapping[str, float], where: str) -> str:
    found = {k.removeprefix(where): v for k, v in last.items() if k.startswith(where)}
    shown = [name for name in ("accuracy", "loss") if name in found]
    parts = [f"{n} {found[n]:.4f}, worst decile {found[f'{n}_worst_decile']:.4f}" for n in shown]
    return "; ".join(parts)


def _server_metrics(last: Mapping[str, float]) -> dict[str, float]:
    return {k.removeprefix("test/"): v for k, v in last.items() if k.startswith("test/")}


def note(line: Mapping[str, Any]) -> str:
    """Return a round's loss and main metrics in a line."""
    places = ("test", "clients", "personal")
    names = ["loss", *(f"{place}/{n}" for place in places for n in ("accuracy", "loss"))]
    shown = [f"{n} {line[n]:.4f}" for n in names if n in line]
    if line.get("reachable") == 0:
        shown.insert(0, "no client was within reach")
    elif line.get("replied") == []:
        shown.insert(0, "no reply was used")
    if "seconds" in line:
        shown.append(f"{line['seconds']:.1f} s")
    return "  ".join(shown)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if column in ("accuracy", "f1") else f"{value:.4f}"
