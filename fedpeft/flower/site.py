"""A site's SuperNode, with a check of each run before anything of it is kept, unpacked or run.

Flower 1.41 takes whatever bundle the server has for a run, and runs it in a process of its own. It
can only ask for signatures of Flower's hub. So the function by which it pulls a message is wrapped:
a run that this node has not seen is fetched first, its bundle and configuration checked, and what
was checked is what Flower then gets. What is leaned on is checked at the start, and in tests.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from flwr.app import Error, Message
from flwr.common.config import get_fused_config_from_fab

import fedpeft
from fedpeft.deployment.signing import hash_of, verify
from fedpeft.errors import FedPeftError, SiteError
from fedpeft.flower.bundle import bundle as own_bundle
from fedpeft.flower.inside import hasten, unknown
from fedpeft.flower.messages import REFUSED, log
from fedpeft.types import Scalar

Owners: TypeAlias = Callable[[], "Sequence[Path] | None"]
"""Says who may submit runs, as it is now: files of public keys; ``None`` is anybody."""

Pinned: TypeAlias = Callable[[], bool]
"""Says whether no app is taken but the one of this installation."""
_LARGEST, _PROJECT = 16 << 20, 1 << 20
"""Bytes of the largest bundle, and of the largest pyproject.toml in one, unpacked: it is read
before anybody's signature is."""
_MOST = 8
"""Runs whose bundles are kept in memory; another's is fetched and checked again."""
_PULL, _INSERT = "_pull_and_store_message", "_insert_message"
_GIVEN = ("state", "object_store", "receive", "get_run", "get_fab")
"""Arguments of Flower's function that are used here; others are passed on."""
_BUSY, _GLANCE = 60.0, 0.3
"""Seconds after a message for which the next is looked for often; between two such looks. Flower's
own, while nothing comes, are 3 seconds apart, which is half of a short round."""


def supernode(arguments: Sequence[str], owners: Owners, pinned: Pinned) -> NoReturn:
    """Be a SuperNode with the arguments of ``flower-supernode``, until it ends.

    Only runs that one of ``owners`` signed get onto this machine, and where the app is ``pinned``
    only those of the app that is installed here. Raises ``SiteError`` where this
    version of Flower is not known.
    """
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    guard(flower, Admission(owners, pinned))
    hasten(flower, "pull_objects")
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
    # Flower returns where its connection broke, and its other threads would go on for ever
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Admission:
    """What a run has to bring; call it with the run and its bundle as the server sent them."""

    owners: Owners
    pinned: Pinned = lambda: False

    def __call__(self, run: Any, bundle: Any) -> None:
        """Raise ``SiteError`` with the reason where it is not taken."""
        found = hash_of(bundle.content)
        if not found == bundle.hash_str == run.fab_hash:
            raise SiteError("the server sent another app than the run names")
        if self.pinned() and found != hash_of(own_bundle()):
            raise SiteError(
                f"the app (SHA-256 {found[:12]}...) is not the one of this site's own fedpeft "
                f"{fedpeft.__version__}, and it takes no other (limits.bundle); install the same "
                "fedpeft at server and sites"
            )
        config = _config(run, bundle.content)
        owners = self.owners()
        if owners is not None:
            verify(config, found, owners)


def guard(flower: Any, admit: Callable[[Any, Any], None]) -> None:
    """Have ``flower``, the module of the SuperNode's loop, ask ``admit`` about each run first.

    Raises ``SiteError`` where the module is not as it was in the versions that are known.
    """
    pull, insert = getattr(flower, _PULL, None), getattr(flower, _INSERT, None)
    parameters = inspect.signature(pull).parameters if pull else {}
    if not pull or not insert or not set(_GIVEN) <= set(parameters):
        raise unknown("pulls messages")  # signatures could not be checked
    setattr(flower, _PULL, _Guarded(pull, insert, admit))


class _Guarded:
    """Flower's function that pulls a message, behind a check of the run that it is of."""

    def __init__(
        self,
        pull: Callable[..., int | None],
        insert: Callable[..., None],
        admit: Callable[[Any, Any], None],
    ) -> None:
        self._pull, self._insert, self._admit = pull, insert, admit
        self._known: dict[int, tuple[Any, Any]] = {}
        self._message: Message | None = None
        self._busy = -_BUSY

    def __call__(self, **given: Any) -> int | None:
        """Pull a message as Flower does, and more often while a run goes on."""
        while (run := self._one(given)) is None:
            if time.monotonic() > self._busy + _BUSY:
                return None
            time.sleep(_GLANCE)
        self._busy = time.monotonic()
        return run

    def _one(self, given: Mapping[str, Any]) -> int | None:
        """Pull a message; answer it with the reason where its run is not taken."""
        receive, get_run, get_fab = (given[name] for name in _GIVEN[2:])
        self._message = None

        def received() -> Any:
            found = receive()
            if found is not None:
                self._message = found[0]
                self._meet(found[0].metadata.run_id, get_run, get_fab)
            return found

        # what was checked and nothing else: a server might send another the second time
        checked = {
            "receive": received,
            "get_run": lambda run_id: self._known[run_id][0],
            "get_fab": lambda _, run_id: self._known[run_id][1],
        }
        try:
            return self._pull(**{**given, **checked})
        except FedPeftError as why:
            message = self._message
            if message is None:
                raise
            log.warning("run %d is refused: %s", message.metadata.run_id, why)
            refusal = Message(Error(REFUSED, str(why)), reply_to=message)
            self._insert(refusal, given["state"], given["object_store"])
            return int(message.metadata.run_id)

    def _meet(
        self, run_id: int, get_run: Callable[[int], Any], get_fab: Callable[[str, int], Any]
    ) -> None:
        if run_id in self._known:
            return
        run = get_run(run_id)
        bundle = get_fab(run.fab_hash, run_id)
        self._admit(run, bundle)
        self._known[run_id] = run, bundle
        if len(self._known) > _MOST:
            del self._known[next(iter(self._known))]


def _config(run: Any, bundle: bytes) -> Mapping[str, Scalar]:
    """Return the run-config as Flower will give it to the app.

    Raises ``SiteError`` for a bundle that is none: the SuperNode would end over it.
    """
    _check_size(bundle)
    try:
        found: Mapping[str, Scalar] = get_fused_config_from_fab(bundle, run)
    except Exception as error:  # whatever reading a stranger's archive may lead to
        raise SiteError(f"the run's app or configuration cannot be read ({error})") from None
    return found


def _check_size(bundle: bytes) -> None:
    """Raise ``SiteError`` for a bundle that takes much memory before it is known whose it is."""
    size = len(bundle)
    if size > _LARGEST:
        raise SiteError(f"the run's app has {size} bytes, at most {_LARGEST} are taken")
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as packed:
            size = packed.getinfo("pyproject.toml").file_size
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, OSError) as error:
        raise SiteError(f"the run's app or configuration cannot be read ({error})") from None
    if size > _PROJECT:
        raise SiteError(
            f"the run's app has a pyproject.toml of {size} bytes, at most {_PROJECT} are read"
        )
