from __future__ import annotations

import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.durable import (
    FAULTS,
    KINDS,
    MOMENTS,
    append_line,
    make_folder,
    remove_folder,
    replace_file,
    replace_folder,
)
from fedpeft.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
LARGE = 300_000


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order."""
    found: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        found.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        found.append(f"rename {source.name} {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    replace_file(tmp_path / "f", [b"one", b"two"], "plan")
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert calls == ["sync .f.new", "rename .f.new f", f"sync {tmp_path.name}"]
    replace_file(tmp_path / "f", [], "plan")
    assert (tmp_path / "f").read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_missing_folders_are_made_durably(tmp_path: Path, calls: list[str]) -> None:
    replace_file(tmp_path / "a" / "b" / "f", [b"x"], "plan")
    top = tmp_path.name
    assert calls == ["sync a", f"sync {top}", "sync .f.new", "rename .f.new f", "sync b"]
    calls.clear()
    make_folder(tmp_path / "a" / "b")
    assert calls == []


def test_a_line_is_appended_and_durable(tmp_path: Path, calls: list[str]) -> None:
    append_line(tmp_path / "f", "one", "ledger")
    append_line(tmp_path / "f", "zwölf", "ledger")
    assert (tmp_path / "f").read_bytes() == b"one\nzw\xc3\xb6lf\n"
    assert calls == ["sync f", f"sync {tmp_path.name}"] * 2


def test_a_folder_is_durable_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    made = tmp_path / ".d.new"
    (made / "sub").mkdir(parents=True)
    (made / "a").write_text("a")
    (made / "sub" / "b").write_text("b")
    replace_folder(tmp_path / "d", made, "adapter")
    assert calls == [
        *("sync a", "sync sub", "sync b", "sync .d.new"),
        *("rename .d.new d", f"sync {tmp_path.name}"),
    ]
    assert (tmp_path / "d" / "sub" / "b").read_text() == "b"


def test_a_folder_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        made = tmp_path / "made"
        made.mkdir()
        (made / content).write_text(content)
        replace_folder(tmp_path / "d", made, "adapter")
        assert [p.name for p in (tmp_path / "d").iterdir()] == [content]
        assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    remove_folder(tmp_path / "nothing")


def test_a_full_disk_is_told_and_the_old_file_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(tmp_path / "f", [b"old"], "plan")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"f: cannot be written \(No space left on device\); continue with --resume"
    with pytest.raises(RunError, match=message):
        replace_file(tmp_path / "f", [b"new"], "plan")
    assert (tmp_path / "f").read_bytes() == b"old"
    with pytest.raises(RunError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        append_line(Path("/dev/full"), "line", "ledger")
    (tmp_path / "made").mkdir()
    with pytest.raises(RunError, match=r"d: cannot be written \(No space left on device\)"):
        replace_folder(tmp_path / "d", tmp_path / "made", "adapter")


def test_the_faults_are_named() -> None:
    assert len(FAULTS) == len(KINDS) * len(MOMENTS) == 90
    assert FAULTS[:2] == ("plan.begun", "plan.half")


CREATED = """
import json, os, sys
from pathlib import Path
from fedpeft.deployment.submissions import submit, submitted
from fedpeft.durable import MOMENTS, create_file
from fedpeft.errors import RunError

root, told = Path(sys.argv[1]), []

def key(at):
    create_file(at / "made", b"n" * 9999)

def run(at):
    submit(at, "r", {"out": "x"}, b"app")

def killed(write, at, fault):
    pid = os.fork()
    if pid == 0:
        os.environ["FEDPEFT_FAULT"] = fault
        write(at)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def there(at):
    if (at / "made").exists():
        return (at / "made").read_bytes() == b"n" * 9999
    return [each.config for each in submitted(at)] == [{"out": "x"}] or None

for write, kind, nth in ((key, "key", 1), (run, "submission", 1), (run, "submission", 2)):
    for moment in MOMENTS:
        at = root / f"{write.__name__}-{moment}-{nth}"
        at.mkdir()
        status, left = killed(write, at, f"{kind}.{moment}:{nth}"), there(at)
        try:
            write(at)
            again = "made"
        except RunError as error:
            again = "refused"
        told.append([write.__name__, nth, moment, status, left, again, there(at)])
print(json.dumps(told))
"""


def test_what_is_made_once_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """A kill at each moment; the same again makes it, or says that it is there."""
    asked = [sys.executable, "-c", CREATED, str(tmp_path)]
    ran = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert len(told) == 3 * len(MOMENTS)
    for write, nth, moment, status, left, again, then in told:
        committed = moment in ("renamed", "settled") and (write, nth) != ("run", 1)
        assert status == 9, (write, nth, moment)
        assert left is (True if committed else None), (write, nth, moment)
        assert again == ("refused" if committed else "made"), (write, nth, moment)
        assert then is True


KILLED = """
import os, sys, json
from pathlib import Path
from fedpeft.durable import MOMENTS, append_line, replace_file, replace_folder

root, large = Path(sys.argv[1]), int(sys.argv[2])

def file(at):
    replace_file(at / "f", [b"n" * large], "plan")

def line(at):
    append_line(at / "f", "n" * large, "plan")

def folder(at):
    made = at / ".d.new"
    made.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (made / name).write_bytes(b"n" * large)
    replace_folder(at / "d", made, "plan")

def counted(at):
    for i in range(3):
        replace_file(at / "f", [str(i).encode()], "plan")

def killed(write, at, fault):
    pid = os.fork()
    if pid == 0:
        os.environ["FEDPEFT_FAULT"] = fault
        write(at)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def found(at):
    return {str(p.relative_to(at)): [p.stat().st_size, p.read_bytes()[:1].decode()]
            for p in sorted(at.rglob("*")) if p.is_file()}

told = []
for write in (file, line, folder):
    for moment in MOMENTS:
        at = root / f"{write.__name__}-{moment}"
        (at / "d").mkdir(parents=True)
        (at / "f").write_bytes(b"o\\n")
        (at / "d" / "a").write_bytes(b"o")
        status = killed(write, at, f"plan.{moment}")
        left = found(at)
        write(at)
        told.append([write.__name__, moment, status, left, found(at)])
at = root / "counted"
at.mkdir()
told.append(["counted", "begun", killed(counted, at, "plan.begun:3"), found(at), {}])
told.append(["counted", "begun", killed(counted, at, "plan.begun:4"), found(at), {}])
print(json.dumps(told))
"""


def test_killed_at_every_moment(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", KILLED, str(tmp_path), str(LARGE)]
    ran = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert len(told) == 3 * len(MOMENTS) + 2
    old, new, line = [2, "o"], [LARGE, "n"], LARGE + 1
    for write, moment, status, left, then in told[:-2]:
        assert status == 9, (write, moment)
        after = moment in ("renamed", "settled")
        if write == "file":
            assert left["f"] == (new if after else old)
            assert left.get(".f.new", [0])[0] == {
                "half": LARGE // 2,
                "written": LARGE,
                "synced": LARGE,
            }.get(moment, 0)
            assert then == {"d/a": [1, "o"], "f": new}
        if write == "line":
            assert left["f"][0] == 2 + {"begun": 0, "half": line // 2}.get(moment, line)
        if write == "folder":
            whole = {"d/a": new, "d/b": new}
            seen = {k: v for k, v in left.items() if k.startswith("d/")}
            gone = moment == "synced"
            assert seen == (whole if after else {} if gone else {"d/a": [1, "o"]})
            assert then == {**whole, "f": old}
    assert told[-2][2:4] == [9, {"f": [1, "1"]}]
    assert told[-1][2:4] == [0, {"f": [1, "2"]}]


# --- nobody else writes what must survive --------------------------------------------------------

SETTLING = {"fsync", "fdatasync", "rename", "renames", "link", "symlink_to", "hardlink_to"}


def settling(source: str) -> list[str]:
    """Calls that rename or sync files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in SETTLING:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "shutil.move"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            found += [a.name for a in node.names if a.name in SETTLING | {"replace", "move"}]
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            found += [ast.unparse(node)] if ast.unparse(node.func).endswith(".replace") else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "os.fsync(1)",
        "os.replace(a, b)",
        "os.rename(a, b)",
        "path.rename(b)",
        "path.replace(b)",
        "shutil.move(a, b)",
        "from os import replace",
        "from shutil import move as go",
    ],
)
def test_settling_calls_are_found(source: str) -> None:
    assert len(settling(source)) == 1
    assert settling("text.replace('a', 'b'); dataclasses.replace(a, b=1)") == []


def test_only_durable_renames_and_syncs() -> None:
    paths = {p.relative_to(ROOT).as_posix(): p for p in (ROOT / "fedpeft").rglob("*.py")}
    sources = {name: settling(path.read_text("utf-8")) for name, path in paths.items()}
    assert sources.pop("fedpeft/durable.py")
    assert {name: found for name, found in sources.items() if found} == {}
