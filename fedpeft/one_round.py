"""One round of a run: asks, aggregates, evaluates and says what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedpeft import events, hiding, turns
from fedpeft.attendance import Attendance
from fedpeft.broadcasts import Bodies, messages
from fedpeft.checkpoint import Checkpoint
from fedpeft.conversion import Conversion
from fedpeft.course import Course, in_order
from fedpeft.diagnostics import Participation, label_bias, weighted
from fedpeft.engine._base import Engine
from fedpeft.errors import RunError
from fedpeft.evaluation import Best, evaluated_clients, reported
from fedpeft.memory import InProcess, MemoryStore
from fedpeft.phases import Reply
from fedpeft.plan import Plan
from fedpeft.post import Post
from fedpeft.releases import asker, chooser, is_guarded, published, spent
from fedpeft.rounds import Report, server_round
from fedpeft.run_folder import RunFolder
from fedpeft.site import Site
from fedpeft.state import ServerState
from fedpeft.traffic import WHOLE, Traffic, told
from fedpeft.types import Converting, Flight, Tensors, Weights
from fedpeft.watching import Line, Watch
from fedpeft.weighing import weighed
from fedpeft.wire import Message


@dataclass
class Run:
    """A run under way; ``driver.drive`` builds one.

    ``updates`` are the last ones of the clients, ``found`` is what was found out about them, for
    weightings and schedules that ask for it.
    """

    plan: Plan
    site: Site
    engine: Engine
    folder: RunFolder | None
    watch: Watch
    run: str
    attendance: Attendance
    post: Post
    updates: MemoryStore = field(default_factory=InProcess)
    found: MemoryStore = field(default_factory=InProcess)
    history: list[Line] = field(default_factory=list)

    @cached_property
    def participation(self) -> Participation:
        """Who has taken part so far, as the lines of the rounds say."""
        return Participation(self.history)

    def course(self, at: Checkpoint, reachable: Sequence[str], sent: Traffic) -> Course:
        """Return the next round before anybody is asked; what is sent is counted."""
        bodies: Bodies = {}

        def send(flights: Sequence[Flight]) -> None:
            requests = self.messages(at.state, [f.client for f in flights], bodies=bodies)
            for flight, (_, message) in zip(flights, sent.counted(requests), strict=True):
                self.post.send(flight, message)

        plan, stands = self.plan, events.begin(at.state.round, self.post.clock, at.flying)
        choose = chooser(plan, at.state, list(self.engine.population()))
        draw = asker(plan, at.state)
        return Course(plan.schedule, choose, self.post, send, reachable, draw, stands)

    def resend(self, at: Checkpoint) -> None:
        """Ask those anew whose replies were waited for when the run was interrupted."""
        bodies: dict[int, Bodies] = {flight.version: {} for flight in at.flying}
        for flight in at.flying:
            state, known = at.state.at(flight.version), bodies[flight.version]
            ((_, message),) = self.messages(state, [flight.client], bodies=known)
            self.post.send(flight, message)

    def messages(
        self,
        state: ServerState,
        clients: Iterable[str],
        *,
        training: bool = True,
        bodies: Bodies | None = None,
    ) -> Iterator[tuple[str, Message]]:
        """Yield what each client is sent."""
        plan, tables, remote = self.plan, self.site.tables, self.engine.remote
        how = {"remote": remote, "training": training}
        return messages(plan, tables, state, self.run, clients, bodies=bodies, **how)


def one_round(run: Run, at: Checkpoint) -> Checkpoint:
    """Play the next round; return how the run stands after it. Raises ``RunError``."""
    began, plan, state, sent = time.perf_counter(), run.plan, at.state, Traffic()
    reachable = run.post.reachable(_able(run, at))
    course = run.course(at, turns.left(plan, at.turns, reachable), sent)
    course.ask()
    weights = _weights(run, state, course)

    def ask(requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        asked = list(sent.counted(requests))
        clients, tell = [client for client, _ in asked], run.watch.client
        answers = in_order(run.post.exchange(asked), clients, lambda done: tell(done, len(clients)))
        return sent.waiting(answers)

    answers, population = course.replies([*weights.of], run.watch.client), run.engine.population()
    works = population if plan.privacy.unit is None else run.site.federation.counted
    conversion = Conversion(plan, run.site.learner.device, run.found, state.round, works)
    how = run.run, works, weights, sent.waiting(answers), ask, course.versions, run.updates
    after, report = server_round(plan, run.site.tables, state, *how, conversion.aged)
    after = replace(after, past=_past(state, course.stands.flying))
    if report.refused and not report.replied and report.up.of:
        client, reason = next(iter(report.refused.items()))
        problem = f"round {state.round}: no reply could be used; {client}: {reason}"
        if not is_guarded(plan):
            raise RunError(problem)
        run.watch.warn(problem)  # to stop here would tell of clients: what is released is noise
    line = _line(run, course, report, sent)
    line |= spent(plan, len(population), state)
    if plan.privacy.hides:
        line |= hiding.spent(plan, run.site.federation.counted, state.round + 1)
    line |= {"reachable": len(reachable), "participants": len(after.acks)}
    line |= {"converted": conversion.count} if isinstance(plan.schedule, Converting) else {}
    line["server_seconds"] = round(time.perf_counter() - began - sent.waited, 3)
    line |= _evaluate(run, after)
    best, params = _best(plan, at, after, line)
    line["seconds"] = round(time.perf_counter() - began, 3)
    flying, replied = course.stands.flying, report.replied
    asked = turns.after(plan, at.turns, course.stands.asked)
    over = turns.exhausted(plan, asked, flying, list(population))
    told = course.told(population) if run.engine.remote and not plan.privacy.secret else {}
    stands = run.post.clock, flying, asked, over, replied, told
    found = Checkpoint(after, best, params, line, *stands)
    found = _ended(found) if is_over(plan, found) else found
    return replace(found, line=published(plan, found.line))


def _able(run: Run, at: Checkpoint) -> Sequence[str]:
    """Return those of whom this round may still have a reply: asked anew, or at work already."""
    there = run.attendance.reachable(at.state.round)
    able = {*turns.left(run.plan, at.turns, there), *(flight.client for flight in at.flying)}
    return [client for client in there if client in able]


def is_over(plan: Plan, at: Checkpoint) -> bool:
    """Tell whether a run plays no further round."""
    impatient = plan.patience is not None and at.best.stale >= plan.patience
    return impatient or bool(at.over) or at.state.round >= plan.rounds


def _weights(run: Run, state: ServerState, course: Course) -> Weights:
    """Return the weights of all whose replies may be used; before the first of them."""
    population = run.engine.population()
    return weighed(
        run.plan,
        state,
        run.plan.schedule.weighed(course.stands, list(population)),
        population,
        rates={} if run.engine.remote else run.attendance.participation,
        expected=None if is_guarded(run.plan) else run.attendance.expected,
        awaited=course.stands.awaited,
    )


def _best(plan: Plan, at: Checkpoint, after: ServerState, line: Line) -> tuple[Best, Tensors]:
    """Return the best round so far and its adapter, where the plan keeps one."""
    best, params = at.best, at.best_params
    if plan.keep_best and plan.keep_best in line:
        best = best.after(at.state.round, float(line[plan.keep_best]), plan.keep_best)
        params = after.tensors if best.round == at.state.round else params
    elif plan.keep_best and after.round % plan.eval_every == 0:
        measured = ", ".join(k for k in line if "/" in k) or "nothing"
        raise RunError(f"keep_best: no metric {plan.keep_best!r} was measured; there is {measured}")
    return best, params


def _ended(at: Checkpoint) -> Checkpoint:
    """Return the end of a run, which waits for no reply."""
    late = {flight.client: "the run was over before its reply" for flight in at.flying}
    line = {**at.line, "refused": {**at.line.get("refused", {}), **late}} if late else at.line
    return replace(at, state=replace(at.state, past={}), line=line, flying=())


def _timing(run: Run, course: Course, report: Report) -> dict[str, Any]:
    """Return what time it is, how stale updates were and what came when nobody waited for it."""
    line: dict[str, Any] = {}
    if run.plan.schedule.overlaps:
        version = course.stands.version
        stale = Counter(version - course.versions[client] for client in report.replied)
        line["staleness"] = {str(age): stale[age] for age in sorted(stale)}
    if run.plan.latency.timed:
        line["clock"] = round(run.post.clock, 3)
    return line | ({"strays": strays} if (strays := run.post.strays()) else {})


def _past(state: ServerState, flying: Iterable[Flight]) -> Mapping[int, Tensors]:
    """Return the versions with which clients are still at work."""
    return {at: state.at(at).params for at in sorted({flight.version for flight in flying})}


def _line(run: Run, course: Course, report: Report, sent: Traffic) -> dict[str, Any]:
    """Return what the ledger says of what was sent, what came and what it weighs."""
    population, replied = run.engine.population(), report.replied
    line: dict[str, Any] = {"round": course.stands.version, "asked": len(course.stands.asked)}
    line |= {"replied": list(replied), **report.metrics, **told(sent.sent, report.up)}
    line |= {"refused": dict(report.refused)} if report.refused else {}
    line |= {**weighted(report.weights, replied), **report.spread}
    line |= run.participation.after(replied, population)
    line |= label_bias(run.attendance.crowd, population, replied, report.weights)
    return line | _timing(run, course, report)


def _evaluate(run: Run, state: ServerState) -> dict[str, Any]:
    plan, site = run.plan, run.site
    if state.round % plan.eval_every and state.round != plan.rounds:
        return {}
    line: dict[str, Any] = {}
    if "test" in plan.evaluations and (examples := site.test()):
        (metrics,) = site.learner.evaluate([{**site.initial, **state.tensors}], [examples])
        line |= {f"test/{k}": v for k, v in metrics.items() if math.isfinite(v)}
    if "clients" in plan.evaluations and plan.holdout:
        line |= _evaluate_clients(run, state)
    return line


def _evaluate_clients(run: Run, state: ServerState) -> dict[str, Any]:
    sent = Traffic()
    asked = evaluated_clients(run.plan, list(run.engine.population()))
    requests = sent.counted(run.messages(state, asked, training=False))
    line = reported(run.plan, run.engine.evaluate(requests))
    return line | {"eval_bytes": sent.sent.all()[WHOLE]}
