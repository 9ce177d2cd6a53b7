"""The sides of the engine benchmark, each run by processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.addresses import free_port
from fedpeft.flower.environment import quiet
from simulations.benchmarks import _processes

ROOT = Path(__file__).parents[2]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
WORKERS = 2
"""Flower's, with a thread each."""
PEFT, FLOWER, FLOWERTUNE = "peft", "flower", "flowertune"
ALL = (
    "inline(group=1)",
    "inline(group=16)",
    'inline(group="auto")',
    "processes(workers=2, group=8)",
    "peft/bfloat16",
    'inline(group="auto")/bfloat16',
    FLOWER,
    FLOWERTUNE,
)
SCALING = (
    *(f"inline(group={n})" for n in (1, 2, 4, 8, 16, 32, 64)),
    *(f"processes(workers={n}, group=8)" for n in (1, 2)),
)
_PEER = Path(__file__).parent / "_flower_peer"


@dataclass(frozen=True, slots=True)
class Side:
    """``name`` is ``peft``, ``flower``, ``flowertune`` or the spec of an engine of fedpeft."""

    name: str
    precision: str = "float32"

    def __str__(self) -> str:
        return self.name if self.precision == "float32" else f"{self.name}/{self.precision}"

    @property
    def by_flower(self) -> bool:
        """Flower's sides start their own processes, and are run once."""
        return self.name in (FLOWER, FLOWERTUNE)


def sides(text: str) -> list[Side]:
    """Read a list such as ``peft,inline(group=16)/bfloat16``; ``all`` and ``scaling`` are lists."""
    found = []
    for word in re.split(r",(?![^(]*\))", text):
        for given in {"all": ALL, "scaling": SCALING}.get(word.strip(), (word.strip(),)):
            name, _, precision = given.partition("/")
            found.append(Side(name, precision or "float32"))
    return list(dict.fromkeys(found))


def prepare(folder: Path, lines: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Write the first adapter to ``folder``; return the workload's arithmetic and the peak."""
    request = {"kind": "prepare", "lines": lines, "tiny": str(folder) in str(lines["model"])}
    found, _ = _here(folder / "prepare", request, folder, device)
    return found


def measure(
    folder: Path, side: Side, lines: Mapping[str, Any], device: str, compared: Sequence[int]
) -> tuple[dict[str, Any], Path]:
    """Run a side once; return its times and memory, and where its adapters are."""
    given: dict[str, Any] = {"lines": dict(lines)}
    given |= {"side": side.name, "precision": side.precision, "compared": compared}
    own = folder / re.sub(r"\W+", "-", str(side))
    shutil.rmtree(own, ignore_errors=True)
    if side.by_flower:
        found, ran = _flower(own, given, folder, device, cached=side.name == FLOWER)
    else:
        if side.name != PEFT and side.precision != "float32":
            given["lines"] = {**lines, "precision": side.precision}
        kind = "peft" if side.name == PEFT else "engine"
        found, ran = _here(own, {"kind": kind, **given}, folder, device)
    return {**found, "whole": ran.seconds, "memory": ran.memory}, own


def _here(
    own: Path, request: Mapping[str, Any], folder: Path, device: str
) -> tuple[dict[str, Any], _processes.Ran]:
    path = _ask(own, request, folder, device)
    command = [sys.executable, "-m", "simulations.benchmarks._side", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    return _answer(own, _processes.run(command, env, ROOT, own / "log"))


def _flower(
    own: Path, request: Mapping[str, Any], folder: Path, device: str, cached: bool
) -> tuple[dict[str, Any], _processes.Ran]:
    """Run the app in ``_flower_peer`` by ``flwr run``: Ray, one thread for each of two workers."""
    if not Path("/proc").is_dir():
        raise RuntimeError("Flower's sides need /proc, to end the processes that Flower leaves")
    path = _ask(own, request, folder, device)
    app = shutil.copytree(_PEER, own / "app", ignore=shutil.ignore_patterns("__pycache__"))
    nodes = int(re.findall(r"\d+", str(request["lines"]["cohort"]))[0])
    resources = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={WORKERS}"
    if device != "cpu":
        resources += f" client-resources-num-gpus={1 / WORKERS} init-args-num-gpus=1"
    config = f"request={json.dumps(str(path))} cached={str(cached).lower()}"
    bin = Path(sys.executable).parent
    command = [str(bin / "flwr"), "run", str(app), "--stream"]
    command += ["--federation-config", resources, "--run-config", config]
    ports = [free_port(), free_port()]
    env = quiet(
        FLWR_HOME=str(own / "home"),
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(ports[0]),
        FLWR_LOCAL_CONTROL_API_PORT=str(ports[1]),
        RAY_USAGE_STATS_ENABLED="0",
        PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
    )
    return _answer(own, _processes.run(command, env, own, own / "log"))


def _ask(own: Path, request: Mapping[str, Any], folder: Path, device: str) -> Path:
    own.mkdir(parents=True)
    path = own / "request.json"
    more = {"device": device, "initial": str(folder / "initial.npz")}
    path.write_text(json.dumps({**request, **more}), encoding="utf-8")
    return path


def _answer(own: Path, ran: _processes.Ran) -> tuple[dict[str, Any], _processes.Ran]:
    path = own / "answer.json"
    if not path.exists():
        words = (own / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{own.name} ended without a result:\n{words}")
    return json.loads(path.read_text(encoding="utf-8")), ran
