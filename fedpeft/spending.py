"""What a client's round spends, written down before it trains: of its records, and as a client.

Of its records a client spends what its own steps do, against everybody. As a client, under a
promise that the server keeps (``user``), it spends what the noise on the sum leaves to readers of
the models: one Gaussian mechanism a round. Nothing is gained by cohorts there, because a client
does not see the rounds in which it was not asked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpeft import hiding
from fedpeft.errors import BudgetError
from fedpeft.ledger import CLIENT, Charge, Ledgers, Release, answer, charge_all, unpromised
from fedpeft.plan import Plan
from fedpeft.releases import is_guarded, mechanism_of
from fedpeft.rng import derive
from fedpeft.turns import allowed
from fedpeft.types import Tensors

if TYPE_CHECKING:
    from fedpeft.client_rounds import Client

_KEY = 32
"""Bytes of a round's key."""


@dataclass(frozen=True, slots=True)
class Purse:
    """Where a client's spending is kept, and the (epsilon, delta) that its site allows.

    ``limit`` is of its records, ``client_limit`` of all of them as one client's. What it spends as
    a client it writes down where it ``is_apart``: on a machine of its own, whose ledger outlives
    runs. Where one machine plays all clients the run's own ledger says it. Limits are of a data
    set; where it is ``of_all_data``, of all that the client ever had: it may have got new records
    since, and has most of the old ones still. With ``promised_only`` limits leave out runs that
    promised nothing.
    """

    ledgers: Ledgers
    limit: tuple[float, float] | None = None
    client_limit: tuple[float, float] | None = None
    is_apart: bool = False
    of_all_data: bool = False
    promised_only: bool = False

    @property
    def is_limited(self) -> bool:
        """Whether the site allows no more than so much."""
        return self.limit is not None or self.client_limit is not None


def key_of(
    plan: Plan,
    site: Client,
    client: str,
    broadcast: tuple[str, int],
    depends: Sequence[Tensors | bytes],
    purse: Purse | None,
) -> bytes:
    """Return the key that hides the records of a client's round, which has counted then.

    It is empty where none are hidden. ``broadcast`` is its run and round, ``depends`` all that
    training depends on beside the plan and the data: a digest of the packet, header and all, and
    the tensors that it and the client's memory came to. The plan counts, too: the same noise under
    another clip or rate would tell the gradients' difference. Raises ``BudgetError`` where it would
    be one too many, where nobody would know, or where its site has a limit and what that is of
    would not be hidden.
    """
    _check_hidden(plan, purse)
    charges = list(_charges(plan, site, client, broadcast, depends, purse))
    if purse is None and charges:
        raise BudgetError("has no ledger to write down what it spends of its privacy")
    keys = charge_all(purse.ledgers, client, charges) if purse and charges else []
    if not plan.privacy.hides:
        return b""
    if not plan.privacy.secret:
        return derive(plan.seed, broadcast[1], client, "steps").bytes(_KEY)
    return keys[0]


def answered(plan: Plan, client: str, run: str, purse: Purse) -> None:
    """Write down that a client's reply may leave its node: what it released is not played again.

    Call it once the reply is kept, and before it is sent. Raises ``RunError`` where the disk does
    not take it; then the reply must not leave.
    """
    if plan.privacy.secret:
        answer(purse.ledgers, client, run)


def check_evaluation(plan: Plan, purse: Purse) -> None:
    """Raise ``BudgetError`` where metrics on a client's held-out records are not to leave it."""
    if purse.is_limited or (plan.privacy.hides and plan.privacy.secret):
        raise BudgetError("metrics on held-out records are not noised, so none leave this node")


def _check_hidden(plan: Plan, purse: Purse | None) -> None:
    """Raise ``BudgetError`` where a site has a limit on what the plan does not hide."""
    meant = plan.privacy.secret
    if purse and purse.limit and not (plan.privacy.hides and meant):
        raise BudgetError(
            f"its site allows epsilon {purse.limit[0]:g}, and this plan hides no records; say "
            "privacy: record(epsilon=...), without simulate_noise=true"
        )
    if purse and purse.client_limit and not (is_guarded(plan) and meant):
        raise BudgetError(
            f"its site allows epsilon {purse.client_limit[0]:g} of a client, and this plan hides "
            "no clients; say privacy: user(epsilon=...), without simulate_noise=true"
        )


def _charges(
    plan: Plan,
    site: Client,
    client: str,
    broadcast: tuple[str, int],
    depends: Sequence[Tensors | bytes],
    purse: Purse | None,
) -> Iterator[Charge]:
    """Yield what a round spends: first of the client's records, then as a client.

    What promises nothing is written down once for a run, at a machine of the client's own.
    """
    is_apart = purse is not None and purse.is_apart
    promised = plan.privacy.secret and (plan.privacy.hides or is_guarded(plan))
    if not is_apart and not (promised and plan.privacy.hides):
        return
    held, (run, round) = hiding.holder(site), broadcast
    if not promised:
        yield Charge(unpromised(held.fingerprint, run), math.inf)
        return
    of = held.fingerprint, run, round, _digest(plan.digest(), depends)
    how = (purse.of_all_data, purse.promised_only) if purse else (False, False)
    step = hiding.stepping_of(plan, hiding.units_of(plan, site, client))
    if step is not None:
        unit, noise = str(step.told()["unit"]), step.noise_multiplier
        release = Release(*of, unit, step.rate, noise, step.steps)
        yield Charge(release, step.rounds, purse.limit if purse else None, *how)
    mechanism = mechanism_of(plan, len(held.population)) if is_apart else None
    if mechanism is not None and purse is not None:
        most = allowed(plan)
        noise, timed = mechanism.unamplified, most is not None
        release = Release(*of, CLIENT, 1.0, noise, 1, timed=timed)
        yield Charge(release, min(plan.rounds, most or plan.rounds), purse.client_limit, *how)


def _digest(plan: str, depends: Sequence[Tensors | bytes]) -> str:
    found = hashlib.blake2b(plan.encode(), digest_size=16)
    for each in depends:
        if isinstance(each, bytes):
            found.update(b"%d:" % len(each) + each)
            continue
        for name in sorted(each):
            value = np.ascontiguousarray(each[name])
            found.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
            found.update(value.tobytes())
        found.update(b"|")
    return found.hexdigest()
