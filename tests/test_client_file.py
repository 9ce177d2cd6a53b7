"""What a site says of itself is read as it is meant, and every mistake is told at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.data.jsonl import Jsonl
from fedpeft.deployment.client_file import ClientFile, Limits, load_client
from fedpeft.errors import SiteError
from fedpeft.spec import build, find, names

LEAST = {"site": "hospital-a", "server": "fl.example.org:9092", "keys": "keys"}


def written(folder: Path, **lines: Any) -> Path:
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **lines}, sort_keys=False), encoding="utf-8")
    return path


def problems(folder: Path, **lines: Any) -> list[str]:
    path = written(folder, **{k: v for k, v in lines.items() if v is not None})
    with pytest.raises(SiteError) as caught:
        load_client(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ").split("; ")


def test_the_least_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert load_client(written(tmp_path)) == ClientFile(
        path=tmp_path / "client.yaml",
        site="hospital-a",
        server="fl.example.org:9092",
        keys=tmp_path / "keys",
        insecure=False,
        home=tmp_path / "me/.fedpeft/sites/hospital-a",
        data=None,
        device="cpu",
        threads=1,
        idle=1800.0,
        limits=Limits(),
        owners=None,
    )


def test_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    limits = {
        "bundle": "installed", "modules": ["mine.methods"], "files": ["templates", "/srv"],
        "models": ["minilm", "/models/llama"], "tasks": ["classify"], "rank": 32, "rounds": 200,
        "seconds": 900, "epsilon": 8, "delta": 1e-5, "metrics": False, "gain": True,
        "client_epsilon": 4, "promised_only": True,
    }  # fmt: skip
    given = {
        "home": "state", "data": "jsonl(train='a.jsonl,/b.jsonl')", "device": "cuda:1",
        "threads": 2, "idle": 60, "limits": limits, "owners": ["owner.pub"],
    }  # fmt: skip
    found = load_client(written(tmp_path, **given))
    assert found.data == Jsonl(train=f"{tmp_path}/a.jsonl,/b.jsonl")
    assert (found.home, found.owners) == (tmp_path / "state", (tmp_path / "owner.pub",))
    assert (found.device, found.threads, found.idle) == ("cuda:1", 2, 60.0)
    assert found.limits == Limits(
        pinned=True,
        modules=("mine.methods",),
        files=(tmp_path / "templates", Path("/srv")),
        models=("minilm", "/models/llama"), tasks=("classify",), rank=32, rounds=200,
        seconds=900.0, epsilon=8.0, delta=1e-5, metrics=False, gain=True,
        client_epsilon=4.0, promised_only=True,
    )  # fmt: skip


def test_the_file_in_the_contract_is_read(tmp_path: Path) -> None:
    """YAML's ``1.0e-5`` is a number; its ``1e-5`` is a text, and the message says so."""
    (tmp_path / "client.yaml").write_text(
        "site: a\nserver: 127.0.0.1:9092\ninsecure: true\n"
        'data: jsonl(train="train.jsonl")\nlimits:\n  epsilon: 8.0\n'
        "  delta: 1.0e-5\n"
    )
    found = load_client(tmp_path / "client.yaml")
    assert (found.limits.epsilon, found.limits.delta, found.keys) == (8.0, 1e-5, None)
    (tmp_path / "client.yaml").write_text(
        "site: a\nserver: 127.0.0.1:9092\ninsecure: true\nlimits:\n  delta: 1e-5\n"
    )
    with pytest.raises(SiteError, match=r"limits.delta: '1e-5' must be .* write 1.0e-5"):
        load_client(tmp_path / "client.yaml")


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    limits = {
        "modules": ["a b"],
        "rank": 0,
        "epsilon": -1,
        "model": ["minilm"],
        "tasks": ["clasify"],
        "metrics": 1,
    }
    found = problems(
        tmp_path, site="Hospital A", server="fl.example.org", threads=1.5, device="gpu",
        ownrs=["a"], insecure="yes", data="jsonl(trian='a')", idle=True, limits=limits,
    )  # fmt: skip
    for part in (
        "site: 'Hospital A' is no name of a site",
        "server: 'fl.example.org' is no address",
        "insecure: 'yes' must be true or false",
        "data: jsonl has no field 'trian'",
        "device: 'gpu' must be cpu",
        "threads: 1.5 must be a whole number, at least 1",
        "idle: True must be a number above 0",
        "unknown line 'ownrs'",
        "did you mean 'owners'?",
        "limits.tasks: there is no task 'clasify'",
        "did you mean 'classify'?",
        "limits.rank: 0 must be a whole number",
        "limits.modules: 'a b' is no module",
        "limits.epsilon: -1 must be a number above 0",
        "limits.metrics: 1 must be true or false",
        "unknown line 'limits.model'",
        "did you mean 'models'?",
    ):
        assert any(each.startswith(part) for each in found), (part, found)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ({"insecure": True}, "insecure: fl.example.org is another machine"),
        ({"insecure": True, "server": "10.0.0.5:9092"}, "insecure: 10.0.0.5 is another machine"),
        ({"data": "sites(names='a')"}, "data: sites(names='a') is a plan's line"),
        ({"limits": ["rank"]}, "limits: ['rank'] must be lines 'name: value'"),
        ({"limits": {"models": "minilm"}}, "limits.models: 'minilm' must be a list of texts"),
        ({"limits": {"bundle": "mine"}}, "limits.bundle: 'mine' must be any or installed"),
        ({"limits": {"delta": 1}}, "limits.delta: 1 must be a number above 0 and below 1"),
        ({"owners": [1]}, "owners: [1] must be a list of texts"),
        ({"home": 7}, "home: 7 must be a text"),
        ({"limits": {"epsilon": 3}}, "limits.epsilon: counts what this site's own records spend"),
        ({"limits": {"client_epsilon": 3}}, "limits.client_epsilon: counts what this site's own"),
        ({"limits": {"promised_only": "yes"}}, "limits.promised_only: 'yes' must be true or false"),
    ],
)
def test_a_mistake(tmp_path: Path, lines: dict[str, Any], problem: str) -> None:
    assert problems(tmp_path, **lines)[0].startswith(problem)


@pytest.mark.parametrize("server", ["127.0.0.1:9092", "localhost:9092", "[::1]:9092"])
def test_without_keys_only_this_machine(tmp_path: Path, server: str) -> None:
    assert load_client(written(tmp_path, server=server, insecure=True)).keys is None


def test_missing_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text("threads: 1\n")
    with pytest.raises(SiteError, match=r"site: is missing; server: is missing; keys: is missing"):
        load_client(tmp_path / "client.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n", "a client.yaml is a list of lines"),
        ("site: a\nsite: b\n", "'site' is given twice"),
        ("limits:\n  rank: 1\n  rank: 2\n", "'rank' is given twice"),
        ("site: [\n", "not YAML"),
    ],
)
def test_what_is_no_client_file(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "client.yaml").write_text(text)
    with pytest.raises(SiteError, match=problem):
        load_client(tmp_path / "client.yaml")
    with pytest.raises(SiteError, match="no such file"):
        load_client(tmp_path / "missing.yaml")


def test_it_is_light(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = f"""
import sys
from fedpeft.deployment.client_file import load_client
load_client({str(written(tmp_path))!r})
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "peft", "flwr"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("spec", "rooted"),
    [
        ("csv(train='a.csv', delimiter=';')", "csv(train='{here}/a.csv', delimiter=';')"),
        ("jsonl(train='a b.jsonl, ~/c.jsonl')", "jsonl(train='{here}/a b.jsonl,{home}/c.jsonl')"),
        ("npz(file='/data/a.npz')", "npz(file='/data/a.npz')"),
        ("imagefolder(train='cats,dogs')", "imagefolder(train='{here}/cats,dogs')"),
        ("embedded(name='support')", "embedded(name='support')"),
        ("hub(name='org/name')", "hub(name='org/name')"),
    ],
)
def test_paths_are_taken_from_beside_the_file(
    tmp_path: Path, spec: str, rooted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "cats,dogs").mkdir()
    found = load_client(written(tmp_path, data=spec)).data
    assert found == build("data", rooted.format(here=tmp_path, home="/home/me"))


@pytest.mark.parametrize("name", names("data"))
def test_sources_of_files_say_which_fields_those_are(name: str) -> None:
    source = find("data", name)
    for field in getattr(source, "files", ()):
        assert field in {f.name for f in fields(source)}
