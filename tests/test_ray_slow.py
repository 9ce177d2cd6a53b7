"""The same plan on a Ray cluster of two nodes, each with a processor and an object store."""

from __future__ import annotations

import csv
import http.server
import io
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import simulate
from fedpeft.engine._actor import Code, sources
from fedpeft.engine.inline import Inline
from fedpeft.engine.ray import Ray
from fedpeft.errors import FedPeftError, PlanError, RunError
from fedpeft.sweep import command
from fedpeft.sweep.place import Place
from tests.test_processes import LOCAL, SGD, Told, failing, rounds, same
from tests.test_sweep import write
from tests.tiny import support_lines, support_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of two nodes with one processor each."""
    import ray
    from ray.cluster_utils import Cluster

    make: Any = Cluster

    store = 100 * 1024 * 1024
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make(
            initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store}
        )
        made.add_node(num_cpus=1, object_store_memory=store)
    try:
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.parametrize("personal", ["ditto", "tuned(steps=2)"])
def test_personal_adapters_move_with_their_clients(bert: Path, cluster: str, personal: str) -> None:
    plan = support_plan(bert, rounds=3, holdout=0.2, personal=personal)
    expected, found = simulate(plan), simulate(plan, engine=Ray(address=cluster))
    assert rounds(found) == rounds(expected)
    assert found.history[-1]["personal/loss"] == expected.history[-1]["personal/loss"]


def test_two_nodes_give_the_bits_of_one_process(bert: Path, tmp_path: Path, cluster: str) -> None:
    pids, told = tmp_path / "pids", Told()
    pids.mkdir()
    trainer = failing(how="kill", round=0.4, once=str(tmp_path / "once"), pids=str(pids))
    plan = support_plan(bert, rounds=3, **{**LOCAL, "trainer": trainer})
    engine = Ray(address=cluster)
    found = simulate(plan, out=tmp_path / "run", engine=engine, watch=told)
    assert len(list(pids.iterdir())) >= 2
    (warning,) = (text for text in told.warnings if "worker" in text)
    assert warning.startswith("a worker died (ActorDiedError: ")
    assert warning.endswith(" again")
    expected = simulate(plan)
    assert same(found.tensors, expected.tensors)
    assert rounds(found) == rounds(expected)
    assert told.records == sum(line["seen"] for line in found.history)
    memories = list((tmp_path / "run" / "memory").glob("client-*.safetensors"))
    assert len(memories) == 4


def test_a_group_of_actors_is_near(bert: Path, cluster: str) -> None:
    plan = support_plan(bert, trainer=SGD)
    found = simulate(plan, engine=Ray(address=cluster, workers=1, group=4)).tensors
    for name, value in simulate(plan).tensors.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_what_fails_is_one_line(bert: Path, cluster: str) -> None:
    plan = support_plan(bert, trainer=failing(how="raise"))
    with pytest.raises(RunError, match=r"a worker failed: KeyError: 'no such thing' \(failing.py"):
        simulate(plan, engine=Ray(address=cluster, workers=1))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_gpus": 1}, PlanError, r"ray\(num_gpus=1\) asks for more GPUs .* none has any"),
        ({"num_cpus": 2}, PlanError, r"ray\(num_cpus=2\) asks for more CPUs .* largest has 1"),
        ({"workers": 3}, PlanError, r"ray\(workers=3\) do not fit .* room for 2 of num_cpus=1"),
    ],
)
def test_a_cluster_that_has_too_little_is_named(
    bert: Path, cluster: str, fields: dict[str, Any], kind: type[FedPeftError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        simulate(support_plan(bert), engine=Ray(address=cluster, **fields))


def test_whole_runs_of_a_sweep_on_two_nodes(bert: Path, tmp_path: Path, cluster: str) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    lines = support_lines(bert, rounds=2, trainer=SGD)
    kill = failing(how="kill", round=0.4, once=str(tmp_path / "once"), pids=str(pids))
    trainers = {"plain": {"trainer": SGD}, "killed": {"trainer": kill}}
    path = write(tmp_path, plan=lines, axes={"how": trainers}, seeds=[0, 1])
    engine = Ray(address=cluster)

    def played(out: Path) -> list[dict[str, str]]:
        command.sweep(path, out, Place("ray", engine))
        return list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))

    there, here = tmp_path / "there", tmp_path / "here"
    table = played(there)
    assert sorted(line["status"] for line in table) == ["done", "done", "done", "failed"]
    assert [line["problem"][:15] for line in table if line["problem"]] == ["its worker died"]
    assert sorted(line["status"] for line in played(there)) == ["done", "kept", "kept", "kept"]
    assert len(list(pids.iterdir())) >= 2
    assert command.sweep(path, here, Place("inline", Inline()))
    for adapter in here.glob("*/adapter/adapter_model.safetensors"):
        assert adapter.read_bytes() == (there / adapter.relative_to(here)).read_bytes()


@pytest.mark.parametrize("where", ["nobody", "no Ray", "no address"])
def test_an_address_without_a_cluster_is_refused_soon(bert: Path, where: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = {"nobody": "127.0.0.1:9", "no address": "here", "no Ray": ""}[where]
        address = given or f"127.0.0.1:{server.server_port}"
        began = time.monotonic()
        with pytest.raises(RunError, match=f"no Ray cluster answers at {address}; start one"):
            simulate(support_plan(bert), engine=Ray(address=address))
        assert time.monotonic() - began < 15
        server.shutdown()


def test_without_an_address_a_ray_is_started_and_ended(bert: Path) -> None:
    import ray

    ray.shutdown()  # of the cluster above
    plan = support_plan(bert, trainer=SGD)
    found = simulate(plan, engine="ray(workers=1, threads=1)")
    assert same(found.tensors, simulate(plan).tensors)
    assert not ray.is_initialized()


def test_ray_that_is_not_installed_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r"pip install 'fedpeft\[simulation\]'"):
        simulate(support_plan(bert), engine="ray")


def test_modules_that_a_machine_lacks_come_with_the_plan(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = sources(support_plan(bert, trainer=failing()))
    assert list(sent) == ["tests.failing"]
    code = Code([], {"elsewhere.failing": sent["tests.failing"]})
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    monkeypatch.delitem(sys.modules, "elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere.failing", ModuleType("failing"))
    monkeypatch.delitem(sys.modules, "elsewhere.failing")
    code.install()
    from fedpeft.spec import build

    assert type(build("trainers", "elsewhere.failing:Failing")).__module__ == "elsewhere.failing"
