"""What a client does that hides its records: units, keys, refusals, the check of its gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import Plan, hiding, simulate, spending
from fedpeft.errors import BudgetError, ModelError, RunError
from fedpeft.federation import deal
from fedpeft.ledger import InProcessLedgers, OnDiskLedgers, Release, charge
from fedpeft.per_example import check
from fedpeft.site import Site
from fedpeft.spending import Purse
from fedpeft.stacking import stack
from fedpeft.tasks.classify import Classify
from fedpeft.types import Stacked, Tensors
from tests.tiny import support_plan

SEEDED = "record(noise_multiplier=0.7, clip=0.3, simulate_noise=true)"
SECRET = "record(noise_multiplier=0.7, clip=0.3)"
SGD = "plain(optimizer='sgd', lr=0.2, steps=3, batch=5)"
FIRST = Release("data", "run", 0, "broadcast", "record", 0.1, 1.0, 10)


def private(model: Path, **lines: Any) -> Plan:
    usual = {"privacy": SECRET, "weighting": "uniform", "trainer": SGD, "evaluate": "test"}
    return support_plan(model, **usual | lines)


@pytest.fixture(scope="module")
def site(bert: Path) -> Iterator[Site]:
    plan = private(bert)
    made = Site(plan, deal(plan))
    yield made
    made.close()


# --- units --------------------------------------------------------------------------------------


def of_patients(folder: Path, patients: list[Any]) -> str:
    path = folder / "train.jsonl"
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "p": p} for i, p in enumerate(patients)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl(train={str(path)!r})"


def test_one_number_is_one_unit_however_it_is_written(bert: Path, tmp_path: Path) -> None:
    same = [1, 1.0, "1", 2, "2", 2.0, 1.5, "1.5"]
    plan = private(
        bert, data=of_patients(tmp_path, same), privacy="record(epsilon=3, unit='p')",
        clients=1, partition="iid", holdout=0,
    )  # fmt: skip
    assert [len(rows) for rows in deal(plan).members("client-000")] == [3, 3, 2]


@pytest.mark.parametrize(
    "trainer", ["steps=3, batch=5", "records=30, batch=5", "epochs=2, batch=3"]
)
def test_the_server_takes_replies_of_clients_that_count_units(
    bert: Path, tmp_path: Path, trainer: str
) -> None:
    """Where clients count units, as many steps as a plan has them take may be more than else."""
    seeded = "record(noise_multiplier=1.0, unit='p', simulate_noise=true)"
    plan = private(
        bert, data=of_patients(tmp_path, [i // 7 for i in range(28)]), privacy=seeded,
        clients=2, partition="iid", holdout=0, rounds=1, evaluate="",
        trainer=f"plain(optimizer='sgd', lr=0.1, {trainer})",
    )  # fmt: skip
    federation = deal(plan)
    assert max(federation.counted.values()) <= 4
    result = simulate(plan)
    assert "refused" not in result.history[0]
    assert result.history[0]["replied"] == ["client-000", "client-001"]


# --- keys ---------------------------------------------------------------------------------------


def test_two_plans_in_one_run_never_share_a_key(bert: Path, site: Site) -> None:
    """The same noise for other gradients (of another clip or rate) would tell their difference."""
    purse, keys = Purse(InProcessLedgers()), set[bytes]()
    plans = [
        private(bert),
        private(bert, privacy="record(noise_multiplier=0.7, clip=0.4)"),
        private(bert, trainer="plain(optimizer='sgd', lr=0.3, steps=3, batch=5)"),
        private(bert, seed=4),
        private(bert, adapter="lora(r=2, alpha=64)"),
    ]
    for plan in [replace(p, rounds=9) for p in plans]:
        keys.add(spending.key_of(plan, site, "client-000", ("run", 0), [site.initial], purse))
    assert len(keys) == len(plans)
    again = replace(plans[0], rounds=9, compare="base")  # says nothing of how clients train
    assert spending.key_of(again, site, "client-000", ("run", 0), [site.initial], purse) in keys
    assert len(purse.ledgers.read("client-000").releases) == len(plans)


# --- refusals -----------------------------------------------------------------------------------


def test_a_site_with_a_limit_takes_no_plan_whose_noise_the_server_knows(
    bert: Path, site: Site
) -> None:
    purse = Purse(InProcessLedgers(), (3.0, 1e-5))
    with pytest.raises(BudgetError, match=r"allows epsilon 3, and .*simulate_noise"):
        spending.key_of(private(bert, privacy=SEEDED), site, "client-000", ("r", 0), [], purse)
    free = Purse(InProcessLedgers())
    assert spending.key_of(private(bert, privacy=SEEDED), site, "client-000", ("r", 0), [], free)


@pytest.mark.parametrize("key", ["", "00", "00" * 31, "00" * 33])
def test_a_ledger_with_another_key_than_a_whole_one_is_damaged(tmp_path: Path, key: str) -> None:
    """A short one could be guessed, and with it all noise."""
    ledgers = OnDiskLedgers(tmp_path)
    charge(ledgers, "c", FIRST, rounds=1)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": key}))
    with pytest.raises(RunError, match="damaged"):
        charge(ledgers, "c", FIRST, rounds=1)


def test_a_folder_that_takes_no_ledger_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        charge(OnDiskLedgers(tmp_path / "file"), "c", FIRST, rounds=1)


# --- the check of gradients -----------------------------------------------------------------------


class Mixed(Classify):
    """A task whose losses depend on the batch."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return each record's part of the batch's mean."""
        each = super().losses(logits, labels)
        return each / len(each)


def test_a_client_with_one_record_checks_for_nobody_else(bert: Path) -> None:
    """One record alone has nothing to be compared with, so the next client is looked at."""
    plan = replace(private(bert), task=Mixed())
    federation = deal(plan)
    one = replace(federation, train={**federation.train, "client-000": np.array([0])})
    made = Site(plan, one)
    hiding.check_records(plan, made, "client-000", made.initial, 0)
    with pytest.raises(ModelError, match="depends on the others in its batch"):
        hiding.check_records(plan, made, "client-001", made.initial, 0)
    made.close()


class Focused(Classify):
    """A task that looks at those records whose losses are larger than the others'."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return losses, each with a weight that follows from all and is no part of gradients."""
        each = super().losses(logits, labels)
        return each * (torch.softmax(each, 0) * len(each)).detach()


@pytest.mark.parametrize("adapter", ["lora(r=4)", "lora(r=4, head='local')", "head"])
def test_records_that_mix_only_where_losses_differ_are_found_on_a_fresh_head(
    bert: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(private(bert, adapter=adapter), task=Focused())
    made = Site(plan, deal(plan))
    with monkeypatch.context() as patch:  # where losses are nearly equal nothing is to be seen
        patch.setattr("fedpeft.hiding._SPREAD", 0.0)
        hiding.check_records(plan, made, "client-000", made.initial, 0)
    hiding._checked.discard(made.learner)
    with pytest.raises(ModelError, match="depends on the others in its batch"):
        hiding.check_records(plan, made, "client-000", made.initial, 0)
    made.close()


class Broken:
    """A learner for which records of one length have gradients that are not finite."""

    max_group = None

    def __init__(self, site: Site, length: int, broken: Mapping[str, float]) -> None:
        self._site, self._length, self._broken = site, length, broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site.learner, name)

    def grads(
        self, params: Stacked, fixed: Stacked, batch: Any, seeds: Any = None
    ) -> tuple[Stacked, torch.Tensor]:
        found, losses = self._site.learner.grads(params, fixed, batch, seeds)
        value = self._broken["alone" if len(losses) == 1 else "together"]
        where = torch.tensor([value if n == self._length else 0.0 for n in batch.lengths])
        return {k: g + where.reshape(-1, *[1] * (g.dim() - 1)) for k, g in found.items()}, losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_without_a_finite_gradient_does_not_end_the_run(site: Site, value: float) -> None:
    """It counts as zero in training; to stop would tell that it is there."""
    params: Tensors = {k: v + np.float32(0.02) for k, v in site.initial.items()}
    stacked = stack([params], torch.device("cpu"))
    records = [site.train("client-000")[i] for i in range(3)]
    length = len(records[0]["input_ids"])
    assert [len(r["input_ids"]) == length for r in records] == [True, False, False]
    check(Broken(site, length, {"alone": value, "together": value}), stacked, {}, records)
    for alone, together in ((0.0, value), (value, 0.0)):
        mixing = Broken(site, length, {"alone": alone, "together": together})
        with pytest.raises(ModelError, match="depends on the others"):
            check(mixing, stacked, {}, records)
