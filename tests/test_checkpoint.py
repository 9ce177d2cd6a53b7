from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest

from fedpeft.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedpeft.errors import RunError
from fedpeft.evaluation import Best
from fedpeft.folds import Fold
from fedpeft.last_updates import LastUpdates
from fedpeft.learned import Learned
from fedpeft.mirror import Mirror
from fedpeft.releases import Coins
from fedpeft.state import ServerState
from fedpeft.types import Flight, Tensors

DIGEST = "d" * 64


def checkpoint(round: int, value: float = 0.0) -> Checkpoint:
    params = {"b": np.full((2, 3), value, "f4"), "a": np.array(1.5, "f4")}
    fold = Fold({"m.fold_A": params["b"] + 2}, {0: (0,), round: (2,)})
    kept = {"m.fold_B": params["b"] + 3}
    once = {"m.lora_A.weight": params["b"] + 4}
    slots, control = {"m/b": np.ones((2, 3))}, {"b": -params["b"]}
    step = {"adapter": {"b": params["b"].astype("f2")}, "head": {"gaps": np.arange(3, dtype="u1")}}
    mirror = Mirror({"b": params["b"] + 5}, {round: step}, {round: 15})
    learned = Learned(("c", "d/e"), {"weight": np.array([0.1, 1 / 3]), "since": np.ones(2)})
    last = LastUpdates(("d/e", "c"), {"b": np.full((2, 3), 0.1)})
    past = {1: {"b": params["b"] + 6}, 2: {"b": params["b"] + 7}}
    known = {"c": 0}
    state = ServerState(
        params, slots, control, known, round, fold, kept, once, mirror, learned, last, past
    )
    state = dataclasses.replace(state, coins=Coins(bytes(range(32)), 0.1))
    flying = (Flight("c", 1, 0.1), Flight("d", 2, 1 / 3))
    best = Best(0.5, 1, 2), {"b": params["b"] + 1}
    turns = {"d": 1, "c": 2}
    return Checkpoint(state, *best, {"round": round - 1}, 2 / 3, flying, turns, "too few are left")


def same(a: Tensors, b: Tensors) -> bool:
    """Names, order, dtypes, shapes and bits."""
    return [(k, v.dtype, v.shape, v.tobytes()) for k, v in a.items()] == [
        (k, v.dtype, v.shape, v.tobytes()) for k, v in b.items()
    ]


def loaded(folder: Path) -> Checkpoint:
    found = load_checkpoint(folder, DIGEST)
    assert found is not None
    return found


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, DIGEST) is None
    assert load_checkpoint(tmp_path / "missing", DIGEST) is None


def test_all_of_the_state_comes_back(tmp_path: Path) -> None:
    before = checkpoint(3, 0.1)
    save_checkpoint(tmp_path, before, DIGEST)
    after = loaded(tmp_path)
    assert same(after.state.params, before.state.params)
    assert same(after.state.slots, before.state.slots)
    assert same(after.state.control, before.state.control)
    assert same(after.best_params, before.best_params)
    assert same(after.state.fold.tensors, before.state.fold.tensors)
    assert {t: tuple(ranks) for t, ranks in after.state.fold.ranks.items()} == {0: (0,), 3: (2,)}
    assert same(after.state.kept, before.state.kept)
    assert same(after.state.once, before.state.once)
    held, kept = after.state.mirror, before.state.mirror
    assert same(held.tensors, kept.tensors)
    assert (held.sizes, [*held.steps]) == ({3: 15}, [3])
    assert [*held.steps[3]] == ["adapter", "head"]
    assert all(same(held.steps[3][name], kept.steps[3][name]) for name in held.steps[3])
    assert after.state.last.clients == ("d/e", "c")
    assert same(after.state.last.total, before.state.last.total)
    assert after.state.learned.clients == ("c", "d/e")
    assert same(after.state.learned.scalars, before.state.learned.scalars)
    assert (after.state.acks, after.state.round) == ({"c": 0}, 3)
    assert (after.best, after.line) == (Best(0.5, 1, 2), {"round": 2})
    assert (after.clock, tuple(after.flying)) == (before.clock, before.flying)
    assert [*after.state.past] == [1, 2]
    assert all(same(after.state.past[at], before.state.past[at]) for at in (1, 2))
    assert after.state.coins == before.state.coins
    assert (after.turns, after.over) == ({"d": 1, "c": 2}, "too few are left")


def test_every_field_is_saved(tmp_path: Path) -> None:
    """A field that is added to the state and forgotten here would be lost on resume."""
    assert [f.name for f in dataclasses.fields(ServerState)] == [
        *("params", "slots", "control", "acks", "round", "fold", "kept", "once", "mirror"),
        *("learned", "last", "past", "coins"),
    ]
    assert [f.name for f in dataclasses.fields(Checkpoint)] == [
        *("state", "best", "best_params", "line", "clock", "flying", "turns", "over"),
        *("replied", "course"),
    ]
    assert [f.name for f in dataclasses.fields(Best)] == ["value", "round", "stale"]


def test_bits_survive_however_arrays_lie(tmp_path: Path) -> None:
    base = np.frombuffer(bytes(range(48)), "<f4").reshape(3, 4)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], "f4")
    params = {
        "t": base.T,
        "r": base[::-1],
        "odd": odd,
        "n": np.array(7, "i8"),
        "h": base.astype("f2"),
    }
    save_checkpoint(tmp_path, Checkpoint(ServerState(params, {}, {}, {}, 1)), DIGEST)
    after = loaded(tmp_path)
    assert same(after.state.params, params)
    assert (after.state.slots, after.state.control, after.best_params) == ({}, {}, {})
    assert math.isnan(after.best.value)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for round in range(1, 5):
        save_checkpoint(tmp_path, checkpoint(round), DIGEST)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("state-000003.safetensors", "state-000004.safetensors")
    ]
    assert loaded(tmp_path).state.round == 4


def test_without_the_newest_the_one_before_is_taken(tmp_path: Path) -> None:
    for round in (1, 2):
        save_checkpoint(tmp_path, checkpoint(round, round), DIGEST)
    (tmp_path / "state-000002.safetensors").unlink()
    assert same(loaded(tmp_path).state.params, checkpoint(1, 1).state.params)


def test_a_checkpoint_of_the_same_round_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, checkpoint(1, value), DIGEST)
    assert loaded(tmp_path).state.params["b"][0, 0] == 2


def test_what_a_kill_leaves_behind_is_not_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), DIGEST)
    (tmp_path / ".state-000002.safetensors.new").write_bytes(b"half")
    assert loaded(tmp_path).state.round == 1
    save_checkpoint(tmp_path, checkpoint(2), DIGEST)
    assert loaded(tmp_path).state.round == 2


@pytest.mark.parametrize("alone", [True, False])
def test_a_damaged_checkpoint_names_the_remedy(tmp_path: Path, alone: bool) -> None:
    for round in (2,) if alone else (1, 2):
        save_checkpoint(tmp_path, checkpoint(round), DIGEST)
    path = tmp_path / "state-000002.safetensors"
    whole = path.read_bytes()
    remedy = (
        "start again in another folder"
        if alone
        else "delete it to resume from state-000001.safetensors"
    )
    lengths = [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]
    broken = [whole[:length] for length in lengths]
    broken += [whole + b"x", whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"acks", b"akcs")]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(RunError, match=rf"state-000002.safetensors: .*damaged.*; {remedy}$"):
            load_checkpoint(tmp_path, DIGEST)
        assert path.read_bytes() == content
    if not alone:
        path.unlink()
        assert loaded(tmp_path).state.round == 1


def test_the_checksum_covers_the_numbers_and_the_state_around_them(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(2), DIGEST)
    path = tmp_path / "state-000002.safetensors"
    whole = path.read_bytes()
    for old, new in ((rb"\"round\": 2", rb"\"round\": 1"), (rb"{\"c\": 0}", rb"{\"c\": 1}")):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(RunError, match="checksum does not match"):
            load_checkpoint(tmp_path, DIGEST)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), DIGEST)
    with pytest.raises(RunError, match="belongs to another plan; start again in another folder"):
        load_checkpoint(tmp_path, "e" * 64)


def test_a_checkpoint_with_secrets_is_its_owner_s_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        (tmp_path / ".state-000001.safetensors.new").write_bytes(b"half")
        for round, coins in ((1, Coins(b"k" * 32, 1.0)), (2, Coins())):
            state = dataclasses.replace(checkpoint(round).state, coins=coins)
            save_checkpoint(tmp_path, Checkpoint(state), DIGEST)
    finally:
        os.umask(old)
    modes = [p.stat().st_mode & 0o777 for p in sorted(tmp_path.glob("state-*"))]
    assert modes == [0o600, 0o666]
