"""What the weightings share that count the last updates of clients that are away."""

from __future__ import annotations

from collections.abc import Mapping

OFFERS: Mapping[str, str] = {
    "keeps-updates": "a client's update counts in all later rounds, too, not in one",
    "reads-single-updates": "the server keeps each client's update by itself",
}
NEEDS: Mapping[str, str] = {
    "linear": "adds the mean of the last updates to the sum, so the step must be a function of "
    "it: use aggregator: mean"
}
REFUSES: Mapping[str, str] = {
    "asks": "keeps what travels as an update, and of the factors there are only answers: use "
    "aggregator: mean",
    "remakes": "an update of an earlier round belongs to factors that are made anew since: use "
    "aggregator: mean",
    "fresh": "an update of an earlier round belongs to factors that began anew since: set "
    "fresh='none' in the adapter",
    "resting-ranks": "would move ranks that rest by what they did in an earlier round: name "
    "single ranks",
}
