"""``python -m simulations.quadratics.participation``: rates that go with the clients' labels.

250 clients; client n has label mix ``L_n ~ Dirichlet(0.1)`` over 10 labels, its optimum is
``b_n = L_n M`` with a normal ``M`` [10, 10], and all have the curve ``I``, so that local steps
alone leave no bias. How often it takes part follows from its labels: the plan's ``bernoulli``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedpeft.availability.bernoulli import Bernoulli
from fedpeft.rng import derive
from fedpeft.types import Crowd
from simulations.quadratics import _arithmetic
from simulations.quadratics.bowls import Bowls
from simulations.quadratics.rounds import plan, tail

RESULTS = Path(__file__).parent / "results"
CLIENTS, LABELS, ROUNDS, QUICK, SEEDS = 250, 10, 4000, 3, 4
LR, STEPS = 0.02, 5
TRAINER = f"plain(optimizer='sgd', lr={LR}, steps={STEPS}, batch=1)"
WEIGHTINGS = (
    "uniform",
    "fedau(cutoff=50)",
    "fedau(cutoff=None)",
    "known",
    "fedvarp",
    "mifa",
    "uniform(denominator='population')",
)


def federation(seed: int) -> tuple[Bowls, Crowd]:
    """Return the quadratics of a seed, and the clients whose labels they follow from."""
    rng = derive(seed, "participation")
    mix = rng.dirichlet(np.full(LABELS, 0.1), CLIENTS)
    optima = mix @ rng.normal(size=(LABELS, LABELS))
    curves = np.repeat(np.eye(LABELS)[None], CLIENTS, axis=0)
    bowls = Bowls(curves, optima, optima[:, None])
    return bowls, Crowd(bowls.clients, mix, seed)


def measure(weighting: str, seed: int, rounds: int) -> Mapping[str, float]:
    """Play a run; return ``bias`` and ``rms`` of the distance from the optimum in its last half."""
    bowls, crowd = federation(seed)
    availability = Bernoulli()
    presence, rates = availability.presence(crowd), availability.true_rates(crowd)

    def there(round: int) -> Sequence[str]:
        return [name for name, here in zip(crowd.names, presence(round), strict=True) if here]

    told = dict(zip(crowd.names, rates.tolist(), strict=True))
    made = plan(rounds, weighting=weighting, trainer=TRAINER, seed=seed)
    found = tail(made, bowls, 0.5, there, told)
    return {"bias": found["bias"], "rms": found["rms"]}


def compute(weighting: str, seed: int, rounds: int) -> Mapping[str, float]:
    """Return what :func:`measure` does, by float64 arithmetic alone."""
    bowls, crowd = federation(seed)
    availability = Bernoulli()
    rule = _arithmetic.rules(availability.true_rates(crowd), LABELS)[weighting]
    how = availability.presence(crowd), rounds, (1 - LR) ** STEPS
    ways = np.array([*_arithmetic.played(rule, bowls.optima, *how)][rounds // 2 :]) - bowls.minimum
    bias, rms = np.linalg.norm(ways.mean(0)), np.sqrt((ways**2).sum(1).mean())
    return {"bias": float(bias), "rms": float(rms)}


def expected(seed: int) -> tuple[float, float]:
    """Return the bias of ``uniform`` and of ``fedau(cutoff=50)`` where small steps would rest.

    A client counts as often as it takes part, times its mean weight: the mean of intervals that
    end after 50 rounds at the latest is ``(1 - (1 - p)^50) / p``, where one over its rate is due.
    """
    bowls, crowd = federation(seed)
    rates = Bernoulli().true_rates(crowd)
    counts = rates, 1 - (1 - rates) ** 50
    ways = [(own @ bowls.optima) / own.sum() - bowls.minimum for own in counts]
    uniform, cut = (float(np.linalg.norm(way)) for way in ways)
    return uniform, cut


def by_seed(folder: Path, seeds: int) -> str:
    """Return, as Markdown, what a cutoff of 50 leaves under each seed, and what is expected."""
    lines = [
        "| seed | `uniform` | `fedau(cutoff=50)` | removed | expected |",
        "|---|---|---|---|---|",
    ]
    for seed in range(seeds):
        usual, own = (_read(folder, name, seed) for name in ("uniform", "fedau(cutoff=50)"))
        if usual and own:
            (first, cut), values = expected(seed), (usual["bias"], own["bias"])
            shown = f"{first:.3f}, {cut:.3f}: {_removed(first, cut)}"
            biases = " | ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {seed} | {biases} | {_removed(*values)} | {shown} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _removed(usual: float, own: float) -> str:
    return f"{100 * (1 - own / usual):.1f} %"


def table(folder: Path, seeds: int) -> str:
    """Return, as Markdown, the means over the seeds that a weighting and ``uniform`` both have."""
    lines = ["| weighting | seeds | bias | rms | bias removed |", "|---|---|---|---|---|"]
    for weighting in WEIGHTINGS:
        pairs = ((_read(folder, weighting, s), _read(folder, "uniform", s)) for s in range(seeds))
        done = [(own, usual) for own, usual in pairs if own and usual]
        if done:
            bias, rms = (np.mean([own[key] for own, _ in done]) for key in ("bias", "rms"))
            left = float(np.mean([own["bias"] / usual["bias"] for own, usual in done]))
            shown = f"{bias:.4f} | {rms:.4f} | {_removed(1, left)}"
            lines.append(f"| `{weighting}` | {len(done)} | {shown} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Play what is missing, write the table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.quadratics.participation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so many")
    parser.add_argument("--only", default="", help="weightings whose name holds this")
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0 on")
    parser.add_argument("--arithmetic", action="store_true", help="in float64, without the code")
    options = parser.parse_args(arguments)
    play = compute if options.arithmetic else measure
    options.results.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * options.minutes
    for seed in range(options.seeds):
        for weighting in WEIGHTINGS:
            path = _path(options.results, weighting, seed)
            if path.exists() or options.only not in weighting or time.time() > end:
                continue
            found = play(weighting, seed, QUICK if options.quick else ROUNDS)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{weighting}, seed {seed}: {found}", flush=True)
    text = table(options.results, options.seeds) + "\n" + by_seed(options.results, options.seeds)
    (options.results / "participation.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _path(folder: Path, weighting: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in weighting)
    return folder / f"participation_{name}_{seed}.json"


def _read(folder: Path, weighting: str, seed: int) -> Mapping[str, float] | None:
    path = _path(folder, weighting, seed)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())
