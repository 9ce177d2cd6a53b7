"""The model card of an adapter: what the Hub reads of it, where it comes from, what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft import hiding, releases
from fedpeft.evaluation import EVALUATED
from fedpeft.plan import Plan
from fedpeft.site import Site
from fedpeft.spec import describe
from fedpeft.types import Hubbed

_TAGS = ["federated", "fedpeft"]
_PIPELINES = {
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
}
"""What a base's head does, to what the Hub calls that."""


def front_matter(plan: Plan, base: str, scores: Mapping[str, float]) -> list[str]:
    """Return the lines of YAML that the Hub reads at the top of a card.

    ``base`` is the base model as a card names it. ``scores`` are metrics as ``test/accuracy``; each
    is a result in the ``model-index``. Nothing depends on where a run lies.
    """
    from huggingface_hub import EvalResult, ModelCardData

    data = plan.data.hub_id if isinstance(plan.data, Hubbed) else None
    kind = describe(plan.data).partition("(")[0]
    task = _PIPELINES[plan.task.head]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data or kind,
            dataset_split=place,  # those of one type and split are told as of one data set
            dataset_name=EVALUATED.get(place, place),
            metric_type=metric,
            metric_value=value,
        )
        for full, value in scores.items()
        for place, _, metric in [full.rpartition("/")]
        if math.isfinite(value)
    ]
    about = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=task,
        tags=_TAGS,
        datasets=[data] if data else None,
        metrics=sorted({one.metric_type for one in results}) or None,
        model_name=f"{base.rstrip('/').rpartition('/')[2]}-federated" if results else None,
        eval_results=results or None,
    )
    return ["---", *about.to_yaml().splitlines(), "---"]


def model_card(
    plan: Plan,
    site: Site,
    history: Sequence[Mapping[str, Any]],
    scored: Mapping[str, Any],
) -> str:
    """Return the model card of a run.

    ``scored`` is the line of the ledger with the metrics of what is exported.
    """
    scores = {k: v for k, v in scored.items() if "/" in k and v is not None}
    front = front_matter(plan, site.base.location.origin, scores)
    facts = {
        "Rounds": len(history),
        "Clients": len(site.federation.train),
        **(_of_clients(site, history) if not plan.privacy.secret else {}),
        **releases.card(plan, len(site.federation.train), len(history)),
        **hiding.card(plan, site.federation.counted, len(history)),
    }
    text = ["# Federated adapter", "", "Trained with fedpeft; the plan is below.", ""]
    text += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), ""]
    if scores:
        text += [f"| metric after round {scored['round'] + 1} | value |", "|---|---|"]
        text += [f"| {k} | {v:.4f} |" for k, v in scores.items()] + [""]
    lines = [f"{k}: {v}" for k, v in plan.lines().items()]
    return "\n".join([*front, *text, "```yaml", *lines, "```", ""])


def _of_clients(site: Site, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return facts that follow from what clients have and do."""
    traffic = {
        name: sum(line.get(key, 0) for line in history)
        for name, key in (
            ("Bytes up", "up_bytes"),
            ("Bytes down", "down_bytes"),
            ("Bytes for federated evaluation", "eval_bytes"),
        )
    }
    return {
        "Training records": sum(site.federation.population.values()),
        **{name: f"{count:,}" for name, count in traffic.items()},
        "Data fingerprint": f"`{site.federation.splits.fingerprint[:32]}`",
    }
