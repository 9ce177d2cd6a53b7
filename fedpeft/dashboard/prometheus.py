"""What is shown of runs, for Prometheus: gauges by run, in its text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fedpeft.dashboard.runs import Followed
from fedpeft.errors import RunError, printable

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

STATES = ("running", "finished", "stopped")
TOTALS = {
    "up_bytes": "Bytes that clients have sent, all rounds.",
    "down_bytes": "Bytes that clients were sent, all rounds.",
    "eval_bytes": "Bytes sent for federated evaluation, all rounds.",
    "refused": "Replies that were not used, all rounds.",
}
LAST = {
    "reachable": "Clients within reach, in the last round.",
    "asked": "Clients asked in the last round.",
    "replied": "Clients whose reply was used in the last round.",
    "participants": "Clients that have ever taken part.",
    "seconds": "Seconds of the last round.",
    "epsilon": "Epsilon spent of the clients' privacy.",
    "epsilon_rdp": "Epsilon spent of the clients' privacy, by RDP.",
    "epsilon_record": "Epsilon spent of the records' privacy, by a client in all rounds.",
}


def check() -> None:
    """Raise ``RunError`` where the package that writes the format is not installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise RunError(
            "--metrics: needs prometheus-client; pip install 'fedpeft[metrics]'"
        ) from None


def exposition(runs: Iterable[Followed]) -> bytes:
    """Return all runs in the text format. A name that is no text becomes one."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    known = list(runs)

    class Told(Collector):
        def collect(self) -> Iterator[GaugeMetricFamily]:
            yield from _families(known)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Told())
    return generate_latest(registry)


def _families(runs: list[Followed]) -> Iterator[GaugeMetricFamily]:
    from prometheus_client.core import GaugeMetricFamily

    def family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"fedpeft_{name}", text, labels=["run", *labels])

    state = family("run_state", "1 for the state that a run is in.", "state")
    done = family("rounds_done", "Rounds that are over.")
    planned = family("rounds_planned", "Rounds of the plan.")
    metric = family("metric", "The newest value of a metric.", "metric")
    totals = {name: family(f"{name}_sum", text) for name, text in TOTALS.items()}
    last = {name: family(name, text) for name, text in LAST.items()}
    for run in runs:
        name, ledger = printable(run.name), run.ledger
        for each in STATES:
            state.add_metric([name, each], float(run.state == each))
        done.add_metric([name], ledger.rounds)
        planned.add_metric([name], run.planned)
        for column in sorted(ledger.columns):
            if ("/" in column or column == "loss") and (value := ledger.last(column)) is not None:
                metric.add_metric([name, printable(column)], value)
        for column, found in totals.items():
            if column in ledger.columns:
                found.add_metric([name], ledger.total(column))
        for column, found in last.items():
            if (value := ledger.last(column)) is not None:
                found.add_metric([name], value)
    yield from (state, done, planned, metric, *totals.values(), *last.values())
