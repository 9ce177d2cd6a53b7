"""A site with records of its own, with real processes: ``fedpeft client``, TLS, signed runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import StreamLogsRequest

from fedpeft.plan import Plan
from tests.test_certificates_slow import process
from tests.test_client_slow import Federation, simulated, stopped
from tests.test_sites import NAMES, SGD, written
from tests.tiny import support_lines, support_rows, tiny_bert
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    lines = json.loads(made.file.read_text())
    lines |= {"data": "jsonl(train='own.jsonl')", "limits": {"rounds": 2}}
    made.file.write_text(json.dumps(lines))
    with ExitStack() as running:
        running.callback(made.control.close)
        running.enter_context(process(made.superlink(), made.env, tmp_path / "link.log"))
        running.callback(made.end)
        wait_until(made.answers)
        yield made


def test_a_site_trains_on_its_own_records_and_refuses_what_is_too_much(
    federation: Federation, tmp_path: Path
) -> None:
    """The adapter is that of a simulation, bit for bit; the server's log has the refusal."""
    rows = [{**row, "site": "a"} for row in support_rows()[0]]
    written(tmp_path / "own.jsonl", rows)
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    lines = support_lines(bert, task=NAMES, clients=None, correction="scaffold", trainer=SGD)
    test = str(bert.parent / "support.test.jsonl")
    own = {"data": f"sites(names='a', test={test!r})", "partition": None}
    pooled = {
        "data": f"jsonl(train={str(tmp_path / 'own.jsonl')!r}, test={test!r})",
        "partition": "by_field(field='site')",
    }
    federation.register()
    log = tmp_path / "client.log"
    client = federation.client(log)
    wait_until(lambda: b"joined: a is node " in log.read_bytes())
    said = log.read_text()
    assert f"records: {len(rows)} (text" in said
    run = federation.submit(Plan.from_lines(lines | own), wait=float(HANGS))
    ended = federation.end_of(run)
    assert ended == "completed", log.read_text() + (tmp_path / "link.log").read_text()
    simulated(Plan.from_lines(lines | pooled), tmp_path / "in-process")
    name = "adapter/adapter_model.safetensors"
    found = tmp_path / "server/runs" / str(run) / name
    assert found.read_bytes() == (tmp_path / "in-process" / name).read_bytes()
    longer = Plan.from_lines(lines | own | {"rounds": 3})
    run = federation.submit(longer, wait=float(HANGS))
    assert federation.end_of(run) != "completed"
    streamed = federation.control.StreamLogs(StreamLogsRequest(run_id=run))
    told = "".join(each.log_output for each in streamed)
    assert "1 of 1 clients are missing (a)" in told
    refusal = "a refuses this plan: rounds: 3, and the most here are 2"
    assert refusal in told
    assert refusal in log.read_text()
    assert stopped(client) == 0
