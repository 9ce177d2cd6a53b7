from __future__ import annotations

import socket

import pytest

from fedpeft.addresses import free_port, is_loopback, split_address
from fedpeft.errors import SiteError


def test_what_is_this_machine_alone() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.0.0.5", "fl.example.org", "localhost.example.org", ""):
        assert not is_loopback(host), host


def test_host_and_port() -> None:
    assert split_address("fl.example.org:9092") == ("fl.example.org", 9092)
    assert split_address("[::1]:1") == ("::1", 1)
    for wrong in ("fl.example.org", ":9092", "h:0", "h:65536", "h:²", "https://h"):
        with pytest.raises(SiteError, match="is no address; write HOST:PORT"):
            split_address(wrong)


def test_a_port_that_is_free() -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", free_port()))
