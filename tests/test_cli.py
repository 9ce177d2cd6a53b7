"""The command line as a person meets it: one-line errors, exit status 2, nothing overwritten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft import cli
from fedpeft.catalogue import families
from fedpeft.errors import PlanError
from tests.tiny import support_lines

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedpeft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


@pytest.fixture
def plan(bert: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(support_lines(bert)))
    return path


def test_run_eval_predict_export(fedpeft: Run, bert: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, _ = fedpeft("run", plan, "compare=base", "--out", out)
    assert code == 0
    for words in ("round 1", "round 2", "base model, untrained", "federated adapter", "MB up"):
        assert words in text
    code, again, _ = fedpeft("run", plan, "compare=base", "--out", out, "--resume")
    assert code == 0
    assert "federated adapter" in again

    table = json.loads((out / "result.json").read_text())
    code, text, _ = fedpeft("eval", out)
    assert code == 0
    assert json.loads(text)["loss"] == pytest.approx(table["last"]["test/loss"], abs=1e-5)
    (out / "adapter" / "fedpeft.json").rename(tmp_path / "kept.json")  # as if made elsewhere
    data = support_lines(bert)["data"]
    code, text, _ = fedpeft("eval", out / "adapter", "--data", data, "--model", str(bert))
    assert json.loads(text)["loss"] == pytest.approx(table["last"]["test/loss"], abs=1e-5)
    assert "labelled rows" in fedpeft("eval", out / "adapter")[2]
    (tmp_path / "kept.json").rename(out / "adapter" / "fedpeft.json")
    code, text, _ = fedpeft("predict", out / "adapter", "cancel it", "where is my parcel")
    assert [set(json.loads(line)) for line in text.splitlines()] == [{"label", "probability"}] * 2

    assert fedpeft("export", out, "--merged", "--out", tmp_path / "merged")[0] == 0
    merged = json.loads(fedpeft("eval", tmp_path / "merged")[1])
    assert merged["loss"] == pytest.approx(table["last"]["test/loss"], abs=1e-5)
    code, _, err = fedpeft("export", out, "--merged", "--out", tmp_path / "merged")
    assert (code, "exists" in err) == (2, True)


def test_predict_continues_prompts(fedpeft: Run, llama: Path, tmp_path: Path) -> None:
    lines = support_lines(llama, task="causal_lm(max_length=32)", partition="iid", rounds=1)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(lines))
    assert fedpeft("run", path, "--out", tmp_path / "run")[0] == 0
    code, text, _ = fedpeft("predict", tmp_path / "run", "My order", "--tokens", "5")
    assert code == 0
    assert json.loads(text)["prompt"] == "My order"


def test_plan_prints_text_and_json(fedpeft: Run, plan: Path) -> None:
    code, text, _ = fedpeft("plan", plan, "uplink=half")
    assert code == 0
    for words in ("parameters", "bytes per round", "memory", "uplink", "half(dtype='float16')"):
        assert words in text
    code, text, _ = fedpeft("plan", plan, "--json")
    found = json.loads(text)
    assert (code, found["ok"], found["clients"], found["bytes"]["exact"]) == (0, True, 4, True)
    code, text, _ = fedpeft("plan", plan, "correction=scaffold", "rounds=0", "--json")
    found = json.loads(text)
    assert (code, found["ok"], len(found["problems"])) == (2, False, 2)


MISTAKES: list[tuple[list[str], str]] = [
    (["optimizer=adm"], "optimizer: .*did you mean 'adam'"),
    (["adapter=lora(alhpa=3)"], "adapter: lora has no field 'alhpa'; did you mean 'alpha'"),
    (["adapter=lora(r=0)"], "adapter: lora: r=0 must be at least 1"),
    (["trainer=plain(lr=fast)"], "trainer: plain: lr=fast .*write lr='fast'"),
    (["trainer=plain("], "trainer: cannot read"),
    (["roundz=3"], "unknown line 'roundz'; did you mean 'rounds'"),
    (["rounds=none"], "no line 'rounds'|rounds: "),
    (["rounds=-1"], "rounds: -1 must be at least 1"),
    (["holdout=2"], "holdout: 2.0 must be"),
    (["data=jsonl(train='missing.jsonl')"], "data: .*missing.jsonl.*FEDPEFT_DATA"),
    (["model=minilmm"], "model: .*minilm"),
    (["clients=500"], "partition: .*clients"),
    (["cohort=uniform(size=50)"], "cohort: .*size=50"),
    (["task=classify(label='intent')"], "data: .*intent"),
    (["task=classify(max_length=9999)"], "task: .*max_length"),
    (["aggregator=nopkg.robust:Median()"], "aggregator: there is no module 'nopkg.robust'"),
    (["compare=bse"], "compare: 'bse' is unknown; did you mean 'base'"),
    (["preset=nope"], "preset: there is no presets method 'nope'"),
    (["rounds"], "write LINE=SPEC"),
]


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("task", ["classify", "causal_lm"])
def test_a_text_too_long_is_refused_before_anything_is_written(
    fedpeft: Run, bert: Path, llama: Path, tmp_path: Path, command: str, task: str
) -> None:
    lines = support_lines(bert if task == "classify" else llama, task=task, partition="iid")
    rows = Path(lines["data"].split("'")[1]).read_text().splitlines()
    long = json.dumps({**json.loads(rows[3]), "text": "refund " * 400})
    (tmp_path / "long.jsonl").write_text("\n".join([*rows[:3], long, *rows[4:]]))
    path, out = tmp_path / "plan.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**lines, "data": "jsonl(train='long.jsonl')"}))
    path.write_text(path.read_text().replace("long.jsonl", str(tmp_path / "long.jsonl")))
    code, _, err = fedpeft(command, path, *(["--out", out] if command == "run" else []))
    assert code == 2
    assert re.fullmatch(r"error: data: train: row 4 .* max_length=128 .*\n", err), err
    assert not out.exists()


@pytest.mark.parametrize(("lines", "message"), MISTAKES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_mistakes_are_one_line(
    fedpeft: Run, plan: Path, tmp_path: Path, command: str, lines: list[str], message: str
) -> None:
    out = ["--out", str(tmp_path / "run")] if command == "run" else []
    code, _, err = fedpeft(command, plan, *lines, *out)
    assert code == 2
    assert re.search(f"^error: .*({message})", err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_mistakes_with_files(fedpeft: Run, plan: Path, tmp_path: Path) -> None:
    assert "no such file" in fedpeft("run", tmp_path / "none.yaml")[2]
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [minilm\nrounds: 3")
    code, _, err = fedpeft("plan", broken)
    assert code == 2
    assert "broken.yaml:2: not YAML" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    code, _, err = fedpeft("run", plan, "--out", tmp_path / "full")
    assert (code, "choose another --out" in err) == (2, True)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    for command in ("eval", "export"):
        assert fedpeft(command, tmp_path / "full")[0] == 2
    assert fedpeft("predict", tmp_path / "full", "text")[0] == 2


def test_a_changed_plan_is_not_resumed(fedpeft: Run, plan: Path, tmp_path: Path) -> None:
    assert fedpeft("run", plan, "--out", tmp_path / "run")[0] == 0
    before = (tmp_path / "run" / "rounds.jsonl").read_bytes()
    code, _, err = fedpeft("run", plan, "rounds=5", "--out", tmp_path / "run", "--resume")
    assert code == 2
    assert "rounds was 2, is 5" in err
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == before
    code, _, err = fedpeft("run", plan, "--out", tmp_path / "run")
    assert (code, "--resume" in err) == (2, True)


@pytest.mark.parametrize(
    ("engine", "threads"),
    [
        ("processes(workers=2)", 3),
        ("processes(workers=2, threads=1)", 1),
        ("ray", 3),
        ("ray(num_cpus=2, threads=1)", 1),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_threads_are_those_of_each_worker_unless_the_engine_says_otherwise(
    fedpeft: Run,
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    engine: str,
    threads: int,
) -> None:
    engines: list[Any] = []

    def simulate(*_: Any, engine: Any, **__: Any) -> Any:
        engines.append(engine)
        raise PlanError("enough")

    def hosts(self: Any, plans: Any) -> Any:  # of the whole runs of a sweep
        engines.append(self)
        raise PlanError("enough")

    monkeypatch.setattr("fedpeft.driver.simulate", simulate)
    monkeypatch.setattr("fedpeft.engine.ray.Ray.hosts", hosts)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    if command == "sweep":
        plan = tmp_path / "sweep.yaml"
        plan.write_text("plan: plan.yaml\naxes:\n  uplink: [raw]\n")
    out = ("--out", tmp_path / "run")
    fedpeft(command, plan, *out, "--engine", engine, "--threads", "3")
    fedpeft(command, plan, *out, "--engine", "inline", "--threads", "3")
    fedpeft(command, plan, *out, "--engine", engine)
    assert engines[0].made_with()["threads"] == engines[0].threads == threads
    assert "threads" not in engines[1].made_with()  # those of this process
    assert engines[2].threads == (1 if "threads" in engine else None)


def test_eval_takes_fewer_records_where_they_do_not_fit(
    fedpeft: Run, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.inference import Exported

    assert fedpeft("run", plan, "--out", tmp_path / "run")[0] == 0
    code, text, err = fedpeft("eval", tmp_path / "run")
    assert (code, err) == (0, "")
    forward, most = Exported._forward, 7

    def cramped(self: Exported, rows: Any, batch: int = 32) -> Any:
        for logits, labels, where in forward(self, rows, batch):
            if len(where) > most:
                raise MemoryError
            yield logits, labels, where

    monkeypatch.setattr(Exported, "_forward", cramped)
    code, again, err = fedpeft("eval", tmp_path / "run")
    assert code == 0
    assert json.loads(again) == pytest.approx(json.loads(text), rel=1e-5)
    assert [line.split()[-5] for line in err.splitlines()] == ["16", "8", "4"]
    most = 0
    code, _, err = fedpeft("eval", tmp_path / "run")
    assert (code, "error: evaluation: one record does not fit into memory" in err) == (2, True)


@pytest.mark.parametrize("name", ["sweep", "grid"])
def test_sweep_writes_a_csv(name: str, fedpeft: Run, plan: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("plan: plan.yaml\naxes:\n  uplink: [raw, hlf]\n")
    code, text, _ = fedpeft(name, sweep, "--out", tmp_path / "runs")
    assert code == 1  # one of the two failed
    assert "2 runs, 0 finished, 1 to be made, 1 refused" in text
    assert "2/2 done" in text
    assert "did you mean 'half'" in text
    assert (tmp_path / "runs" / "sweep.csv").read_text().count("\n") == 3


def test_parts_lists_methods(fedpeft: Run) -> None:
    assert "optimizers: adagrad, adam, sgd, yogi" in fedpeft("parts")[1]
    assert "there is no family 'optimiser'" in fedpeft("parts", "optimiser")[2]


def test_parts_of_a_family_and_all_about_one(fedpeft: Run) -> None:
    listed = fedpeft("parts", "aggregators")[1]
    assert "flexlora     FlexLoRA: " in listed
    assert "2402.11505" in listed
    told = fedpeft("parts", "aggregators", "flexlora")[1]
    assert told.startswith("flexlora(sigma_to='B', rank_normalise=False, momentum=0.0, ")
    assert "cut to the adapter's rank" in told
    assert "did you mean 'flexlora'" in fedpeft("parts", "aggregators", "flexlra")[2]
    assert "all-MiniLM-L6-v2" in fedpeft("parts", "models", "minilm")[1]
    assert "did you mean 'minilm'" in fedpeft("parts", "models", "minilmm")[2]
    assert all(fedpeft("parts", family)[0] == 0 for family in families())


def test_cuda_where_there_is_none(fedpeft: Run, plan: Path, tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = fedpeft("run", plan, "--device", "cuda", "--out", tmp_path / "run")
    assert (code, "torch sees no CUDA device" in err) == (2, True)


def test_help_and_plan_import_no_torch(plan: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedpeft', 'plan', sys.argv[1]]\n"
        "from fedpeft import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'flwr') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
