"""Which sites there are: read off files of keys, brought to Flower, told to server apps."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from fedpeft.deployment import certificates
from fedpeft.deployment.roster import ROSTER, enrol, read_keys, read_roster, write_roster
from fedpeft.errors import SiteError
from fedpeft.flower.control import Control, Site


class Link:
    """Registers sites as Flower's SuperLink does: a key that was taken back never comes again."""

    def __init__(self) -> None:
        self.known: dict[int, Site] = {}

    def sites(self) -> list[Site]:
        return list(self.known.values())

    def register(self, key: bytes, name: str) -> int:
        if any(site.key == key for site in self.known.values()):
            raise SiteError("key in use")
        node = 100 + len(self.known)
        self.known[node] = Site(node, name, "registered", key, 0.0)
        return node

    def unregister(self, node: int) -> None:
        old = self.known[node]
        self.known[node] = Site(node, old.name, "unregistered", old.key, 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert list(certificates.make(tmp_path / "certs", ["fl.example.org"], ["a", "b"], 30))
    return tmp_path / "certs" / "server" / "sites"


def control(link: Link) -> Control:
    return cast(Control, link)


def test_sites_come_once_and_go(folder: Path) -> None:
    link = Link()
    roster, told = enrol(control(link), read_keys(folder))
    assert roster == {100: "a", 101: "b"}
    assert told == ["site a: registered", "site b: registered"]
    assert enrol(control(link), read_keys(folder)) == (roster, [])
    kept = (folder / "b.pub").read_bytes()
    (folder / "b.pub").unlink()
    assert enrol(control(link), read_keys(folder)) == (
        {100: "a"},
        ["site b: its key is taken back"],
    )
    assert link.known[101].state == "unregistered"
    (folder / "b.pub").write_bytes(kept)
    roster, told = enrol(control(link), read_keys(folder))
    assert roster == {100: "a"}
    assert told == ["site b: its key was taken back; make it another (fedpeft certs)"]


def test_a_file_that_was_renamed_renames_the_site(folder: Path) -> None:
    link = Link()
    enrol(control(link), read_keys(folder))
    (folder / "b.pub").rename(folder / "c.pub")
    assert enrol(control(link), read_keys(folder)) == ({100: "a", 101: "c"}, [])


def test_a_site_that_cannot_be_taken_in_does_not_keep_the_others_out(folder: Path) -> None:
    class Full(Link):
        def register(self, key: bytes, name: str) -> int:
            if name == "a":
                raise SiteError("no room")
            return super().register(key, name)

    roster, told = enrol(control(Full()), read_keys(folder))
    assert list(roster.values()) == ["b"]
    assert told[0] == "site a: cannot be registered (no room)"


def test_keys_that_are_none(folder: Path) -> None:
    (folder / "c.pub").write_bytes((folder / "a.pub").read_bytes())
    with pytest.raises(SiteError, match=r"c\.pub: is the key of a, too"):
        read_keys(folder)
    (folder / "c.pub").write_bytes(b"ssh-rsa nothing")
    with pytest.raises(SiteError, match=r"c\.pub: is no site's key"):
        read_keys(folder)


def test_the_roster_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROSTER, raising=False)
    assert read_roster() == {}
    big = {2**64 - 1: "a", 5: "b"}
    write_roster(tmp_path / "roster.json", big)
    monkeypatch.setenv(ROSTER, str(tmp_path / "roster.json"))
    assert read_roster() == big


@pytest.mark.parametrize("text", ["", "[]", '{"x": "a"}', None])
def test_who_is_who_is_not_guessed(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "roster.json").write_text(text)
    with pytest.raises(SiteError, match=r"roster\.json: is no roster of sites"):
        read_roster(tmp_path / "roster.json")
