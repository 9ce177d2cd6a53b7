"""What a report says, of metrics that are given: pairs, tables, sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from fedpeft.site import Site
from fedpeft.site_report import Adapters, as_text, difference, measured, paired, statements, table
from fedpeft.types import Metrics, Tensors

ONE, OTHER = {"w": np.zeros(1)}, {"w": np.ones(1)}


class Given:
    """A site whose records are pairs of metrics: those of ``ONE`` and of any other adapter."""

    def __init__(self, records: Sequence[tuple[float, float]], measure: str = "accuracy") -> None:
        self.records, self.measure, self.most = records, measure, 0
        self.learner, self.initial = self, OTHER

    def held(self, client: str) -> Sequence[tuple[float, float]]:
        return self.records

    def evaluate(
        self, tensors: Sequence[Tensors], examples: Sequence[Any], width: int = 1
    ) -> list[Metrics]:
        self.most = max(self.most, len(tensors))
        of = [0 if own is ONE else 1 for own in tensors]
        means = [float(np.mean([r[k] for r in each])) for k, each in zip(of, examples, strict=True)]
        return [{self.measure: mean, "perplexity": float("inf")} for mean in means]


def compared(given: Given) -> dict[str, Any]:
    measures = (given.measure, "perplexity")
    return paired(cast(Site, given), "a", measures, ONE, OTHER)


def test_records_are_compared_one_by_one() -> None:
    """Five heads of six: 2 (1 + 6) / 64 = 7/32."""
    given = Given([(1, 0)] * 5 + [(0, 1)] + [(1, 1)] * 3 + [(0, 0)])
    found = compared(given)
    assert (found["better"], found["worse"], found["records"]) == (5, 1, 10)
    assert found["p"] == pytest.approx(7 / 32)
    assert found["by"] == {"accuracy": pytest.approx(0.4)}
    assert found["measure"] == "accuracy"


def test_of_a_loss_the_lower_one_is_better_and_records_come_in_pieces() -> None:
    given = Given([(1.0, 2.0)] * 100 + [(2.5, 2.0)] * 50, "loss")
    found = compared(given)
    assert (found["better"], found["worse"], found["measure"]) == (100, 50, "loss")
    assert found["by"] == {"loss": pytest.approx(-0.5)}
    assert found["p"] == pytest.approx(5.4e-5, rel=0.02)  # 3.99 standard deviations, corrected
    assert given.most == 64


def test_where_no_record_differs_there_is_nothing_to_test() -> None:
    found = compared(Given([(1, 1)] * 4))
    assert (found["better"], found["worse"], found["p"]) == (0, 0, 1.0)


def test_rows_are_of_what_there_is() -> None:
    given = cast(Site, Given([(1, 0), (1, 0)]))
    assert measured(given, "a", Adapters(ONE)) == {
        "base": {"accuracy": 0.0},
        "federated": {"accuracy": 1.0},
    }
    assert [*measured(given, "a", Adapters(ONE, OTHER))] == ["base", "federated", "personal"]
    assert measured(cast(Site, Given([])), "a", Adapters(ONE)) == {}


REPORT = {
    "run": "r1",
    "name": "week",
    "site": "a",
    "rounds": 3,
    "records": {"training": 40, "held out": 10},
    "rows": {
        "base": {"loss": 1.5, "accuracy": 0.25},
        "federated": {"loss": 0.25, "accuracy": 0.9},
        "alone": {"loss": 0.5, "accuracy": 0.8},
    },
    "gain": {
        "federated": {
            "by": {"loss": -0.25, "accuracy": 0.1},
            "measure": "accuracy", "records": 10, "better": 2, "worse": 1, "p": 1.0,
        }
    },
    "missing": {"personal": "none: why"},
}  # fmt: skip


def test_a_report_in_words() -> None:
    assert table(REPORT) == [
        "| held-out records      |   loss | accuracy |",
        "|-----------------------|-------:|---------:|",
        "| base model, untrained | 1.5000 |   25.0 % |",
        "| this site alone       | 0.5000 |   80.0 % |",
        "| federated adapter     | 0.2500 |   90.0 % |",
    ]
    (sentence,) = statements(REPORT)
    assert sentence == (
        "federated adapter against this site alone: loss -0.2500, accuracy +10.0 points; by "
        "accuracy better on 2 records, worse on 1, the same on 7 (sign test p = 1)"
    )
    text = as_text(REPORT)
    assert text.startswith("# week at a\n\nRun r1, 3 rounds; 10 held-out records of 50.\n\n|")
    assert "\n- personal adapter: none: why\n- federated adapter against" in text
    assert "fedpeft gain" not in text
    assert "`fedpeft gain` trains alone" in as_text({**REPORT, "gain": {}})


def test_a_report_without_held_out_records() -> None:
    text = as_text({**REPORT, "records": {"training": 40, "held out": 0}, "rows": {}, "gain": {}})
    assert "no records were held out; the plan's holdout says how many are" in text
    assert "|" not in text
    assert "fedpeft gain" not in text


def test_differences_in_words() -> None:
    assert difference("personal/accuracy", 0.031) == "personal/accuracy +3.1 points"
    assert difference("perplexity", -1.5) == "perplexity -1.5000"
