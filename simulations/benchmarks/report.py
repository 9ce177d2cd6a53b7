"""A report of a sweep of 500 runs: how long it takes, how large it is, how fast its page answers.

The runs are made up, since 500 real ones take days: folders, ledgers, tables and ``sweep.csv`` are
written by what writes them in a sweep (``run_sweep``, ``RunFolder``, ``durable``), with the rounds,
clients and metrics of a study of privacy. Actions are measured in headless Chromium, from the event
until the page has its new layout.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedpeft.durable import append_line
from fedpeft.errors import TrainError
from fedpeft.plan import Plan
from fedpeft.run_folder import RunFolder
from fedpeft.sweep.running import Here, run_sweep
from fedpeft.sweep.sweep_file import read_sweep
from simulations.benchmarks import _report

ROUNDS, CLIENTS = 50, 20
METHODS = {
    "lora": ({"adapter": "lora(r=8)"}, 0.86),
    "ffa_lora": ({"adapter": "lora(r=8, train='B', init='orthonormal')"}, 0.85),
    "rolora": ({"adapter": "lora(r=8, train='B/A')"}, 0.855),
    "lora_xs": ({"adapter": "core(r=16)"}, 0.83),
    "misspelt": ({"adapter": "lorra(r=8)"}, 0.0),
}
"""Plan lines and the accuracy that is made up; the last one is refused."""
BUDGETS = {"none": math.inf, "8": 8.0, "4": 4.0, "2": 2.0, "1": 1.0}
SIZES = {"raw": 1.0, "half": 0.5, "int8": 0.26, "int4": 0.13, "sign": 0.04}
MANY = {f"randk(density={n / 25:g})": n / 25 for n in range(1, 25)}
"""As many codecs as make about 500 points of one seed each."""
WHOLE = 600_000
"""Bytes of an update as float32."""
BASE = {
    "model": "minilm",
    "task": "classify",
    "data": "embedded(name='support')",
    "partition": "dirichlet(alpha=0.5)",
    "clients": CLIENTS,
    "cohort": "poisson(rate=0.5)",
    "trainer": "plain(optimizer='sgd', lr=0.5, steps=8, batch=8)",
    "weighting": "uniform(denominator='expected')",
    "holdout": 0.1,
    "downlink": "half",
    "rounds": ROUNDS,
}


def measure(quick: bool) -> dict[str, Any]:
    """Return rows for building reports, their size, and each action on their pages."""
    rows: list[dict[str, Any]] = []
    for seeds, sizes in [(1, SIZES)] if quick else [(5, SIZES), (1, MANY)]:
        with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as temporary:
            folder = Path(temporary)
            runs = write_sweep(folder, seeds, sizes)
            began = time.perf_counter()
            command = [sys.executable, "-m", "fedpeft", "report", str(folder / "runs")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
            page = folder / "runs" / "report" / "report.html"
            found: list[dict[str, Any]] = [
                {"what": "fedpeft report", "seconds": round(seconds, 2)},
                {"what": "report.html", "megabytes": round(page.stat().st_size / 1e6, 3)},
            ]
            found += _actions(page, folder / "browser", 3 if quick else 20)
            rows += [{"runs": runs, "points": runs // seeds, **row} for row in found]
    targets = {"seconds": 20.0, "megabytes": 5.0, "milliseconds": 100.0}
    return {"rows": rows, "targets": targets, "load": round(os.getloadavg()[0], 1)}


def write_sweep(folder: Path, seeds: int, sizes: Mapping[str, float]) -> int:
    """Write ``sweep.yaml`` and the runs of a sweep below ``folder``; return how many runs."""
    budgets = {
        name: {"privacy": "none" if value == math.inf else _promise(value)}
        for name, value in BUDGETS.items()
    }
    axes = {
        "method": {name: lines for name, (lines, _) in METHODS.items()},
        "budget": budgets,
        "uplink": list(sizes),
    }
    path = folder / "sweep.yaml"
    exclude = [{"method": "misspelt", "budget": list(BUDGETS)[1:]}]
    content = {"plan": BASE, "axes": axes, "exclude": exclude, "seeds": [*range(seeds)]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    cells = {_key(cell.plan): cell.values for cell in read_sweep(path) if cell.plan}

    def play(plan: Plan, out: Path) -> Mapping[str, Any]:
        return _made_up(plan, out, cells[_key(plan)])

    outcomes = run_sweep(
        read_sweep(path), folder / "runs", Here(play), lambda plan: plan.digest("made up"),
        lambda number, outcome: None,
    )  # fmt: skip
    return len(outcomes)


def _promise(epsilon: float) -> str:
    return f"user(epsilon={epsilon}, clip=0.5, simulate_noise=True)"


def _key(plan: Plan) -> str:
    return plan.digest("made up")


def _made_up(plan: Plan, out: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write a run's folder and return its table. Raises ``TrainError`` for a few, which diverge."""
    method, budget, uplink = (str(values[axis]) for axis in ("method", "budget", "uplink"))
    rng = np.random.default_rng([plan.seed, *f"{method} {budget} {uplink}".encode()])
    common = 0.01 * np.random.default_rng(plan.seed).standard_normal()
    epsilon, size = BUDGETS[budget], {**SIZES, **MANY}[uplink]
    best = METHODS[method][1] - 0.16 / math.sqrt(epsilon) * (1.3 if method == "lora" else 1.0)
    best += 0.01 * math.log2(size) * (0.5 if method == "lora_xs" else 1.0) + common
    best += 0.008 * rng.standard_normal()
    with RunFolder(out, plan, ("made up",), resume=True, made_with={"group": 1}) as folder:
        if method == "rolora" and uplink == "sign" and plan.seed == 0:
            raise TrainError("training diverged: the loss is not finite; lower the trainer's lr")
        lines = [_line(number, best, epsilon, size, rng) for number in range(ROUNDS)]
        append_line(folder.path / "rounds.jsonl", "\n".join(map(json.dumps, lines)), "ledger")
        total = {k: sum(line[k] for line in lines) for k in ("up_bytes", "down_bytes", "seconds")}
        last = {name: value for name, value in lines[-1].items() if "/" in name}
        table = {"rounds": ROUNDS, "clients": CLIENTS, "rows": {}, "last": last, **total}
        folder.finish(table)
    return table


def _line(
    number: int, best: float, epsilon: float, size: float, rng: np.random.Generator
) -> dict[str, Any]:
    done = 1 - math.exp(-(number + 1) / 12)
    score = 0.13 + (best - 0.13) * done + 0.006 * float(rng.standard_normal())
    names = [f"client-{n:03}" for n in range(CLIENTS) if rng.random() < 0.5]
    up, down = round(WHOLE * size) + 90, WHOLE // 2 + 90
    each = 0.05 * rng.standard_normal(CLIENTS)
    held = {f"client-{n:03}": {"accuracy": score + float(x)} for n, x in enumerate(each)}
    line: dict[str, Any] = {"round": number, "asked": len(names), "replied": names}
    line |= {"loss": 2.1 - 1.5 * done, "seen": 64 * len(names)}
    line |= {"up_bytes": up * len(names), "down_bytes": down * len(names)}
    line["traffic"] = {name: {"up_bytes": up, "down_bytes": down} for name in names}
    line |= {"update_norm": 0.4 + 0.1 * done, "update_norm_max": 0.5 + 0.1 * done}
    line |= {"update_cosine": 0.3 * math.exp(-number / 20), "reachable": CLIENTS}
    if epsilon < math.inf:
        line |= {"epsilon": epsilon * ((number + 1) / ROUNDS) ** 0.55, "clip": 0.5}
    line |= {"test/accuracy": score, "test/loss": 2.1 - 2.0 * score, "per_client": held}
    line |= {"clients/accuracy": statistics.fmean(m["accuracy"] for m in held.values())}
    line |= {"participants": CLIENTS, "server_seconds": 0.02, "seconds": 1.5}
    return line


ACTIONS = {
    "sort the table": "$('points').tHead.rows[0].querySelectorAll('button')"
    "[turn % $('points').tHead.rows[0].cells.length].click()",
    "filter by text": "$('search').value = ['ffa', 'int', '', 'rolora 8'][turn % 4];"
    "$('search').dispatchEvent(new Event('input'))",
    "filter by an axis": "const box = document.querySelector('#filters select');"
    "box.selectedIndex = turn % box.options.length; box.dispatchEvent(new Event('change'))",
    "choose a point": "const shown = $('points').tBodies[0].rows;"
    "shown[(7 * turn) % shown.length].querySelector('button').click()",
    "another score": "$('metric').selectedIndex = turn % $('metric').options.length;"
    "$('metric').dispatchEvent(new Event('change'))",
}
"""What a reader does, as JavaScript in which ``turn`` counts."""
RESET = (
    "$('search').value = ''; document.querySelectorAll('#filters select')"
    ".forEach((box) => { box.selectedIndex = 0; }); $('search').dispatchEvent(new Event('input'))"
)
"""All points are shown again."""


def _actions(page: Path, home: Path, times: int) -> list[dict[str, Any]]:
    """Return the median and the longest time of each action."""
    from tests.browser import Browser, found

    if found() is None:
        return [{"what": "actions", "skipped": "no chromium"}]
    rows = []
    with Browser(home) as browser:
        browser.look(1280, 900)
        browser.open(page.as_uri())
        browser.wait("document.body.dataset.ready === 'yes'")
        for what, action in ACTIONS.items():
            browser.tell(RESET)
            code = (
                f"(() => {{ const taken = []; for (let turn = 0; turn < {times}; turn++) {{"
                f"const began = performance.now(); {{ {action} }} document.body.offsetHeight;"
                "document.documentElement.getBoundingClientRect();"
                "taken.push(performance.now() - began); } return taken; })()"
            )
            taken = browser.tell(code)
            rows.append({"what": what, "milliseconds": round(statistics.median(taken), 1),
                         "longest": round(max(taken), 1)})  # fmt: skip
        if browser.problems:
            raise RuntimeError(f"the page has problems: {browser.problems}")
    return rows


if __name__ == "__main__":
    _report.main("report", measure)
