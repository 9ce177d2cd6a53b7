"""A small plan for sites with records of their own, the records, and the same in simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedpeft.plan import Plan
from fedpeft.types import Row
from simulations._machines.federation import Federation, dealt, pooled

LINES: Mapping[str, Any] = {
    "model": "minilm",
    "task": 'classify(names="billing,bug,cancel,delivery,feedback,login,refund,upgrade")',
    "adapter": "lora(r=2, alpha=4)",
    "trainer": "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)",
    "holdout": 0.0,
    "evaluate": "",
}
"""Two steps a round: what a federation of machines takes beside them is what is looked at."""
CORRECTED: Mapping[str, Any] = {**LINES, "correction": "scaffold"}
"""With control variates, so that each client remembers something."""


def write_plan(
    path: Path, lines: Mapping[str, Any], sites: int, rounds: int
) -> dict[str, Sequence[Row]]:
    """Write a plan for so many sites, evaluated at its end; return the rows of each."""
    its = {**lines, "rounds": rounds, "eval_every": rounds}
    names = [f"site-{number}" for number in range(sites)]
    path.write_text(yaml.safe_dump({**its, "data": f"sites(names={','.join(names)!r})"}))
    given = {"data": "embedded(name='support')", "partition": "iid", "clients": sites}
    return dict(zip(names, dealt(Plan.from_lines({**its, **given})).values(), strict=True))


def is_as_simulated(federation: Federation, run: Path, lines: Mapping[str, Any]) -> bool:
    """Tell whether a run's adapter is, bit for bit, that of a simulation of the same plan.

    The simulation takes turns with its clients in one thread, as sites do.
    """
    import torch

    from fedpeft.driver import simulate
    from fedpeft.export import read_tensors

    rows = pooled(federation, federation.folder / "all.jsonl")
    rounds = Plan.from_yaml(run / "plan.yaml").rounds
    its = {**lines, "rounds": rounds, "eval_every": rounds}
    its |= {"data": f"jsonl(train={str(rows)!r})", "partition": "by_field(field='site')"}
    torch.set_num_threads(1)
    alone = simulate(Plan.from_lines(its), engine="inline(group=1)").tensors
    ended = read_tensors(run / "adapter")
    return {*alone} == {*ended} and all(
        alone[name].tobytes() == ended[name].tobytes() for name in alone
    )
