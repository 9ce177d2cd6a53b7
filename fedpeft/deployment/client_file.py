"""``client.yaml``: what a site is, which records are its own, and what it lets plans do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.addresses import is_loopback, split_address
from fedpeft.data import _files
from fedpeft.data._site_names import RULE, is_site
from fedpeft.deployment.settings import Reader
from fedpeft.errors import FedPeftError, SiteError
from fedpeft.spec import build, names, nearest
from fedpeft.types import Scattered, Source
from fedpeft.yaml_file import read_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a site lets plans do; ``None`` allows whatever a plan says.

    ``models`` are plan lines as they are written, ``tasks`` names of methods, ``rank`` the highest
    of a low-rank adapter. ``seconds`` is the longest work on one message. ``epsilon``, at
    ``delta``, is what all runs together may spend of the site's records, ``client_epsilon`` what
    they may of all of these as one; with ``promised_only`` neither counts runs that promised
    nothing. ``metrics`` says whether anything that was measured on its records may leave, ``gain``
    whether, with it, what it gained over training alone may. ``modules`` are those from outside
    fedpeft whose methods plans may use, and ``files`` the folders below which they may name files.
    Where it is ``pinned`` no app is taken but that of this machine's fedpeft.
    """

    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    rank: int | None = None
    rounds: int | None = None
    seconds: float | None = None
    epsilon: float | None = None
    client_epsilon: float | None = None
    delta: float = 1e-5
    promised_only: bool = False
    metrics: bool = True
    gain: bool = False
    modules: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFile:
    """A site's settings, every path absolute.

    ``path`` is the file they are from. ``keys`` is the folder from ``fedpeft certs``, ``None``
    where the site is ``insecure``. ``data`` are its own records; without, it is dealt those of the
    plan. ``idle`` is in seconds. ``owners`` are the files of the public keys of those who may
    submit runs; ``None`` is anybody.
    """

    path: Path
    site: str
    server: str
    keys: Path | None
    insecure: bool
    home: Path
    data: Source | None
    device: str = "cpu"
    threads: int = 1
    idle: float = 1800.0
    limits: Limits = field(default_factory=Limits)
    owners: tuple[Path, ...] | None = None


def load_client(path: str | Path) -> ClientFile:
    """Read ``client.yaml``. Reads no data and no key.

    Raises ``SiteError`` that lists everything wrong with it.
    """
    path = Path(path).expanduser().absolute()
    reader = Reader(read_mapping(path, SiteError, "a client.yaml"))
    here = path.parent
    site, server = reader.text("site", "", needed=True), reader.text("server", "", needed=True)
    if site and not is_site(site):
        reader.wrong("site", f"{site[:80]!r} is no name of a site; {RULE}")
    insecure = reader.flag("insecure", False)
    _check_server(reader, server or "", insecure)
    keys = reader.text("keys", needed=not insecure)
    home = reader.text("home") or f"~/.fedpeft/sites/{site}"
    owners = reader.texts("owners")
    data, limits = _data(reader, here), reader.nested("limits")
    found = ClientFile(
        path=path,
        site=site or "",
        server=server or "",
        keys=None if keys is None or insecure else _at(here, keys),
        insecure=insecure,
        home=_at(here, home),
        data=data,
        device=_device(reader),
        threads=reader.whole("threads", 1) or 1,
        idle=reader.number("idle", 1800.0) or 1800.0,
        limits=_limits(limits, here),
        owners=None if owners is None else tuple(_at(here, owner) for owner in owners),
    )
    if data is None and reader.text("data") is None:
        for name in ("epsilon", "client_epsilon"):
            if getattr(found.limits, name) is not None:
                limits.wrong(name, "counts what this site's own records spend; name them in data")
    reader.unknown()
    if problems := [*reader.problems, *limits.problems]:
        raise SiteError(f"{path}: {'; '.join(problems)}")
    return found


def _check_server(reader: Reader, server: str, insecure: bool) -> None:
    if not server:
        return
    try:
        host, _ = split_address(server)
    except SiteError as error:
        reader.wrong("server", str(error))
        return
    if insecure and not is_loopback(host):
        reader.wrong(
            "insecure",
            f"{host} is another machine, and without TLS everybody on the way reads and writes; "
            "leave it out and name keys, or use 127.0.0.1",
        )


def _data(reader: Reader, here: Path) -> Source | None:
    spec = reader.text("data")
    if spec is None:
        return None
    try:
        source: Source = build("data", spec)
    except FedPeftError as error:
        reader.wrong("data", str(error))
        return None
    if isinstance(source, Scattered):
        reader.wrong("data", f"{spec} is a plan's line; name this site's own records here")
        return None
    return _files.beside(source, here)


def _device(reader: Reader) -> str:
    device = reader.text("device", "cpu") or "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and not number.isdecimal()):
        reader.wrong("device", f"{device!r} must be cpu, cuda or cuda:N")
    return device


def _limits(reader: Reader, here: Path) -> Limits:
    tasks, known = reader.texts("tasks"), names("tasks")
    modules = reader.texts("modules") or ()
    bundle = reader.text("bundle", "any")
    if bundle not in ("any", "installed"):
        reader.wrong("bundle", f"{bundle!r} must be any or installed")
    for module in modules:
        if not all(word.isidentifier() for word in module.split(".")):
            reader.wrong("modules", f"{module!r} is no module; write package.module")
    for task in tasks or ():
        if task not in known and ":" not in task:
            reader.wrong("tasks", f"there is no task {task!r}{nearest(task, known)}")
    found = Limits(
        models=reader.texts("models"),
        tasks=tasks,
        rank=reader.whole("rank", None),
        rounds=reader.whole("rounds", None),
        seconds=reader.number("seconds", None),
        epsilon=reader.number("epsilon", None),
        client_epsilon=reader.number("client_epsilon", None),
        delta=reader.number("delta", 1e-5, below=1) or 1e-5,
        promised_only=reader.flag("promised_only", False),
        metrics=reader.flag("metrics", True),
        gain=reader.flag("gain", False),
        modules=modules,
        files=tuple(_at(here, folder) for folder in reader.texts("files") or ()),
        pinned=bundle == "installed",
    )
    reader.unknown()
    return found


def _at(folder: Path, text: str) -> Path:
    return folder / Path(text).expanduser()
