"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny

if TYPE_CHECKING:
    from tests.killing import Runs


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # a machine that others use as well is slow at times, which is no fault of what is tested
    settings.register_profile(
        "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised data out of the user's cache, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT's folder."""
    return tiny.tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's folder."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def runs(bert: Path) -> Iterator[Runs]:
    """The process whose children are killed: one for all tests, since it imports for seconds."""
    from tests.killing import Runs

    with Runs(bert) as made:
        yield made


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the shared data; skip where it is absent, but never in CI."""
    root = Path(os.environ.get("FEDPEFT_DATA", "../shared/data"))

    def find(name: str) -> Path:
        if not (root / name).exists() and "CI" not in os.environ:
            pytest.skip(f"{root / name} is not here")
        return root / name

    return find


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Server and clients share this process but, as in real life, no base model."""
    import torch

    import client.app
    from fedpeft.models import _base

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    for module in ("grid", "nodes"):
        monkeypatch.setattr(f"fedpeft.flower.{module}.SLEEP", (0.0, 0.001))
    yield
    client.app.forget()
    torch.set_num_threads(threads)
