"""A step of DP-SGD at a client, beside a plain one and beside Opacus' two ways.

Every side ends with parameters that have moved: a plain step of SGD; fedpeft's, with batch, clip,
noise and all; Opacus' hooks, and its ghost clipping, on the same PEFT model, with its optimizer's
noise. All take the same 16 records. Sides are timed in turn, ratios are medians over the turns.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from fedpeft.plan import Plan
from fedpeft.privacy._stepping import Stepping
from fedpeft.types import Job
from simulations.benchmarks.per_example import MODELS, RECORDS, Setting

GOAL = 1.35
TRAINER = 'plain(optimizer="sgd", lr=0.01, steps=1, batch=16)'


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row for each model."""
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    warnings.filterwarnings("ignore", "Secure RNG turned off", UserWarning)
    return [_row(name, 4.0 if quick else 40.0) for name in MODELS]


def _row(name: str, seconds: float) -> dict[str, Any]:
    setting = Setting(MODELS[name])
    sides: dict[str, Callable[[], Any]] = {"plain": _fedpeft(setting, False)}
    sides["fedpeft"] = _fedpeft(setting, True)
    if find_spec("opacus") is not None:
        sides |= {"opacus_hooks": _opacus(setting, False), "opacus_ghost": _opacus(setting, True)}
    for run in sides.values():
        run()
    turns, end = list[dict[str, float]](), time.perf_counter() + seconds
    while len(turns) < 3 or time.perf_counter() < end:
        turn = {}
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            turn[side] = 1e3 * (time.perf_counter() - began)
        turns.append(turn)
    setting.site.close()
    ratios = {
        f"{side}_to_plain": round(statistics.median(t[side] / t["plain"] for t in turns), 2)
        if side in sides
        else None
        for side in ("fedpeft", "opacus_hooks", "opacus_ghost")
    }
    return {
        "promise": "record",
        "model": name,
        "records": RECORDS,
        "parameters": sum(v[0].numel() for v in setting.params.values()),
        "turns": len(turns),
        **{f"{side}_ms": round(statistics.median(t[side] for t in turns), 1) for side in sides},
        **ratios,
    }


def _fedpeft(setting: Setting, hides: bool) -> Callable[[], Any]:
    """Return one step of fedpeft's trainer; a hidden one takes every record at the rate 1."""
    trainer = Plan.from_lines({**setting.site.plan.lines(), "trainer": TRAINER}).trainer
    stepping = Stepping(RECORDS, 1.0, 1, 1, 1.0, 1e-5, noise=1.0)
    members = list(np.arange(RECORDS).reshape(-1, 1))
    count = 0

    def run() -> Any:
        nonlocal count
        count += 1
        key = count.to_bytes(32, "little")
        hidden = [stepping.hidden(key, members)] if hides else []
        records = setting.records
        return trainer.fit(
            Job(setting.site.learner, setting.params, {}, [records], [count], hidden=hidden)
        )

    return run


def _opacus(setting: Setting, ghost: bool) -> Callable[[], Any]:
    """Return one step of Opacus' on the same records, collated anew as every side does."""
    model, task = setting.peft(), setting.site.plan.task
    optimizers, modules = import_module("opacus.optimizers"), import_module("opacus.grad_sample")
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.SGD(trained, 0.01)
    noise = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": RECORDS}
    if ghost:
        wrapped = modules.GradSampleModuleFastGradientClipping(
            model, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
        )
        optimizer = optimizers.DPOptimizerFastGradientClipping(plain, **noise)
        utils = import_module("opacus.utils.fast_gradient_clipping_utils")
    else:
        wrapped = modules.GradSampleModule(model, loss_reduction="mean")
        optimizer = optimizers.DPOptimizer(plain, **noise)

    def run() -> Any:
        batch = setting.site.learner.collate(setting.records, [1.0] * RECORDS)
        optimizer.zero_grad()
        wrapped.zero_grad()
        losses = task.losses(wrapped(**batch.inputs).logits, batch.labels)
        if ghost:
            loss = utils.DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean")
            loss.backward()
        else:
            torch.autograd.backward(losses.mean())
        optimizer.step()

    return run
