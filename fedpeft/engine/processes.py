"""Clients in several processes of this machine, which share the base's weights in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.engine._base import Engine, Stage
from fedpeft.engine._dispatch import Died, Dispatch, Event, Window, event_of, requests_of
from fedpeft.engine._grouped import Grouped
from fedpeft.memory import MemoryStore, OnDisk
from fedpeft.spec import bounded, method
from fedpeft.wire import Body

if TYPE_CHECKING:
    from fedpeft.engine._block import Block, Map
    from fedpeft.engine._parcel import Parcel
    from fedpeft.engine._worker import Frame

_PATIENCE = 5.0
"""Seconds that a process has to end by itself, once it has closed its pipe."""


@method
class Processes(Grouped):
    """``workers`` resident processes, each with ``threads`` of torch; see :class:`Grouped`.

    By default each has the command line's ``--threads``, else the processor's cores are dealt to
    the workers. On ``cuda`` the workers are dealt to the GPUs, and each has the base there; all
    take the one that is named, as in ``cuda:1``.
    """

    workers: int = bounded(default=2, low=1)
    threads: int | None = bounded(default=None, low=1)

    def made_with(self) -> dict[str, int | str]:
        """Return what decides the last bits of a run beside its plan."""
        found = {**super().made_with(), "threads": self._threads()}
        return found | ({} if self.group == 1 else {"workers": self.workers})

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Start the workers; they end with the context, or with this process."""
        from fedpeft.engine._block import Block
        from fedpeft.engine._player import Player
        from fedpeft.engine._worker import Setup

        threads = self._threads()
        with ExitStack() as stack:
            memories: MemoryStore = stage.memories
            if not isinstance(memories, OnDisk):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedpeft-"))
                memories = OnDisk(Path(folder), deferred=True)
            grouping = self.grouping(stage, threads, self.workers)
            keep = partial(self.keep, stage)
            player = Player(stage.site, memories, grouping, stage.warn, keep=keep)
            setup = Setup.of(stage.site, player.grouping, threads)
            block = stack.enter_context(closing(Block(setup)))
            base = stage.site.base
            imports = [__name__, *(type(x).__module__ for x in (setup, base.model, base.tokenizer))]
            crew = _Crew(block, memories, stage.device, self.workers, imports)
            stack.callback(crew.close)
            crew.start()
            yield Dispatch(stage, player, crew)

    def _threads(self) -> int:
        from fedpeft.engine._worker import cores

        return self.threads or max(1, cores() // self.workers)


class _Crew:
    """See ``_dispatch.Crew``; a worker and its parent talk over one pipe each."""

    def __init__(
        self, block: Block, memories: MemoryStore, device: str, size: int, imports: list[str]
    ) -> None:
        self._block, self._memories, self._device, self.size = block, memories, device, size
        self._imports = imports
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._bodies: dict[int, Body] = {}
        self._begun: set[int] = set()

    def start(self) -> None:
        """Start all workers."""
        for number in range(self.size):
            self._start(number)

    def hand(self, number: int, window: Window, width: int) -> None:
        """Send a window, and the broadcast if it is new to the worker."""
        new = self._bodies.get(number) is not window.body
        told = {**window.told(width), "body": new}
        try:
            self._pipes[number].send_bytes(json.dumps(told).encode())
            if new:
                self._pipes[number].send_bytes(b"".join(window.body.pieces))
            self._bodies[number] = window.body
        except OSError:
            pass  # it has died, which reading will find

    def next(self) -> tuple[int, Event]:
        """Read one frame of the worker that has waited longest among those with one."""
        told_by = wait(list(self._pipes.values()))[0]
        number = next(number for number, pipe in self._pipes.items() if pipe is told_by)
        self._pipes[number] = self._pipes.pop(number)  # the others come first now
        try:
            told = json.loads(self._pipes[number].recv_bytes())
            body = self._pipes[number].recv_bytes() if told["kind"] == "reply" else None
        except (EOFError, OSError):
            return number, Died(self._ended(number))
        self._begun.add(number)
        return number, event_of(told, body)

    def restart(self, number: int) -> None:
        """Start another worker in the place of a dead one."""
        self._start(number)

    def close(self) -> None:
        """End the workers. They hold nothing: what they save is replaced as a whole."""
        for number, process in self._processes.items():
            self._pipes[number].close()
            process.kill()
        for process in self._processes.values():
            process.join()
            process.close()

    def _start(self, number: int) -> None:
        forked = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(self._imports)
        ours, theirs = context.Pipe()
        place, block = _place(self._device, number), self._block
        process = context.Process(
            target=_main,
            args=(theirs, block.handed_on(), block.map, block.parcel, self._memories, place),
            daemon=True,
            name=f"fedpeft-worker-{number}",
        )
        with closing(theirs), undisturbed():
            process.start()
        self._pipes[number], self._processes[number] = ours, process
        self._bodies.pop(number, None)

    def _ended(self, number: int) -> str:
        """Return what ended a worker that has closed its pipe."""
        process = self._processes.pop(number)
        self._pipes.pop(number).close()
        process.join(_PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        if code == 1 and number not in self._begun:
            return "exit status 1; a script has to call under `if __name__ == '__main__':`"
        return _cause(code)


def _main(
    pipe: Connection,
    descriptor: int,
    places: Map,
    parcel: Parcel,
    memories: MemoryStore,
    device: str,
) -> None:
    """Serve one parent until it closes the pipe."""
    from fedpeft.engine._worker import Worker, broken, end_with_parent, ready

    end_with_parent()
    try:
        try:
            setup = parcel.open(places.open(descriptor))
            worker = Worker(setup, memories, device, lambda frame: _tell(pipe, frame))
        except Exception as error:
            _tell(pipe, broken(error))
            return
        _tell(pipe, ready())
        body = Body([], [])
        while True:
            told = json.loads(pipe.recv_bytes())
            if told["body"]:
                body = Body([], [memoryview(pipe.recv_bytes())])
            for frame in worker.play(told["what"], requests_of(told, body), told["width"]):
                _tell(pipe, frame)
    except (EOFError, ConnectionError):
        return


def _tell(pipe: Connection, frame: Frame) -> None:
    told, body = frame
    pipe.send_bytes(json.dumps(told).encode())
    if body is not None:
        pipe.send_bytes(b"".join(body.pieces))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Have processes that start meanwhile see no Ctrl-C, and wait for each other but briefly."""
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    mask = getattr(signal, "pthread_sigmask", None)
    held = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else None
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("GOMP_SPINCOUNT")
        if mask:
            mask(signal.SIG_SETMASK, held)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


def _place(device: str, number: int) -> str:
    """Return where a worker trains: on the GPU that was named, else on one after the other."""
    import torch

    asked = torch.device(device)
    if asked.type != "cuda" or asked.index is not None:
        return device
    return f"cuda:{number % max(1, torch.cuda.device_count())}"
