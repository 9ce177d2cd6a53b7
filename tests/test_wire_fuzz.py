"""Packets that no honest client sends: refused with a reason, or as good as any other."""

from __future__ import annotations

import resource

import pytest

from tests import fuzz_wire
from tests.fuzz_wire import SECONDS, Tally, cases, fuzz


def _sound(tally: Tally) -> None:
    """Nothing was raised but ``WireError``, or :func:`fuzz` would have."""
    assert tally.resealed >= tally.mutants / 2
    assert tally.slowest < SECONDS
    assert tally.largest <= 4
    assert 0 < tally.accepted < tally.mutants / 3
    decoders = ("coded symbols", "a mask", "array", "update is not finite", "level")
    for start in decoders:
        assert any(reason.startswith(start) for reason in tally.reasons), start


def test_the_cases_are_all_codecs() -> None:
    found = {case.spec for case in cases()}
    assert {"raw", "half", "int8", "topk", "topk(density=0.1) | int8"} <= found


def test_coverage_is_of_what_reads_a_packet_from_honest_packets_on() -> None:
    found = {function.__module__ for function in fuzz_wire.readers()}
    assert {"fedpeft.wire", "fedpeft.entropy", "fedpeft.admission", "fedpeft.codecs.topk"} <= found
    assert all(name.startswith(fuzz_wire.READERS) for name in found)
    each = cases()
    for case, seed in zip(each, fuzz_wire.seeds(each), strict=True):
        assert fuzz_wire.read(seed, each) == (case, case.honest)


def test_a_few_thousand_mutants() -> None:
    _sound(fuzz(3_000, seed=1))


@pytest.mark.slow
def test_a_hundred_thousand_mutants() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _sound(fuzz(100_000, seed=2))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB; what the coder itself allocates is seen by the system alone


def _breaks(case: fuzz_wire.Case, message: bytes) -> None:
    raise KeyError("none")


def test_what_is_no_wire_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_wire.Case, "admit", _breaks)
    case = next(case for case in cases() if case.spec == "raw")
    with pytest.raises(RuntimeError, match=r"raw, seed 0: KeyError\('none'\) for 6162"):
        fuzz_wire._batch(case, [(b"ab", True)], Tally(), 0)
