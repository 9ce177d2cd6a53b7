"""What a plan says where it says nothing; the other lines must be given."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULTS: Mapping[str, str] = {
    "partition": "iid",
    "adapter": "lora",
    "trainer": "plain",
    "correction": "none",
    "personal": "none",
    "uplink": "raw",
    "downlink": "raw",
    "privacy": "none",
    "cohort": "everyone",
    "weighting": "examples",
    "aggregator": "mean",
    "optimizer": "sgd",
    "schedule": "sync",
    "availability": "always",
    "latency": "none",
    "track": "none",
}
