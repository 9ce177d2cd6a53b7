from __future__ import annotations

import pickle
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.errors import RunError
from fedpeft.memory import NEVER, InProcess, Memory, OnDisk
from fedpeft.types import Tensors


def named(value: float) -> Tensors:
    return {"local/head": np.array([value], "f4")}


def value(tensors: Tensors) -> float | None:
    return float(tensors["local/head"][0]) if tensors else None


def test_nothing_holds_before_the_first_acknowledgement() -> None:
    assert Memory().at(NEVER, "c") == {}
    assert Memory().after(NEVER, 0, named(0)).at(NEVER, "c") == {}


def test_a_version_holds_once_it_is_acknowledged() -> None:
    memory = Memory().after(NEVER, 0, named(0)).after(0, 2, named(2))
    assert value(memory.at(0, "c")) == 0
    assert value(memory.at(2, "c")) == 2


def test_a_round_that_is_played_again_starts_from_the_same() -> None:
    before = Memory().after(NEVER, 0, named(0)).after(0, 2, named(2))
    once = before.after(2, 3, named(3))
    twice = once.after(2, 3, named(3.5))
    assert value(once.at(2, "c")) == value(twice.at(2, "c")) == 2
    assert value(twice.at(3, "c")) == 3.5
    assert sorted(twice.versions) == sorted(once.versions)


def test_a_reply_that_was_lost_is_forgotten() -> None:
    memory = Memory().after(NEVER, 0, named(0)).after(0, 1, named(1)).after(0, 2, named(2))
    assert sorted(memory.versions) == [0, 2]


def test_at_most_three_versions_are_kept() -> None:
    memory = Memory()
    for round in range(9):
        memory = memory.after(round - 1, round, named(round))
    assert sorted(memory.versions) == [6, 7, 8]


def test_another_history_is_refused() -> None:
    memory = Memory().after(NEVER, 4, named(4))
    message = (
        r"client anna: the server knows round 3, its memory holds \[4\]; "
        "restore the client's memory or start a new run"
    )
    with pytest.raises(RunError, match=message):
        memory.at(3, "anna")
    with pytest.raises(RunError, match=r"knows round 0, its memory holds \[\]"):
        Memory().at(0, "anna")


@given(st.lists(st.sampled_from(["used", "lost", "absent", "killed", "back"])))
def test_a_server_may_die_in_a_round_and_go_back_one_checkpoint(events: list[str]) -> None:
    """The memory agrees with a server that keeps the whole history of every checkpoint."""
    memory, round, written = Memory(), 0, 0.0
    checkpoints: list[tuple[int, int, float | None]] = [(0, NEVER, None)]  # round, ack, value
    for event in events:
        round, ack, expected = checkpoints[-1]
        assert value(memory.at(ack, "c")) == expected
        if event == "back":
            checkpoints = checkpoints[-2:-1] or checkpoints
            continue
        if event != "absent":
            written += 1
            memory = memory.after(ack, round, named(written))
        if event != "killed":
            after = (round + 1, round, written) if event == "used" else (round + 1, ack, expected)
            checkpoints = [checkpoints[-1], after]


@pytest.fixture(params=["in process", "on disk", "deferred"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> InProcess | OnDisk:
    if request.param == "in process":
        return InProcess()
    return OnDisk(tmp_path / "memory", deferred=request.param == "deferred")


def test_a_client_without_memory_has_an_empty_one(store: InProcess | OnDisk) -> None:
    assert store.load("anna") == Memory()
    store.save("anna", Memory())
    assert store.load("anna") == Memory()


def test_clients_do_not_share_memory(store: InProcess | OnDisk) -> None:
    names = ["a/b", "a_b", "a b", "../a", "", ".", "a" * 300, "a" * 301, "ä", "A", "a"]
    for i, name in enumerate(names):
        store.save(name, Memory({0: named(i)}))
    assert [value(store.load(name).at(0, name)) for name in names] == list(range(len(names)))


def test_a_memory_is_replaced_as_a_whole(store: InProcess | OnDisk) -> None:
    store.save("anna", Memory({0: named(0), 1: named(1)}))
    store.save("anna", Memory({2: named(2)}))
    assert sorted(store.load("anna").versions) == [2]


layouts = st.sampled_from(["plain", "transposed", "reversed", "broadcast", "scalar"])
versions = st.dictionaries(
    st.integers(0, 12), st.dictionaries(st.text(max_size=3), layouts, max_size=3), max_size=3
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(versions)
def test_disk_holds_what_the_process_would(
    tmp_path: Path, versions: dict[int, dict[str, str]]
) -> None:
    base = np.arange(6, dtype="f4").reshape(2, 3)
    lying = {
        "plain": base,
        "transposed": base.T,
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (4, 3)),
        "scalar": np.array(2.5, "f4"),
    }
    memory = Memory({r: {k: lying[v] for k, v in ts.items()} for r, ts in versions.items()})
    name = str(sorted(versions))
    OnDisk(tmp_path).save(name, memory)
    found = OnDisk(tmp_path).load(name)
    assert list(found.versions) == list(memory.versions)
    for round, tensors in memory.versions.items():
        again = found.versions[round]
        assert list(again) == list(tensors)
        for key, array in tensors.items():
            assert again[key].dtype == array.dtype
            np.testing.assert_array_equal(again[key], array, strict=True)


def test_files_stay_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    for name in ("../evil", "/etc/passwd", "a\0b", "..", "x" * 400):
        OnDisk(folder).save(name, Memory({0: named(1)}))
    files = list(folder.iterdir())
    assert len(files) == 5
    assert all(p.suffix == ".safetensors" and len(p.name) < 90 for p in files)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    disk = OnDisk(tmp_path)
    disk.save("anna", Memory({3: named(1)}))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = {
        "short": whole[:-1],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "foreign": b"PK\x03\x04" + whole,
    }[damage]
    path.write_bytes(broken)
    message = "anna-.*damaged.*; restore the client's memory or start a new run"
    with pytest.raises(RunError, match=message):
        disk.load("anna")
    assert path.read_bytes() == broken


# --- memories that wait to be settled ------------------------------------------------------------

CLIENTS = ("anna", "bert")
moves = st.lists(
    st.tuples(
        st.sampled_from(["saved", "settled", "killed", "power cut"]),
        st.sampled_from(CLIENTS),
        st.integers(0, 400),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(moves)
def test_what_is_settled_outlives_a_power_cut(moves: list[tuple[str, str, int]]) -> None:
    """After one, what was not settled may be there in part, or not at all."""
    saved, settled = dict[str, float](), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        disk = OnDisk(Path(folder), deferred=True)
        for number, (move, client, length) in enumerate(moves):
            if move == "saved":
                disk.save(client, Memory({number: named(number)}))
                saved[client] = number
            elif move == "settled":  # by whom did not save
                OnDisk(Path(folder)).settle([client, "charles"])
                settled |= {c: v for c, v in saved.items() if c == client}
            elif move == "killed":
                disk = OnDisk(Path(folder), deferred=True)
            else:
                saved = dict(settled)
                for path in Path(folder).glob("*.pending"):
                    whole = path.read_bytes()
                    path.write_bytes(whole[: min(length, len(whole) - 1)])
            for client in CLIENTS:
                found = [value(tensors) for tensors in disk.load(client).versions.values()]
                assert found == ([saved[client]] if client in saved else [])


def test_settling_leaves_one_file_for_each_client(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, deferred=True)
    for client in CLIENTS:
        disk.save(client, Memory({0: named(0)}))
    assert {p.suffix for p in tmp_path.iterdir()} == {".pending"}
    for _ in range(2):
        disk.settle([*CLIENTS, "charles"])
        assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}
    disk.settle([])
    OnDisk(tmp_path / "nowhere").settle(CLIENTS)


def test_processes_save_and_one_settles(tmp_path: Path) -> None:
    disk = pickle.loads(pickle.dumps(OnDisk(tmp_path, deferred=True)))
    names = [f"client-{i}" for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: disk.save(name, Memory({0: named(len(name))})), names))
    OnDisk(tmp_path).settle(names)
    assert len(list(tmp_path.iterdir())) == 40
    assert all(disk.load(name) != Memory() for name in names)


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for disk in (OnDisk(tmp_path / "file"), OnDisk(tmp_path / "file" / "below", deferred=True)):
        with pytest.raises(RunError, match=r"cannot be written .*; continue with --resume"):
            disk.save("anna", Memory({0: named(0)}))


@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_what_was_loaded_is_not_changed_by_what_is_saved(tmp_path: Path, numbers: int) -> None:
    disk = OnDisk(tmp_path)
    disk.save("anna", Memory({0: {"x": np.full(numbers, 1.0)}}))
    before = disk.load("anna")
    disk.save("anna", before.after(0, 1, {"x": np.full(numbers, 2.0)}))
    assert (before.versions[0]["x"] == 1).all()
    assert [float(v["x"][-1]) for v in disk.load("anna").versions.values()] == [1.0, 2.0]


def test_large_memories_are_mapped_not_copied(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, deferred=True)
    for i in range(20):
        disk.save(str(i), Memory({0: {"x": np.full(1_000_000, float(i))}}))
    tracemalloc.start()
    held = [disk.load(str(i)) for i in range(20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, "of 160 million bytes"
    assert [float(memory.versions[0]["x"][7]) for memory in held] == list(range(20))
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(held[0].versions[0]["x"])[0] = 1
