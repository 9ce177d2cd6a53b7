"""Gradients of single records against one-by-one backward passes, Opacus and numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from fedpeft.adapters import _peft_folder
from fedpeft.errors import ModelError, SpecError
from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base
from fedpeft.per_example import clipped_sums, gradients, norms
from fedpeft.spec import build
from fedpeft.types import Adapter, Batch, Example, Metrics, Stacked, Task, Tensors
from tests.architectures import VOCABULARY, checkpoint, fresh_base, randomised

CLASSIFY, LANGUAGE = "sequence-classification", "causal-lm"
TASKS = {CLASSIFY: "classify", LANGUAGE: "causal_lm"}
LORA = "lora(r=3, alpha=5, targets='all-linear')"
MODELS = [("bert", CLASSIFY), ("llama", LANGUAGE), ("gpt2", LANGUAGE), ("gpt2", CLASSIFY)]
LENGTHS = (9, 4, 6, 3)
Bases = Callable[..., Base]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Bases:
    """Return a base with a head; tests must leave it as it was."""
    root, made = tmp_path_factory.mktemp("per-example"), dict[tuple[str, str, bool], Base]()

    def find(kind: str, head: str, double: bool = True) -> Base:
        if (kind, head, double) not in made:
            folder = root / kind if (root / kind).exists() else checkpoint(kind, root / kind, bert)
            classes = ("a", "b", "c") if head == CLASSIFY else ()
            made[kind, head, double] = fresh_base(folder, head, classes, double)
        return made[kind, head, double]

    return find


class Setting:
    """K clients with an adapter and records of their own, and what each record alone gives."""

    def __init__(self, base: Base, spec: str, clients: int, lengths: Sequence[int] = LENGTHS):
        self.adapter: Adapter = build("adapters", spec)
        self.task: Task = build("tasks", TASKS[base.head_kind])
        self.base, shapes = base, self.adapter.shapes(base.outline)
        initial = self.adapter.initial(base, shapes, 0)
        self.own: list[Tensors] = [randomised(initial, k, 0.1) for k in range(clients)]
        dtype = next(base.model.parameters()).dtype
        self.params: Stacked = {
            n: torch.stack([torch.from_numpy(own[n]) for own in self.own]).to(dtype) for n in shapes
        }
        rng = np.random.default_rng(1)
        self.records = [_record(rng, n, base.head_kind) for _ in self.own for n in lengths]
        self.learner = ModelLearner(base, self.adapter.attach(base), self.task)

    def batch(self, weights: Sequence[float] | None = None) -> Batch:
        return self.learner.collate(self.records, weights or [0.5] * len(self.records))

    def one_by_one(self) -> Stacked:
        """Differentiate the loss of each record by itself, without padding."""
        found: list[list[torch.Tensor]] = []
        for i, record in enumerate(self.records):
            k = i * len(self.own) // len(self.records)
            leaves = {n: v[k : k + 1].clone().requires_grad_() for n, v in self.params.items()}
            inputs, labels = self.task.collate([record], 0)
            loss = self.task.losses(self.learner.attached(leaves, inputs), labels)[0]
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            found.append(list(grads))
        columns = zip(*found, strict=True)
        return {n: torch.cat(c) for n, c in zip(self.params, columns, strict=True)}

    def close(self) -> None:
        self.learner.attached.detach()


def _record(rng: np.random.Generator, length: int, head: str) -> Example:
    ids = rng.integers(3, VOCABULARY, length)
    if head == CLASSIFY:
        return {"input_ids": ids, "labels": np.asarray(rng.integers(0, 3))}
    told = rng.integers(0, length - 1)
    return {"input_ids": ids, "labels": np.where(np.arange(length) < told, -100, ids)}


def _matrix(stacked: Stacked) -> NDArray[np.float64]:
    """Return all tensors jointly, [n, parameters]."""
    return np.concatenate([v.detach().double().flatten(1).numpy() for v in stacked.values()], 1)


def _difference(found: Stacked, expected: Stacked) -> float:
    """Return the largest L2 distance of two rows, all tensors jointly, relative to their norm."""
    assert list(found) == list(expected)
    return _apart(_matrix(found), _matrix(expected))


def _apart(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    lengths = np.linalg.norm(theirs, axis=1)
    assert lengths.min() > 1e-3
    return float((np.linalg.norm(ours - theirs, axis=1) / lengths).max())


# --- oracles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-9), (False, 1e-6)])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize(("kind", "head"), MODELS)
def test_each_record_gets_the_gradient_it_has_alone(
    bases: Bases, kind: str, head: str, clients: int, double: bool, tolerance: float
) -> None:
    setting = Setting(bases(kind, head, double), LORA, clients)
    expected, batch = setting.one_by_one(), setting.batch()
    for chunk in (1, 3, 8, 100):
        found, losses = gradients(setting.learner, setting.params, {}, batch, chunk=chunk)
        assert _difference(found, expected) < tolerance
        each = norms(setting.learner, setting.params, {}, batch, chunk=chunk)
        lengths = np.linalg.norm(_matrix(expected), axis=1)
        np.testing.assert_allclose(each, lengths, rtol=tolerance)
        assert each.dtype == torch.float64
        assert losses.shape == (clients * len(LENGTHS),)
    setting.close()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # Opacus's hooks
@pytest.mark.parametrize(("kind", "head"), MODELS)
def test_opacus_finds_the_same(bases: Bases, kind: str, head: str, tmp_path: Path) -> None:
    setting = Setting(bases(kind, head), LORA, clients=2)
    batch, each = setting.batch(), len(LENGTHS)
    found, _ = gradients(setting.learner, setting.params, {}, batch)
    for k, own in enumerate(setting.own):
        setting.adapter.export(setting.base, own, tmp_path / str(k))
        rows = slice(k * each, (k + 1) * each)
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        expected = _by_opacus(setting, tmp_path / str(k), inputs, batch.labels[rows])
        assert set(expected) == set(found)
        assert _difference({n: found[n][rows] for n in expected}, expected) < 1e-6
    setting.close()


def _by_opacus(
    setting: Setting, folder: Path, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> Stacked:
    from peft import PeftModel

    opacus: Any = pytest.importorskip("opacus.grad_sample")
    model = PeftModel.from_pretrained(
        copy.deepcopy(setting.base.model),
        str(folder),
        is_trainable=True,
        autocast_adapter_dtype=False,
    )
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    torch.autograd.backward(setting.task.losses(wrapped(**inputs).logits, labels).sum())
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix(_peft_folder.PREFIX).replace(".modules_to_save.default", "")
            found[short.replace(".default", "")] = parameter.grad_sample
    return found


@pytest.mark.parametrize(("kind", "head"), [("bert", CLASSIFY), ("llama", LANGUAGE)])
def test_an_adapter_that_takes_one_client_is_worked_off_record_by_record(
    bases: Bases, kind: str, head: str
) -> None:
    setting = Setting(bases(kind, head), "full", clients=2, lengths=(5, 3))
    expected, batch = setting.one_by_one(), setting.batch()
    found, _ = gradients(setting.learner, setting.params, {}, batch)
    assert _difference(found, expected) < 1e-9
    clipped = clipped_sums(setting.learner, setting.params, {}, batch, clip=0.5)
    assert _apart(_matrix(clipped.sums), _by_numpy(expected, 2, 0.5)) < 1e-9
    setting.close()


def test_parameters_that_stay_fixed_are_repeated_too(bases: Bases) -> None:
    setting = Setting(bases("bert", CLASSIFY), LORA, clients=3)
    expected, batch = setting.one_by_one(), setting.batch()
    train = {n: v for n, v in setting.params.items() if "lora_A" not in n}
    fixed = {n: v for n, v in setting.params.items() if "lora_A" in n}
    found, _ = gradients(setting.learner, train, fixed, batch)
    assert _difference(found, {n: expected[n] for n in train}) < 1e-9
    setting.close()


# --- clipped sums -------------------------------------------------------------------------------


def _by_numpy(grads: Stacked, clients: int, clip: float) -> NDArray[np.float64]:
    every = _matrix(grads).reshape(clients, -1, sum(v[0].numel() for v in grads.values()))
    factors = np.minimum(1, clip / np.linalg.norm(every, axis=2))
    sums: NDArray[np.float64] = (every * factors[:, :, None]).sum(1)
    return sums


@pytest.mark.parametrize("clients", [1, 3])
def test_clipped_sums_are_those_of_numpy(bases: Bases, clients: int) -> None:
    setting = Setting(bases("llama", LANGUAGE), LORA, clients)
    expected, batch = setting.one_by_one(), setting.batch()
    lengths = np.linalg.norm(_matrix(expected), axis=1)
    clip = float(np.median(lengths))
    for chunk in (1, 3, 8, 100):
        found = clipped_sums(setting.learner, setting.params, {}, batch, clip=clip, chunk=chunk)
        assert _apart(_matrix(found.sums), _by_numpy(expected, clients, clip)) < 1e-9
        np.testing.assert_allclose(found.norms, lengths, rtol=1e-9)
    free = clipped_sums(setting.learner, setting.params, {}, batch, clip=1e9)
    grads, losses = setting.learner.grads(
        setting.params, {}, replace(batch, weights=torch.ones_like(batch.weights))
    )
    assert _difference(free.sums, grads) < 1e-12  # nothing clipped: the gradient of the sum
    torch.testing.assert_close(free.losses, losses, rtol=1e-12, atol=0)
    setting.close()


def test_rows_that_fill_up_add_exactly_nothing(bases: Bases) -> None:
    setting = Setting(bases("bert", CLASSIFY), LORA, clients=2)
    batch = setting.batch([1.0, 0.25, 0.0, 0.0, 3.0, 0.0, 1.0, 1.0])
    filler = [2, 3, 5]
    found, _ = gradients(setting.learner, setting.params, {}, batch, chunk=3)
    expected = setting.one_by_one()
    assert all((value[filler] == 0).all() for value in found.values())
    real = [0, 1, 4, 6, 7]
    ours, theirs = _matrix(found), _matrix(expected)
    assert _apart(ours[real], theirs[real]) < 1e-9  # and the other weights do not count
    clipped = clipped_sums(setting.learner, setting.params, {}, batch, clip=1e9)
    assert (clipped.norms[filler] == 0).all()
    wanted = np.stack([theirs[[0, 1]].sum(0), theirs[[4, 6, 7]].sum(0)])
    assert _apart(_matrix(clipped.sums), wanted) < 1e-9
    setting.close()


# --- a record's gradient is its own -------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), MODELS)
def test_neither_partners_nor_padding_matter(bases: Bases, kind: str, head: str) -> None:
    lengths = [(5, 2, 5, 4), (5, 40, 17, 2), (5,)]
    first: list[Stacked] = []
    for partners in lengths:
        setting = Setting(bases(kind, head), LORA, 1, partners)
        found, _ = gradients(setting.learner, setting.params, {}, setting.batch())
        first.append({n: v[:1] for n, v in found.items()})
        setting.close()
    assert _difference(first[1], first[0]) < 1e-9
    assert _difference(first[2], first[0]) < 1e-9


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e200])
def test_a_record_that_is_not_finite_harms_no_other(
    bert: Path, tmp_path: Path, value: float
) -> None:
    """Token 3 of this model has an embedding that no layer survives."""
    base = fresh_base(checkpoint("bert", tmp_path / "model", bert), CLASSIFY, ("a", "b", "c"))
    base.model.get_parameter("bert.embeddings.word_embeddings.weight").data[3, 0] = value
    setting = Setting(base, LORA, clients=2)
    for record in setting.records:
        record["input_ids"][record["input_ids"] == 3] = 4
    clean = setting.batch([1.0] * 5 + [0.0] + [1.0] * 2)
    expected = clipped_sums(setting.learner, setting.params, {}, clean, clip=0.5, chunk=8)
    setting.records[5]["input_ids"][1] = 3
    found = clipped_sums(setting.learner, setting.params, {}, setting.batch(), clip=0.5, chunk=8)
    assert not found.norms[5].isfinite()
    assert np.array_equal(_matrix(found.sums), _matrix(expected.sums))
    setting.close()


# --- the bound ----------------------------------------------------------------------------------


@dataclass
class Given:
    """Record r has gradient ``table[r]`` [2, 2] in ``x`` and its first row in ``y``."""

    table: torch.Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calls: list[tuple[int, int]] = field(default_factory=list)
    max_group: int | None = None

    def collate(self, records: Sequence[Example | None], weights: Sequence[float]) -> Batch:
        rows = torch.tensor([0 if r is None else int(r["input_ids"][0]) for r in records])
        lengths = [int(r is not None) for r in records]
        return Batch({"rows": rows}, rows, torch.tensor(weights), lengths)

    def grads(
        self, params: Stacked, fixed: Stacked, batch: Batch, seeds: Sequence[int] | None = None
    ) -> tuple[Stacked, torch.Tensor]:
        assert len(batch.lengths) == len(batch.labels)
        self.calls.append((len(batch.labels), params["x"].untyped_storage().data_ptr()))
        each = self.table[batch.labels] * batch.weights[:, None, None]
        rows = len(batch.labels) // len(params["x"])
        sums = each.reshape(-1, rows, 2, 2).sum(1)
        return {"x": sums, "y": sums[:, 0]}, torch.zeros(len(batch.labels))

    def evaluate(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Metrics]:
        raise NotImplementedError

    def grams(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Tensors]:
        raise NotImplementedError

    def mean_gradients(
        self, tensors: Any, names: Any, examples: Any, width: int = 1
    ) -> Sequence[tuple[Tensors, float]]:
        raise NotImplementedError


def _sums(
    learner: Given, rows: Sequence[int], weights: Sequence[float], clients: int, **options: Any
) -> NDArray[np.float64]:
    batch = learner.collate([{"input_ids": np.array([r])} for r in rows], weights)
    params = {"x": torch.zeros(clients, 2, 2), "y": torch.zeros(clients, 2)}
    return _matrix(clipped_sums(learner, params, {}, batch, **options).sums)


ENTRIES = st.one_of(
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, 1e-30, 1e25, -3e38, float("inf"), float("nan")]),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(ENTRIES, min_size=4, max_size=4), min_size=6, max_size=6),
    st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]),
    st.integers(0, 5),
    st.sampled_from([1e-3, 1.0, 7.5]),
    st.integers(1, 7),
)
def test_one_record_moves_the_sum_by_at_most_the_clip(
    table: list[list[float]], shape: tuple[int, int], gone: int, clip: float, chunk: int
) -> None:
    learner = Given(torch.tensor(table).reshape(6, 2, 2))
    clients, each = shape
    options: dict[str, Any] = {"clients": clients, "clip": clip, "chunk": chunk}
    every = _sums(learner, range(6), [1.0] * 6, **options)
    assert np.isfinite(every).all()
    without = _sums(learner, range(6), [float(i != gone) for i in range(6)], **options)
    moved = np.linalg.norm(every - without, axis=1)
    assert moved[gone // each] <= clip * (1 + 1e-5)
    assert not np.delete(moved, gone // each).any()
    if clients == 1:  # a row that fills up is as good as none
        rest = [i for i in range(6) if i != gone]
        fewer = _sums(learner, rest, [1.0] * 5, **options)
        np.testing.assert_allclose(fewer, without, rtol=0, atol=1e-6 * clip)


def test_small_numbers() -> None:
    table = torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    learner = Given(table)
    batch = learner.collate([{"input_ids": np.array([r])} for r in (0, 1, 0, 0)], [1, 1, 1, 0])
    params = {"x": torch.zeros(2, 2, 2), "y": torch.zeros(2, 2)}
    root = 34**0.5  # x has norm 5, y has norm 3
    found = clipped_sums(learner, params, {}, batch, clip=root / 2)
    torch.testing.assert_close(found.norms, torch.tensor([root, 1, root, 0], dtype=torch.float64))
    assert found.sums["x"].tolist() == [[[1.5, 0.0], [2.0, 1.0]], [[1.5, 0.0], [2.0, 0.0]]]
    assert found.sums["y"].tolist() == [[1.5, 0.0], [1.5, 0.0]]


@pytest.mark.parametrize(
    ("clients", "rows", "chunk", "sizes", "copies"),
    [
        (1, 7, 3, [3, 3, 1], False),
        (1, 2, 3, [2], False),
        (2, 4, 3, [3, 1, 3, 1], False),
        (3, 1, 2, [2, 1], False),
        (4, 2, 4, [4, 4], True),
        (5, 2, 5, [4, 4, 2], True),
        (2, 0, 3, [], False),
    ],
)
def test_passes_hold_a_chunk_of_records(
    clients: int, rows: int, chunk: int, sizes: list[int], copies: bool
) -> None:
    """Parameters are copied only where several clients with several records each share a pass."""
    learner, every = Given(torch.ones(1, 2, 2)), clients * rows
    batch = learner.collate([{"input_ids": np.array([0])}] * every, [1.0] * every)
    params = {"x": torch.zeros(clients, 2, 2), "y": torch.zeros(clients, 2)}
    found = clipped_sums(learner, params, {}, batch, clip=100.0, chunk=chunk)
    assert found.sums["x"].tolist() == [[[float(rows)] * 2] * 2] * clients
    assert [size for size, _ in learner.calls] == sizes
    origin = params["x"].untyped_storage().data_ptr()
    assert any(place != origin for _, place in learner.calls) is copies
    assert len(norms(learner, params, {}, batch)) == every
    grads, losses = gradients(learner, params, {}, batch)
    assert grads["y"].shape == (every, 2)
    assert len(losses) == every
    learner.calls.clear()
    shared = {n: v[:1].expand(clients, *v.shape[1:]) for n, v in params.items()}
    norms(learner, shared, {}, batch, chunk=chunk)
    places = {place for _, place in learner.calls}
    assert places <= {origin}  # nor where all clients have the same


def test_passes_hold_no_more_clients_than_the_learner_takes() -> None:
    learner = Given(torch.ones(1, 2, 2), max_group=2)
    batch = learner.collate([{"input_ids": np.array([0])}] * 5, [1.0] * 5)
    params = {"x": torch.zeros(1, 2, 2), "y": torch.zeros(1, 2)}
    clipped_sums(learner, params, {}, batch, clip=1.0)
    assert [size for size, _ in learner.calls] == [2, 2, 1]


def test_what_cannot_be_is_refused() -> None:
    learner = Given(torch.ones(1, 2, 2))
    batch = learner.collate([{"input_ids": np.array([0])}] * 3, [1.0] * 3)
    params = {"x": torch.zeros(2, 2, 2)}
    with pytest.raises(ModelError, match="3 rows cannot be dealt evenly to 2 clients"):
        norms(learner, params, {}, batch)
    with pytest.raises(SpecError, match="chunk=0 must be at least 1"):
        norms(learner, params, {}, batch, chunk=0)
    for clip in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match=f"clip={clip} must be above 0 and finite"):
            clipped_sums(learner, params, {}, batch, clip=clip)


# --- units ----------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees how many gradients in float64 any tensor has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if (
                isinstance(value, torch.Tensor)
                and value.dtype == torch.float64
                and value.dim() == 3
            ):
                self.most = max(self.most, len(value))
        return found


def _units_by_numpy(
    table: NDArray[np.float64], owners: Sequence[int], real: Sequence[float], clip: float
) -> tuple[NDArray[np.float64], list[float]]:
    total, lengths = np.zeros(6), []
    for unit in sorted({*owners}):
        rows = [r for r, o in enumerate(owners) if o == unit and real[r]]
        if not rows:
            continue
        each = np.concatenate([table[rows].reshape(-1, 4), table[rows][:, 0]], axis=1)
        mean = each.mean(0)
        lengths.append(float(np.linalg.norm(mean)))
        total += mean * min(1.0, clip / lengths[-1])
    return total, lengths


@pytest.mark.parametrize("chunk", [1, 4, 7, 100, 5000])
@pytest.mark.parametrize(
    ("clients", "each", "units"), [(1, 60, 60), (1, 2000, 3), (1, 1, 1), (3, 20, 6), (2, 31, 1)]
)
def test_units_are_clipped_whatever_rows_are_theirs(
    clients: int, each: int, units: int, chunk: int
) -> None:
    rng = np.random.default_rng(clients * each + units)
    rows = clients * each
    table = rng.standard_normal((rows, 2, 2))
    owners, real = rng.integers(0, units, rows).tolist(), (rng.random(rows) < 0.8).astype(float)
    learner = Given(torch.tensor(table))
    batch = learner.collate([{"input_ids": np.array([r])} for r in range(rows)], real.tolist())
    params = {n: torch.zeros(clients, *s, dtype=torch.float64) for n, s in UNITS.items()}
    with Watching() as watching:  # type: ignore[no-untyped-call]
        found = clipped_sums(learner, params, {}, batch, clip=0.7, chunk=chunk, owners=owners)
    assert watching.most <= max(min(chunk, rows) + 1, clients)
    wanted = [
        _units_by_numpy(table[s], owners[s], real[s].tolist(), 0.7)
        for s in (slice(k * each, (k + 1) * each) for k in range(clients))
    ]
    assert _apart(_matrix(found.exact), np.stack([total for total, _ in wanted])) < 1e-12
    lengths = [length for _, own in wanted for length in own]
    np.testing.assert_allclose(found.norms, lengths, rtol=1e-12)
    assert len(found.losses) == rows


def test_losses_of_units_stay_in_the_order_of_rows() -> None:
    class Telling(Given):
        def grads(self, params: Any, fixed: Any, batch: Batch, seeds: Any = None) -> Any:
            return super().grads(params, fixed, batch)[0], batch.labels.double()

    learner = Telling(torch.ones(5, 2, 2))
    batch = learner.collate([{"input_ids": np.array([r])} for r in range(5)], [1.0] * 5)
    params = {n: torch.zeros(1, *s) for n, s in UNITS.items()}
    found = clipped_sums(learner, params, {}, batch, clip=1.0, chunk=2, owners=[2, 0, 1, 0, 2])
    assert found.losses.tolist() == [0, 1, 2, 3, 4]


def test_no_unit_gives_a_sum_of_zero() -> None:
    learner = Given(torch.ones(1, 2, 2))
    params = {n: torch.zeros(2, *s) for n, s in UNITS.items()}
    found = clipped_sums(learner, params, {}, learner.collate([], []), clip=1.0, owners=[])
    assert not _matrix(found.sums).any()
    assert len(found.norms) == len(found.losses) == 0


UNITS = {"x": (2, 2), "y": (2,)}
