"""Reports: their numbers against the ledgers', what they may say, and what users do wrong."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpeft.errors import RunError
from fedpeft.past_run import PastRun
from fedpeft.reporting import command, scores
from fedpeft.reporting.command import report
from fedpeft.reporting.page import as_data
from fedpeft.reporting.points import Point, Sweep, Trial, problems, read_points, reason
from fedpeft.significance import holm
from fedpeft.sweep.tuning import Cost, as_text
from tests.reported import HOSTILE, PRIVATE, lay, line, score, sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def told(runs: Path) -> Path:
    """The folder of a report about the sweep."""
    return report(runs, runs.parent / "report", _never).parent


def _never(text: str) -> None:
    raise AssertionError(text)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class _Data(HTMLParser):
    """What is in the element that holds a page's data, and every tag there is."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.tags, self.within = "", list[str](), False
        self.attributes = list[tuple[str, str | None]]()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.within = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self.within:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.within = False


def shown(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_Data(page).text)
    return found


# --- numbers ------------------------------------------------------------------------------------


def _ledgers(runs: Path) -> dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]]:
    """Return the rounds of finished runs by combination and seed, read without the library."""
    found: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in _rows(runs / "sweep.csv"):
        if row["status"] != "failed":
            lines = (runs / row["run"] / "rounds.jsonl").read_text().splitlines()
            key = row["method"], row["privacy"], row["uplink"]
            found.setdefault(key, {})[row["seed"]] = [json.loads(text) for text in lines]
    return found


def test_points_are_what_the_ledgers_say(runs: Path, told: Path) -> None:
    rows = {(r["method"], r["privacy"], r["uplink"]): r for r in _rows(told / "tables/points.csv")}
    ledgers = _ledgers(runs)
    assert len(rows) == 10
    assert len(ledgers) == 8
    for key, seeds in ledgers.items():
        row, last = rows[key], [lines[-1]["test/accuracy"] for lines in seeds.values()]
        assert int(row["finished"]) == len(seeds)
        assert float(row["test/accuracy"]) == pytest.approx(statistics.fmean(last))
        wanted = stats.t.interval(0.95, len(last) - 1, statistics.fmean(last), stats.sem(last))
        found = float(row["test/accuracy low"]), float(row["test/accuracy high"])
        assert found == pytest.approx(wanted)
        sent = [sum(li["up_bytes"] + li["down_bytes"] for li in lines) for lines in seeds.values()]
        assert float(row["megabytes"]) == pytest.approx(statistics.fmean(sent) / 1e6)
        up = [sum(each["up_bytes"] for each in lines) for lines in seeds.values()]
        assert float(row["megabytes up"]) == pytest.approx(statistics.fmean(up) / 1e6)
        spent = {lines[-1].get("epsilon") for lines in seeds.values()}
        assert row["epsilon of users"] == ("" if spent == {None} else "3.0")
    assert rows["misspelt", "none", "raw"]["finished"] == "0"
    assert rows["lora", "none", "half"]["finished"] == "2"


def test_the_page_has_the_numbers_of_the_tables(told: Path) -> None:
    found, rows = shown(told / "report.html"), _rows(told / "tables/points.csv")
    assert found["counts"] == {
        "runs": 30,
        "finished": 23,
        "unfinished": 0,
        "failed": 7,
        "points": 10,
    }
    for point, row in zip(found["points"], rows, strict=True):
        assert point["values"] == [row["method"], row["privacy"], row["uplink"]]
        if "test/accuracy" in point["scores"]:
            mean, low, _ = point["scores"]["test/accuracy"]
            assert mean == pytest.approx(float(row["test/accuracy"]), rel=1e-4)
            assert low == pytest.approx(float(row["test/accuracy low"]), rel=1e-4)
            assert point["mb"] == pytest.approx(float(row["megabytes"]), rel=1e-4)
            assert point["up"] == pytest.approx(float(row["megabytes up"]), rel=1e-4)


def test_neighbours_are_compared_as_scipy_compares_them(runs: Path, told: Path) -> None:
    ledgers, checked = _ledgers(runs), 0
    rows = [r for r in _rows(told / "tables/pairs.csv") if r["metric"] == "test/accuracy"]
    for row in rows:
        axis = row["axis"]
        names = ("method", "privacy", "uplink")
        keys = [tuple(row[who] if name == axis else row[f"at {name}"] for name in names)
                for who in ("one", "other")]  # fmt: skip
        a, b = (ledgers[key[0], key[1], key[2]] for key in keys)
        common = sorted({*a} & {*b})
        x, y = ([own[seed][-1]["test/accuracy"] for seed in common] for own in (a, b))
        assert int(row["seeds"]) == len(common)
        assert float(row["difference"]) == pytest.approx(statistics.fmean(x) - statistics.fmean(y))
        differences = [p - q for p, q in zip(x, y, strict=True)]
        if statistics.pstdev(differences) > 1e-9:
            assert float(row["p"]) == pytest.approx(stats.ttest_rel(x, y).pvalue, rel=1e-6)
            checked += 1
    assert len(rows) == 12
    assert checked >= 3
    assert [float(r["p (Holm)"]) for r in rows] == pytest.approx(
        holm([float(r["p"]) for r in rows])
    )


def test_effects_have_one_difference_for_each_seed(told: Path) -> None:
    rows = _rows(told / "tables/effects.csv")
    (row,) = [r for r in rows if (r["metric"], r["axis"]) == ("test/accuracy", "uplink")]
    each: list[float] = []
    for seed in range(3):  # of four settings one lacks a seed, and is left out
        given = [(m, p) for m in ("lora", HOSTILE) for p in ("none", PRIVATE)][1:]
        by = [
            score({"method": m, "privacy": p, "uplink": "raw", "seed": seed})
            - score({"method": m, "privacy": p, "uplink": "half", "seed": seed})
            for m, p in given
        ]
        each.append(statistics.fmean(by))
    assert (row["one"], row["other"], row["seeds"], row["settings"]) == ("raw", "half", "3", "3")
    assert float(row["difference"]) == pytest.approx(statistics.fmean(each))
    assert float(row["p"]) == pytest.approx(stats.ttest_1samp(each, 0.0).pvalue)


def _past(score: int, epsilon: int, sent: int) -> PastRun:
    spent = {"epsilon of users": float(epsilon)} if epsilon else {}
    metrics = {"test/accuracy": float(score)}
    return PastRun(Path("x"), {}, 1, True, metrics, 1_000_000 * sent, 0, 1.0, spent)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12))
def test_the_front_is_that_of_brute_force(given: list[tuple[int, int, int]]) -> None:
    points = [
        Point({"a": str(at)}, [Trial("0", "finished", "x", _past(*each))])
        for at, each in enumerate(given)
    ]
    prices = [(-score, epsilon or math.inf, sent) for score, epsilon, sent in given]

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    wanted = [not any(beats(other, each) for other in prices) for each in prices]
    found = scores.front(Sweep(Path("s"), ["a"], points), "test/accuracy")
    assert list(found.members) == wanted


def test_the_front_is_by_all_objectives_that_are_known(runs: Path) -> None:
    found = read_points(runs)
    front = scores.front(found, "test/accuracy")
    assert list(front.objectives) == ["test/accuracy", "epsilon of users", "megabytes"]
    best = {
        p.values["method"] for p, member in zip(found.points, front.members, strict=True) if member
    }
    assert best == {"lora"}
    losses = scores.front(found, "test/loss")  # lower is better: the same ones
    assert losses.members == front.members


def test_tables_are_the_same_in_parquet(told: Path) -> None:
    from pyarrow import parquet

    for path in (told / "tables").glob("*.csv"):
        found = parquet.read_table(path.with_suffix(".parquet")).to_pylist()
        assert len(found) == len(_rows(path))
        for left, right in zip(found, _rows(path), strict=True):
            assert {k: "" if v is None else str(v) for k, v in left.items()} == right


def test_plots_are_for_papers(told: Path) -> None:
    from PIL import Image

    names = {path.name for path in (told / "figures").iterdir()}
    costs = ("epsilon-of-users", "megabytes", "megabytes-up")
    plots = [f"score-against-{cost}" for cost in costs]
    plots += [f"score-by-{axis}" for axis in ("method", "privacy", "uplink")]
    assert names == {f"{plot}.{kind}" for plot in plots for kind in ("png", "svg")}
    with Image.open(told / "figures/score-against-megabytes.png") as image:
        assert image.width >= 900
    text = (told / "figures/score-against-epsilon-of-users.svg").read_text()
    assert "accuracy, test set (%)" in text
    assert "epsilon of users at the end of a run" in text
    assert HOSTILE not in text
    text = (told / "figures/score-by-privacy.svg").read_text()
    assert all(word in text for word in ("accuracy, test set (%)", ">privacy<", ">method<", "lora"))


def test_a_plan_of_the_page_is_the_one_that_was_run(runs: Path, told: Path) -> None:
    from fedpeft.plan import Plan

    found = shown(told / "report.html")
    for point in found["points"]:
        for seed, status, name, _ in point["seeds"]:
            if status == "finished":
                lines = {**found["base"], **point["lines"], "seed": seed}
                typed = {k: int(v) if v.isdigit() else v for k, v in lines.items() if v}
                for key in ("holdout", "eval_every"):
                    typed[key] = float(lines[key]) if key == "holdout" else int(lines[key])
                made = Plan.from_lines(typed)
                assert made.digest() == Plan.from_yaml(runs / name / "plan.yaml").digest()


# --- what may be said ---------------------------------------------------------------------------


def test_nothing_that_runs_say_is_markup(told: Path) -> None:
    page = told / "report.html"
    found, text = _Data(page), page.read_text()
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert HOSTILE not in text
    assert HOSTILE in [point["values"][0] for point in shown(page)["points"]]
    where = [each for problem in shown(page)["problems"] for each in problem["reason"].split()]
    assert HOSTILE.split()[0] in where


@given(st.text())
def test_data_survive_and_end_no_element(text: str) -> None:
    assert json.loads(as_data({"text": text})) == {"text": text}
    assert not {*"<>&"} & {*as_data({"text": text})}


def test_the_page_lets_nothing_be_loaded(told: Path) -> None:
    found = _Data(told / "report.html")
    policies = [text or "" for name, text in found.attributes if name == "content"]
    (policy,) = [text for text in policies if text.startswith("default-src")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'none'" in policy
    assert [text for name, text in found.attributes if name in ("src", "href")] == ["data:,"]
    text = (told / "report.html").read_text()
    assert {*re.findall(r"https?://[^\"' )]*", text)} == {"http://www.w3.org/2000/svg"}


def test_failures_and_refusals_have_their_reasons(runs: Path) -> None:
    found = [
        (point.values["method"], t.seed, reason(t)) for point, t in problems(read_points(runs))
    ]
    assert ("lora", "2", f"diverged {HOSTILE}") in found
    refused = [why for method, _, why in found if method == "misspelt"]
    assert len(refused) == 6
    assert all("did you mean 'lora'" in why for why in refused)


def test_a_run_says_what_it_has_and_why_it_lacks_the_rest(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(at, 0.5, 10) for at in range(2)])
    found = shown(report(path, None, _never))
    assert found["columns"]["test/accuracy"] == [0.5, 0.5]
    titles = [chart["title"] for chart in found["charts"]]
    for title in ("Accuracy", "Traffic of a round", "Norm of updates", "Agreement of updates"):
        assert title in titles
    assert "Accuracy of each client" in titles
    assert found["columns"]["client accuracy shared adapter"] == [0.25, 0.5]
    gain, promise, versions = found["sections"]
    assert gain["tables"][0]["rows"][1] == ["each client alone (mean)", "40.0 %"]
    assert gain["tables"][0]["rows"][-1] == ["gain: federated less alone", "+15.0 points"]
    assert promise["tables"] == []
    assert ["python", sys.version.split()[0]] in versions["tables"][0]["rows"]
    assert found["command"].startswith(f"fedpeft run {path}/plan.yaml --out again --threads ")
    assert "Epsilon: the plan promises nothing (privacy: none)." in found["missing"]
    assert found["plan"]["partition"] == "iid"
    rows = _rows(path / "report/tables/rounds.csv")
    assert [(row["round"], row["up_bytes"]) for row in rows] == [("1", "20.0"), ("2", "20.0")]
    clients = {row["client"]: row for row in _rows(path / "report/tables/clients.csv")}
    assert (clients["a"]["used"], clients["a"]["up_bytes"]) == ("2", "20")


def test_what_each_client_gained_is_that_of_the_exported_adapter(tmp_path: Path) -> None:
    lines = [line(at, score, 10) for at, score in enumerate((0.5, 0.75, 0.25))]
    path = lay(tmp_path / "run", lines)
    result = json.loads((path / "result.json").read_text())
    alone = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.5, "loss": 1.0}, "gone": {"accuracy": 0.5}}
    for best, gains in ((None, {"a": -0.25, "b": -0.375}), (1, {"a": 0.25, "b": -0.125})):
        told = {**result, "best_round": best, "alone_per_client": alone}
        (path / "result.json").write_text(json.dumps(told))
        page = report(path, None, _never, overwrite=True)
        found = shown(page)
        assert found["columns"]["client accuracy gain"] == sorted(gains.values())
        (chart,) = (c for c in found["charts"] if c["title"] == "Gain in accuracy")
        assert (chart["unit"], chart["scale"]) == ("points", 100.0)
        (row,) = found["sections"][0]["tables"][1]["rows"]
        better = sum(gain > 0 for gain in gains.values())
        assert row[:3] == ["gain in accuracy of 2 clients", str(better), str(2 - better)]
        low, high = (f"{100 * gain:+.1f} points" for gain in sorted(gains.values()))
        assert row[4:] == [low, high]
        clients = {each["client"]: each for each in _rows(page.parent / "tables/clients.csv")}
        assert {name: float(each["accuracy gain"]) for name, each in clients.items()} == gains


def test_of_a_private_run_nothing_is_shown_but_what_its_ledger_says(tmp_path: Path) -> None:
    lines = [{"round": at, "epsilon": 1.0 + at, "clip": 0.5, "test/accuracy": 0.5} for at in (0, 1)]
    promise: dict[str, Any] = {
        "privacy": "user(noise_multiplier=1.0)",
        "evaluate": "test",
        "holdout": 0.0,
    }
    path = lay(tmp_path / "run", lines, **promise)
    (path / "kept.json").write_text(json.dumps({"secret-site": {"gain": {"accuracy": 0.123}}}))
    page = report(path, None, _never)
    found, whole = shown(page), page.read_text()
    assert set(found["columns"]) == {"round", "epsilon", "clip", "test/accuracy"}
    assert found["clients"]["total"] == 0
    assert "secret-site" not in whole
    facts = dict(found["sections"][1]["tables"][0]["rows"])
    assert facts["Unit of privacy"] == "client; neighbours: add or remove one client"
    assert facts["Adversary"] == "other clients and readers of the model; the server is trusted"
    assert any(text.startswith("Clients, bytes, participation") for text in found["missing"])
    assert not (path / "report/tables/clients.csv").exists()


@pytest.mark.parametrize("unit", ["", ", unit='patient'"])
def test_a_promise_to_records_names_its_unit_sampler_and_accountant(
    tmp_path: Path, unit: str
) -> None:
    promise: dict[str, Any] = {
        "privacy": f"record(epsilon=3.0{unit})",
        "evaluate": "test",
        "holdout": 0.0,
    }
    path = lay(tmp_path / "run", [{"round": 0, "epsilon_record": 1.0, "test/loss": 0.5}], **promise)
    facts = dict(shown(report(path, None, _never))["sections"][1]["tables"][0]["rows"])
    what = "patient" if unit else "record"
    assert what in facts["Unit hidden"]
    assert facts["Batches"].startswith(f"each {what} is in a step's batch by a coin of its own")
    assert "accountant PLD" in facts["Batches"]
    assert facts["Hidden from"] == "the server, other clients and readers of the model"


def test_what_sites_told_of_their_gain_is_shown_of_other_runs(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(0, 0.5, 10)])
    (path / "kept.json").write_text(json.dumps({"site-a": {"gain": {"accuracy": 0.125}}}))
    gain = shown(report(path, None, _never))["sections"][0]["tables"][1]
    assert gain["rows"] == [["site-a", "+12.5 points"]]


def test_runs_without_a_table_are_points_by_what_their_plans_differ_in(tmp_path: Path) -> None:
    each: dict[str, Any] = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"uplink": "half"}}
    for name, lines in each.items():
        lay(tmp_path / name, [line(0, 0.5, 10)], **lines)
    found = read_points(tmp_path)
    assert (list(found.axes), len(found.points)) == (["uplink"], 2)
    assert [sorted(point.finished) for point in found.points] == [["0", "1"], ["0"]]


def test_of_a_search_trials_are_no_axis_and_what_choosing_costs_is_told(tmp_path: Path) -> None:
    names = ("trial", "uplink", "seed", "status", "run", "problem")
    rows = [(0, "raw", 0), (0, "raw", 1), (1, "half", 0), (1, "half", 1), (2, "raw", 0)]
    text = [",".join(names)]
    for trial, uplink, seed in rows:
        name = f"{uplink}-{seed}"
        if not (tmp_path / name).exists():
            lay(tmp_path / name, [line(0, 0.5, 10)], uplink=uplink, seed=seed)
        text.append(f"{trial},{uplink},{seed},done,{name},")
    (tmp_path / "sweep.csv").write_text("\n".join([*text, ""]))
    cost = Cost("users", "", "", 4, 0, 12.5, 1e-5, "PLD", 3.0, False)
    (tmp_path / "tuning.json").write_text(json.dumps({"costs": [asdict(cost)]}))
    found = shown(report(tmp_path, None, _never))
    assert found["axes"] == ["uplink"]
    assert [len(point["seeds"]) for point in found["points"]] == [2, 2]
    assert found["notes"][0] == next(as_text([cost]))


def test_without_scores_the_loss_in_training_is_shown(tmp_path: Path) -> None:
    for seed in (0, 1):
        rounds = [{"round": 0, "loss": 1.0 + seed, "up_bytes": 10, "down_bytes": 10}]
        lay(tmp_path / str(seed), rounds, seed=seed)
    found = read_points(tmp_path)
    assert scores.metrics(found) == ["loss"]
    assert found.points[0].scores("loss") == {"0": 1.0, "1": 2.0}


# --- mistakes -----------------------------------------------------------------------------------


def _refused(path: Path, message: str, out: Path | None = None, *, overwrite: bool = False) -> None:
    with pytest.raises(RunError, match=message) as caught:
        report(path, out, _never, overwrite=overwrite)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_and_no_sweep(tmp_path: Path) -> None:
    _refused(tmp_path / "none", "none: no such folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "empty: is no run folder, and holds none")
    _refused(lay(tmp_path / "run", [], finished=False), "run: no round is over yet")
    (tmp_path / "only").mkdir()
    lay(tmp_path / "only/run", [line(0, 0.5, 10)], finished=False)
    _refused(tmp_path / "only", "none of its 1 runs has finished.*not finished")


def test_damage_is_named_by_its_place(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(0, 0.5, 10)])
    with (path / "rounds.jsonl").open("a") as file:
        file.write("{damaged\n")
    _refused(path, r"rounds\.jsonl:2: no JSON object; restore the line")
    lay(tmp_path / "good", [line(0, 0.5, 10)], seed=1)
    ((_, lost),) = problems(read_points(tmp_path))
    assert "rounds.jsonl:2: no JSON object" in reason(lost)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed,loss\n0,1\n", "lacks the columns status, run, problem, so it is no table of this"),
        ("", "lacks the columns status, run, problem"),
        ("seed,status,run,problem\n", "has no run yet"),
        ("seed,status,run,problem\n0,done\n", "damaged; fedpeft sweep writes it anew"),
        ("seed,status,run,problem\n0,done,../x,\n", "names no folder of this sweep"),
        ("seed,status,run,problem\n0,done,x,\n", "its folder is gone"),
    ],
)
def test_tables_of_other_versions(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.csv").write_text(text)
    _refused(tmp_path, message)


def test_results_of_an_older_version(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(0, 0.5, 10)])
    (path / "result.json").write_text(json.dumps({"accuracy": 0.5}))
    _refused(path, r"result\.json: is no final table of this version")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path, other = lay(tmp_path / "run", [line(0, 0.5, 10)]), tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        _refused(path, "other: exists and is no report; choose", other, overwrite=overwrite)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    page = report(path, None, _never)
    before = page.read_bytes()
    _refused(path, "report: holds a report; add --overwrite")
    assert page.read_bytes() == before
    assert report(path, None, _never, overwrite=True) == page
    assert sorted(p.name for p in path.iterdir() if "report" in p.name) == ["report"]


def test_the_command_says_where_the_page_is(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(0, 0.5, 10)])
    command = [sys.executable, "-m", "fedpeft", "report", str(path), "--out", str(tmp_path / "a/b")]
    for more, code in ([], 0), ([], 2), (["--overwrite"], 0):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert done.stdout == ("" if code else f"{tmp_path}/a/b/report.html\n")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = lay(tmp_path / "run", [line(0, 0.5, 10)])
    most = resource.RLIMIT_FSIZE
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft", "report", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(most, (20_000, 20_000)),
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*report: cannot be written \(File too large\); .*\n", done.stderr)
    assert not [p.name for p in path.iterdir() if "report" in p.name]


def test_without_its_packages_there_are_the_page_and_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_is_there", lambda package: False)
    said: list[str] = []
    page = report(lay(tmp_path / "run", [line(0, 0.5, 10)]), None, said.append)
    assert said == [
        "no plots without matplotlib: pip install 'fedpeft[report]'",
        "no Parquet tables without pyarrow: pip install 'fedpeft[report]'",
    ]
    assert shown(page)["name"] == "run"
    kinds = {p.suffix for p in page.parent.rglob("*") if p.is_file()}
    assert kinds == {".html", ".json", ".csv"}


def test_points_keep_their_order(runs: Path) -> None:
    found: Sweep = read_points(runs)
    given: Mapping[str, list[str]] = {
        axis: list(dict.fromkeys(p.values[axis] for p in found.points)) for axis in found.axes
    }
    assert given["uplink"] == ["raw", "half"]
    whole = itertools.product(given["method"][:2], given["privacy"], given["uplink"])
    assert [tuple(p.values.values()) for p in found.points][:8] == list(whole)
