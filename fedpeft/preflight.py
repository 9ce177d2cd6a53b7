"""Everything that can be refused before a model is loaded, in one place. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.errors import FedPeftError
from fedpeft.federation import Federation, deal
from fedpeft.models._outline import Outline, outline
from fedpeft.plan import Plan
from fedpeft.types import Shapes


@dataclass(frozen=True, slots=True)
class Preflight:
    """A plan whose data, population, model files and adapter fit each other."""

    federation: Federation
    outline: Outline
    shapes: Shapes


def check(plan: Plan) -> Preflight:
    """Deal the data, read the model's outline and let the parts object.

    Raises ``FedPeftError`` naming the line of the plan.
    """
    federation = deal(plan)
    plan.cohort.choose(list(federation.train), np.random.default_rng(0))
    try:
        found = outline(plan.model, plan.task.head, len(federation.classes))
    except FedPeftError as error:
        raise type(error)(f"model: {error}") from error
    try:
        shapes = plan.adapter.shapes(found)
    except FedPeftError as error:
        raise type(error)(f"adapter: {error}") from error
    try:
        plan.task.encode([], None, found.limit, federation.classes)
    except FedPeftError as error:
        raise type(error)(f"task: {error}") from error
    return Preflight(federation, found, shapes)
