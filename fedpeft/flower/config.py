"""A plan as the flat run-config of a Flower app, and back. Nothing here imports flwr.

Every line of a plan is one key; an empty string stands for a line that the plan does not have. The
other keys say how to run it (:class:`Settings`) and change no result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedpeft import turns
from fedpeft.data import _files
from fedpeft.errors import FedPeftError, ModelError, PlanError, SpecError
from fedpeft.models._locate import locate
from fedpeft.plan import PARTS, Plan, check_real
from fedpeft.spec import describe
from fedpeft.types import Carrying, Scalar

LINES = (*(field.name for field in fields(Plan)), "preset")
"""Every key of the run-config that belongs to the plan."""
_SIZES = (*range(1, 300), 10**3, 10**4, 10**6)
"""Numbers of records for which work is compared."""
_RUN = re.compile(r"[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a plan is run on Flower; part of no result.

    ``threads`` are torch's in each process, ``device`` is torch's. ``out`` is the run folder, by
    default ``$FEDPEFT_HOME/runs/<run id>``, which ``resume`` takes up again. ``wait`` is how many
    seconds the server waits for the plan's clients, ``deadline`` how many a client has for a round;
    0 waits as long as Flower keeps the message. ``every`` waits for those whose nodes are gone and
    asks them again, so that a run ends alike whoever was killed on the way. ``run`` is the run's
    own name, kept through every start: nodes take messages of no other. ``signer`` and
    ``signature`` say which owner submits it (``deployment/signing.py``), for sites that ask.
    """

    threads: int = 1
    device: str = "cpu"
    out: str = ""
    resume: bool = False
    wait: float = 120.0
    deadline: float = 0.0
    every: bool = False
    run: str = ""
    signer: str = ""
    signature: str = ""

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                problems.append(f"{field.name}: {value!r} must be a {kind.__name__}")
            elif kind in (int, float) and value < (kind is int):
                problems.append(f"{field.name}: {value} must be at least {int(kind is int)}")
        if isinstance(self.run, str) and self.run and not is_run(self.run):
            problems.append(f"run: {self.run[:80]!r} must be at most 64 letters, digits and -")
        if problems:
            raise PlanError(*problems)


def is_run(name: str) -> bool:
    """Tell whether a run can have this name, which becomes that of folders at nodes."""
    return _RUN.fullmatch(name) is not None


def read_config(config: Mapping[str, Scalar]) -> tuple[Plan, Settings]:
    """Read a run-config. Raises ``PlanError`` listing every problem with the plan's lines."""
    known = {field.name for field in fields(Settings)}
    settings = Settings(**{k: v for k, v in config.items() if k in known})  # type: ignore[arg-type]
    lines = {k: v for k, v in config.items() if k not in known and v != ""}
    plan = Plan.from_lines(lines)
    check_real(plan)
    return plan, settings


def check_settings(plan: Plan, settings: Settings) -> None:
    """Raise ``PlanError`` for what real machines would make of a promise that counts turns.

    It assumes of when replies come that this depends on nobody's records.
    """
    if turns.allowed(plan) is None:
        return
    if settings.every:
        raise PlanError(
            "every=true asks a client anew whose app broke down, so its reply comes later, and "
            "with privacy: user(participations=...) when one comes must not depend on its records; "
            "set every=false"
        )
    if len({plan.trainer.budget(records)[0] for records in _SIZES}) > 1:
        raise PlanError(
            f"trainer: {describe(plan.trainer)} takes more steps where a client has more records, "
            "so its reply comes later, and with privacy: user(participations=...) when one comes "
            "must not depend on its records; say steps=..."
        )


def run_config(plan: Plan, *, rooted: bool = True) -> dict[str, Scalar]:
    """Return every plan key; relative paths of files and folders that exist here become absolute.

    Flower's processes work in the directory in which their SuperLink or SuperNode was started.
    Where they are not ``rooted`` paths stay as they are written: they are another machine's.
    Raises ``PlanError`` for what only a simulation can do.
    """
    check_real(plan)
    lines: dict[str, Any] = plan.lines()
    lines["model"] = _model(plan.model) if rooted else plan.model
    parts = {line: _carried(getattr(plan, line)) for line in PARTS}
    parts = {line: _rooted(part) for line, part in parts.items()} if rooted else parts
    lines |= {line: describe(part, full=True) for line, part in parts.items()}
    if rooted and plan.warm_start and Path(plan.warm_start).exists():
        lines["warm_start"] = str(Path(plan.warm_start).absolute())
    for name in (f.name for f in fields(Plan) if f.default not in (None, "", MISSING)):
        if getattr(plan, name) in (None, ""):  # an empty key would bring the default back
            lines[name] = "none"
    return {name: lines.get(name, "") for name in LINES}


def as_toml(plan: Plan) -> str:
    """Return :func:`run_config` as a TOML file for ``flwr run . --run-config FILE``."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in run_config(plan).items())


def home() -> Path:
    """Return where Flower's processes keep runs and clients' memory: ``$FEDPEFT_HOME``."""
    return Path(os.environ.get("FEDPEFT_HOME") or "~/.fedpeft").expanduser().absolute()


def _toml(value: Scalar) -> str:
    if isinstance(value, str):  # a JSON string is a TOML string, but for one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _model(model: str) -> str:
    try:
        location = locate(model)
    except ModelError:
        return model
    given = location.folder is not None and location.origin == model
    return str(location.folder) if given else model


def _carried(part: Any) -> Any:
    """Return ``part`` with what its files hold, where it can carry that."""
    return part.carried() if isinstance(part, Carrying) else part


def _rooted(part: Any) -> Any:
    """Return ``part`` with absolute paths; what only looks like a path is left as it is."""
    if hasattr(part, "stages"):
        return part
    texts = {f.name: v for f in fields(part) if isinstance(v := getattr(part, f.name), str)}
    found = {name: _paths(text) for name, text in texts.items()}
    changed = {name: text for name, text in found.items() if text != texts[name]}
    try:
        return replace(part, **changed) if changed else part
    except SpecError:
        return part


def _paths(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not all(Path(name).suffix or "/" in name for name in names):
        return text
    for find in (_files.find, _files.find_folder):
        with contextlib.suppress(FedPeftError):
            return ",".join(str(find(name).absolute()) for name in names)
    return text
