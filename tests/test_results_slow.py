"""What sites keep of a run, with real processes: a server, three sites, one of them away."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.plan import Plan
from simulations._machines.federation import Federation, dealt
from tests.tiny import LABELS, support_lines, tiny_bert
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SITES = ("north", "south", "west")
MODEL = "adapter_model.safetensors"


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    """Three sites, of which the second lets its gain leave; the plan keeps personal adapters."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    lines = support_lines(bert, personal="ditto", rounds=4, holdout=0.3, eval_every=2, clients=3)
    rows = dealt(Plan.from_lines({**lines, "partition": "iid", "holdout": 0.0, "personal": "none"}))
    folder = tmp_path / "m"
    folder.mkdir()
    found = Federation(folder, dict(zip(SITES, rows.values(), strict=True)))
    for line in ("partition", "clients"):
        del lines[line]
    lines |= {"task": f"classify(names='{','.join(LABELS)}')"}
    lines |= {"data": f"sites(names='{','.join(SITES)}')"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(lines))
    settings = found.folder / "south" / "client.yaml"
    limits = {**yaml.safe_load(settings.read_text()), "limits": {"gain": True}}
    settings.write_text(yaml.safe_dump(limits))
    return found


def kept(made: Federation, site: str) -> Path:
    (found,) = (made.folder / site / "state" / "results").glob("[!.]*")
    return found


def standing(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / "kept.json").read_text())["sites"]
    except FileNotFoundError:
        return {}
    return found


def rounds(run: Path) -> int:
    ledger = run / "rounds.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def test_sites_keep_the_result_and_the_gain_leaves_where_it_may(
    made: Federation, tmp_path: Path
) -> None:
    with made:
        run = made.submit(tmp_path / "plan.yaml", "week")
        wait_until(lambda: rounds(run) >= 1)
        away = made._running["west"]
        away.send_signal(signal.SIGTERM)
        assert away.wait(HANGS) == 0
        wait_until(lambda: (run / "result.json").exists())
        wait_until(
            lambda: {s for s, about in standing(run).items() if about["kept"]} >= {*SITES[:2]}
        )
        wait_until(lambda: "run week: finished" in made.told("server"))
        assert not standing(run)["west"]["kept"]
        status = made.fedpeft("status")
        assert "week: west does not have the result yet: " in status
        assert not (made.folder / "west" / "state" / "results").exists()

        assert made.revive() == ["west"]
        wait_until(lambda: standing(run)["west"]["kept"])
        assert "its result is sent to" in made.told("server")
        exported = (run / "adapter" / MODEL).read_bytes()
        for site in SITES:
            found = kept(made, site)
            assert (found / "adapter" / MODEL).read_bytes() == exported
            assert (found / "personal" / MODEL).read_bytes() != exported
            config = "adapter_config.json"
            there = run / "adapter" / config
            assert (found / "adapter" / config).read_bytes() == there.read_bytes()
            assert "| personal adapter " in (found / "README.md").read_text()

        for site in ("north", "south"):
            shown = made.fedpeft("gain", f"{site}/client.yaml", "week")
            for row in ("base model, untrained", "this site alone", "federated adapter"):
                assert f"| {row} " in shown
            assert "sign test p = " in shown
        wait_until(lambda: standing(run)["south"]["gain"])
        gain = json.loads((kept(made, "south") / "report.json").read_text())["gain"]
        told = standing(run)["south"]["gain"]
        assert {k: v for k, v in told.items() if "/" not in k} == gain["federated"]["by"]
        own = {k.removeprefix("personal/"): v for k, v in told.items() if "/" in k}
        assert own == gain["personal"]["by"]
        assert [standing(run)[site]["gain"] for site in ("north", "west")] == [None, None]
        assert "week: against training alone south has gained accuracy " in made.fedpeft("status")
        quiet = json.loads((kept(made, "north") / "report.json").read_text())["gain"]
        everything = b"".join(p.read_bytes() for p in run.rglob("*") if p.is_file())
        assert str(quiet["federated"]["by"]["loss"]).encode() not in everything
