"""Model cards: what the Hub reads at the top of them, and the frontier of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.driver import simulate
from fedpeft.model_card import front_matter
from fedpeft.plan import Plan
from fedpeft.sweep import command
from fedpeft.sweep.card import frontier_section
from fedpeft.sweep.place import Place
from tests.tiny import support_lines, support_plan


def card_of(path: Path) -> Any:
    """Read a card as the Hub does; what its metadata may not be raises."""
    card = ModelCard.load(path, ignore_metadata_errors=False)
    assert isinstance(card.data, ModelCardData)
    assert metadata_load(path) == yaml.safe_load(card.data.to_yaml())
    return card.data


def test_the_hub_reads_base_library_and_results(bert: Path, tmp_path: Path) -> None:
    result = simulate(support_plan(bert, keep_best="test/loss"), out=tmp_path / "my-run")
    data = card_of(tmp_path / "my-run" / "adapter" / "README.md")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
    assert data.base_model == str(bert)
    assert data.tags == ["federated", "fedpeft"]
    assert data.model_name == f"{bert.name}-federated"
    assert data.eval_results is not None
    told = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    last = result.table["last"]
    assert told["the server's test set", "accuracy"] == last["test/accuracy"]
    assert told["held-out records of the clients", "loss"] == last["clients/loss"]
    assert len(told) == len(last)
    assert data.metrics == sorted({metric for _, metric in told})


@pytest.mark.parametrize(
    ("line", "expected"),
    [("hub(name='nyu-mll/glue', config='sst2')", ["nyu-mll/glue"]), ("jsonl(train='a')", None)],
)
def test_a_data_set_of_the_hub_is_named(bert: Path, line: str, expected: Any) -> None:
    plan = Plan.from_lines({**support_lines(bert), "data": line})
    lines = front_matter(plan, "org/base", {"test/accuracy": 0.5, "test/f1": float("nan")})
    data: Any = ModelCard("\n".join([*lines, "# Title"])).data
    assert (data.datasets, data.base_model, data.metrics) == (expected, "org/base", ["accuracy"])
    (result,) = data.eval_results
    assert result.dataset_type == (expected[0] if expected else "jsonl")


def test_a_card_without_results_is_one(bert: Path) -> None:
    data: Any = ModelCard("\n".join(front_matter(support_plan(bert), "org/base", {}))).data
    assert (data.library_name, data.eval_results) == ("peft", None)


def test_an_exported_run_of_a_sweep_tells_of_the_frontier(bert: Path, tmp_path: Path) -> None:
    user = "user(noise_multiplier=2.0, clip=0.5, simulate_noise=true)"
    lines = support_lines(bert, rounds=1, evaluate="test", cohort="poisson(rate=0.9)")
    lines["weighting"] = "uniform(denominator='expected')"
    axes = {"privacy": ["none", user], "uplink": ["raw", "half"]}
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"plan": lines, "axes": axes, "seeds": [0, 1]}))
    assert command.sweep(path, out, Place("inline", "inline"))
    run = next(p for p in sorted(out.iterdir()) if (p / "run.json").exists() and _is_private(p))
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    target = tmp_path / "exported" / "README.md"
    assert card_of(target).library_name == "peft"
    text = target.read_text()
    assert text.startswith((run / "adapter" / "README.md").read_text())
    head, _, *rows = [text for text in frontier_section(run).splitlines() if text[:1] == "|"]
    assert head.startswith("| run | ")
    assert "| test/accuracy | epsilon of users | MB |" in head
    assert rows
    assert all("(2 seeds)" in row and " ± " in row for row in rows)
    assert "choosing the best of 4 private runs costs epsilon" in text
    assert frontier_section(tmp_path / "elsewhere" / "run") == ""


def _is_private(run: Path) -> bool:
    return "user(" in str(json.loads((run / "run.json").read_text())["lines"].get("privacy"))
