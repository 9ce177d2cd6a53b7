"""Flower ClientApp: a message in, one client's round or evaluation, a message out.

Flower starts a process for every message, so this one does as little as it can: the warm trainer
(``fedpeft/warm``) does the work where one runs, and what that takes is imported only where none
does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.faults import fault
from fedpeft.flower.messages import (
    addressee,
    answer,
    hello_record,
    log,
    metrics_record,
    packet_record,
    read_packet,
)
from fedpeft.warm.channel import Gone, Keeping, Place, Warm

if TYPE_CHECKING:
    from fedpeft.node import Node

app = ClientApp()

_T = TypeVar("_T")
_here: list[Node] = []  # at most one, where no warm trainer runs


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which clients this node plays."""

    def make() -> RecordDict:
        return hello_record(_done(lambda trainer: trainer.hello(_place(context))))

    return answer(message, make)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Play one round."""

    def make() -> RecordDict:
        place, client = _place(context), addressee(message.content)
        packet = read_packet(message.content)
        reply = _done(lambda trainer: trainer.train(place, client, packet))
        fault("reply.unsent")
        return packet_record(reply)

    return answer(message, make)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the held-out records; without any, reply with nothing."""

    def make() -> RecordDict:
        place, client = _place(context), addressee(message.content)
        packet = read_packet(message.content)
        return metrics_record(_done(lambda trainer: trainer.evaluate(place, client, packet)))

    return answer(message, make)


@app.query("keep")
def keep(message: Message, context: Context) -> Message:
    """Keep the run's result at the site; tell of its gain only what the site lets leave."""

    def make() -> RecordDict:
        place, client = _place(context), addressee(message.content)
        packet = read_packet(message.content)
        told = _done(lambda trainer: trainer.keep(place, client, packet))
        fault("reply.unsent")
        return metrics_record(told)

    return answer(message, make)


def forget() -> None:
    """Give back all that is not on disk, as the end of this process would."""
    while _here:
        _here.pop().unload()


def _place(context: Context) -> Place:
    return Place(dict(context.run_config), dict(context.node_config))


def _done(work: Callable[[Keeping], _T]) -> _T:
    """Return what the warm trainer makes of it, or this process where none runs."""
    try:
        return work(Warm())
    except Gone as why:
        if why.broken:
            log.warning("%s; this process goes on without it", why)
    if not _here:
        from fedpeft.node import Node

        _here.append(Node())
    return work(_here[0])
