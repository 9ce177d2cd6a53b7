"""What a site's SuperNode takes of a server: nothing of a run that no owner signed."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from fedpeft.addresses import free_port
from fedpeft.deployment.here import owners
from fedpeft.deployment.signing import hash_of, make_owner, sign
from fedpeft.errors import SiteError
from fedpeft.flower.environment import quiet
from fedpeft.flower.messages import REFUSED
from fedpeft.flower.site import Admission, _check_size, guard
from tests.test_certificates_slow import eventually, process

ROOT = Path(__file__).parents[1]

PROJECT = """
[project]
name = "marks"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
clientapp = "marks.client:app"
serverapp = "marks.server:app"
[tool.flwr.app.config]
rounds = 3
signer = ""
signature = ""
"""

CLIENT = """
import os
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

with Path(os.environ["MARK"]).open("a") as marks:
    marks.write("{name}\\n")
app = ClientApp()

@app.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
"""

SERVER = """
import json, os, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    asked = [Message(RecordDict(), node, "query") for node in nodes]
    told = [
        [m.error.code, m.error.reason] if m.has_error() else [0, "played"]
        for m in grid.send_and_receive(asked)
    ]
    Path(os.environ["TOLD"]).with_name(f"{context.run_id}.json").write_text(json.dumps(told))
"""


def bundle(name: str, config: str = "") -> bytes:
    """An app whose client leaves its name in a file as soon as it is imported."""
    files: dict[str, bytes | Path] = {
        "pyproject.toml": (PROJECT + config).encode(),
        "marks/__init__.py": b"",
        "marks/client.py": CLIENT.replace("{name}", name).encode(),
        "marks/server.py": SERVER.encode(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what Flower takes of pathspec
        return build_fab_from_files(files)[0]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owners") / "certs"
    for name in ("alice", "mallory"):
        make_owner(folder, name)
    return folder / "owners"


def signed(keys: Path, app: bytes, name: str = "alice", **config: Any) -> dict[str, Any]:
    whole = {"rounds": 3, **config}
    signer, signature = sign(keys / name / "owner.key", whole, hash_of(app))
    return {**config, "signer": signer, "signature": signature}


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for, unless a test says so."""
    monkeypatch.setattr("fedpeft.flower.site._BUSY", -1.0)


class Site:
    """Flower's own function that pulls a message, with a server of dictionaries behind it."""

    def __init__(self, admit: Callable[[Any, Any], None]) -> None:
        self.runs: dict[int, Run] = {}
        self.bundles: dict[str, list[Fab]] = {}
        self.waiting: list[Message] = []
        self.store = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=self.store).state()
        self.state.set_node_id(5)
        module = SimpleNamespace(
            _pull_and_store_message=flower._pull_and_store_message,
            _insert_message=flower._insert_message,
        )
        guard(module, admit)
        self._pull = module._pull_and_store_message

    def has(self, run_id: int, *apps: bytes, **config: Any) -> None:
        """Have the server know a run; it sends ``apps`` in turn when asked for its bundle."""
        run = Run.create_empty(run_id)
        run.fab_hash, run.override_config = hash_of(apps[0]), config
        run.fab_id, run.fab_version = "somebody/marks", "1.0.0"
        self.runs[run_id] = run
        self.bundles[run.fab_hash] = [Fab(run.fab_hash, app, {}) for app in apps]

    def get_fab(self, hash: str, run_id: int) -> Fab:
        found = self.bundles[hash]
        return found.pop(0) if len(found) > 1 else found[0]

    def get_run(self, run_id: int) -> Run:
        if run_id not in self.runs:
            raise RunNotRunningException
        return self.runs[run_id]

    def pull(self, run_id: int) -> int | None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        message = Message(RecordDict(), 5, MessageType.QUERY)
        message.metadata.__dict__.update(_run_id=run_id, _src_node_id=1)
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            found = [(message, get_object_tree(message))]
            objects = {i: o.deflate() for i, o in get_all_nested_objects(message).items()}
        done: int | None = self._pull(
            state=self.state,
            object_store=self.store.store(),
            node_config={},
            receive=lambda: found.pop() if found else None,
            get_run=self.get_run,
            get_fab=self.get_fab,
            pull_object=lambda run, name: objects[name],
            confirm_message_received=lambda run, name: None,
            trusted_entities=None,
        )
        return done

    def replies(self) -> list[tuple[int, str]]:
        found = self.state.get_messages_legacy(is_reply=True)
        return [(m.error.code, str(m.error.reason)) for m in found]


def tasks(site: Site) -> int:
    """How many processes Flower would start: each is a task."""
    return len(site.state.get_tasks())


def test_a_pinned_site_takes_its_own_app_and_no_other(keys: Path) -> None:
    """Not even one that an owner signed, nor without owners."""
    from fedpeft.flower.bundle import bundle as own_bundle

    own, app, alice = own_bundle(), bundle("good"), keys / "alice" / "owner.pub"
    for known in (lambda: [alice], lambda: None):
        site = Site(Admission(known, lambda: True))
        site.has(7, app, **signed(keys, app))
        site.pull(7)
        ((code, reason),) = site.replies()
        assert code == REFUSED
        assert "is not the one of this site's own fedpeft" in reason
        assert not tasks(site)
    site = Site(Admission(lambda: None, lambda: True))
    site.has(8, own)
    assert site.pull(8) == 8
    assert not site.replies()


def test_a_bundle_that_unpacks_to_much_is_not_unpacked(keys: Path) -> None:
    """Its pyproject.toml is read before the signature, which is of what it says."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("pyproject.toml", PROJECT + "#" * (200 << 20))
    app = packed.getvalue()
    assert len(app) < 1 << 20
    site = Site(Admission(lambda: [keys / "alice" / "owner.pub"]))
    site.has(7, app, **signed(keys, app))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    site.pull(7)
    ((code, reason),) = site.replies()
    assert (code, "has a pyproject.toml of 2097" in reason) == (REFUSED, True), reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10, "KiB"
    with pytest.raises(SiteError, match="at most 16777216 are taken"):
        _check_size(bytes((16 << 20) + 1))


def test_bundles_are_not_kept_for_ever(keys: Path) -> None:
    site = Site(Admission(lambda: None))
    for number in range(1, 21):
        site.has(number, bundle(f"app{number}"))
        assert site.pull(number) == number
    guarded: Any = site._pull
    assert len(guarded._known) == 8
    assert site.pull(1) == 1, "one that was let go of is fetched and checked again"
    assert not site.replies()


def test_a_run_that_an_owner_signed_is_taken(keys: Path) -> None:
    site, app = Site(Admission(lambda: [keys / "alice" / "owner.pub"])), bundle("good")
    site.has(7, app, **signed(keys, app))
    assert site.pull(7) == 7
    assert not site.replies()
    run, kept = site.state.get_run(7), site.state.get_fab(hash_of(app))
    assert run is not None
    assert kept is not None
    assert kept.content == app
    assert tasks(site) == 1


def test_whatever_else_is_answered_with_the_reason_and_nothing_of_it_is_kept(keys: Path) -> None:
    alice = [keys / "alice" / "owner.pub"]
    good, evil = bundle("good"), bundle("evil")
    cases = {
        "is not signed": (evil, {}),
        "none of this site's owners (alice)": (evil, signed(keys, evil, "mallory")),
        "the app (SHA-256": (evil, signed(keys, good)),
        "a line was changed": (good, {**signed(keys, good), "rounds": 99}),
        "cannot be read": (good, {**signed(keys, good), "strange": 1}),
        "app or configuration cannot be read": (b"no archive", {}),
    }
    for reason, (app, config) in cases.items():
        site = Site(Admission(lambda: alice))
        site.has(7, app, **config)
        for _ in range(2):  # asked again, it is refused again
            assert site.pull(7) == 7
            ((code, told),) = site.replies()
            assert code == REFUSED
            assert reason in told
        assert site.state.get_run(7) is None
        assert site.state.get_fab(hash_of(app)) is None
        assert tasks(site) == 0
        site.has(8, good, **signed(keys, good))
        assert site.pull(8) == 8
        assert tasks(site) == 1


def test_what_was_checked_is_what_flower_gets(keys: Path) -> None:
    """A server that shows one bundle and then sends another does not get it in."""
    good, evil = bundle("good"), bundle("evil")
    site = Site(Admission(lambda: [keys / "alice" / "owner.pub"]))
    site.has(7, good, evil, **signed(keys, good))
    assert site.pull(7) == 7
    kept = site.state.get_fab(hash_of(good))
    assert kept is not None
    assert kept.content == good
    other = Site(Admission(lambda: [keys / "alice" / "owner.pub"]))
    other.has(7, good, **signed(keys, good))
    other.bundles[hash_of(good)] = [Fab(hash_of(good), evil, {})]
    assert other.pull(7) == 7
    assert other.replies() == [(REFUSED, "the server sent another app than the run names")]


def test_a_site_without_owners_takes_any_run_that_can_be_read() -> None:
    site = Site(Admission(lambda: None))
    site.has(7, bundle("any"), rounds=5)
    site.has(8, bundle("any"), strange=5)
    assert [site.pull(7), len(site.replies())] == [7, 0]
    assert site.pull(8) == 8  # Flower's own SuperNode would end over it
    assert "cannot be read (Key 'strange' is not present" in site.replies()[0][1]


def test_who_may_submit_is_looked_up_for_each_run(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner who is taken out of client.yaml brings no further run in."""
    file, app = tmp_path / "client.yaml", bundle("good")
    known = {name: str(keys / name / "owner.pub") for name in ("alice", "mallory")}

    def write(*names: str) -> None:
        lines = {"site": "a", "server": "127.0.0.1:1", "insecure": True}
        file.write_text(json.dumps({**lines, "owners": [known[name] for name in names]}))

    monkeypatch.setenv("FEDPEFT_CLIENT", str(file))
    site = Site(Admission(owners))
    for number, names in enumerate([("alice", "mallory"), ("alice",), ()]):
        write(*names)
        site.has(number, app, **signed(keys, app, "mallory"))
        assert site.pull(number) == number
        assert len(site.replies()) == int(number > 0)
    file.write_text("owners: [")
    site.has(9, app, **signed(keys, app))
    site.pull(9)
    assert site.state.get_run(9) is None


def test_a_run_that_is_over_is_passed_over_as_flower_does(keys: Path) -> None:
    site = Site(Admission(lambda: ()))
    assert site.pull(9) is None
    assert not site.replies()


@pytest.mark.parametrize(
    "lacks", ["_pull_and_store_message", "_insert_message", "receive", "get_fab", "object_store"]
)
def test_another_flower_is_not_trusted(lacks: str) -> None:
    def pull(**given: Any) -> None: ...

    given = ["state", "object_store", "receive", "get_run", "get_fab"]
    text = ", ".join(name for name in given if name != lacks)
    space: dict[str, Any] = {}
    exec(f"def pull(*, {text}): ...", space)
    module = SimpleNamespace(_pull_and_store_message=space["pull"], _insert_message=pull)
    if lacks.startswith("_"):
        delattr(module, lacks)
    with pytest.raises(SiteError, match=r"flwr \S+: pulls messages otherwise"):
        guard(module, Admission(lambda: None))


def test_flower_calls_what_is_wrapped_by_its_name() -> None:
    """The loop looks the function up in its module at each message, and gives all by name."""
    code = flower.start_client_internal.__code__
    assert "_pull_and_store_message" in code.co_names
    assert "install_from_fab" not in dir(flower)  # unpacking is the task's affair


LEFT = """
import threading, time
import flwr.supernode.cli as flower
from fedpeft.flower.site import supernode

def returns():  # as it does where its connection broke, beside threads that go on
    threading.Thread(target=time.sleep, args=(600,)).start()

flower.flower_supernode = returns
supernode([], lambda: None)
"""


def test_a_supernode_whose_connection_broke_ends_and_does_not_linger() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", LEFT], env=env, timeout=300).returncode == 1


# --- real processes ------------------------------------------------------------------------------

NODE = """
import sys
from pathlib import Path
from fedpeft.flower.site import supernode

known = [Path(sys.argv[1])]
supernode(sys.argv[2:], lambda: known, lambda: False)
"""


@pytest.fixture
def federation(tmp_path: Path, keys: Path) -> Iterator[tuple[Callable[..., Any], Path]]:
    """A SuperLink and a site whose owner is alice; what submits a run and returns what it told."""
    port = free_port()
    env = quiet(
        FLWR_HOME=str(tmp_path / "flwr"),
        MARK=str(tmp_path / "marks"),
        TOLD=str(tmp_path / "told"),
        PYTHONPATH=str(ROOT),
    )
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    node = [sys.executable, "-c", NODE, str(keys / "alice" / "owner.pub"), "--insecure"]
    node += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    with ExitStack() as running:
        running.enter_context(process(link, env, tmp_path / "link.log"))
        made = running.enter_context(
            process(node, env | {"FLWR_HOME": str(tmp_path / "site")}, tmp_path / "node.log")
        )
        assert eventually(lambda: "SuperNode ID" in (tmp_path / "node.log").read_text())
        client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}", insecure=True, root_certificates=None, interceptors=[]
        )
        running.callback(client.close)

        def submit(app: bytes, config: dict[str, Any]) -> Any:
            fab = fab_to_proto(Fab(hash_of(app), app, {}))
            request = StartRunRequest(fab=fab, override_config=user_config_to_proto(config))
            run = client.StartRun(request).run_id
            told = tmp_path / f"{run}.json"
            assert eventually(told.exists), (tmp_path / "link.log").read_text()
            assert made.poll() is None
            return json.loads(told.read_text())

        yield submit, tmp_path / "marks"


@pytest.mark.slow
def test_an_app_that_no_owner_signed_never_runs(
    federation: tuple[Callable[..., Any], Path], keys: Path
) -> None:
    """Its code would leave a mark; the server is told the reason; signed, the same code runs."""
    submit, marks = federation
    good, evil = bundle("good"), bundle("evil")
    refused = {
        "is not signed, and this site takes only": (evil, {}),
        "none of this site's owners (alice)": (evil, signed(keys, evil, "mallory")),
        "is not the one that alice signed": (evil, signed(keys, good)),
        "a line was changed afterwards": (good, {**signed(keys, good), "rounds": 4}),
    }
    for reason, (app, config) in refused.items():
        ((code, told),) = submit(app, config)
        assert code == REFUSED
        assert reason in told
        assert not marks.exists()
    installed = marks.with_name("site") / "apps"
    assert not installed.exists()
    assert submit(good, signed(keys, good)) == [[0, "played"]]
    assert set(marks.read_text().split()) == {"good"}
    assert len(list(installed.iterdir())) == 1
