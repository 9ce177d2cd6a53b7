"""Clients that send random directions instead of updates, and what they see of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedpeft.engine._base import Engine, Stage
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.tables import Tables
from fedpeft.tensors import narrowed, norm, size
from fedpeft.types import Scalar, Shapes, Simulation, Tensors
from fedpeft.wire import Message, body, peek
from simulations._study.around import Around, Replies, Requests

Vector = NDArray[np.float32]


@dataclass
class Sphere:
    """Directions in the space of all that travels up in some round: unit vectors, by their names.

    What comes next is their seed's, not the run's.
    """

    shapes: Shapes
    seed: int

    @property
    def dimensions(self) -> int:
        """How many coordinates it has."""
        return size(self.shapes.values())

    def vector(self, name: str) -> Vector:
        """Return the direction of ``name``."""
        found = derive(self.seed, "canary", name).standard_normal(self.dimensions, np.float32)
        unit: Vector = found / np.linalg.norm(found)
        return unit

    def tensors(self, vector: Vector) -> Tensors:
        """Return a vector as named tensors."""
        found, at = dict[str, Vector](), 0
        for name, shape in self.shapes.items():
            count = size([shape])
            found[name] = vector[at : at + count].reshape(shape)
            at += count
        return found

    def cosines(self, moved: Tensors, names: Iterable[str]) -> list[float]:
        """Return the cosine of each name's direction with how the model moved."""
        flat = np.concatenate([moved[k].reshape(-1) for k in self.shapes]).astype(np.float64)
        flat /= float(np.linalg.norm(flat)) or 1.0
        return [float(self.vector(name) @ flat) for name in names]


def travelling(plan: Plan, tables: Tables) -> Shapes:
    """Return what of the adapter travels up in some round."""
    names = frozenset[str]().union(*(tables.up(t)["adapter"] for t in range(plan.rounds)))
    return {name: shape for name, shape in tables.shapes.items() if name in names}


@dataclass
class Aviary(Simulation):
    """An engine some of whose clients are canaries; everything else of a run is as ever.

    ``count`` of the plan's clients are drawn for it. They are asked as often as the others, and
    whatever they are sent answer with their direction, as long as the clip. ``iterates`` are the
    models that they were sent, one for each round in which anybody was asked.
    """

    plan: Plan
    inner: Simulation
    count: int
    seed: int = 0
    population: Sequence[str] = ()
    names: Sequence[str] = ()
    iterates: list[Tensors] = field(default_factory=list)

    def made_with(self) -> Mapping[str, int | str]:
        """Return what the engine within does."""
        return self.inner.made_with()

    def check_device(self, device: str) -> None:
        """Ask the engine within."""
        self.inner.check_device(device)

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Start the engine within, and draw who is a canary."""
        self.population = list(stage.site.federation.population)
        drawn = derive(self.seed, "canaries").permutation(len(self.population))[: self.count]
        self.names = [self.population[i] for i in sorted(drawn.tolist())]
        self.tables = stage.site.tables
        self.sphere = Sphere(travelling(self.plan, self.tables), self.seed)
        self.iterates.append({k: stage.site.initial[k] for k in self.sphere.shapes})
        with self.inner.start(stage) as engine:
            yield Around(engine, self._exchange)

    def see(self, messages: Iterable[tuple[str, Message]]) -> None:
        """Take down the model of a round; where clients have less of it, what any of them has."""
        at = {k: v.copy() for k, v in self.iterates[-1].items()}
        seen = set[int]()
        for client, message in messages:
            if id(message.body) in seen:
                continue
            seen.add(id(message.body))
            round = int(peek(message)["round"])
            came = self.tables.of(client, round).decode(message, round).adapter
            for name in at.keys() & came.keys():
                at[name][tuple(map(slice, came[name].shape))] = came[name]
        if seen:
            self.iterates.append(at)

    def reply(self, client: str, message: Message) -> Message:
        """Return a canary's answer to a broadcast."""
        told = peek(message)
        round = int(told["round"])
        own = self.tables.of(client, round)
        up = own.up(round)
        delta = narrowed(self.sphere.tensors(self.sphere.vector(client)), up["adapter"])
        scale = np.float32(float(told["clip"]) / norm(delta))
        rng = derive(self.plan.seed, round, client, "uplink")
        sections = own.uplink.encode({k: scale * v for k, v in delta.items()}, rng)
        said: dict[str, Scalar] = {"run": told.get("run", ""), "round": round, "inside": 1}
        said |= {"steps": 1, "seen": 1, "lr_sum": 1.0, "loss": 1.0}
        return body(sections, own.uplink.expected(up)).seal(said)

    def _exchange(self, engine: Engine, requests: Requests) -> Replies:
        """Have canaries answer at once, and the others play their round."""
        asked, names = list(requests), {*self.names}
        self.see(asked)
        others = [(client, message) for client, message in asked if client not in names]
        for client, message in asked:
            if client in names:
                yield client, self.reply(client, message)
        if others:
            yield from engine.exchange(others)
