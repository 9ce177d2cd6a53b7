"""``docs/tutorial.md``, as somebody would follow it."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedpeft.addresses import free_port
from tests.deployed import ROOT, environment
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", TEXT, re.DOTALL)
COMMAND = 'fedpeft() { python -m fedpeft "$@"; }\n'


def shell(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-ec", COMMAND + text],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


@contextmanager
def background(folder: Path, command: str) -> Iterator[Path]:
    """Run a command that stays; yield what it prints."""
    words = command.removesuffix("&").split()
    log = folder / f"{words[-1]}.log"
    with log.open("wb") as told:
        made = subprocess.Popen(
            ["python", "-m", *words], cwd=folder, env=environment(), stdout=told, stderr=told
        )
    try:
        yield log
    finally:
        made.send_signal(signal.SIGINT)
        try:
            made.wait(HANGS)
        finally:
            made.kill()
            made.wait()
    assert "Traceback" not in log.read_text()


def test_it_works_as_it_says(tmp_path: Path) -> None:
    port = f":{free_port()}"
    for kind, text in BLOCKS:
        if kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name, text
            (tmp_path / name[1]).write_text(text.replace(":9092", port))
    certs, records, processes, run, own = (text for kind, text in BLOCKS if kind == "bash")
    for text in (certs, records):
        done = shell(tmp_path, text)
        assert done.returncode == 0, done.stderr
    with ExitStack() as going:
        server, *clients = (
            going.enter_context(background(tmp_path, line)) for line in processes.splitlines()
        )
        wait_until(lambda: "2 sites: a, b" in server.read_text())
        wait_until(lambda: all("joined: " in log.read_text() for log in clients))
        done = shell(tmp_path, run)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "run plan has finished" in done.stdout
        assert re.search(r"^a +online +\d+ s ago$", done.stdout, re.MULTILINE), done.stdout
        assert re.search(r"^plan +finished +3 of 3 ", done.stdout, re.MULTILINE), done.stdout
        adapter = tmp_path / "server" / "runs" / "plan" / "adapter"
        assert (adapter / "adapter_model.safetensors").exists()

        gained = shell(tmp_path, own)
        assert gained.returncode == 0, gained.stderr
        assert "| this site alone " in gained.stdout
        (kept,) = (tmp_path / "site-a" / "results").iterdir()
        model = "adapter/adapter_model.safetensors"
        assert (kept / model).read_bytes() == (adapter.parent / model).read_bytes()

        unsigned = shell(tmp_path, "fedpeft submit plan.yaml")
        assert unsigned.returncode == 1
        assert "the run is not signed" in unsigned.stdout
        (beyond,) = re.findall(r"`(fedpeft submit plan\.yaml rounds=20 [^`]*)`", TEXT)
        refused = shell(tmp_path, beyond)
        assert refused.returncode == 1
        assert "the most here are 10" in refused.stdout, refused.stdout
