"""Everything that can be refused before a model is loaded, in one place. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft import hiding, releases
from fedpeft.attendance import Attendance
from fedpeft.errors import DataError, FedPeftError, ModelError, PlanError
from fedpeft.federation import Federation, deal
from fedpeft.first_gradient import public_splits
from fedpeft.models._locate import file_of, locate
from fedpeft.models._outline import Outline, outline
from fedpeft.plan import Plan
from fedpeft.scattered import is_scattered
from fedpeft.spec import describe, nearest
from fedpeft.state import ServerState
from fedpeft.types import Asking, Narrowing, Shapes
from fedpeft.weighing import weighed


@dataclass(frozen=True, slots=True)
class Preflight:
    """A plan whose data, population, model files and adapter fit each other."""

    federation: Federation
    outline: Outline
    shapes: Shapes
    warnings: tuple[str, ...]


def check(plan: Plan, federation: Federation | None = None) -> Preflight:
    """Deal the data, read the model's outline and let the parts object.

    A ``federation`` is given where it is not dealt here. Raises ``FedPeftError`` naming the line of
    the plan.
    """
    federation = federation or deal(plan)
    _check_cohort(plan, federation)
    rates = Attendance(plan, federation.crowd(plan.seed)).participation
    everyone = list(federation.population)
    weighed(plan, ServerState({}, {}, {}), everyone, federation.population, rates=rates)
    if isinstance(plan.adapter, Narrowing):
        try:
            plan.adapter.check_clients(federation.population)
        except FedPeftError as error:
            raise type(error)(f"adapter: {error}") from error
    _check_labels(plan, federation)
    if (plan.keep_best or "").startswith("clients/") and not federation.holds_out:
        raise PlanError("keep_best: no client has held-out records; raise holdout")
    if plan.personal.when != "never" and not federation.holds_out:
        raise PlanError("personal: no client has held-out records to evaluate on; raise holdout")
    try:
        found = outline(plan.model, plan.task.head, len(federation.classes))
    except FedPeftError as error:
        raise type(error)(f"model: {error}") from error
    try:
        shapes = plan.adapter.shapes(found)
    except FedPeftError as error:
        raise type(error)(f"adapter: {error}") from error
    if isinstance(plan.aggregator, Asking):
        try:
            plan.aggregator.phases(shapes)
        except FedPeftError as error:
            raise type(error)(f"aggregator: {error}") from error
    try:
        plan.task.encode([], None, found.limit, federation.classes)
    except FedPeftError as error:
        raise type(error)(f"task: {error}") from error
    public_splits(plan)
    if plan.warm_start is not None:
        _check_folder(Path(plan.warm_start))
    return Preflight(federation, found, shapes, tuple(_warnings(plan, federation, shapes, found)))


def _check_cohort(plan: Plan, federation: Federation) -> None:
    clients = len(federation.train)
    if plan.cohort.expected(clients) > clients:
        raise PlanError(
            f"cohort: {describe(plan.cohort)} asks more clients than the {clients} there are; "
            "ask fewer, or say everyone"
        )
    usual, least = plan.schedule.expected(plan.cohort.expected(clients)), plan.schedule.least
    if max(usual, least) > clients:
        raise PlanError(
            f"schedule: {describe(plan.schedule)} waits for the replies of more clients than the "
            f"{clients} there are; lower {'size' if usual > clients else 'minimum'}"
        )
    try:
        plan.availability.true_rates(federation.crowd(plan.seed))
    except FedPeftError as error:
        raise type(error)(f"availability: {error}") from error


def _check_labels(plan: Plan, federation: Federation) -> None:
    if federation.splits.test is None:
        return
    try:
        labels = plan.task.labels(federation.splits.test)
    except FedPeftError as error:
        raise type(error)(f"data: test: {error}") from error
    for number, label in enumerate(labels or [], 1):
        if str(label) not in federation.classes:
            raise DataError(
                f"data: test: row {number} has the label {label!r}, which no training row has"
                + nearest(str(label), federation.classes)
            )


def _check_folder(path: Path) -> None:
    if list(path.glob("*.safetensors")):
        return
    inner = path / "adapter"
    hint = f"did you mean {inner}?" if inner.is_dir() else "give an adapter folder"
    raise ModelError(f"warm_start: {path}: no weights in it; {hint}")


def _warnings(plan: Plan, federation: Federation, shapes: Shapes, found: Outline) -> Iterator[str]:
    tested, held = federation.splits.test is not None, federation.holds_out
    yield from releases.warnings(plan, len(federation.population))
    if federation.is_counted:
        yield from hiding.warnings(plan, federation.counted, federation.scattered)
    elif plan.privacy.hides:
        yield "privacy: what records spend follows from how many a site has, which it says later"
    if plan.adapter.roles(shapes, 0).local and "test" in plan.evaluations and tested:
        yield "test: some trained tensors stay with the clients; read the clients/ metrics"
    if not found.exact:
        yield "adapter: the shape of this model's head is guessed; its bytes are an estimate"
    if "clients" in plan.evaluations and not held:
        yield "holdout: no client has held-out records, so there is no federated evaluation"
    if plan.evaluations == ("test",) and not tested:
        yield "evaluate: there is no test set, so nothing is evaluated"
    if plan.schedule.hurried and not (plan.latency.timed or is_scattered(plan)):
        yield (
            "schedule: in a simulation without latency all reply at once, so no deadline passes "
            "and the first are those by name; say latency: lognormal"
        )
    if plan.comparisons and not tested:
        yield "compare: needs a test set, and the data line has none"


def check_texts(plan: Plan, federation: Federation, limit: int) -> None:
    """Have the task read every text, where one might be too long for the model.

    For classification the tokenizer's own file counts the tokens, without torch. Of images it reads
    the first, to see the model's processor work: the rest takes long, and a run reads them before
    it loads the model. Raises ``DataError`` naming split and row.
    """
    if getattr(plan.task, "max_length", None) is not None:
        return  # what is too long is cut
    tokenizer = _tokenizer(plan)
    most = 1 if plan.task.head == "image-classification" else None
    for name, rows in (("train", federation.splits.train), ("test", federation.splits.test or [])):
        try:
            if tokenizer is not None:
                plan.task.encode(rows[:most], tokenizer, limit, federation.classes)
        except FedPeftError as error:
            raise type(error)(f"data: {name}: {error}") from error


def _tokenizer(plan: Plan) -> Any:
    location = locate(plan.model)
    path = file_of(location, "tokenizer.json")
    if plan.task.head == "sequence-classification":
        return None if path is None else _Counter(path)
    from fedpeft.models._base import load_tokenizer

    return load_tokenizer(plan.model, plan.task.head)


class _Counter:
    """As much of a tokenizer as classification asks for, from the ``tokenizers`` library alone."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many tokens are added to a text or a pair."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def __call__(self, *texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        """Tokenise texts, or pairs of them."""
        inputs = list(texts[0]) if len(texts) == 1 else list(zip(*texts, strict=True))
        found = self._tokenizer.encode_batch(inputs)
        return {"input_ids": [e.ids for e in found], "token_type_ids": [e.type_ids for e in found]}
