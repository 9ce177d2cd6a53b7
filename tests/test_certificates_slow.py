"""Real Flower processes with the keys and certificates that ``fedpeft certs`` makes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedpeft.addresses import free_port
from fedpeft.deployment import certificates, handshake
from fedpeft.errors import SiteError
from fedpeft.flower.environment import quiet


def eventually(is_so: Callable[[], bool], seconds: float = 120.0) -> bool:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def process(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as told:
        made = subprocess.Popen(command, env=env, stdout=told, stderr=told, cwd=log.parent)
    try:
        yield made
    finally:
        made.terminate()
        try:
            made.wait(30)
        except subprocess.TimeoutExpired:
            made.kill()
            made.wait(30)


@pytest.mark.slow
def test_a_known_site_joins_over_tls_and_an_unknown_one_does_not(tmp_path: Path) -> None:
    certs, port, home = tmp_path / "certs", free_port(), tmp_path / "flwr"
    assert list(certificates.make(certs, ["fl.example.org"], ["a", "b"], 30))
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f'address = "localhost:{port}"\nroot-certificates = "{certs / "ca.crt"}"\n'
    )
    env = quiet(FLWR_HOME=str(home))

    def flwr(*arguments: str) -> str:
        command = ["flwr", "supernode", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def there() -> bool:
        try:
            handshake.probe("localhost", port, certs / "sites" / "a" / "ca.crt")
        except SiteError:
            return False
        return True

    server = certs / "server"
    superlink = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    superlink += ["--enable-supernode-auth", "--database", str(tmp_path / "state.db")]
    superlink += ["--ssl-ca-certfile", str(server / "ca.crt")]
    superlink += ["--ssl-certfile", str(server / "server.crt")]
    superlink += ["--ssl-keyfile", str(server / "server.key")]

    def supernode(site: str) -> list[str]:
        keys = certs / "sites" / site
        command = ["flower-supernode", "--superlink", f"localhost:{port}"]
        command += ["--root-certificates", str(keys / "ca.crt"), "--port", str(free_port())]
        return [*command, "--auth-supernode-private-key", str(keys / "site.key")]

    with ExitStack() as running:
        running.enter_context(process(superlink, env, tmp_path / "superlink.log"))
        assert eventually(there), (tmp_path / "superlink.log").read_text()
        flwr("register", str(server / "sites" / "a.pub"), "here", "--name", "a")
        logs = {site: tmp_path / f"{site}.log" for site in "ab"}
        nodes = {s: running.enter_context(process(supernode(s), env, logs[s])) for s in "ab"}
        assert eventually(lambda: "SuperNode ID" in logs["a"].read_text()), logs["a"].read_text()
        assert eventually(lambda: nodes["b"].poll() is not None), logs["b"].read_text()
        assert "Failed to activate SuperNode" in logs["b"].read_text()
        assert nodes["a"].poll() is None
        (known,) = json.loads(flwr("list", "here", "--format", "json"))["nodes"]
        assert known["status"] == "online"
