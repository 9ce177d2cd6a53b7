"""``fedpeft gain``: what a run has gained a site, against training alone on its own records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpeft.deployment.client_file import ClientFile
from fedpeft.errors import RunError, SiteError
from fedpeft.results import Kept, find
from fedpeft.site_report import table

Tell = Callable[[str], None]


def gain(file: ClientFile, run: str, tell: Tell) -> Kept:
    """Compare what a site keeps of a run with what it can do alone; return it with the report.

    Training alone takes about as long as the site's part in the run; it happens once, and what came
    of it stays in the report. Nothing is written before the end. Raises ``SiteError`` for a run
    that is not kept here, records that were not held out, or other records than the run had.
    """
    found = find(file.home, run)
    if found.report["gain"]:
        tell("this site has trained alone for this run before; that is what came of it")
        return found
    held_out = found.report["records"]["held out"]
    if not held_out:
        raise SiteError(
            f"{run}: no records of this site were held out, so there is nothing to compare on; "
            "the plan's holdout says how many are"
        )
    rows, compared = _compared(file, found, tell)
    try:
        found.add(rows, compared)
    except RunError as error:
        for line in table({"rows": rows}):
            tell(line)
        reason = getattr(error.__cause__, "strerror", None) or error
        raise SiteError(
            f"{found.folder}: the report cannot be written ({reason}); what came of it is above"
        ) from error
    return Kept(found.folder)


def _compared(file: ClientFile, found: Kept, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the table's rows, and each adapter against that of training alone."""
    from contextlib import closing

    import torch

    from fedpeft.plan import Plan
    from fedpeft.scattered import held_by
    from fedpeft.site import Site
    from fedpeft.site_report import finite, measured, paired, trained_alone

    adapters, about = found.about
    client, plan = str(about["client"]), Plan.from_lines(about["lines"])
    if file.data is None or client != file.site:
        raise SiteError(f"{file.path}: is not of the site that took part in this run, {client}")
    federation = held_by(plan, client, file.data)
    if federation.splits.fingerprint != about["data"]:
        raise SiteError(
            f"{file.path}: data: holds other records than at the end of this run, so others would "
            "be held out; put back what was there"
        )
    torch.set_num_threads(file.threads)
    with closing(Site(plan, federation, file.device, leads=False, warn=tell)) as site:
        progress = _Progress(tell)
        alone = trained_alone(
            plan, site, client, adapters.federated, about["rounds"], progress.seen
        )
        rows = measured(site, client, adapters)
        records, measures = site.held(client), plan.task.measures
        rows["alone"] = finite(site.learner.evaluate([alone], [records])[0])
        own = {"federated": adapters.federated, "personal": adapters.personal}
        return rows, {
            whose: paired(site, client, measures, tensors, alone)
            for whose, tensors in own.items()
            if tensors
        }


class _Progress:
    """Says every tenth of the way how far training has come."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._said = tell, -1

    def seen(self, records: int, most: int) -> None:
        """Note that so many records were seen, ``most`` in the end."""
        tenth = min(10, 10 * records // most)
        if tenth > self._said:
            self._said = tenth
            self._tell(f"training alone: {min(records, most):,} of {most:,} records seen")
