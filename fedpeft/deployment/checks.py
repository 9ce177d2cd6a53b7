"""What a site looks at before it joins: its records, its keys, the server, its owners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedpeft.addresses import split_address
from fedpeft.deployment.client_file import ClientFile, Limits
from fedpeft.deployment.files import load_certificate, read
from fedpeft.deployment.handshake import Unreachable, probe
from fedpeft.deployment.signing import owner_of
from fedpeft.warm.channel import address


def check(file: ClientFile, warm: Path) -> Iterator[str]:
    """Yield what was found, a line each; ``warm`` is the folder of the warm trainer's socket.

    A line that begins with ``warning: `` is one. Raises ``FedPeftError`` where the site cannot
    join; a server that is not there yet is waited for.
    """
    address(warm)
    yield f"site {file.site}, home {file.home}"
    if file.data is None:
        yield (
            "warning: data: none of its own; it plays every client of a plan whose records all "
            "machines have, as one site alone would"
        )
    else:
        from fedpeft.deployment.data_check import check_data

        yield from (f"data: {line}" for line in check_data(file).lines())
    yield from _check_server(file)
    yield f"limits: {describe(file.limits)}"
    if file.limits.gain and not file.limits.metrics:
        yield "warning: limits: gain: true says nothing beside metrics: false, which keeps all here"
    if file.owners is None:
        yield (
            "warning: owners: none are named, so whoever may submit at the server runs code on "
            "this machine; name the files of their public keys"
        )
    else:
        names = ", ".join(owner_of(path) for path in file.owners)
        yield f"owners: {names or 'nobody, so no run is taken'}"


def describe(limits: Limits) -> str:
    """Return a site's limits in a line."""
    told = [f"models {' or '.join(limits.models)}"] if limits.models is not None else []
    told += [f"tasks {' or '.join(limits.tasks)}"] if limits.tasks is not None else []
    for name, value in (("rank", limits.rank), ("rounds", limits.rounds)):
        told += [f"{name} at most {value}"] if value is not None else []
    told += [f"{limits.seconds:g} seconds a message"] if limits.seconds is not None else []
    if limits.epsilon is not None:
        told.append(f"epsilon {limits.epsilon:g} at delta {limits.delta:g} over all runs")
    if limits.client_epsilon is not None:
        told.append(f"epsilon {limits.client_epsilon:g} at delta {limits.delta:g} as a client")
    told += ["runs that promised nothing do not count"] if limits.promised_only else []
    told += [] if limits.metrics else ["no metrics leave"]
    told += ["the gain may leave"] if limits.gain and limits.metrics else []
    told += [f"methods of {', '.join(limits.modules)}"] if limits.modules else []
    told += [f"files below {', '.join(map(str, limits.files))}"] if limits.files else []
    told += ["no app but that of this fedpeft"] if limits.pinned else []
    return "; ".join(told) or "none"


def _check_server(file: ClientFile) -> Iterator[str]:
    if file.keys is None:
        yield f"warning: insecure: nothing that goes to {file.server} is encrypted or signed"
        return
    read(file.keys / "site.key", private=True)
    load_certificate(file.keys / "ca.crt")
    try:
        good = probe(*split_address(file.server), file.keys / "ca.crt")
    except Unreachable as error:
        yield f"warning: server: {error}; it is waited for"
    else:
        yield f"server: {file.server}, its certificate good until {good:%F}"
