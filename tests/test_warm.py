"""The warm trainer: what crosses its socket, who may, and what becomes of either side's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import cli
from fedpeft.errors import RunError, WireError
from fedpeft.warm import channel
from fedpeft.warm.channel import SERVICE, Gone, Place, Warm, address, frame, unframe
from fedpeft.warm.service import Service, serving
from tests.fake_trainer import HELLO, Fake
from tests.test_flower import SGD, FakeGrid, assert_same, config_of, serve
from tests.tiny import support_plan, tiny_bert

ROOT = Path(__file__).parents[1]
PLACE = Place({"model": "m", "seed": 3, "resume": False}, {"partition-id": 1, "max-epsilon": 2.5})


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "warm"


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def service(where: Path, fake: Fake) -> Iterator[Service]:
    with serving(where, lambda: fake, idle=0.2) as found:
        yield found


# --- what crosses --------------------------------------------------------------------------------


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans()),
    st.binary(max_size=50),
)
def test_frames_come_back(header: dict[str, Any], packet: bytes) -> None:
    assert unframe(frame(header, packet)) == (header, packet)


@given(st.binary(max_size=40))
def test_rubbish_is_no_frame(data: bytes) -> None:
    try:
        header, _ = unframe(data)
    except WireError:
        return
    assert isinstance(header, dict)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0\5ab", b"\xff\xff\xff\xff{}", frame({})[:-1], b"\0\0\0\2[]"]
)
def test_what_is_cut_short_or_else_is_no_frame(data: bytes) -> None:
    with pytest.raises(WireError, match="no frame"):
        unframe(data)


def test_answers_are_those_of_the_trainer(where: Path, service: Service, fake: Fake) -> None:
    warm = Warm(where)
    assert warm.hello(PLACE) == HELLO
    packet = os.urandom(6_000_000)  # more than gRPC takes by itself
    assert warm.train(PLACE, "a", packet) == packet[::-1]
    assert warm.evaluate(PLACE, "b", b"x") == {"loss": 0.1, "accuracy": 1 / 3}
    assert warm.evaluate(PLACE, "b", b"") == {}
    assert fake.asked == [(PLACE, ""), (PLACE, "a"), (PLACE, "b"), (PLACE, "b")]
    state = warm.state()
    assert (state["calls"], state["pid"], state["busy"]) == (4, os.getpid(), "")
    assert state["loaded"] is True


def test_a_refusal_keeps_its_reason(where: Path, service: Service) -> None:
    with pytest.raises(RunError, match="its loss is not finite; lower lr"):
        Warm(where).train(PLACE, "a", b"refuse")
    assert Warm(where).train(PLACE, "a", b"ab") == b"ba"


def test_a_mistake_of_ours_is_no_refusal(where: Path, service: Service) -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        Warm(where).train(PLACE, "a", b"fail")
    assert Warm(where).train(PLACE, "a", b"ab") == b"ba"


def test_another_version_is_told_to_install_the_same(
    where: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "PROTOCOL", 0)
    with pytest.raises(RunError, match="install the same"):
        Warm(where).hello(PLACE)


class Keeper(Fake):
    """One whose clients keep results, too."""

    def keep(self, place: Place, client: str, packet: bytes) -> dict[str, float]:
        self.asked.append((place, client))
        return {"gain/loss": -0.25} if packet else {}


def test_a_result_is_kept_by_a_trainer_that_keeps_any(where: Path, tmp_path: Path) -> None:
    keeper = Keeper()
    with serving(where, lambda: keeper):
        assert Warm(where).keep(PLACE, "a", b"result") == {"gain/loss": -0.25}
        assert Warm(where).keep(PLACE, "a", b"") == {}
        assert keeper.asked == [(PLACE, "a")] * 2
    with (
        serving(tmp_path / "other", Fake),
        pytest.raises(RunError, match="keeps no results"),
    ):
        Warm(tmp_path / "other").keep(PLACE, "a", b"result")


def test_one_message_is_played_at_a_time(where: Path, service: Service, fake: Fake) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(Warm(where).train, PLACE, c, b"sleep0.1") for c in "abcd"]
        assert {a.result() for a in asked} == {b"1.0peels"}
    assert fake.most == 1
    assert len(fake.asked) == 4


def test_its_health_can_be_asked_for(where: Path, service: Service) -> None:
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    with grpc.secure_channel(address(where), credentials) as to:
        stub: Any = health_pb2_grpc.HealthStub(to)
        found = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert found.status == health_pb2.HealthCheckResponse.SERVING


# --- who may -------------------------------------------------------------------------------------


def test_folder_and_token_are_the_owners_alone(where: Path, service: Service) -> None:
    assert where.stat().st_mode & 0o777 == 0o700
    assert (where / "token").stat().st_mode & 0o777 == 0o600
    assert len((where / "token").read_text()) == 64


def test_another_token_is_not_taken(where: Path, service: Service, fake: Fake) -> None:
    (where / "token").write_text("0" * 64)
    with pytest.raises(Gone, match="another token") as caught:
        Warm(where, wait=0).train(PLACE, "a", b"x")
    assert caught.value.broken
    with pytest.raises(Gone, match="another token"):
        Warm(where, wait=0).state()
    assert not fake.asked


def test_a_folder_that_others_may_enter_is_refused(where: Path, service: Service) -> None:
    where.chmod(0o755)
    with pytest.raises(RunError, match="chmod 700"):
        Warm(where).hello(PLACE)


def test_a_folder_that_others_may_enter_is_closed(where: Path) -> None:
    where.mkdir(mode=0o755)
    with serving(where, Fake):
        assert where.stat().st_mode & 0o777 == 0o700


def test_there_is_one_in_a_folder(where: Path, service: Service) -> None:
    with pytest.raises(RunError, match="a warm trainer runs already"), serving(where, Fake):
        pass
    assert Warm(where).hello(PLACE) == HELLO


def test_a_path_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    far = tmp_path / ("x" * 120)
    with pytest.raises(RunError, match="set FEDPEFT_WARM to a shorter folder"), serving(far, Fake):
        pass


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="no folder to write in"), serving(tmp_path / "file", Fake):
        pass


# --- coming and going ----------------------------------------------------------------------------


def test_where_none_ever_ran_that_is_known_at_once(where: Path) -> None:
    with pytest.raises(Gone, match="no warm trainer runs here") as caught:
        Warm(where, wait=60).hello(PLACE)
    assert not caught.value.broken


def test_one_that_ended_as_it_should_is_not_waited_for(where: Path) -> None:
    with serving(where, Fake):
        pass
    with pytest.raises(Gone) as caught:
        Warm(where, wait=60).hello(PLACE)
    assert not caught.value.broken


def test_what_is_not_asked_for_is_let_go_of(where: Path, fake: Fake) -> None:
    before, made = Fake.made, [fake, Fake()]
    with serving(where, lambda: made.pop(0), idle=600) as service:
        service.unload_if_idle()
        assert not Warm(where).state()["loaded"]
        Warm(where).hello(PLACE)
        service.unload_if_idle()
        assert not fake.unloaded
        service.idle = 0.0
        service.unload_if_idle()
        assert fake.unloaded
        assert not Warm(where).state()["loaded"]
        assert Warm(where).hello(PLACE) == HELLO
        assert Warm(where).state()["loaded"]
    assert Fake.made == before + 1


def test_nothing_is_let_go_of_in_the_middle(where: Path, service: Service, fake: Fake) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Warm(where).train, PLACE, "a", b"sleep0.6")
        while service.busy != "train":
            time.sleep(0.01)
        time.sleep(0.3)
        service.unload_if_idle()
        assert not fake.unloaded
        assert asked.result() == b"6.0peels"


PROCESS = """
import sys
from pathlib import Path
from fedpeft.warm.service import serve
from tests.fake_trainer import Fake

serve(Path(sys.argv[1]), 60, Fake)
"""


def started(where: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(where)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"warm trainer: {where}\n"
    return process


def ended(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert process.stdout is not None
    process.stdout.close()
    return code


def test_one_that_is_killed_and_started_again_is_asked_again(where: Path) -> None:
    first = started(where)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Warm(where, wait=60).train, PLACE, "a", b"sleep2")
        while not Warm(where).state()["busy"]:
            time.sleep(0.01)
        assert ended(first, signal.SIGKILL) == -signal.SIGKILL
        second = started(where)
        assert asked.result(timeout=60) == b"2peels"
    assert ended(second, signal.SIGTERM) == 0


def test_one_that_is_killed_is_not_waited_for_forever(where: Path) -> None:
    ended(started(where), signal.SIGKILL)
    with pytest.raises(Gone, match="the warm trainer is gone") as caught:
        Warm(where, wait=0.1).hello(PLACE)
    assert caught.value.broken


def test_one_that_does_not_come_back_is_waited_for_once(where: Path) -> None:
    """Each of Flower's messages is a process of its own: the next one is not to wait again."""
    ended(started(where), signal.SIGKILL)
    with pytest.raises(Gone, match="the warm trainer is gone"):
        Warm(where, wait=0.1).hello(PLACE)
    with pytest.raises(Gone, match="no warm trainer runs here") as caught:
        Warm(where, wait=600).hello(PLACE)
    assert not caught.value.broken
    third = started(where)
    assert Warm(where).hello(PLACE) == HELLO
    assert ended(third, signal.SIGTERM) == 0


def test_a_living_ones_token_is_never_taken_away(where: Path, service: Service) -> None:
    token = (where / "token").read_text()
    (where / "token").write_text("0" * 64)  # as a caller has it that was there before this one
    with pytest.raises(Gone, match="another token"):
        Warm(where, wait=0.1).hello(PLACE)
    assert (where / "token").read_text() == "0" * 64
    (where / "token").write_text(token)
    assert Warm(where).hello(PLACE) == HELLO


def test_a_long_round_does_not_hold_up_the_end(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = started(where)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Warm(where, wait=0).train, PLACE, "a", b"sleep600")
        while not Warm(where).state()["busy"]:
            time.sleep(0.01)
        assert ended(process, signal.SIGTERM) == 0
        with pytest.raises(Gone):
            asked.result(timeout=60)


# --- a run through it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


def test_a_clientapp_imports_no_torch() -> None:
    code = (
        "import sys, client.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_is_the_same_through_it(
    killed: bool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None
) -> None:
    """Bit for bit, with a control variate at each client; also where it is killed in between."""
    plan = support_plan(bert, correction="scaffold", trainer=SGD, rounds=2)
    serve(FakeGrid(config_of(plan, out=str(tmp_path / "alone")), nodes=4))
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("FEDPEFT_WARM", str(tmp_path / "warm"))
    trainers = [warm_process()]
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "through")), nodes=4)
    played = grid.play

    def play(message: Any, place: int) -> Any:
        if killed and len(trainers) == 1 and Warm().state()["calls"] > 5:
            trainers[0].kill()
            trainers[0].wait()
            trainers.append(warm_process())
        return played(message, place)

    monkeypatch.setattr(grid, "play", play)
    try:
        serve(grid)
        assert Warm().state()["calls"] > 5
    finally:
        for process in trainers:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert len(trainers) == 1 + killed
    assert_same(tmp_path / "alone", tmp_path / "through")


def test_without_one_this_process_does_the_work(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None
) -> None:
    plan = support_plan(bert, rounds=1)
    where = tmp_path / "warm"
    ended(started(where), signal.SIGKILL)
    monkeypatch.setenv("FEDPEFT_WARM", str(where))
    monkeypatch.setattr(channel, "_WAIT", 0.0)
    serve(FakeGrid(config_of(plan, out=str(tmp_path / "run")), nodes=4))
    assert (tmp_path / "run" / "adapter").is_dir()


def warm_process() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpeft", "warm"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("warm trainer: ")
    return process


def test_the_command_says_how_it_is(
    where: Path,
    service: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for folder, code, said in ((where, 0, "calls: 0"), (tmp_path, 2, "fedpeft warm' starts one")):
        line = ["fedpeft", "warm", "--state", "--folder", str(folder)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        told = capsys.readouterr()
        assert int(exit.value.code or 0) == code
        assert said in told.out + told.err
