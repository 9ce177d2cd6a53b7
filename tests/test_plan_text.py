"""What a site refuses of a plan before it imports, opens or constructs anything that it names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.deployment.client_file import ClientFile, Limits
from fedpeft.deployment.here import CLIENT
from fedpeft.deployment.plan_text import unread_refusals
from fedpeft.errors import FedPeftError
from fedpeft.flower.config import run_config
from fedpeft.node import Node
from fedpeft.plan import Plan
from fedpeft.spec import mentions
from fedpeft.warm.channel import Place
from tests.tiny import support_lines, tiny_bert

pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every file that this process opens."""
    found, on = list[str](), [True]

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if on[0] and event == "open" and isinstance(words[0], str | bytes | os.PathLike):
            found.append(os.fsdecode(words[0]))

    sys.addaudithook(hook)  # it stays for good, so it is switched off
    yield found
    on[0] = False


def site(*files: Path) -> ClientFile:
    """Return a site without records of its own that lets plans name files below some folders."""
    return ClientFile(
        path=Path("/client.yaml"), site="a", server="127.0.0.1:1", keys=None, insecure=True,
        home=Path("/home"), data=None, limits=Limits(files=files),
    )  # fmt: skip


def refused(folder: Path, limits: str, lines: Mapping[str, Any], data: str = "") -> str:
    path = folder / "client.yaml"
    base = "site: a\nserver: 127.0.0.1:1\ninsecure: true\nhome: state\n"
    path.write_text(f"{base}{data}limits: {{{limits}}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CLIENT, str(path))
        try:
            Node().hello(Place(dict(lines), {"partition-id": 0, "num-partitions": 1}))
        except FedPeftError as error:
            return str(error)
    return ""


CHAINED = "feedback(topk(density=0.1) | evil:Trap)"


@pytest.mark.parametrize(
    ("line", "spec"),
    [
        ("task", "evil:Trap"),
        ("data", "evil:Trap(a=1)"),
        ("uplink", "topk(density=0.1) | evil:Trap"),
        ("uplink", CHAINED),
        ("uplink", "feedback(wrapped=evil:Trap)"),
        ("uplink", "feedback(evil:Trap(x='a,b)'))"),
        ("preset", "evil:Trap"),
        ("availability", "evil : Trap"),
    ],
)
def test_code_that_the_owner_did_not_allow_is_not_imported(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, spec: str
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('a stranger is in')")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {**run_config(Plan.from_lines(support_lines(bert))), line: spec}
    said = refused(tmp_path, "files: [/]", lines)
    assert f"a refuses this plan: {line}: evil is none of the modules from which" in said
    with pytest.raises(SystemExit):
        refused(tmp_path, "files: [/], modules: [evil]", lines)


@pytest.mark.parametrize("kind", ["template", "warm_start", "data"])
def test_a_path_that_the_owner_did_not_allow_is_not_opened(
    bert: Path, tmp_path: Path, opened: list[str], kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "f").write_text('{"text": "a", "label": "billing"}\n')
    plan = run_config(Plan.from_lines(support_lines(bert)))
    lines = {
        "template": {"task": f"causal_lm(chat_template={str(secret / 'f')!r})"},
        "warm_start": {"warm_start": str(secret)},
        "data": {"data": f"jsonl(train={str(secret / 'f')!r})"},
    }[kind]
    given = {**plan, "data": "embedded(name='support')", **lines}
    opened.clear()
    said = refused(tmp_path, "", given)
    assert "a refuses this plan: " in said
    assert str(secret) in said
    assert "is a path, and plans may name files here only in no folder (limits.files" in said
    assert not [path for path in opened if str(secret) in path]
    elsewhere = refused(tmp_path, "files: [other]", given)
    assert f"only in {tmp_path / 'other'} (limits.files" in elsewhere
    assert "limits.files" not in refused(tmp_path, "files: [secret]", given)


def test_a_way_out_of_an_allowed_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "secret")
    limits = site(tmp_path / "ours")
    for path in ("ours/../secret", "ours/link", "ours/a.jsonl,secret", "secret", "ours\0"):
        lines = {"data": f"jsonl(train={str(tmp_path / path)!r})"}
        assert unread_refusals(limits, lines), path
    for path in ("ours/a.jsonl", f"ours/a.jsonl,{tmp_path}/ours/b.jsonl"):
        assert not unread_refusals(limits, {"data": f"jsonl(train={str(tmp_path / path)!r})"})


@pytest.mark.parametrize(
    "spec",
    [
        "causal_lm(max_length=4, # , \n chat_template='/etc/passwd')",
        "causal_lm(**{'chat_template': '/etc/passwd'})",
        "causal_lm('/etc/passwd')",
        "causal_lm(chat_template='/etc/' 'passwd')",
        "causal_lm(chat_template='/etc/' + 'passwd')",
        "causal_lm(chat_template=r'/etc/passwd')",
        "causal_lm(chat_template='\\x2fetc/passwd')",
        "CausalLm(chat_template='/etc/passwd')",
        "causal_lm(chat_template='/etc/passwd'",
        "causal_lm(chat_template='/etc/passwd') | classify",
    ],
)
def test_no_other_spelling_is_let_through(bert: Path, tmp_path: Path, spec: str) -> None:
    lines = {**run_config(Plan.from_lines(support_lines(bert))), "task": spec}
    reasons = unread_refusals(site(bert.parent), lines)
    assert any(reason.startswith("task: ") for reason in reasons) or (
        "**" in spec and "has no field '**'" in refused(tmp_path, "files: [/]", lines)
    )


def test_a_chat_template_goes_to_sites_as_text(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}, (x\n{% endfor %}")
    task = f"causal_lm(chat_template={str(path)!r})"
    lines = support_lines(bert, task=task, evaluate="test", partition="iid")
    sent = run_config(Plan.from_lines(lines))
    assert "template.jinja" not in str(sent["task"])
    assert not [r for r in unread_refusals(site(bert.parent), sent) if r.startswith("task")]
    (read,) = mentions(str(sent["task"]))
    assert read.given["chat_template"] == path.read_text()


def test_plans_that_name_no_files_and_no_code_are_read(bert: Path) -> None:
    from tests.test_pairs import LISTED

    for listed in LISTED.values():
        for spec in listed:
            list(mentions(spec))
    for lines in (
        {"preset": "fedprox", "data": "sites(names='a,b', test='/srv/test.jsonl')"},
        {"task": "causal_lm(chat_template='{% for m in messages %}{{ m }}, (x{% endfor %}')"},
        {"task": "causal_lm(chat_template='plain')", "warm_start": "none"},
        {"data": "hub(name='nyu-mll/glue', config='sst2')", "uplink": "", "preset": ""},
    ):
        assert unread_refusals(site(), lines) == []
    assert unread_refusals(site(), {"data": "hub(name='/srv/x')"})
