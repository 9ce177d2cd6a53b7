"""Trackers: what they are given, that they go on without a step twice, and never stop a run."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fedpeft
from fedpeft import tracking
from fedpeft.driver import simulate
from fedpeft.errors import PlanError
from fedpeft.plan import Plan
from fedpeft.spec import method
from fedpeft.track.chain import Chain
from fedpeft.track.none import None_
from fedpeft.tracking import Trackers
from fedpeft.types import Tracked
from fedpeft.watching import Line, Quiet
from tests.tiny import support_lines

ROOT = Path(fedpeft.__file__).parent
LINES = [{"round": i, "loss": 1.0 / (i + 1), "who": ["a"], "nan": math.nan} for i in range(3)]


class Listening(Quiet):
    """Hears warnings, and interrupts after so many rounds."""

    def __init__(self, rounds: int | None = None) -> None:
        self.warnings, self.rounds = list[str](), rounds

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def round(self, line: Line) -> None:
        if line["round"] + 1 == self.rounds:
            raise KeyboardInterrupt

    @property
    def tracked(self) -> list[str]:
        return [text for text in self.warnings if text.startswith("track:")]


HEARD: list[tuple[int, Mapping[str, float]]] = []


@method
class Fake:
    """A tracker that fails, or hangs, at a place."""

    at: str = ""
    hangs: bool = False

    def open(self, run: Tracked) -> Fake:
        self._pass("open")
        return self

    def write(self, round: int, values: Mapping[str, float]) -> None:
        self._pass("write")
        HEARD.append((round, values))

    def close(self, *, done: bool) -> None:
        self._pass("close")
        HEARD.append((-1, {"done": done}))

    def _pass(self, place: str) -> None:
        if self.at == place and self.hangs:
            threading.Event().wait()
        if self.at == place:
            raise SystemExit("no route\nto host")


def followed(tracker: Any, folder: Path, lines: list[dict[str, Any]] = LINES) -> list[str]:
    HEARD.clear()
    warned = list[str]()
    with Trackers(tracker, Tracked(folder, "r", {}, ()), warned.append) as trackers:
        for line in lines:
            trackers.write(line)
    return warned


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    found = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags}
    for steps in found.values():
        assert len(steps) == len({step for step, _ in steps})
    return {tag: dict(steps) for tag, steps in found.items()}


# --- the threads --------------------------------------------------------------------------------


def test_a_tracker_is_given_finite_numbers_alone(tmp_path: Path) -> None:
    assert followed(Fake(), tmp_path) == []
    rounds = [(i, {"loss": 1.0 / (i + 1)}) for i in range(3)]
    assert [*rounds, (-1, {"done": True})] == HEARD
    assert scalars(tmp_path)["loss"][2] == pytest.approx(1 / 3)  # TensorBoard, beside it


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_one_that_fails_is_said_once_and_keeps_nothing_from_others(tmp_path: Path, at: str) -> None:
    warned = followed(Chain(stages=(Fake(at=at), Fake())), tmp_path)
    assert len(warned) == 1
    assert "Fake(at=" in warned[0]
    assert warned[0].endswith("no route to host; the run goes on without it")
    assert [round for round, _ in HEARD if round >= 0][-3:] == [0, 1, 2] or at == "close"
    assert (-1, {"done": True}) in HEARD


def test_keys_are_not_in_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    said = "GET https://me:geheim@host/x?k=0123456789abcdef refused"
    monkeypatch.setattr(Fake, "open", lambda self, run: _fail(said))
    (warned,) = followed(Fake(), tmp_path)
    assert "GET https://***@host/x?k=*** refused" in warned


def _fail(said: str) -> None:
    raise OSError(said)


def test_one_that_hangs_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.2)
    (warned,) = followed(Fake(at="write", hangs=True), tmp_path)
    assert "has not taken everything within 0.2 s" in warned


def test_a_run_that_ends_early_is_said_to(tmp_path: Path) -> None:
    HEARD.clear()
    with (
        pytest.raises(KeyboardInterrupt),
        Trackers(Fake(), Tracked(tmp_path, "r", {}, ()), print),
    ):
        raise KeyboardInterrupt
    assert HEARD == [(-1, {"done": False})]


def test_without_a_folder_nobody_is_told(tmp_path: Path) -> None:
    HEARD.clear()
    with Trackers(Fake(), None, print) as trackers:
        trackers.write(LINES[0])
    assert HEARD == []
    assert None_().open(Tracked(tmp_path, "r", {}, ())) is None  # type: ignore[func-returns-value]


def test_only_who_drives_the_rounds_tracks() -> None:
    """That is a simulation, or the server: never a client, or anything that clients run."""
    found = set()
    for path in [*ROOT.rglob("*.py"), *ROOT.parent.glob("client/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if "fedpeft.tracking" in modules:
            found.add(path.name)
    assert found == {"driver.py"}


# --- the plan -----------------------------------------------------------------------------------


def test_the_line_is_no_part_of_a_run_s_identity(bert: Path) -> None:
    lines = support_lines(bert)
    plain = Plan.from_lines(lines)
    tracked = Plan.from_lines({**lines, "track": ["mlflow", "wandb(project='p')"]})
    assert plain.digest() == tracked.digest()
    assert tracked.lines()["track"].startswith("mlflow(")
    assert " | wandb(project='p'" in tracked.lines()["track"]
    assert Plan.from_lines(tracked.lines()).track == tracked.track


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("mlflow(uri='http://me:secret@host')", "track: mlflow: uri has a password in it"),
        ("wandb(key='x')", "wandb has no field 'key'"),
        ("mlflo", "did you mean 'mlflow'"),
        (["mlflow", 3], "track: .*3"),
    ],
)
def test_lines_that_make_no_sense(bert: Path, track: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_lines({**support_lines(bert), "track": track})
    assert "secret@" not in str(caught.value)


# --- MLflow and Weights & Biases, offline ---------------------------------------------------------

quiet = pytest.mark.filterwarnings("ignore")  # theirs, about each other's versions


def recorded(path: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    pb: Any = wandb_internal_pb2  # made when it is imported

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = pb.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def wandb_history(folder: Path) -> tuple[dict[int, dict[str, float]], dict[str, Any], set[str]]:
    """Return each step's numbers (a step that is told twice fails), the configuration, and ids."""
    steps, config, ids = dict[int, dict[str, float]](), dict[str, Any](), set[str]()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in recorded(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            if record.HasField("history"):
                told = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                step = int(told.pop("_step"))
                assert step not in steps
                steps[step] = {k: v for k, v in told.items() if k[0] != "_"}
    return steps, config, ids


def mlflow_history(
    uri: str, experiment: str = "fedpeft"
) -> tuple[Any, dict[int, dict[str, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name(experiment)
    assert place is not None
    (run,) = client.search_runs([place.experiment_id])
    steps = dict[int, dict[str, float]]()
    for name in run.data.metrics:
        for each in client.get_metric_history(run.info.run_id, name):
            assert name not in steps.setdefault(each.step, {})
            steps[each.step][name] = each.value
    return run, steps


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    found = {}
    for text in (folder / "rounds.jsonl").read_text().splitlines():
        line = json.loads(text)
        kept = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "round"}
        found[line["round"]] = {k: float(v) for k, v in kept.items()}
    return found


@quiet
@pytest.mark.slow
def test_both_have_each_round_once_also_after_an_interruption(bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    track = [f"mlflow(uri={uri!r})", "wandb(mode='offline', project='p')"]
    lines = support_lines(bert, rounds=4, evaluate="test")
    plan, out = Plan.from_lines({**lines, "track": track}), tmp_path / "run"
    first = Listening(rounds=2)
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=out, watch=first)
    run, _ = mlflow_history(uri)
    assert run.info.status == "KILLED"
    second = Listening()
    simulate(plan, out=out, resume=True, watch=second)
    assert first.tracked == second.tracked == []
    run, steps = mlflow_history(uri)
    expected = numbers(out)
    assert len(expected) == 4
    assert {step: values.keys() for step, values in steps.items()} == {
        step: values.keys() for step, values in expected.items()
    }
    assert steps == {s: pytest.approx(values) for s, values in expected.items()}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["model"] == plan.model
    assert run.data.params["trainer"] == plan.lines()["trainer"]
    told, config, ids = wandb_history(out)
    assert told == {s: pytest.approx(values) for s, values in expected.items()}
    assert config["aggregator"] == "mean()" or config["aggregator"] == plan.lines()["aggregator"]
    assert ids == {json.loads((out / "run.json").read_text())["run"]}
    assert {*scalars(out)} == {name for values in expected.values() for name in values}
    alone = tmp_path / "alone"
    simulate(Plan.from_lines(lines), out=alone)
    bits = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (out, alone)]
    assert bits[0] == bits[1]


@quiet
def test_mlflow_is_filled_up_with_what_it_has_missed(tmp_path: Path) -> None:
    from fedpeft.track.mlflow import Mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Mlflow(uri=uri)
    told = [{"round": i, "loss": float(i), "test/loss": 2.0 * i} for i in range(5)]
    for done, more in ((0, 2), (4, 5)):  # rounds 2 and 3 were run while it was out of reach
        warned = list[str]()
        run = Tracked(tmp_path, "r", {"model": "m"}, tuple(told[:done]))
        with Trackers(tracker, run, warned.append) as trackers:
            for line in told[done:more]:
                trackers.write(line)
        assert warned == []
    _, steps = mlflow_history(uri)
    assert steps == {i: {"loss": float(i), "test/loss": 2.0 * i} for i in range(5)}


@quiet
def test_a_server_out_of_reach_changes_nothing(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    track = ["mlflow(uri='http://127.0.0.1:9')", "mlflow(uri='sqlite:////proc/no/m.db')"]
    watch = Listening()
    lines = support_lines(bert, rounds=2, evaluate="test")
    out = tmp_path / "run"
    result = simulate(Plan.from_lines({**lines, "track": track}), out=out, watch=watch)
    assert len(watch.tracked) == 2
    assert all("; the run goes on without it" in text for text in watch.tracked)
    plain = simulate(Plan.from_lines(lines), out=tmp_path / "plain")
    timed = ("seconds", "server_seconds")
    tables = [{k: v for k, v in each.table.items() if k not in timed} for each in (result, plain)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.spec import build

    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    (warned,) = followed(build("track", name), tmp_path)
    assert f"track: {name}: not installed; pip install 'fedpeft[track]'" in warned


@quiet
@pytest.mark.slow
def test_what_is_secret_goes_to_no_tracker(bert: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    lines = support_lines(bert, rounds=2, evaluate="test", cohort="poisson(rate=0.9)")
    lines |= {"weighting": "uniform(denominator='expected')", "privacy": "user(epsilon=5)"}
    lines["track"] = [f"mlflow(uri={uri!r})", "wandb(mode='offline')"]
    out = tmp_path / "run"
    simulate(Plan.from_lines(lines), out=out)
    public = {"epsilon", "epsilon_rdp", "clip", "test/accuracy", "test/loss", "test/f1"}
    run, steps = mlflow_history(uri)
    assert {name for values in steps.values() for name in values} <= public
    assert {*run.data.metrics} <= public
    told, _, _ = wandb_history(out)
    assert {name for values in told.values() for name in values} <= public
    assert steps == told == {s: pytest.approx(v) for s, v in numbers(out).items()}


@quiet
def test_wandb_without_a_login_does_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.track.wandb import Wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    (warned,) = followed(Wandb(mode="online"), tmp_path)
    assert "nobody is logged in; say wandb login, or mode='offline'" in warned
