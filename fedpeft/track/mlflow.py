"""MLflow: a run of an experiment, at a server or in a database file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedpeft.errors import SpecError
from fedpeft.spec import method
from fedpeft.types import Tracked

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_TAG = "fedpeft.run"
_LONGEST = 500
"""Characters of a parameter."""


@method
class Mlflow:
    """Rounds as metrics, the plan's lines as parameters.

    ``uri`` is that of the server, or ``sqlite:///FILE``; by default what ``MLFLOW_TRACKING_URI``
    says. Who may write there is said by MLflow's own variables (``MLFLOW_TRACKING_TOKEN``, ...).
    """

    uri: str | None = None
    experiment: str = "fedpeft"

    def check(self) -> None:
        """Raise ``SpecError`` for an address with a password in it."""
        try:
            secret = urlsplit(self.uri or "").password
        except ValueError:
            secret = None
        if secret:
            raise SpecError(
                "mlflow: uri has a password in it, and plans are shown and sent; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )

    def open(self, run: Tracked) -> Following:
        """Go on with the MLflow run of the same id, filled up to the rounds that are done."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise SpecError("not installed; pip install 'fedpeft[track]'") from None
        client = MlflowClient(tracking_uri=self.uri)
        known = client.get_experiment_by_name(self.experiment)
        place = known.experiment_id if known else client.create_experiment(self.experiment)
        found = client.search_runs([place], filter_string=f"tags.\"{_TAG}\" = '{run.run}'")
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return Following(client, found[0].info.run_id)
        made = client.create_run(place, run_name=run.folder.name, tags={_TAG: run.run})
        from mlflow.entities import Param

        lines = [Param(name, str(value)[:_LONGEST]) for name, value in run.lines.items()]
        client.log_batch(made.info.run_id, params=lines)
        return Following(client, made.info.run_id)


class Following:
    """A run at MLflow. Rounds that it has already are left out, number by number."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self._client, self._run = client, run
        self._last: dict[str, int] = {}
        for name in client.get_run(run).data.metrics:
            steps = [each.step for each in client.get_metric_history(run, name)]
            self._last[name] = max(steps)

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a round."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if self._last.get(name, -1) < round}
        metrics: list[Any] = [Metric(name, value, now, round) for name, value in new.items()]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, done: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")
