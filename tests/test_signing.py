"""Signed runs: any other line, key, app or signature than what an owner signed is refused."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import cli, durable
from fedpeft.deployment import certificates, signing
from fedpeft.deployment.signing import FREE, OWN, make_owner, owner_of, sign, verify
from fedpeft.errors import RunError, SiteError
from fedpeft.flower.config import Settings

APP = signing.hash_of(b"the bundle")
CONFIG: dict[str, Any] = {
    "model": "minilm",
    "adapter": "lora(r=8)",
    "rounds": 12,
    "clients": 3,
    "wait": 120.0,
    "resume": False,
    "out": "",
    "preset": "",
}

scalars = (
    st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, width=64)
).filter(lambda value: value not in (float("inf"), float("-inf")))
configs = st.dictionaries(st.text(max_size=6), scalars, max_size=6)


def kind_and_value(value: Any) -> tuple[type, str]:
    return type(value), repr(value)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "certs"
    for name in ("alice", "bob"):
        make_owner(folder, name)
    return folder


def key(certs: Path, name: str = "alice") -> Path:
    return certs / "owners" / name / "owner.key"


def pub(certs: Path, name: str = "alice") -> Path:
    return certs / "owners" / name / "owner.pub"


def signed(
    certs: Path, config: dict[str, Any], name: str = "alice", app: str = APP
) -> dict[str, Any]:
    return {
        **config,
        **dict(zip(("signer", "signature"), sign(key(certs, name), config, app), strict=True)),
    }


# --- keys ----------------------------------------------------------------------------------------


def test_a_key_is_its_owners_alone_and_openssh_reads_it(certs: Path) -> None:
    for path in (certs, *certs.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    kind, _, name = pub(certs).read_text().split()
    assert (kind, name) == ("ssh-ed25519", "alice")
    if shutil.which("ssh-keygen"):
        told = subprocess.run(
            ["ssh-keygen", "-l", "-f", pub(certs)], capture_output=True, text=True, check=True
        )
        assert owner_of(pub(certs)) == f"alice ({told.stdout.split()[1]})"


def test_a_key_of_ssh_keygen_signs_too(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    own = tmp_path / "id"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "carol of A", "-f", own], check=True
    )
    signer, signature = sign(own, CONFIG, APP)
    verify({**CONFIG, "signer": signer, "signature": signature}, APP, [tmp_path / "id.pub"])
    assert owner_of(tmp_path / "id.pub").startswith("carol of A (SHA256:")


def test_no_key_is_overwritten(certs: Path) -> None:
    before = {p: p.read_bytes() for p in certs.rglob("*") if p.is_file()}
    with pytest.raises(SiteError, match="alice has a key; choose another name"):
        make_owner(certs, "alice")
    for bad in ("../x", "A", "", "a b"):
        with pytest.raises(SiteError, match=r"--owner .* is no name of an owner"):
            make_owner(certs, bad)
    assert {p: p.read_bytes() for p in certs.rglob("*") if p.is_file()} == before


def test_a_making_that_was_cut_short_keeps_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at each of the two files; the same command then ends it."""
    for at, left in ((0, []), (1, ["owner.key"])):
        count = iter(range(9))

        def create(path: Path, data: bytes, at: int = at, count: Any = count) -> None:
            if next(count) == at:
                raise RunError(f"{path}: cannot be written (No space left on device)")
            durable.create_file(path, data)

        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(signing, "create_file", create)
            with pytest.raises(RunError, match="No space left"):
                make_owner(folder, "alice")
        found = [p.name for p in (folder / "owners" / "alice").iterdir()]
        assert found == left
        before = key(folder).read_bytes() if left else b""
        make_owner(folder, "alice")
        assert key(folder).read_bytes() == (before or key(folder).read_bytes())
        verify(signed(folder, CONFIG), APP, [pub(folder)])


def test_the_command_makes_an_owner_alone_or_with_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fedpeft(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", "certs", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    alone, whole = tmp_path / "alone", tmp_path / "whole"
    assert fedpeft("--owner", "alice", "--out", alone)[0] == 0
    assert sorted(p.name for p in alone.rglob("*") if p.is_file()) == ["owner.key", "owner.pub"]
    code, _, err = fedpeft("--owner", "alice", "--out", alone)
    assert (code, err.count("\n")) == (2, 1)
    line = ("--server", "localhost", "--sites", "a", "--owner", "bob", "--out", whole)
    code, said, _ = fedpeft(*line)
    assert (code, len(said.splitlines())) == (0, 4)
    (whole / "ca.key").rename(tmp_path / "away")
    assert fedpeft("--owner", "carol", "--out", whole)[0] == 0
    assert fedpeft("--probe", "h:1", "--owner", "dave", "--out", whole)[0] == 2


@pytest.mark.parametrize("use", [lambda p: sign(p, CONFIG, APP), owner_of])
def test_keys_of_other_kinds_are_refused(
    use: Callable[[Path], Any], certs: Path, tmp_path: Path
) -> None:
    others = tmp_path / "certs"
    assert list(certificates.make(others, ["localhost"], ["a"], 30))
    (tmp_path / "rubbish").write_bytes(b"\xff\x00 no key")
    files = ["certs/sites/a/site.key", "certs/server/sites/a.pub", "certs/ca.key", "certs/ca.crt"]
    wrong = [*(tmp_path / name for name in (*files, "rubbish")), key(certs), pub(certs)]
    wrong.remove(pub(certs) if use is owner_of else key(certs))
    for path in wrong:
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
        with pytest.raises(SiteError, match=r"copy: is no owner's"):
            use(copy)
    with pytest.raises(SiteError, match="no such file"):
        use(tmp_path / "none")


def test_a_key_that_others_can_read_or_with_a_passphrase_does_not_sign(
    certs: Path, tmp_path: Path
) -> None:
    open_to_all = tmp_path / "owner.key"
    shutil.copy(key(certs), open_to_all)
    open_to_all.chmod(0o644)
    with pytest.raises(SiteError, match="chmod 600"):
        sign(open_to_all, CONFIG, APP)
    if shutil.which("ssh-keygen"):
        own = tmp_path / "id"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", own], check=True)
        with pytest.raises(SiteError, match="no passphrase"):
            sign(own, CONFIG, APP)


# --- signatures ----------------------------------------------------------------------------------


@given(configs, st.binary())
def test_what_an_owner_signed_is_taken(certs: Path, config: dict[str, Any], app: bytes) -> None:
    whole = signed(certs, config, app=signing.hash_of(app))
    verify(whole, signing.hash_of(app), [pub(certs, "bob"), pub(certs)])
    verify(dict(reversed(whole.items())), None, [pub(certs)])  # whoever has no bundle at hand
    assert signed(certs, whole, app=signing.hash_of(app)) == whole  # signing again changes nothing


@given(configs, configs)
def test_any_other_run_is_refused(certs: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    whole = signed(certs, one)
    changed = {**other, "signer": whole["signer"], "signature": whole["signature"]}

    def covered(config: dict[str, Any]) -> dict[str, Any]:
        return {k: kind_and_value(v) for k, v in config.items() if k not in (*OWN, *FREE)}

    if covered(changed) == covered(whole):
        verify(changed, APP, [pub(certs)])
    else:
        with pytest.raises(SiteError, match="a line was changed afterwards"):
            verify(changed, APP, [pub(certs)])


@given(configs.filter(bool), st.data())
def test_any_change_of_any_line_is_refused(
    certs: Path, config: dict[str, Any], data: st.DataObject
) -> None:
    config = {k: v for k, v in config.items() if k not in (*OWN, *FREE)} or {"rounds": 1}
    whole = signed(certs, config)
    line = data.draw(st.sampled_from(sorted(config)))
    value = data.draw(scalars.filter(lambda v: kind_and_value(v) != kind_and_value(config[line])))
    without = {k: v for k, v in whole.items() if k != line}
    renamed = {**without, line + "x": config[line]}
    for changed in ({**whole, line: value}, without, renamed, {**whole, line + "x": value}):
        with pytest.raises(SiteError, match="a line was changed afterwards"):
            verify(changed, APP, [pub(certs)])


@pytest.mark.parametrize(("value", "like"), [(1, True), (1, 1.0), (0, False), ("1", 1), ("", 0)])
def test_values_that_only_look_alike_differ(certs: Path, value: Any, like: Any) -> None:
    with pytest.raises(SiteError, match="a line was changed"):
        verify({**signed(certs, {"rounds": value}), "rounds": like}, APP, [pub(certs)])


def test_every_setting_but_where_the_server_keeps_a_run_is_signed(certs: Path) -> None:
    whole = signed(certs, CONFIG)
    verify({**whole, "resume": True, "out": "/srv/run"}, APP, [pub(certs)])
    others: dict[str, Any] = {"threads": 2, "device": "cuda", "wait": 1.0, "deadline": 5.0}
    others |= {"every": True, "run": "another"}
    assert {*others, *FREE, *OWN} == set(Settings.__dataclass_fields__)
    for name, value in others.items():
        with pytest.raises(SiteError, match="a line was changed"):
            verify({**whole, name: value}, APP, [pub(certs)])


@given(app=st.binary())
def test_another_app_is_refused(certs: Path, app: bytes) -> None:
    other = signing.hash_of(app)
    with pytest.raises(SiteError, match=r"the app \(SHA-256 .*\) is not the one that alice signed"):
        verify(signed(certs, CONFIG), other, [pub(certs)])
    pretending = signed(certs, CONFIG)
    pretending["signature"] = other + pretending["signature"][64:]
    for hash in (other, None):
        with pytest.raises(SiteError, match="is not the one that alice signed"):
            verify(pretending, hash, [pub(certs)])


def test_nobody_strangers_and_swapped_signatures_are_refused(certs: Path) -> None:
    owners = [pub(certs)]
    with pytest.raises(SiteError, match=r"is not signed, .* its owners sign \(alice\); submit it"):
        verify(CONFIG, APP, owners)
    for name in OWN:
        with pytest.raises(SiteError, match="is not signed"):
            verify({**signed(certs, CONFIG), name: ""}, APP, owners)
    with pytest.raises(SiteError, match=r"signed by SHA256:.*, none of this site's owners \(ali"):
        verify(signed(certs, CONFIG, "bob"), APP, owners)
    with pytest.raises(SiteError, match="none of this site's owners"):
        verify(signed(certs, CONFIG), APP, [])
    one, other = signed(certs, CONFIG), signed(certs, CONFIG, "bob")
    for mixed in (one | {"signature": other["signature"]}, one | {"signer": other["signer"]}):
        with pytest.raises(SiteError, match="is not the one that"):
            verify(mixed, APP, [pub(certs), pub(certs, "bob")])
    later = signed(certs, {**CONFIG, "rounds": 99})
    with pytest.raises(SiteError, match="a line was changed"):
        verify({**one, "signature": later["signature"]}, APP, owners)


@given(st.data())
def test_a_signature_with_any_character_changed_or_missing_is_refused(
    certs: Path, data: st.DataObject
) -> None:
    whole = signed(certs, CONFIG)
    text = whole["signature"]
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.characters().filter(lambda c: c != text[at]))
    for bad in (text[:at], text[:at] + put + text[at + 1 :], text + put):
        with pytest.raises(SiteError):
            verify({**whole, "signature": bad}, APP, [pub(certs)])


def test_a_signature_made_for_something_else_is_none_of_a_run(certs: Path) -> None:
    """The signed bytes begin with what they are for."""
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    own: Any = load_ssh_private_key(key(certs).read_bytes(), None)
    whole = signed(certs, CONFIG)
    assert signing._canonical(CONFIG, APP).startswith(b"fedpeft run 1\n{")
    made = own.sign(signing._canonical(CONFIG, APP).partition(b"\n")[2])
    bad = f"{APP}:{base64.b64encode(made).decode()}"
    with pytest.raises(SiteError, match="a line was changed"):
        verify({**whole, "signature": bad}, APP, [pub(certs)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [1], b"x"])
def test_what_no_run_config_holds_is_not_signed(certs: Path, value: Any) -> None:
    with pytest.raises(SiteError):
        sign(key(certs), {"rounds": value}, APP)
    for app in ("", "abc", APP.upper(), APP + "\n"):
        with pytest.raises(SiteError, match="is no SHA-256"):
            sign(key(certs), CONFIG, app)


# --- at the trainer ------------------------------------------------------------------------------


def test_a_node_reads_nothing_of_a_plan_that_no_owner_signed(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.node import Node
    from fedpeft.warm.channel import Place

    (tmp_path / "booby.py").write_text("raise SystemExit('a stranger is in')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config: dict[str, Any] = {"model": "m", "task": "booby:Trap", "rounds": 1}
    file = tmp_path / "client.yaml"
    base = "{site: a, server: '127.0.0.1:1', insecure: true"
    file.write_text(f"{base}, owners: [{pub(certs)}]}}")
    monkeypatch.setenv("FEDPEFT_CLIENT", str(file))
    place = Place({**config, "signer": "", "signature": ""}, {})
    asks: list[Callable[[], Any]] = [
        lambda: Node().hello(place),
        lambda: Node().train(place, "a", b""),
        lambda: Node().evaluate(place, "a", b""),
    ]
    for ask in asks:
        with pytest.raises(SiteError, match=r"is not signed, .* its owners sign \(alice\)"):
            ask()
    with pytest.raises(SiteError, match="a line was changed"):
        Node().hello(Place({**signed(certs, config), "rounds": 2}, {}))
    with pytest.raises(RunError, match="booby is none of the modules from which plans may take"):
        Node().hello(Place(signed(certs, config), {}))
    file.write_text(f"{base}, owners: [{pub(certs)}], limits: {{modules: [booby]}}}}")
    with pytest.raises(SystemExit, match="a stranger is in"):  # signed and allowed, it is read
        Node().hello(Place(signed(certs, config), {}))
    file.write_text("rubbish: [")
    with pytest.raises(SiteError):
        Node().hello(Place(signed(certs, config), {}))
