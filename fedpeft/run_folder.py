"""What a run leaves behind, and how an interrupted one is taken up again.

::

    run.json         id, digest and lines of the plan: the mark of a started run
    plan.yaml        the resolved plan, to be read and run again
    rounds.jsonl     one line per round
    course.jsonl     of machines that come and go: who was there, and what came when
    checkpoints/     the server's state, the newest two; the newest alone where it holds secrets
    memory/          what clients keep (control variates, private heads), what they have spent
    updates/         the last update of each client, where the weighting counts them
    found/           what the schedule has found out about each client, to convert its updates
    adapter/         the result, as other tools load it
    compare.json     what the final table sets beside it, entry by entry
    outgoing.*       with sites that have records of their own: the result as it is sent to them
    kept.json        which of them keep it
    result.json      the final table: the mark of a finished run
    events.*         TensorBoard
    versions.json    what the run was made with
    grouping.json    which clients share a pass, where that was measured
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from fedpeft.checkpoint import KEPT, Checkpoint, drop_old, load_checkpoint, save_checkpoint
from fedpeft.durable import acquire, append_line, replace_file
from fedpeft.errors import RunError
from fedpeft.json_lines import mapping, read_lines
from fedpeft.memory import OnDisk
from fedpeft.plan import Plan

_VERSIONED = ("fedpeft", "torch", "transformers", "peft", "numpy", "flwr", "dp-accounting")
_BEGUN = ("plan.yaml", "versions.json", "run.json")
_STARTING = {".lock", *_BEGUN, *(f".{name}.new" for name in _BEGUN)}


class RunFolder:
    """One run's folder, locked while open. Use it as a context manager.

    ``run`` is the name that the run was given; without, one is made up when it begins.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        inputs: tuple[str, ...],
        *,
        resume: bool,
        run: str = "",
        made_with: Mapping[str, int | str] | None = None,
    ) -> None:
        self.path, self.plan, self._named = path, plan, run
        self._made_with = {**versions(), **(made_with or {})}
        self.digest = plan.digest(*inputs)
        if self._foreign():
            raise RunError(f"{path}: not empty and no run of fedpeft; choose another --out")
        self._lock = acquire(self.path, "run")
        try:
            self.run = self._take_up(inputs, resume=resume)
            self.warnings = self._other_versions()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    @property
    def finished(self) -> bool:
        """Whether the final table is written."""
        return (self.path / "result.json").exists()

    @property
    def memories(self) -> OnDisk:
        """Where clients of this process keep their memory."""
        return OnDisk(self.path / "memory", deferred=True)

    @property
    def updates(self) -> OnDisk:
        """Where the server keeps the last update of each client."""
        return OnDisk(self.path / "updates", deferred=True)

    @property
    def found(self) -> OnDisk:
        """Where the server keeps what the schedule has found out about each client."""
        return OnDisk(self.path / "found", deferred=True)

    def load(self) -> Checkpoint | None:
        """Return the newest checkpoint, with the ledger brought to the same round.

        Raises ``RunError`` where one of them is damaged; nothing is written then.
        """
        found = load_checkpoint(self.path / "checkpoints", self.digest)
        done = found.state.round if found else 0
        lines = self.history()
        if lines and not found:
            raise RunError(
                f"{self.path}/checkpoints: empty, though {len(lines)} rounds were run; restore it "
                "or choose another --out"
            )
        if self._keyed and len(lines) > done:
            raise RunError(
                f"{self.path}/rounds.jsonl: round {done} was released, and what it released cannot "
                "be made again; restore its checkpoint, or choose another --out"
            )
        lines = lines[:done]
        if found and len(lines) == done - 1:
            lines.append(dict(found.line))
        if [line.get("round") for line in lines] != list(range(done)):
            raise RunError(
                f"{self.path}/rounds.jsonl: does not hold the {done} rounds of the checkpoint, "
                "one a line; restore the file or start again in another folder"
            )
        self._bring("rounds.jsonl", lines)
        if (course := self.path / "course.jsonl").exists():
            played = [line for line in read_lines(course) if line.get("round", done) < done]
            self._bring(course.name, played)
        drop_old(self.path / "checkpoints", kept=1 if self._keyed else KEPT)
        return found

    def begin(self, checkpoint: Checkpoint) -> None:
        """Make the state before the first round durable: its coins must not be drawn again."""
        save_checkpoint(self.path / "checkpoints", checkpoint, self.digest)

    def save(self, checkpoint: Checkpoint) -> None:
        """Make a round durable: first the state, which carries the line, then the line.

        Once both are, no way leads back behind the round, and the key of its noise is deleted.
        """
        if checkpoint.course:
            append_line(self.path / "course.jsonl", json.dumps(dict(checkpoint.course)), "ledger")
        save_checkpoint(self.path / "checkpoints", checkpoint, self.digest)
        append_line(self.path / "rounds.jsonl", json.dumps(dict(checkpoint.line)), "ledger")
        if self._keyed:
            drop_old(self.path / "checkpoints", kept=1)

    def history(self) -> list[dict[str, Any]]:
        """Return the whole lines of ``rounds.jsonl``; a last one cut short is left out."""
        return read_lines(self.path / "rounds.jsonl")

    def compared(self) -> dict[str, Any]:
        """Return the comparisons that are done."""
        return self._read("compare.json") or {}

    def write_compared(self, compared: Mapping[str, Any]) -> None:
        """Keep the comparisons done so far."""
        self._write("compare.json", compared, "compare")

    def result(self) -> dict[str, Any]:
        """Return the final table. Raises ``RunError`` where the run has not finished."""
        found = self._read("result.json")
        if found is None:
            raise RunError(f"{self.path}: has not finished; continue with --resume")
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the final table; the run is finished, and nobody needs its secrets."""
        if self.plan.privacy.secret:
            drop_old(self.path / "checkpoints", kept=1)
        self._write("result.json", result, "result")

    @property
    def _keyed(self) -> bool:
        """Whether checkpoints hold the secret key of a round's noise."""
        return self.plan.privacy.secret and self.plan.privacy.bound < math.inf

    def _bring(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Let a file of lines hold just these."""
        path, text = self.path / name, "".join(json.dumps(line) + "\n" for line in lines).encode()
        if (path.read_bytes() if path.exists() else b"") != text:
            replace_file(path, [text], "ledger")

    def _take_up(self, inputs: tuple[str, ...], *, resume: bool) -> str:
        known = self._read("run.json")
        if known is None:
            return self._begin(inputs)
        if missing := {"run", "digest", "inputs", "lines"} - set(known):
            raise RunError(
                f"{self.path}/run.json: lacks {', '.join(sorted(missing))}, so this is no run of "
                "fedpeft; choose another --out"
            )
        if not self._recorded():  # nothing would be lost
            same = known["digest"] == self.digest and self._named in ("", known["run"])
            return str(known["run"]) if same else self._begin(inputs)
        if not resume:
            state = "finished" if self.finished else "begun"
            raise RunError(
                f"{self.path}: holds a {state} run; add --resume, or choose another --out"
            )
        if known["digest"] != self.digest:
            raise RunError(f"{self.path}: {_difference(known, self.plan, inputs)}")
        if self._named not in ("", known["run"]):
            raise RunError(
                f"{self.path}: holds the run {known['run']}, and this one is {self._named}: sites "
                "would take it for another; choose another folder"
            )
        return str(known["run"])

    def _other_versions(self) -> list[str]:
        """Say what differs from where the run began: its bits may differ then, too."""
        then, now = self._read("versions.json") or {}, self._made_with
        return [
            f"the run began with {name} {then[name]}, goes on with {now.get(name)}: "
            "the result may differ in its last bits"
            for name in then
            if then[name] != now.get(name)
        ]

    def _recorded(self) -> bool:
        """Tell whether any round of this run is durable; without one it may begin anew."""
        return any((self.path / "checkpoints").glob("state-*.safetensors")) or bool(self.history())

    def _begin(self, inputs: tuple[str, ...]) -> str:
        lines, run = self.plan.lines(), self._named or uuid.uuid4().hex
        (self.path / "grouping.json").unlink(missing_ok=True)  # of another plan
        text = yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, width=1000)
        replace_file(self.path / "plan.yaml", [text.encode()], "plan")
        self._write("versions.json", self._made_with, "plan")
        about = {"run": run, "digest": self.digest, "inputs": inputs}
        self._write("run.json", {**about, "lines": self.plan.identity()}, "plan")
        return run

    def _foreign(self) -> bool:
        """Tell whether there is something that no run, started or being started, has left."""
        try:
            found = {p.name for p in self.path.iterdir()}
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            return True
        return "run.json" not in found and not found <= _STARTING

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            found = mapping(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found is None:
            raise RunError(f"{path}: damaged; start again in another folder")
        return found

    def _write(self, name: str, content: Mapping[str, Any], kind: str) -> None:
        text = json.dumps(dict(content), indent=1) + "\n"
        replace_file(self.path / name, [text.encode()], kind)


def versions() -> dict[str, str | int]:
    """Return what decides the bits of a run besides its plan."""
    import torch

    found: dict[str, str | int] = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"threads": torch.get_num_threads(), "machine": platform.machine()}


def _difference(known: Mapping[str, Any], plan: Plan, inputs: tuple[str, ...]) -> str:
    then, now = known["lines"], plan.identity()
    changed = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    if changed:
        line = changed[0]
        return (
            f"the plan was changed: {line} was {then.get(line)!r}, is {now.get(line)!r}"
            + (f" (and {', '.join(changed[1:])})" if changed[1:] else "")
            + "; change it back to resume, or choose another --out"
        )
    what = ["data", "model", "warm start"]
    moved = [w for w, a, b in zip(what, known["inputs"], inputs, strict=False) if a != b]
    return (
        f"the {' and '.join(moved) or 'inputs'} changed since the run began; choose another --out"
    )
