from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedpeft.checkpoint import Checkpoint
from fedpeft.errors import RunError
from fedpeft.plan import Plan
from fedpeft.run_folder import RunFolder
from fedpeft.state import ServerState

LINES = {
    "model": "nowhere",
    "task": "classify",
    "data": "jsonl(train='train.jsonl')",
    "rounds": 3,
    "clients": 4,
}
INPUTS = ("data-1", "model-1")


def opened(path: Path, resume: bool = False, inputs: Any = INPUTS, **lines: Any) -> RunFolder:
    return RunFolder(path, Plan.from_lines({**LINES, **lines}), inputs, resume=resume)


def named(path: Path, run: str, *, resume: bool = False) -> RunFolder:
    return RunFolder(path, Plan.from_lines(LINES), INPUTS, resume=resume, run=run)


def after(round: int) -> Checkpoint:
    params = {"w": np.full(2, round, "f4")}
    return Checkpoint(ServerState(params, {}, {}, {}, round), line=line(round - 1))


def line(round: int) -> dict[str, Any]:
    return {"round": round, "test/loss": 1 / 3 + round, "replied": ["ä"]}


def begun(path: Path, rounds: int = 0) -> Path:
    with opened(path) as folder:
        for round in range(rounds):
            folder.save(after(round + 1))
    return path


def content(path: Path) -> dict[str, bytes]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def test_a_run_keeps_the_name_that_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with named(path, "one") as folder:
        assert folder.run == "one"
    with named(path, "two") as folder:  # nothing was recorded under the first
        assert folder.run == "two"
        folder.save(after(1))
    before = content(path)
    with pytest.raises(RunError, match="holds the run two, and this one is one"):
        named(path, "one", resume=True)
    assert content(path) == before
    for again in ("two", ""):
        with named(path, again, resume=True) as folder:
            assert folder.run == "two"


# --- a run begins --------------------------------------------------------------------------------


def test_a_run_begins_in_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        path.mkdir(parents=True, exist_ok=path.name == "empty")
        with opened(path) as folder:
            assert len(folder.run) == 32
            assert not folder.finished
            assert folder.load() is None
            assert folder.history() == []
            assert folder.compared() == {}
        assert sorted(content(path)) == [".lock", "plan.yaml", "run.json", "versions.json"]
        about = json.loads((path / "run.json").read_text())
        assert (about["run"], about["digest"]) == (folder.run, folder.digest)
        assert about["inputs"] == ["data-1", "model-1"]
        lines = yaml.safe_load((path / "plan.yaml").read_text())
        assert Plan.from_lines(lines) == Plan.from_lines(LINES)
        assert {"fedpeft", "torch", "threads"} < set(
            json.loads((path / "versions.json").read_text())
        )


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.new", "rounds.jsonl", "adapter", "run.json.new"]
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunError, match="not empty and no run of fedpeft; choose another --out"):
            opened(tmp_path, resume)
    assert content(tmp_path) == {name: b"mine"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file: not empty and no run of fedpeft"):
        opened(tmp_path / "file")
    with pytest.raises(RunError, match="run: not empty and no run of fedpeft"):
        opened(tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"null/run: no folder to write in \(.+\)"):
        opened(Path("/proc/null/run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"state": "finished", "wandb": 1}',
            "lacks digest, inputs, lines, run, so this is no run",
        ),
        ('{"run": ', "run.json: damaged; start again in another folder"),
        ("[1, 2]", "run.json: damaged"),
        ("3", "run.json: damaged"),
        ("", "run.json: damaged"),
        ("\udcff", "run.json: damaged"),
    ],
)
def test_a_run_json_that_is_not_ours(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    for _ in range(2):
        with pytest.raises(RunError, match=message):
            opened(tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text(errors="surrogateescape") == text


BEGINNINGS = [
    [],
    [".lock"],
    [".lock", ".plan.yaml.new"],
    [".lock", "plan.yaml"],
    [".lock", "plan.yaml", ".versions.json.new"],
    [".lock", "plan.yaml", "versions.json"],
    [".lock", "plan.yaml", "versions.json", ".run.json.new"],
]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", BEGINNINGS, ids=len)
def test_killed_while_beginning_a_run_just_begins(
    tmp_path: Path, left: list[str], resume: bool
) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    with opened(tmp_path, resume) as folder:
        assert folder.load() is None
    assert set(content(tmp_path)) >= {"plan.yaml", "run.json", "versions.json"}
    assert (tmp_path / "plan.yaml").read_text() != "half"


# --- a run is taken up ---------------------------------------------------------------------------


def test_a_run_is_taken_up_only_when_asked(tmp_path: Path) -> None:
    begun(tmp_path, 1)
    before = content(tmp_path)
    with pytest.raises(RunError, match="holds a begun run; add --resume, or choose another --out"):
        opened(tmp_path)
    with opened(tmp_path, resume=True) as folder:
        folder.finish({"rows": {}})
    with pytest.raises(RunError, match="holds a finished run; add --resume"):
        opened(tmp_path)
    with opened(tmp_path, resume=True) as folder:
        assert folder.finished
        assert folder.result() == {"rows": {}}
    assert content(tmp_path) == {**before, "result.json": b'{\n "rows": {}\n}\n'}


def test_the_run_keeps_its_name(tmp_path: Path) -> None:
    with opened(tmp_path) as first:
        pass
    with opened(tmp_path, resume=True) as second:
        assert second.run == first.run


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"rounds": 4}, "the plan was changed: rounds was 3, is 4; change it back to resume"),
        ({"patience": 2, "keep_best": "clients/loss"}, r"keep_best was None, .* \(and patience\)"),
        ({"aggregator": "mean", "optimizer": "adam(lr=0.5)"}, "optimizer was 'sgd.*is 'adam"),
        ({"model": "elsewhere"}, "the plan was changed: model was 'nowhere', is 'elsewhere'"),
        ({"data": "jsonl(train='b')"}, "the plan was changed: data was .*train.jsonl"),
        ({"inputs": ("data-2", "model-1")}, "the data changed since the run began; choose another"),
        ({"inputs": ("data-1", "model-2")}, "the model changed since the run began"),
        ({"inputs": ("data-2", "model-2")}, "the data and model changed since the run began"),
        ({"rounds": 4, "inputs": ("data-2", "model-1")}, "rounds was 3, is 4"),
    ],
)
def test_another_plan_or_other_inputs_are_named(
    tmp_path: Path, lines: dict[str, Any], message: str
) -> None:
    begun(tmp_path, 2)
    before = content(tmp_path)
    for _ in range(2):  # the lock is given back
        with pytest.raises(RunError, match=message):
            opened(tmp_path, resume=True, **lines)
    assert content(tmp_path) == before


def test_another_warm_start_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, inputs=(*INPUTS, "warm-1"), warm_start="adapter") as folder:
        folder.save(after(1))
    with pytest.raises(RunError, match="the warm start changed since the run began"):
        opened(tmp_path, resume=True, inputs=(*INPUTS, "warm-2"), warm_start="adapter")


def test_comparisons_may_be_added(tmp_path: Path) -> None:
    begun(tmp_path)
    with opened(tmp_path, resume=True, compare="base") as folder:
        folder.write_compared({"base": {"loss": 0.1}})
    with opened(tmp_path, resume=True, compare="base,central") as folder:
        assert folder.compared() == {"base": {"loss": 0.1}}


# --- one process at a time -----------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from tests.test_run_folder import opened
with opened(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    begun(tmp_path)
    asked = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    held = subprocess.Popen(asked, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == b"held\n"
        for resume in (False, True):
            with pytest.raises(RunError, match="another process is writing this run"):
                opened(tmp_path, resume)
        held.kill()  # as SIGKILL ends it: the kernel gives the lock back
    finally:
        held.kill()
        held.communicate()
    with opened(tmp_path, resume=True):
        pass


def test_two_runs_in_one_process_do_not_write_one_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(RunError, match="another process is writing this run"):
        opened(tmp_path)
    with opened(tmp_path, resume=True):
        pass


# --- the ledger follows the checkpoint -----------------------------------------------------------


def texts(*rounds: int) -> str:
    return "".join(json.dumps(line(round)) + "\n" for round in rounds)


def test_rounds_are_saved_and_found(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    assert (tmp_path / "rounds.jsonl").read_text() == texts(0, 1)
    with opened(tmp_path, resume=True) as folder:
        found = folder.load()
        assert found is not None
        assert found.state.params["w"].tolist() == [2, 2]
        assert folder.history() == [line(0), line(1)]
        folder.save(after(3))
    assert (tmp_path / "rounds.jsonl").read_text() == texts(0, 1, 2)


@pytest.mark.parametrize(
    "left",
    [
        texts(0),
        texts(0) + texts(1)[:1],
        texts(0) + texts(1)[:-1],
        texts(0, 1),
        texts(0, 1, 2),
        texts(0, 1) + texts(2)[:9],
    ],
)
def test_the_ledger_is_brought_to_the_checkpoint(tmp_path: Path, left: str) -> None:
    begun(tmp_path, 2)
    (tmp_path / "rounds.jsonl").write_text(left)
    with opened(tmp_path, resume=True) as folder:
        folder.load()
        assert folder.history() == [line(0), line(1)]
    assert (tmp_path / "rounds.jsonl").read_text() == texts(0, 1)


def test_the_first_line_was_not_written(tmp_path: Path) -> None:
    """Killed between the first checkpoint and the first line: there is no ledger at all."""
    begun(tmp_path, 1)
    (tmp_path / "rounds.jsonl").unlink()
    with opened(tmp_path, resume=True) as folder:
        folder.load()
    assert (tmp_path / "rounds.jsonl").read_text() == texts(0)


def test_lines_without_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "rounds.jsonl").write_text(texts(0)[:7])
    with opened(tmp_path, resume=True) as folder:
        assert folder.load() is None
    assert (tmp_path / "rounds.jsonl").read_text() == ""


def test_a_checkpoint_too_many_is_dropped(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end of the one before the one before."""
    begun(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    (folder / "state-000001.safetensors").write_bytes(b"")
    with opened(tmp_path, resume=True) as run:
        run.load()
    assert sorted(p.name[6:12] for p in folder.iterdir()) == ["000002", "000003"]


def test_the_checkpoint_before_takes_the_ledger_back(tmp_path: Path) -> None:
    begun(tmp_path, 3)
    (tmp_path / "checkpoints" / "state-000003.safetensors").unlink()
    with opened(tmp_path, resume=True) as folder:
        found = folder.load()
        assert found is not None
        assert found.state.round == 2
    assert (tmp_path / "rounds.jsonl").read_text() == texts(0, 1)


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        (texts(0), "does not hold the 3 rounds of the checkpoint, one a line; restore the file"),
        ("", "does not hold the 3 rounds"),
        (texts(0, 2), "does not hold the 3 rounds"),
        (texts(0, 0, 2), "does not hold the 3 rounds"),
        (texts(1, 2), "does not hold the 3 rounds"),
        (texts(0) + "{}\n" + texts(2), "does not hold the 3 rounds"),
        (texts(0) + "\n" + texts(1, 2), "rounds.jsonl:2: no JSON object; restore the line"),
        (texts(0) + "{half\n" + texts(2), "rounds.jsonl:2: no JSON object"),
        (texts(0, 1) + "[]\n", "rounds.jsonl:3: no JSON object"),
        ("\udcff\n" + texts(1, 2), "rounds.jsonl:1: no JSON object"),
        (texts(0, 1, 2)[1:], "rounds.jsonl:1: no JSON object"),
    ],
)
def test_a_damaged_ledger_is_refused_and_left_alone(
    tmp_path: Path, ledger: str, message: str
) -> None:
    begun(tmp_path, 3)
    (tmp_path / "rounds.jsonl").write_text(ledger, errors="surrogateescape")
    before = content(tmp_path)
    with opened(tmp_path, resume=True) as folder, pytest.raises(RunError, match=message):
        folder.load()
    assert content(tmp_path) == before


def test_a_damaged_checkpoint_is_refused_and_nothing_overwritten(tmp_path: Path) -> None:
    begun(tmp_path, 3)
    newest = tmp_path / "checkpoints" / "state-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    (tmp_path / "rounds.jsonl").write_text(texts(0, 1))
    before = content(tmp_path)
    message = r"damaged .*; delete it to resume from state-000002.safetensors"
    with opened(tmp_path, resume=True) as folder, pytest.raises(RunError, match=message):
        folder.load()
    assert content(tmp_path) == before


def test_a_table_there_is_only_at_the_end(tmp_path: Path) -> None:
    begun(tmp_path)
    with opened(tmp_path, resume=True) as folder:
        with pytest.raises(RunError, match="has not finished; continue with --resume"):
            folder.result()
        folder.finish({"up_bytes": 3})
        assert folder.result() == {"up_bytes": 3}


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    begun(tmp_path)
    told = json.loads((tmp_path / "versions.json").read_text())
    (tmp_path / "versions.json").write_text(json.dumps({**told, "threads": 99}))
    with opened(tmp_path, resume=True) as folder:
        (warning,) = folder.warnings
    assert warning.startswith("the run began with threads 99, goes on with ")
    with opened(tmp_path / "new") as folder:
        assert folder.warnings == []
