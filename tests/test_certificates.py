"""Keys and certificates: what is made is what TLS and Flower take, and nothing is overwritten."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpeft import cli, durable
from fedpeft.addresses import split_address
from fedpeft.deployment import certificates, files, handshake
from fedpeft.deployment.names import check_hosts
from fedpeft.errors import FedPeftError, RunError, SiteError

Run = Callable[..., tuple[int, str, str]]


def made(folder: Path, server: str = "fl.example.org", sites: str = "a,b", days: int = 30) -> Path:
    hosts, names = server.split(",") if server else [], sites.split(",") if sites else []
    assert list(certificates.make(folder, hosts, names, days))
    return folder


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    return made(tmp_path / "certs")


@pytest.fixture
def fedpeft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@contextmanager
def serving(server: Path, secured: bool = True) -> Iterator[int]:
    """A server that shakes hands with whoever comes; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    with socket.create_server(("", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    opened, _ = listening.accept()
                except OSError:
                    return
                with opened:
                    try:
                        if not secured:
                            opened.recv(1)
                            opened.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                            continue
                        with context.wrap_socket(opened, server_side=True) as shaken:
                            shaken.recv(1)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_what_is_made_and_who_may_read_it(certs: Path) -> None:
    site = {"ca.crt", "site.key"}
    assert set(contents(certs)) == {
        *("ca.crt", "ca.key", "server/ca.crt", "server/server.crt", "server/server.key"),
        *("server/sites/a.pub", "server/sites/b.pub"),
        *(f"sites/{name}/{file}" for name in "ab" for file in site),
    }
    for path in (certs, *certs.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_openssl_agrees(certs: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    command += ["-CAfile", str(certs / "ca.crt"), "-verify_hostname", "fl.example.org"]
    done = subprocess.run(
        [*command, str(certs / "server" / "server.crt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_site_shakes_hands_with_the_server(certs: Path, name: str) -> None:
    with serving(certs / "server") as port:
        good = handshake.probe(name, port, certs / "sites" / "a" / "ca.crt")
    left = good - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


def test_flower_takes_the_keys(certs: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    key = load_ssh_private_key((certs / "sites" / "a" / "site.key").read_bytes(), None)
    public = key.public_key()
    assert uses_nist_ec_curve(public)  # type: ignore[arg-type]
    known = try_load_public_key(certs / "server" / "sites" / "a.pub")
    assert known == public_key_to_bytes(public)  # type: ignore[arg-type]
    assert known != try_load_public_key(certs / "server" / "sites" / "b.pub")


def test_a_site_is_added_and_nothing_else_changes(certs: Path) -> None:
    before = contents(certs)
    made(certs, server="", sites="c")
    after = contents(certs)
    new = {"server/sites/c.pub", "sites/c/ca.crt", "sites/c/site.key"}
    assert set(after) - set(before) == new
    assert {name: after[name] for name in before} == before
    assert after["sites/c/ca.crt"] == before["ca.crt"]


def test_a_server_is_made_again_by_the_same_authority(certs: Path, tmp_path: Path) -> None:
    (certs / "server").rename(tmp_path / "old")
    made(certs, server="127.0.0.2,new.example.org", sites="")
    found = files.load_certificate(certs / "server" / "server.crt")
    names = ["127.0.0.2", "new.example.org", "localhost", "127.0.0.1", "::1"]
    assert files.names_in(found) == names
    found.verify_directly_issued_by(files.load_certificate(certs / "ca.crt"))


@pytest.mark.parametrize(
    ("server", "sites", "days", "reason"),
    [
        ("fl.example.org", "", 30, "has a certificate for fl.example.org.*good until 20"),
        ("", "a", 30, "site a has a key; delete"),
        ("", "c,b", 30, "site b has a key"),
        ("", "", 30, "nothing to make"),
        ("", "c,c", 30, "c is there twice"),
        ("", "../c", 30, "no name of a site"),
        ("", "C", 30, "no name of a site"),
        ("", "c", 0, "--days 0 must be at least 1"),
        ("https://fl.example.org", "", 30, "without scheme and port"),
        ("fl.example.org:9092", "", 30, "without scheme and port"),
        ("10.0.0.256", "", 30, "no name of a host and no address"),
    ],
)
def test_refusals_change_nothing(
    certs: Path, server: str, sites: str, days: int, reason: str
) -> None:
    before = contents(certs)
    with pytest.raises(SiteError, match=reason):
        made(certs, server, sites, days)
    assert contents(certs) == before


def test_sites_need_an_authority_and_the_servers_folder(certs: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="holds no authority"):
        made(tmp_path / "other", server="", sites="a")
    assert not (tmp_path / "other").exists()
    (certs / "server").rename(tmp_path / "gone")
    with pytest.raises(SiteError, match="put it back"):
        made(certs, server="", sites="c")


def test_an_authority_that_others_can_read_is_not_used(certs: Path, tmp_path: Path) -> None:
    (certs / "server").rename(tmp_path / "old")
    (certs / "ca.key").chmod(0o640)
    with pytest.raises(SiteError, match=r"mode 640, readable.*chmod 600"):
        made(certs, server="new.example.org", sites="")
    (certs / "ca.key").chmod(0o600)
    certs.chmod(0o755)
    with pytest.raises(RunError, match="others may enter it; say chmod 700"):
        made(certs, server="new.example.org", sites="")


def test_a_certificate_outlives_no_authority(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (certs / "server").rename(tmp_path / "old")
    late = certificates._now() + datetime.timedelta(days=3600)
    monkeypatch.setattr(certificates, "_now", lambda: late)
    with pytest.raises(SiteError, match="its authority is good for 49 days more"):
        made(certs, server="new.example.org", sites="", days=100)


def test_a_making_that_was_cut_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at each file in turn; the same command then ends, or says what to delete."""
    for at in range(8):
        folder, count = tmp_path / str(at), iter(range(100))

        def create(path: Path, data: bytes, at: int = at, count: Iterator[int] = count) -> None:
            if next(count) == at:
                raise RunError(f"{path}: cannot be written (No space left on device)")
            durable.create_file(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(certificates, "create_file", create)
            with pytest.raises(RunError, match="No space left"):
                made(folder, sites="a")
        if at < 5:  # the authority and the server's certificate
            made(folder, sites="a")
        else:
            with pytest.raises(SiteError, match="site a has a key; delete"):
                made(folder, server="", sites="a")
            shutil.rmtree(folder / "sites" / "a")
            (folder / "server" / "sites" / "a.pub").unlink(missing_ok=True)
            made(folder, server="", sites="a")
        assert len(contents(folder)) == 8


def test_an_authority_whose_key_was_put_away_is_not_made_again(certs: Path, tmp_path: Path) -> None:
    """Sites believe the one that they were given; another would lock them all out."""
    (certs / "ca.key").rename(tmp_path / "ca.key")
    made(certs, server="", sites="c")  # a site needs no signature
    (certs / "server").rename(tmp_path / "server")
    before = contents(certs)
    with pytest.raises(SiteError, match=r"ca.key: is not here; put it back"):
        made(certs, server="new.example.org", sites="")
    made(tmp_path / "other", sites="a")
    shutil.copy(tmp_path / "other" / "ca.key", certs)
    with pytest.raises(SiteError, match=r"is not the key of ca.crt"):
        made(certs, server="new.example.org", sites="")
    (certs / "ca.key").unlink()
    assert contents(certs) == before


def test_a_certificate_that_is_gone_is_made_again_for_the_same_key(
    certs: Path, tmp_path: Path
) -> None:
    keys = [certs / "ca.key", certs / "server" / "server.key"]
    before = [path.read_bytes() for path in keys]
    for gone in ("ca.crt", "server/ca.crt", "server/server.crt"):
        (certs / gone).unlink()
    made(certs, server="localhost", sites="")
    assert [path.read_bytes() for path in keys] == before
    with serving(certs / "server") as port:  # by the authority that the site was given before
        handshake.probe("localhost", port, certs / "sites" / "a" / "ca.crt")


def test_the_servers_copy_of_another_authority_stays(certs: Path, tmp_path: Path) -> None:
    made(tmp_path / "other", sites="a")
    (certs / "server" / "server.crt").unlink()
    shutil.copy(tmp_path / "other" / "ca.crt", certs / "server")
    before = contents(certs)
    with pytest.raises(SiteError, match="is another authority's; move it away"):
        made(certs, server="new.example.org", sites="")
    assert contents(certs) == before


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "f"
    durable.create_file(path, b"one")
    with pytest.raises(RunError, match="exists, and is not overwritten"):
        durable.create_file(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_wrong_authority_name_time_and_no_tls_are_told_in_a_line(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = certs / "ca.crt"
    other = made(tmp_path / "other")

    def told(host: str, port: int, authority: Path) -> str:
        with pytest.raises(SiteError) as error:
            handshake.probe(host, port, authority, 5.0)
        assert "\n" not in str(error.value)
        return str(error.value)

    with serving(certs / "server") as port:
        assert "is not of the authority in" in told("127.0.0.1", port, other / "ca.crt")
        assert "is for other addresses" in told("127.0.0.2", port, ca)
        missing = told("127.0.0.1", port, tmp_path / "none.crt")
        assert "no such file; see fedpeft certs" in missing
        (tmp_path / "no.crt").write_text("no certificate")
        assert "is no certificate (PEM)" in told("127.0.0.1", port, tmp_path / "no.crt")
    assert "cannot be reached (Connection refused)" in told("127.0.0.1", port, ca)
    with serving(certs / "server", secured=False) as port:
        assert "answers without TLS" in told("127.0.0.1", port, ca)

    now = certificates._now()
    for name, days, word in [("old", -40, "is over"), ("new", 40, "is not good yet")]:
        monkeypatch.setattr(certificates, "_now", lambda d=days: now + datetime.timedelta(days=d))
        when = made(tmp_path / name, sites="")
        with serving(when / "server") as port:
            assert word in told("127.0.0.1", port, when / "ca.crt")


def test_the_command(fedpeft: Run, tmp_path: Path) -> None:
    out = tmp_path / "certs"
    code, text, _ = fedpeft("certs", "--server", "fl.example.org", "--sites", "a, b", "--out", out)
    assert code == 0
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        str(out / name) for name in ("ca.key", "server", "sites/a", "sites/b")
    ]
    assert text.count("good until") == 2
    code, _, err = fedpeft("certs", "--sites", "a", "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    with serving(out / "server") as port:
        code, text, _ = fedpeft("certs", "--probe", f"localhost:{port}", "--out", out / "sites/b")
    assert (code, "the server of this authority" in text) == (0, True)
    assert fedpeft("certs", "--probe", "localhost", "--out", out)[0] == 2
    assert fedpeft("certs", "--probe", "localhost:1", "--sites", "c", "--out", out)[0] == 2


def test_addresses() -> None:
    assert split_address("fl.example.org:9092") == ("fl.example.org", 9092)
    assert split_address("[::1]:1") == ("::1", 1)
    for bad in ("fl.example.org", "h:0", "h:70000", ":1", "h:x", "h:²"):
        with pytest.raises(FedPeftError, match="is no address; write HOST:PORT"):
            split_address(bad)
    check_hosts(["a", "a-b.c", "10.0.0.5", "::1"])
