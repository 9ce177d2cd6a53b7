"""The loop over rounds: the same for a simulation and for a federation of machines."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpeft.attendance import Attendance
from fedpeft.baselines import Rows, compare
from fedpeft.checkpoint import Checkpoint
from fedpeft.closing import Result as Closing
from fedpeft.engine._base import Engine, Handing, Stage
from fedpeft.evaluation import EACH_ALONE, scored
from fedpeft.export import write_adapter
from fedpeft.federation import Federation, deal
from fedpeft.first_gradient import public_splits
from fedpeft.handing_out import prepare
from fedpeft.memory import InProcess
from fedpeft.model_card import model_card
from fedpeft.models._base import fingerprint
from fedpeft.one_round import Run, is_over, one_round
from fedpeft.plan import Plan
from fedpeft.post import Post, Simulated
from fedpeft.preflight import check
from fedpeft.run_folder import RunFolder
from fedpeft.scattered import is_scattered
from fedpeft.site import Site, encode
from fedpeft.spec import build
from fedpeft.state import start
from fedpeft.tracking import Trackers
from fedpeft.types import Simulation, Tensors, Tracked
from fedpeft.watching import Line, Quiet, Watch

Posted = Callable[[Engine, int], Post]
"""Makes what carries messages of an engine's clients, from the next round on."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run is: its table, the lines of its rounds and the adapter's tensors."""

    plan: Plan
    table: Mapping[str, Any]
    history: Sequence[Line]
    tensors: Tensors
    folder: Path | None = None


def input_digests(plan: Plan, federation: Federation) -> tuple[str, ...]:
    """Return digests of the data, the model and the warm start: inputs that the lines only name."""
    return _inputs(plan, federation.splits.fingerprint)


def plan_digest(plan: Plan, data: str | None = None) -> str:
    """Return the content address of a run: its plan, data and model.

    ``data`` is the fingerprint of its data, which are loaded where it is not given.
    """
    return plan.digest(*_inputs(plan, deal(plan).splits.fingerprint if data is None else data))


def _inputs(plan: Plan, data: str) -> tuple[str, ...]:
    found = [data, fingerprint(plan.model)]
    if plan.warm_start is not None:
        from fedpeft.export import folder_digest

        found.append(folder_digest(Path(plan.warm_start)))
    if (public := public_splits(plan)) is not None:
        found.append(public.fingerprint)
    if recorded := plan.availability.fingerprint():
        found.append(recorded)
    return tuple(found)


def simulate(
    plan: Plan,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    engine: str | Simulation = "inline",
    watch: Watch | None = None,
    posted: Posted | None = None,
) -> Result:
    """Run ``plan`` with all its clients on this machine, or on the cluster of ``engine``.

    With ``out`` the run leaves a folder behind (see ``run_folder.py``) and can be resumed after a
    kill with the same result, bit for bit. ``engine`` says where clients run, such as
    ``"inline(group=16)"``; ``posted`` says what carries messages, by default a simulated clock.
    Raises ``FedPeftError`` for what the user can mend.
    """
    checked, watch = check(plan), watch or Quiet()
    simulation: Simulation = build("engine", engine) if isinstance(engine, str) else engine
    simulation.check_device(device)
    federation = checked.federation
    for text in checked.warnings:
        watch.warn(text)
    if out is None:
        with (
            contextlib.closing(Site(plan, federation, device, warn=watch.warn)) as site,
            simulation.start(
                Stage(site, InProcess(), None, watch.warn, watch.seen, device)
            ) as running,
        ):
            return drive(plan, site, running, None, watch, posted)
    texts = encode(plan, federation)  # a text that cannot be used leaves no folder behind
    inputs, federation = input_digests(plan, federation), federation.without_rows()
    del checked
    made_with = simulation.made_with()
    with RunFolder(Path(out), plan, inputs, resume=resume, made_with=made_with) as folder:
        asked = plan.comparisons if federation.splits.test is not None else ()
        if folder.finished and set(asked) <= set(folder.compared()):
            return _finished(plan, folder)
        for text in folder.warnings:
            watch.warn(text)
        with (
            contextlib.closing(Site(plan, federation, device, texts, warn=watch.warn)) as site,
            simulation.start(
                Stage(site, folder.memories, folder.path, watch.warn, watch.seen, device)
            ) as running,
        ):
            return drive(plan, site, running, folder, watch, posted)


def drive(
    plan: Plan,
    site: Site,
    engine: Engine,
    folder: RunFolder | None,
    watch: Watch,
    posted: Posted | None = None,
) -> Result:
    """Run the rounds that are left, export the adapter and write the final table."""
    attendance = Attendance(plan, site.federation.crowd(plan.seed))
    stores = (folder.updates, folder.found) if folder else (InProcess(), InProcess())
    name = folder.run if folder else uuid.uuid4().hex
    found = folder.load() if folder else None
    at = found or Checkpoint(start(plan, site.tables, site.initial))
    post = _post(engine, attendance, at.state.round, posted)
    run = Run(plan, site, engine, folder, watch, name, attendance, post, *stores)
    if folder and not found and plan.privacy.secret:
        folder.begin(at)
    post.start(at.clock)
    run.resend(at)
    run.history = list(folder.history()) if folder else []
    watch.begin(plan, at.state.round)
    with Trackers(plan.track, _tracked(run), watch.warn) as trackers:
        at = _rounds(run, at, trackers)
    if at.over and at.state.round < plan.rounds:
        watch.warn(f"the run is over after {at.state.round} of {plan.rounds} rounds: {at.over}")
    shared = at.best_params if plan.keep_best and at.best_params else at.state.tensors
    tensors = {**site.initial, **shared}
    if folder:
        line = scored(run.history, plan.keep_best, at.best)
        card = model_card(plan, site, run.history, line)
        write_adapter(folder.path / "adapter", plan, site, tensors, card)
        if isinstance(engine, Handing) and is_scattered(plan):
            told = folder.run, folder.path.name, plan, at.state.round
            result = Closing.of(*told, tensors, site.tables.shapes)
            prepare(folder.path, replace(result, acks=at.state.acks), [*engine.population()])
    done = folder.compared() if folder else {}
    keep = folder.write_compared if folder else None
    rows = compare(plan, site, engine, run.history, tensors, done, keep, watch.compare)
    table = _table(run, at, rows)
    if folder:
        folder.finish(table)
    return Result(plan, table, run.history, tensors, folder.path if folder else None)


def _post(engine: Engine, attendance: Attendance, round: int, posted: Posted | None) -> Post:
    if posted:
        return posted(engine, round)
    return engine if isinstance(engine, Post) else Simulated(engine, attendance.seconds)


def _tracked(run: Run) -> Tracked | None:
    folder, lines = run.folder, run.plan.lines()
    return Tracked(folder.path, run.run, lines, tuple(run.history)) if folder else None


def _rounds(run: Run, at: Checkpoint, trackers: Trackers) -> Checkpoint:
    plan, folder = run.plan, run.folder
    while not is_over(plan, at):
        at = one_round(run, at)
        if folder:
            for store in (folder.memories, folder.updates, folder.found):
                store.settle(at.replied)
            folder.save(at)
        run.history.append(at.line)
        trackers.write(at.line)
        run.watch.round(at.line)
    return at


def _table(run: Run, at: Checkpoint, rows: Rows) -> dict[str, Any]:
    last = scored(run.history, run.plan.keep_best, at.best)
    return {
        "rounds": at.state.round,
        "clients": len(run.engine.population()),
        "rows": {name: dict(metrics) for name, metrics in rows.items() if name != EACH_ALONE},
        **{name: rows[name] for name in (EACH_ALONE,) if name in rows},
        "last": {k: v for k, v in last.items() if "/" in k},
        "best_round": at.best.round if run.plan.keep_best else None,
        **(_added_up(run.history) if not run.plan.privacy.secret else {}),
        **{k: last[k] for k in ("epsilon", "epsilon_rdp", "clip") if k in last},
    }


def _added_up(history: Sequence[Line]) -> dict[str, Any]:
    """Return the traffic and the time of all rounds."""

    def total(name: str) -> Any:
        return sum(line.get(name, 0) for line in history)

    ways = ("up_bytes", "down_bytes", "eval_bytes", "up_head_bytes", "down_head_bytes")
    times = {"seconds": round(total("seconds"), 1)}
    times["server_seconds"] = round(total("server_seconds"), 3)
    return {**{name: total(name) for name in ways}, **times}


def _finished(plan: Plan, folder: RunFolder) -> Result:
    from fedpeft.export import read_tensors

    table, tensors = folder.result(), read_tensors(folder.path / "adapter")
    return Result(plan, table, folder.history(), tensors, folder.path)
