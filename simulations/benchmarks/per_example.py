"""Gradients of single records: fedpeft's stacked pass, Opacus's hooks, and one backward each.

All sides hold the same LoRA parameters on the same 16 records of the support texts, padded to the
longest, and end with every record's gradient; a plain step, which ends with their sum alone, is
the measure. Sides are timed in turn, and ratios are medians over the turns. Without Opacus its
figures are null.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.adapters import _peft_folder
from fedpeft.federation import deal
from fedpeft.per_example import clipped_sums, gradients
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.site import Site
from fedpeft.stacking import stack
from fedpeft.types import Stacked, Tensors
from simulations.benchmarks import _report

RECORDS = 16
LINES = {
    "data": 'embedded(name="support")',
    "partition": "iid",
    "clients": 10,
    "trainer": "plain",
    "rounds": 1,
}
MODELS: Mapping[str, Mapping[str, str]] = {
    "tiny-novels, all-linear": {
        "model": "tiny-novels",
        "task": "causal_lm(max_length=128)",
        "adapter": 'lora(r=8, alpha=16, targets="all-linear")',
    },
    "minilm, attention": {
        "model": "minilm",
        "task": "classify",
        "adapter": "lora(r=8, alpha=16)",
    },
}


class Setting:
    """A model with its adapter, and 16 records in one batch."""

    def __init__(self, lines: Mapping[str, str]) -> None:
        plan = Plan.from_lines({**LINES, **lines})
        federation = deal(plan)
        self.site = Site(plan, federation)
        rng = derive(0, "benchmark")
        self.tensors: Tensors = {
            name: (value + 0.02 * rng.standard_normal(value.shape)).astype(np.float32)
            for name, value in self.site.initial.items()
        }
        self.params = stack([self.tensors], self.site.learner.device)
        self.records = self.site.train(min(federation.train))[:RECORDS]
        self.batch = self.site.learner.collate(self.records, [1.0] * RECORDS)

    def plain(self) -> Stacked:
        """Return the gradient [1, ...] of the summed loss."""
        return self.site.learner.grads(self.params, {}, self.batch)[0]

    def stacked(self) -> Stacked:
        """Return the gradients [16, ...] in one pass of fedpeft's."""
        return gradients(self.site.learner, self.params, {}, self.batch)[0]

    def clipped(self) -> Stacked:
        """Return the clipped sums [1, ...]."""
        return clipped_sums(self.site.learner, self.params, {}, self.batch, clip=1.0).sums

    def single(self) -> Stacked:
        """Return the gradients [16, ...] by one backward pass each, without any padding."""
        learner = self.site.learner
        found = [
            learner.grads(self.params, {}, learner.collate([record], [1.0]))[0]
            for record in self.records
        ]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def peft(self) -> Any:
        """Return the same adapter on the same base as a PEFT model, without dropout."""
        from peft import PeftModel

        plan, base = self.site.plan, self.site.base
        with tempfile.TemporaryDirectory() as folder:
            plan.adapter.export(base, self.tensors, Path(folder))
            model = PeftModel.from_pretrained(
                copy.deepcopy(base.model), folder, is_trainable=True
            ).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def opacus(self) -> Callable[[], Stacked]:
        """Return what gives the gradients [16, ...] by Opacus's hooks on the PEFT model."""
        model, task = self.peft(), self.site.plan.task
        wrapped = import_module("opacus").GradSampleModule(model, loss_reduction="sum")
        own = {_short(n): p for n, p in model.named_parameters() if p.requires_grad}

        def run() -> Stacked:
            wrapped.zero_grad()  # of the gradients of single records, too
            losses = task.losses(wrapped(**self.batch.inputs).logits, self.batch.labels)
            torch.autograd.backward(losses.sum())
            return {name: own[name].grad_sample for name in self.params}

        return run


def _short(name: str) -> str:
    for part in (_peft_folder.PREFIX, ".modules_to_save", ".default"):
        name = name.replace(part, "")
    return name


def _agree(found: Stacked, expected: Stacked) -> None:
    """Raise where the sides do not compute the same."""
    for name, value in expected.items():
        if float((found[name] - value).norm() / value.norm()) > 1e-4:
            raise RuntimeError(f"{name}: the sides differ")


def measure(quick: bool) -> dict[str, Any]:
    """Return medians in milliseconds and of the ratios of each turn."""
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    return {"rows": [_row(name, lines, 8.0 if quick else 40.0) for name, lines in MODELS.items()]}


def _row(name: str, lines: Mapping[str, str], seconds: float) -> dict[str, Any]:
    setting = Setting(lines)
    sides = {
        "plain_step": setting.plain,
        "fedpeft": setting.stacked,
        "fedpeft_clipped": setting.clipped,
        "one_by_one": setting.single,
    }
    if find_spec("opacus") is not None:
        sides["opacus"] = setting.opacus()
    expected = setting.single()
    for side in set(sides) & {"fedpeft", "opacus"}:  # the first call warms up, too
        _agree(sides[side](), expected)
    turns = _timed(sides, seconds)
    setting.site.close()

    def ratio(slow: str, fast: str) -> float | None:
        return (
            round(statistics.median(t[slow] / t[fast] for t in turns), 2) if slow in sides else None
        )

    return {
        "model": name,
        "records": RECORDS,
        "tokens": sum(setting.batch.lengths),
        "padded_to": setting.batch.inputs["input_ids"].shape[1],
        "turns": len(turns),
        **{f"{side}_ms": round(statistics.median(t[side] for t in turns), 1) for side in sides},
        "opacus_to_fedpeft": ratio("opacus", "fedpeft"),
        "one_by_one_to_fedpeft": ratio("one_by_one", "fedpeft"),
        "fedpeft_to_plain_step": ratio("fedpeft", "plain_step"),
        "clipped_to_plain_step": ratio("fedpeft_clipped", "plain_step"),
    }


def _timed(sides: Mapping[str, Callable[[], Stacked]], seconds: float) -> list[dict[str, float]]:
    """Return milliseconds of every side, turn by turn, for as long as asked but three at least."""
    turns, end = list[dict[str, float]](), time.perf_counter() + seconds
    while len(turns) < 3 or time.perf_counter() < end:
        turn = {}
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            turn[side] = 1e3 * (time.perf_counter() - began)
        turns.append(turn)
    return turns


if __name__ == "__main__":
    _report.main("per_example", measure)
