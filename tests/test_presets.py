"""Papers by their names: what their lines say, and that they run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import Plan, simulate
from fedpeft.errors import PlanError
from fedpeft.plan import PARTS
from fedpeft.preflight import check
from fedpeft.releases import is_guarded
from fedpeft.spec import build, describe, names
from fedpeft.tables import Tables
from tests.tiny import support_plan

PRESETS = names("presets")


def _plan(preset: str, **lines: Any) -> Plan:
    return Plan.from_lines(
        {
            "model": "org/name",
            "task": "classify",
            "data": "jsonl(train='none')",
            "rounds": 3,
            "preset": preset,
        }
        | lines
    )


@pytest.mark.parametrize("name", PRESETS)
def test_lines_are_specs_of_a_plan(name: str) -> None:
    lines = build("presets", name).lines()
    assert set(lines) <= {*PARTS, "evaluate"}
    plan = _plan(name)
    assert plan.evaluate == lines.get("evaluate", "clients,test")
    for line, spec in ((line, spec) for line, spec in lines.items() if line in PARTS):
        family = PARTS[line]
        assert describe(getattr(plan, line)) == describe(build(family, spec))
    # nothing that makes the method is left to defaults that may change
    assert {"aggregator", "weighting", "optimizer", "correction"} <= set(lines)


@pytest.mark.parametrize("name", PRESETS)
def test_explicit_lines_win(name: str) -> None:
    parts = (part for _, part in _plan(name).parts())
    replaces = any("entrywise" in getattr(part, "refuses", {}) for part in parts)
    optimizer = "sgd" if replaces else "sgd(lr=0.25)"  # steps of entries made anew, or at rest
    lines = {"weighting": "uniform(denominator='expected')", "optimizer": optimizer}
    plan = _plan(name, **lines, uplink="half")
    assert describe(plan.weighting) == "uniform(denominator='expected')"
    assert describe(plan.optimizer) == optimizer
    assert describe(plan.uplink) == "half"
    assert describe(plan.correction) == describe(_plan(name).correction)


def test_an_empty_line_leaves_the_preset_alone() -> None:
    assert describe(_plan("ffa_lora", adapter=None).adapter) == describe(_plan("ffa_lora").adapter)


@pytest.mark.parametrize("name", PRESETS)
def test_every_knob_turns_something(name: str) -> None:
    preset = build("presets", name)
    for f in dataclasses.fields(preset):
        value = getattr(preset, f.name)
        number = 32 if value != 32 else 64
        word = "orthonormal" if value != "orthonormal" else "gaussian"
        other: Any = {str: word, int: number, float: 0.25, bool: True}[type(value)]
        turned = dataclasses.replace(preset, **{f.name: other})
        assert turned.lines() != preset.lines(), f.name
        _plan(describe(turned))


def test_fedit_has_the_values_of_the_released_code() -> None:
    plan: Any = _plan("fedit", task="causal_lm")
    adapter, trainer = plan.adapter, plan.trainer
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.targets) == (16, 16, 0.05, "q_proj")
    assert (adapter.train, trainer.optimizer, trainer.lr) == ("A,B", "adamw", 3e-4)
    assert (trainer.batch, trainer.batch // trainer.accumulate, trainer.epochs) == (64, 8, 10)
    assert describe(plan.weighting) == "examples"


def test_ffa_lora_sends_b_alone() -> None:
    plan = _plan("ffa_lora")
    shapes = {"m.lora_A.weight": (8, 20), "m.lora_B.weight": (30, 8)}
    tables = Tables(plan, shapes)
    assert tables.up(0) == tables.down(0) == {"adapter": {"m.lora_B.weight": (30, 8)}}


@pytest.mark.parametrize(
    ("preset", "line", "spec"),
    [
        ("fedavg(lr=0.3, epochs=2, batch=5)", "trainer", "plain(optimizer='sgd', lr=0.3, epochs=2"),
        ("fedavgm(momentum=0.7)", "optimizer", "sgd(momentum=0.7)"),
        ("fedprox(mu=0.1)", "correction", "fedprox(mu=0.1)"),
        ("scaffold", "correction", "scaffold"),
        ("fedcm(alpha=0.3)", "correction", "fedavg_m(beta=0.3)"),
        ("scaffold_m(beta=0.3)", "correction", "scaffold_m(beta=0.3)"),
        ("feddyn(alpha=0.3)", "correction", "feddyn(alpha=0.3)"),
        ("fedamd(p=0.3)", "correction", "fedamd(p=0.3)"),
        ("fedamd(steps=3)", "trainer", "plain(optimizer='sgd', lr=0.01, steps=3"),
        ("ditto(lam=0.5)", "personal", "ditto(lam=0.5)"),
        ("ditto(lr=0.3)", "trainer", "plain(optimizer='sgd', lr=0.3"),
        ("local_only", "personal", "ditto(lam=0.0)"),
        ("scaffold(server_lr=0.5)", "optimizer", "sgd(lr=0.5)"),
        ("fedadam(server_lr=0.1, tau=0.01)", "optimizer", "adam(lr=0.1, tau=0.01)"),
        ("fedyogi(beta2=0.9)", "optimizer", "yogi(beta2=0.9)"),
        ("fedadagrad", "optimizer", "adagrad"),
        (
            "ffa_lora(r=4, init='orthonormal')",
            "adapter",
            "lora(r=4, train='B', init='orthonormal')",
        ),
    ],
)
def test_knobs_arrive(preset: str, line: str, spec: str) -> None:
    assert describe(getattr(_plan(preset), line)).startswith(spec)


def test_a_wrong_preset_is_named() -> None:
    with pytest.raises(PlanError, match=r"preset: there is no presets method 'fedavgg'.*'fedavg"):
        _plan("fedavgg")
    with pytest.raises(PlanError, match=r"preset: fedprox: mu=-1 must be at least 0"):
        _plan("fedprox(mu=-1)")


SMALL = {
    "fedit": "fedit(r=2, targets='attention', epochs=1, batch=8, accumulate=2)",
    "ffa_lora": "ffa_lora(r=2)",
    "fed_sb": "fed_sb(r=4, epochs=1, batch=8)",
    "dp_fed_sb": "dp_fed_sb(r=4)",
}
PROMISED = [name for name in PRESETS if is_guarded(_plan(name))]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PROMISED])
def test_presets_run(bert: Path, name: str) -> None:
    preset = build("presets", SMALL.get(name, name))
    lines: dict[str, Any] = {"adapter": "lora(r=2)", **preset.lines()}
    result = simulate(support_plan(bert, partition="iid", **lines))
    losses = [line["loss"] for line in result.history]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert not any("refused" in line for line in result.history)


@pytest.mark.parametrize("name", PROMISED)
def test_presets_with_a_promise_pass_the_preflight_and_keep_it(bert: Path, name: str) -> None:
    preset = build("presets", SMALL.get(name, name))
    plan = support_plan(bert, partition="iid", **{**preset.lines(), "cohort": "poisson(rate=0.9)"})
    assert not [text for text in check(plan).warnings if "privacy" in text]
    result = simulate(plan)
    assert [line["epsilon"] <= 8 for line in result.history] == [True, True]
    assert result.history[-1]["epsilon"] > 7.9
    assert not any("replied" in line for line in result.history)
    assert all(np.isfinite(value).all() for value in result.tensors.values())


def test_dp_presets_are_the_papers_adapters_under_one_promise() -> None:
    assert {"dp_ffa_lora", "dp_dylora", "dp_fed_sb", "dp_lora_fa"} <= {*PROMISED}
    for name in ("dp_ffa_lora", "dp_dylora", "dp_fed_sb", "dp_lora_fa"):
        plan = _plan(f"{name}(epsilon=3.0, delta=1e-6, clip=0.2, rate=0.3)")
        lines = plan.lines()
        assert "epsilon=3.0" in lines["privacy"]
        assert "delta=1e-06, clip=0.2" in lines["privacy"]
        assert lines["cohort"].startswith("poisson(rate=0.3")
        assert plan.privacy.secret
    public = _plan("dp_fed_sb(public=\"jsonl(train='rows')\")")
    assert describe(public.adapter) == "core(init='gradient', public=\"jsonl(train='rows')\")"
