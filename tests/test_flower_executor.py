"""Processes for messages: forked from one that has imported Flower, started where that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import LaunchResult
from flwr.supercore.superexec.executor.types import ExecutionSpec

from fedpeft.errors import SiteError
from fedpeft.flower.executor import Forks, fork

TOKEN = "a-token-of-one-message"


def spec(task_type: TaskType = TaskType.CLIENT_APP, **changed: Any) -> ExecutionSpec:
    given: dict[str, Any] = {
        "task_type": task_type,
        "runtime_api_address": "127.0.0.1:1",
        "token": TOKEN,
        "insecure": True,
        "root_certificates_path": None,
        "runtime_dependency_install": False,
        "parent_pid": 2**22 + 1,  # no process: whoever looks for its parent ends
        "suppress_output": False,
        "task_id": 7,
    }
    return ExecutionSpec(**{**given, **changed})


class Other:
    """Flower's own executor, as far as it is asked."""

    def __init__(self) -> None:
        self.launched: list[ExecutionSpec] = []
        self.reconciled = 0

    def launch(self, given: ExecutionSpec) -> LaunchResult:
        self.launched.append(given)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        self.reconciled += 1


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def forked() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.name() == "flwr-clientapp"]


def test_a_message_gets_a_process_of_its_own_that_shows_no_token() -> None:
    other = Other()
    forks = Forks(other)
    assert forks.launch(spec()) == LaunchResult.accepted()
    wait_until(forked)
    (process,) = forked()
    assert TOKEN not in " ".join(process.cmdline())
    wait_until(lambda: not psutil.pid_exists(process.pid))
    forks.reconcile()
    assert other.reconciled == 1
    assert not other.launched


@pytest.mark.parametrize(
    "given",
    [spec(TaskType.SERVER_APP), spec(runtime_dependency_install=True)],
    ids=["another task", "dependencies"],
)
def test_what_is_no_plain_message_is_flowers(given: ExecutionSpec) -> None:
    other = Other()
    assert Forks(other).launch(given) == LaunchResult.accepted()
    assert other.launched == [given]


def test_where_nothing_can_be_forked_a_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other()
    forks = Forks(other)

    def fails(**_: Any) -> Any:
        raise ConnectionRefusedError("the fork server was killed")

    monkeypatch.setattr(forks, "_context", SimpleNamespace(Process=fails))
    assert forks.launch(spec()) == LaunchResult.accepted()
    assert other.launched == [spec()]


def test_superexec_gets_it_from_flowers_own_maker() -> None:
    flower = SimpleNamespace(get_executor=getattr(run_superexec, "get_executor", None))
    fork(flower)
    made = flower.get_executor(ExecutorType.SUBPROCESS, executor_config=None)
    assert isinstance(made, Forks)
    capacity = made.get_eligible_capacity({TaskType.CLIENT_APP}, insecure=True)
    assert capacity == ({TaskType.CLIENT_APP}, set())
    made.close()


def test_a_flower_that_is_not_known_is_refused() -> None:
    with pytest.raises(SiteError, match=r"install flwr 1\.41"):
        fork(SimpleNamespace())
