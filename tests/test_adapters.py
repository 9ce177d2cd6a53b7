"""Adapters against PEFT and torch: forward, gradients, files; many clients against one."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.adapters import _peft_folder
from fedpeft.adapters._stacked import _added, masked
from fedpeft.adapters._targets import ATTENTION
from fedpeft.adapters.full import Full
from fedpeft.adapters.lora import Lora
from fedpeft.errors import FedPeftError, ModelError
from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base
from fedpeft.models._outline import Outline, outline
from fedpeft.spec import build
from fedpeft.stacking import stack
from fedpeft.tensors import shapes_of
from fedpeft.types import Adapter, Batch, Dropout, Tensors
from tests.architectures import CHECKPOINTS, IMAGES, checkpoint, fresh_base, inputs, randomised

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's

CLASSES = ("a", "b", "c")
CLASSIFY, LANGUAGE = "sequence-classification", "causal-lm"
PICTURES = "image-classification"
Folders = Callable[[str], Path]
Bases = Callable[[str, str], Base]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Folders:
    """Return the folder of a kind of checkpoint, saved when it is first asked for."""
    root, made = tmp_path_factory.mktemp("architectures"), dict[str, Path]()

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = checkpoint(kind, root / kind, None if kind in IMAGES else bert)
        return made[kind]

    return find


@pytest.fixture(scope="module")
def bases(folders: Folders) -> Bases:
    """Return a base in double precision; tests must leave it as it was."""
    made: dict[tuple[str, str], Base] = {}

    def find(kind: str, head: str) -> Base:
        if (kind, head) not in made:
            classes = () if head == LANGUAGE else CLASSES
            made[kind, head] = fresh_base(folders(kind), head, classes)
        return made[kind, head]

    return find


def _shapes_and_values(adapter: Adapter, base: Base, seed: int = 0) -> Tensors:
    shapes = adapter.shapes(base.outline)
    return randomised(adapter.initial(base, shapes, seed), seed)


def _double(tensors: Tensors) -> dict[str, torch.Tensor]:
    return stack([{k: v.astype(np.float64) for k, v in tensors.items()}], torch.device("cpu"))


def _logits(adapter: Adapter, base: Base, tensors: Tensors, batch: Any) -> torch.Tensor:
    attached = adapter.attach(base)
    try:
        with torch.no_grad():
            return attached(_double(tensors), batch)
    finally:
        attached.detach()


def _peft(base: Base, folder: Path, trainable: bool = False) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        copy.deepcopy(base.model), str(folder), is_trainable=trainable, autocast_adapter_dtype=False
    )
    return model.double().eval()


EXPORTED = [
    *((kind, CLASSIFY) for kind in ("bert", "bert-mlm", "distilbert", "roberta", "gpt2", "llama")),
    *((kind, CLASSIFY) for kind in ("albert", "electra", "mpnet")),
    *((kind, LANGUAGE) for kind in ("llama", "llama-tied", "gpt2", "qwen2")),
]
VARIANTS = [
    "lora(r=3, alpha=5)",
    "lora(r=4, alpha=8, rslora=True, targets='all-linear', init='orthonormal')",
]


# --- exported folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize(("kind", "head"), [*EXPORTED, ("deberta-v2", CLASSIFY)])
def test_peft_loads_the_folder_and_computes_the_same(
    bases: Bases, kind: str, head: str, spec: str, tmp_path: Path
) -> None:
    base, adapter, batch = bases(kind, head), build("adapters", spec), inputs(5)
    tensors = _shapes_and_values(adapter, base)
    expected = _logits(adapter, base, tensors, batch)
    adapter.export(base, tensors, tmp_path)
    model = _peft(base, tmp_path)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
    plain = _logits(adapter, base, adapter.initial(base, shapes_of(tensors), 0), batch)
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("head", ["average", "local", "frozen"])
@pytest.mark.parametrize("train", ["A,B", "A", "B"])
def test_what_trains_does_not_change_the_function(
    bases: Bases, train: str, head: str, tmp_path: Path
) -> None:
    adapter = build("adapters", f"lora(r=3, alpha=5, {train=}, {head=})")
    base, batch = bases("bert", CLASSIFY), inputs(4)
    tensors = _shapes_and_values(adapter, base)
    adapter.export(base, tensors, tmp_path)
    expected = _logits(adapter, base, tensors, batch)
    torch.testing.assert_close(_peft(base, tmp_path)(**batch).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_configuration_is_a_usual_one(bases: Bases, kind: str, tmp_path: Path) -> None:
    base, adapter = bases(kind, CLASSIFY), Lora(r=4, alpha=8.0, targets="all-linear")
    adapter.export(base, _shapes_and_values(adapter, base), tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (found["r"], found["lora_alpha"], found["task_type"]) == (4, 8, "SEQ_CLS")
    assert isinstance(found["lora_alpha"], int)
    assert found["fan_in_fan_out"] is (kind == "gpt2")  # GPT-2 keeps its weights transposed
    assert found["target_modules"] == sorted(found["target_modules"])
    assert found["modules_to_save"] == ["classifier" if kind == "bert" else "score"]


def test_files_do_not_depend_on_the_hash_seed(
    bases: Bases, folders: Folders, tmp_path: Path
) -> None:
    adapter, base = Lora(r=2, targets="all-linear"), bases("bert", CLASSIFY)
    shapes = adapter.shapes(base.outline)
    adapter.export(base, adapter.initial(base, shapes, 5), tmp_path / "here")
    program = (
        "import sys; from pathlib import Path; from fedpeft.adapters.lora import Lora\n"
        "from fedpeft.models._base import load_base\n"
        f"base = load_base(sys.argv[1], {CLASSIFY!r}, {CLASSES!r}, 'cpu')\n"
        "adapter = Lora(r=2, targets='all-linear')\n"
        "tensors = adapter.initial(base, adapter.shapes(base.outline), 5)\n"
        "adapter.export(base, tensors, Path(sys.argv[2]))\n"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run(
        [sys.executable, "-c", program, str(folders("bert")), str(tmp_path / "there")],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    here, there = (
        {p.name: p.read_bytes() for p in (tmp_path / side).iterdir()} for side in ("here", "there")
    )
    assert set(here) == {"adapter_config.json", "adapter_model.safetensors"}
    assert here == there


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize(("kind", "head"), EXPORTED)
def test_gradients_are_those_of_peft(
    bases: Bases, kind: str, head: str, spec: str, tmp_path: Path
) -> None:
    base, adapter, batch = bases(kind, head), build("adapters", spec), inputs(4)
    tensors = _shapes_and_values(adapter, base)
    adapter.export(base, tensors, tmp_path)
    direction = torch.from_numpy(
        np.random.default_rng(1).standard_normal(_logits(adapter, base, tensors, batch).shape)
    )

    leaves = {k: v.requires_grad_() for k, v in _double(tensors).items()}
    attached = adapter.attach(base)
    loss = (attached(leaves, batch) * direction).sum()
    ours = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    attached.detach()

    model = _peft(base, tmp_path, trainable=True)
    model.zero_grad()
    (model(**batch).logits * direction).sum().backward()
    theirs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix(_peft_folder.PREFIX).replace(".modules_to_save.default", "")
            theirs[short.replace(".default", "")] = parameter.grad
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name][0], gradient, rtol=1e-10, atol=1e-12)
        assert gradient.abs().max() > 0


def test_a_head_in_three_modules_gets_its_gradients(bases: Bases) -> None:
    """BERT from a checkpoint without a pooler: pooler and classifier are new."""
    base = bases("bert-mlm", CLASSIFY)
    assert sorted(base.outline.head) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]


# --- many clients in one pass -------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize(("kind", "head"), EXPORTED)
def test_three_clients_in_one_pass_are_three_passes(
    bases: Bases, kind: str, head: str, spec: str
) -> None:
    base, adapter, rows = bases(kind, head), build("adapters", spec), 4
    shapes = adapter.shapes(base.outline)
    own = [randomised(adapter.initial(base, shapes, k), seed=k) for k in range(3)]
    stacked = {
        name: torch.stack([torch.from_numpy(t[name]).double() for t in own]) for name in shapes
    }
    batches = [inputs(rows, seed=k) for k in range(3)]
    together = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    attached = adapter.attach(base)
    with torch.no_grad():
        logits = attached(stacked, together)
        for k in range(3):
            alone = attached({n: v[k : k + 1] for n, v in stacked.items()}, batches[k])
            torch.testing.assert_close(
                logits[rows * k : rows * (k + 1)], alone, rtol=1e-12, atol=1e-12
            )
    attached.detach()


def test_gradients_of_clients_do_not_mix(bases: Bases) -> None:
    base, adapter = bases("bert", CLASSIFY), Lora(r=3)
    shapes = adapter.shapes(base.outline)
    own = [randomised(adapter.initial(base, shapes, k), seed=k) for k in range(2)]
    learner = ModelLearner(base, adapter.attach(base), build("tasks", "classify"))

    def grads(clients: list[int]) -> Any:
        params = {
            n: torch.stack([torch.from_numpy(own[k][n]).double() for k in clients]) for n in shapes
        }
        batches = [inputs(4, seed=k) for k in clients]
        batch = Batch(
            {n: torch.cat([b[n] for b in batches]) for n in batches[0]},
            torch.tensor([0, 1, 2, 0] * len(clients)),
            torch.full((4 * len(clients),), 0.25, dtype=torch.float64),
            [0] * (4 * len(clients)),
        )
        return learner.grads(params, {}, batch)

    both, losses = grads([0, 1])
    for k in range(2):
        alone, loss = grads([k])
        torch.testing.assert_close(losses[4 * k : 4 * k + 4], loss, rtol=1e-12, atol=1e-12)
        for name, gradient in alone.items():
            torch.testing.assert_close(both[name][k], gradient[0], rtol=1e-11, atol=1e-13)
    learner.attached.detach()


def test_a_module_that_does_not_see_records_in_rows_is_refused(bases: Bases) -> None:
    """DeBERTa projects its relative positions, which belong to no client, with LoRA's modules."""
    base, adapter = bases("deberta-v2", CLASSIFY), Lora(r=2, targets="all-linear")
    tensors = _shapes_and_values(adapter, base)
    attached = adapter.attach(base)
    one = _double(tensors)
    two = {k: v.expand(2, *v.shape[1:]) for k, v in one.items()}
    with torch.no_grad():
        attached(one, inputs(4))
        with pytest.raises(ModelError, match="clients cannot share a pass"):
            attached(two, inputs(4))
    attached.detach()


# --- the base is lent ---------------------------------------------------------------------------


def test_a_base_is_given_back_as_it_was(bases: Bases) -> None:
    base, batch = bases("bert", CLASSIFY), inputs(3)
    with torch.no_grad():
        before = base.model(**batch).logits
        adapter = Lora(r=2)
        tensors = _shapes_and_values(adapter, base)
        attached = adapter.attach(base)
        inside = attached(_double(tensors), batch)
        assert torch.equal(base.model(**batch).logits, before)  # hooks sleep between calls
        other = Lora(r=3, targets="all-linear").attach(base)
        assert torch.equal(attached(_double(tensors), batch), inside)
        other.detach()
        attached.detach()
        assert torch.equal(base.model(**batch).logits, before)
    assert not any(m._forward_hooks for m in base.model.modules())


def test_a_head_that_is_not_linear_is_refused_and_leaves_no_hook(bases: Bases) -> None:
    base = bases("bert", CLASSIFY)
    head = {"bert.embeddings.LayerNorm.weight": (16,), **base.outline.head}
    broken = Base(
        base.model,
        base.tokenizer,
        Outline(base.outline.linear, head, base.outline.parameters, 64, True),
        base.location,
        base.head_kind,
        base.classes,
        base.missing,
    )
    with pytest.raises(ModelError, match=r"LayerNorm is not Linear; use adapter: full"):
        Lora(r=2).attach(broken)
    assert not any(m._forward_hooks for m in base.model.modules())


LENGTH = 7


@pytest.mark.parametrize("fresh", [True, False], ids=["in-place", "view"])
def test_the_low_rank_sum_has_the_gradients_of_its_formula(fresh: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (5, 4), "x": (6, 3, 4), "a": (2, 2, 4), "b": (2, 5, 2)}
    leaves = {
        k: torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True)
        for k, s in shapes.items()
    }

    def output(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made = x @ w.T
        return made.clone() if fresh else made.view(-1, 5).view(made.shape)

    def ours(w: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _added(output(w, x), x, a, b, 0.7)

    w, x, a, b = leaves.values()
    assert output(w, x)._is_view() is not fresh
    told = torch.einsum("kntd,krd,kor->knto", x.reshape(2, 3, 3, 4), a, b).reshape(6, 3, 5)
    torch.testing.assert_close(ours(w, x, a, b), x @ w.T + 0.7 * told, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (w, x, a, b))


# --- dropout ------------------------------------------------------------------------------------


def _dropout(*seeds: int, lengths: tuple[int, ...] = (LENGTH,) * 4) -> Dropout:
    return Dropout(seeds, lengths * len(seeds))


def test_dropout_masks_belong_to_the_client(bases: Bases) -> None:
    base, adapter, batch = bases("bert", CLASSIFY), Lora(r=3, dropout=0.5), inputs(4)
    one = _double(_shapes_and_values(adapter, base))
    two = {k: v.expand(2, *v.shape[1:]) for k, v in one.items()}
    twice = {k: torch.cat([v, v]) for k, v in batch.items()}
    state = torch.get_rng_state()
    attached = adapter.attach(base)
    with torch.no_grad():
        quiet = attached(one, batch)
        first, again = (attached(one, batch, _dropout(1)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, quiet)
        other = attached(one, batch, _dropout(2))
        assert not torch.allclose(first, other)
        both = attached(two, twice, _dropout(1, 2))
        torch.testing.assert_close(both, torch.cat([first, other]), rtol=1e-12, atol=1e-12)
        assert torch.equal(attached(one, batch), quiet)
    attached.detach()
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is not used


def test_padding_changes_no_mask(bases: Bases) -> None:
    base, adapter, batch = bases("bert", CLASSIFY), Lora(r=3, dropout=0.5), inputs(2)
    one = _double(_shapes_and_values(adapter, base))
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    own = tuple(int(n) for n in batch["attention_mask"].sum(1))
    attached = adapter.attach(base)
    with torch.no_grad():
        short, long = (attached(one, b, _dropout(1, lengths=own)) for b in (batch, padded))
    attached.detach()
    torch.testing.assert_close(long, short, rtol=1e-12, atol=1e-12)


def test_rows_that_fill_up_draw_nothing() -> None:
    x = torch.ones(4, 6, 10)
    kept = _dropped(x, _dropout(1, 2, lengths=(3, 0)))
    assert torch.equal(kept[1], x[1])
    assert torch.equal(kept[0, 3:], x[0, 3:])
    assert torch.equal(_dropped(x[::2], _dropout(1, 2, lengths=(3,)))[:, :3], kept[::2, :3])


def test_dropout_keeps_the_mean() -> None:
    dropped = _dropped(torch.ones(2, 50, 100), _dropout(1, 2, lengths=(50,)))
    assert np.unique(dropped.numpy()) == pytest.approx(np.array([0.0, 4 / 3]))
    assert dropped.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(1 / 3 / 10_000))
    assert not torch.equal(dropped[0], dropped[1])


def _dropped(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    return masked(x, dropout, 0.25, 0)


# --- full ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", CLASSIFY), ("gpt2", LANGUAGE), ("llama-tied", LANGUAGE)]
)
def test_full_is_plain_training(bases: Bases, kind: str, head: str) -> None:
    base, batch, adapter = bases(kind, head), inputs(4), Full()
    shapes = adapter.shapes(base.outline)
    start = adapter.initial(base, shapes, 0)
    assert shapes_of(start) == shapes
    attached = adapter.attach(base)
    assert attached.max_group == 1
    params = _double(start)
    model: Any = copy.deepcopy(base.model).requires_grad_()
    model.load_state_dict({k: v[0] for k, v in params.items()}, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        loss = attached(leaves, batch).square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        params = {k: v.detach() - 0.1 * g for (k, v), g in zip(leaves.items(), grads, strict=True)}
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(params[name][0], value.detach(), rtol=1e-10, atol=1e-12)
    assert not torch.equal(params[name][0], torch.from_numpy(start[name]).double())


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", CLASSIFY), ("gpt2", LANGUAGE), ("llama-tied", LANGUAGE)]
)
def test_full_exports_a_model_that_transformers_loads(
    folders: Folders, kind: str, head: str, tmp_path: Path
) -> None:
    base = fresh_base(folders(kind), head, CLASSES if head == CLASSIFY else (), double=False)
    adapter, batch = Full(), inputs(3)
    tensors = _shapes_and_values(adapter, base)
    adapter.export(base, tensors, tmp_path / "model")
    restored = adapter.restore(tmp_path / "model", shapes_of(tensors))
    assert all(np.array_equal(restored[k], tensors[k]) for k in tensors)
    again = fresh_base(tmp_path / "model", head, CLASSES if head == CLASSIFY else (), double=False)
    assert not again.missing
    with torch.no_grad():
        expected = adapter.attach(base)(stack([tensors], torch.device("cpu")), batch)
        torch.testing.assert_close(again.model(**batch).logits, expected, rtol=0, atol=1e-6)


def test_full_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Full().restore(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be read"):
        Full().restore(tmp_path, {})
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    for shapes in ({"a": (3,)}, {"b": (2,)}):
        with pytest.raises(ModelError, match=r"of shape \(.,\) is missing"):
            Full().restore(tmp_path, shapes)
    assert Full().restore(tmp_path, {"a": (2,)})["a"].tolist() == [0, 0]


# --- what a model looks like --------------------------------------------------------------------

OUTLINED = [(kind, CLASSIFY) for kind in CHECKPOINTS] + [
    (kind, LANGUAGE) for kind in ("llama", "llama-tied", "gpt2", "qwen2")
]
SAME = ("attention", "all-linear")


def _by_suffix(shapes: Mapping[str, tuple[int, ...]], base: Base) -> dict[str, Any]:
    """Drop the prefix that a checkpoint of the bare encoder does not have."""
    prefix = f"{base.model.base_model_prefix}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("targets", SAME)
@pytest.mark.parametrize(("kind", "head"), OUTLINED)
def test_the_files_tell_what_the_loaded_model_has(
    bases: Bases, folders: Folders, kind: str, head: str, targets: str
) -> None:
    read = outline(str(folders(kind)), head, len(CLASSES))
    base, adapter = bases(kind, head), Lora(r=2, targets=targets)
    assert read.exact
    assert read.limit == base.outline.limit
    found, loaded = adapter.shapes(read), adapter.shapes(base.outline)
    assert _by_suffix(found, base) == _by_suffix(loaded, base)
    assert _by_suffix(read.parameters, base) == _by_suffix(base.outline.parameters, base)
    assert _by_suffix(read.head, base) == _by_suffix(base.outline.head, base)


@pytest.mark.parametrize("targets", SAME)
@pytest.mark.parametrize("kind", IMAGES)
def test_the_files_of_vision_models_tell_every_name(
    bases: Bases, folders: Folders, kind: str, targets: str
) -> None:
    """Files keep old names; a bare encoder's lack its prefix, too."""
    if kind == "convnext" and targets == "attention":
        return  # it has none
    read = outline(str(folders(kind)), PICTURES, len(CLASSES))
    base, adapter = bases(kind, PICTURES), Lora(r=2, targets=targets)
    assert read.exact
    assert dict(read.linear) == dict(base.outline.linear)
    assert dict(read.head) == dict(base.outline.head)
    assert dict(read.parameters) == dict(base.outline.parameters)
    assert adapter.shapes(read) == adapter.shapes(base.outline)
    assert adapter.modules(base.outline)
    assert not any("projection" in module for module in read.linear)  # patches are convolved


@pytest.mark.parametrize(
    ("kind", "names"), [("bert", "key, output.dense"), ("gpt2", "c_fc,c_proj")]
)
def test_listed_targets_are_read_from_files_too(
    bases: Bases, folders: Folders, kind: str, names: str
) -> None:
    base, adapter = bases(kind, CLASSIFY), Lora(r=2, targets=names)
    read = outline(str(folders(kind)), CLASSIFY, len(CLASSES))
    found, loaded = adapter.shapes(read), adapter.shapes(base.outline)
    assert _by_suffix(found, base) == _by_suffix(loaded, base)
    words = [n.strip() for n in names.split(",")]
    assert all(any(m.endswith(w) for w in words) for m in adapter.modules(base.outline))


@pytest.mark.parametrize(
    ("name", "head", "classes"), [("tiny-novels", LANGUAGE, 0), ("minilm", CLASSIFY, 4)]
)
def test_embedded_models_are_what_their_files_say(name: str, head: str, classes: int) -> None:
    try:
        read = outline(name, head, classes)
    except ModelError as error:
        pytest.skip(str(error))
    base = fresh_base(name, head, tuple(map(str, range(classes))), double=False)
    for targets in SAME:
        adapter = Lora(r=2, targets=targets)
        found, loaded = adapter.shapes(read), adapter.shapes(base.outline)
        assert _by_suffix(found, base) == _by_suffix(loaded, base)
    assert _by_suffix(read.parameters, base) == _by_suffix(base.outline.parameters, base)
    assert read.exact
    assert base.outline.limit == 512


@pytest.mark.parametrize(
    ("kind", "head", "targets"),
    [
        *((kind, CLASSIFY, "attention") for kind in ("bert", "roberta", "deberta-v2", "electra")),
        *((kind, LANGUAGE, "attention") for kind in ("llama", "gpt2", "qwen2")),
        *((kind, CLASSIFY, "all-linear") for kind in ("bert", "gpt2", "llama", "electra")),
        *((kind, LANGUAGE, "all-linear") for kind in ("llama", "llama-tied", "gpt2")),
        ("bert", CLASSIFY, "value, output.dense"),
        ("llama", LANGUAGE, "q_proj,down_proj"),
    ],
)
def test_peft_wraps_the_same_modules(bases: Bases, kind: str, head: str, targets: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = bases(kind, head)
    asked: Any = {"attention": None, "all-linear": "all-linear"}.get(
        targets, [t.strip() for t in targets.split(",")]
    )
    config = LoraConfig(
        task_type="SEQ_CLS" if head == CLASSIFY else "CAUSAL_LM",
        target_modules=asked,
        fan_in_fan_out=kind == "gpt2",
    )
    model = get_peft_model(copy.deepcopy(base.model), config)
    theirs = set(model.base_model.targeted_module_names)
    heads = {name.rpartition(".")[0] for name in base.outline.head}
    assert set(Lora(r=2, targets=targets).modules(base.outline)) == theirs - heads


def test_a_target_that_fits_nothing_is_named() -> None:
    found = Outline(
        {"h.0.query": (4, 4), "h.0.value": (4, 4), "h.0.dense": (4, 4)}, {}, {}, 8, True
    )
    assert Lora(targets="value, dense").modules(found) == ["h.0.dense", "h.0.value"]
    assert Lora().modules(found) == ["h.0.query", "h.0.value"]
    with pytest.raises(ModelError, match=r"targets='quary'.*has dense, query, value"):
        Lora(targets="value,quary").modules(found)
    with pytest.raises(ModelError, match="'attention' matches no linear module"):
        Lora().modules(Outline({"dense": (4, 4)}, {}, {}, 8, True))
    with pytest.raises(ModelError, match=r"r=5 exceeds h.0.query \(4 x 4\)"):
        Lora(r=5).shapes(found)
    assert len(set(ATTENTION)) == len(ATTENTION)


def test_a_language_model_without_its_head_is_refused(folders: Folders) -> None:
    """Its head would be drawn from torch's own generator, differently on every side."""
    with pytest.raises(ModelError, match="its files have no lm_head"):
        fresh_base(folders("roberta"), LANGUAGE)


# --- before round 0 -----------------------------------------------------------------------------


def _initial(base: Base, spec: str, seed: int = 0) -> Tensors:
    adapter = build("adapters", spec)
    found: Tensors = adapter.initial(base, adapter.shapes(base.outline), seed)
    return found


def test_adapters_start_from_their_names(bases: Bases) -> None:
    base = bases("bert", CLASSIFY)
    first, again = _initial(base, "lora(r=3)"), _initial(base, "lora(r=3)")
    assert all(v.dtype == np.float32 for v in first.values())
    assert all(np.array_equal(first[k], again[k]) for k in first)
    wider = _initial(base, "lora(r=3, targets='all-linear')")
    assert all(np.array_equal(first[k], wider[k]) for k in first)  # whatever else there is
    other = _initial(base, "lora(r=3)", seed=1)
    factors = [k for k in first if "lora_A" in k]
    assert not any(np.array_equal(first[k], other[k]) for k in factors)
    assert len({first[k].tobytes() for k in factors}) == len(factors) == 4
    assert all(not first[k].any() for k in first if "lora_B" in k)


def test_kaiming_is_uniform_within_its_bound(bases: Bases) -> None:
    drawn = _initial(bases("bert", CLASSIFY), "lora(r=12, targets='all-linear')")
    values = np.concatenate(
        [v.ravel() * math.sqrt(v.shape[1]) for k, v in drawn.items() if "_A" in k]
    )
    assert np.abs(values).max() <= 1
    assert np.abs(values).max() > 0.99
    assert values.mean() == pytest.approx(0, abs=0.05)
    assert values.std() == pytest.approx(1 / math.sqrt(3), rel=0.03)


def test_orthonormal_rows(bases: Bases) -> None:
    drawn = _initial(bases("bert", CLASSIFY), "lora(r=5, init='orthonormal')")
    for name, a in drawn.items():
        if "lora_A" in name:
            np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-6)
            assert a.flags.c_contiguous


def test_gaussian_has_deviation_one_over_r(bases: Bases) -> None:
    drawn = _initial(bases("bert", CLASSIFY), "lora(r=8, init='gaussian', targets='all-linear')")
    values = np.concatenate([v.ravel() for k, v in drawn.items() if "lora_A" in k])
    assert values.std() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "gaussian"])
def test_training_a_alone_can_move(bases: Bases, init: str) -> None:
    """With B frozen at zero every gradient of A would be zero, for ever."""
    base = bases("bert", CLASSIFY)
    drawn = _initial(base, f"lora(r=4, train='A', init={init!r})")
    for name, value in drawn.items():
        if "lora_A" in name:
            assert not value.any()
        elif "lora_B" in name:
            assert value.shape == (16, 4)
            assert value.any()
            assert value.flags.c_contiguous
            if init == "orthonormal":
                np.testing.assert_allclose(value.T @ value, np.eye(4), atol=1e-6)
            if init == "kaiming":
                assert np.abs(value).max() <= 1 / math.sqrt(16)
    learner = ModelLearner(base, Lora(r=4, train="A").attach(base), build("tasks", "classify"))
    batch = Batch(inputs(2), torch.tensor([0, 1]), torch.full((2,), 0.5).double(), [0, 0])
    params = {k: v for k, v in _double(drawn).items() if "lora_A" in k}
    fixed = {k: v for k, v in _double(drawn).items() if k not in params}
    grads, _ = learner.grads(params, fixed, batch)
    learner.attached.detach()
    assert all(g.abs().max() > 0 for g in grads.values())


def test_a_new_head_is_drawn_and_a_trained_one_is_kept(bases: Bases, folders: Folders) -> None:
    new = _initial(bases("bert", CLASSIFY), "lora")
    assert not new["classifier.bias"].any()
    assert new["classifier.weight"].std() == pytest.approx(0.02, rel=0.5)
    kept = _initial(fresh_base(folders("bert-classifier"), CLASSIFY, CLASSES, double=False), "lora")
    assert kept["classifier.bias"].any()
    for spec in ("lora", "full"):  # another number of classes: a new head
        base = fresh_base(folders("bert-classifier"), CLASSIFY, (*CLASSES, "d"), double=False)
        drawn = _initial(base, spec)
        assert drawn["classifier.weight"].shape == (4, 16)
        assert not drawn["classifier.bias"].any()


# --- roles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["average", "local", "frozen"])
@pytest.mark.parametrize("train", ["A,B", "A", "B"])
def test_roles(train: str, head: str) -> None:
    shapes = {"m.lora_A.weight": (2, 4), "m.lora_B.weight": (4, 2), "classifier.bias": (3,)}
    roles = build("adapters", f"lora({train=}, {head=})").roles(shapes, 0)
    factors = {f"m.lora_{factor}.weight" for factor in train.split(",")}
    own = {"classifier.bias"}
    assert roles.down == roles.up == factors | (own if head == "average" else set())
    assert roles.train == factors | (own if head != "frozen" else set())
    assert roles.local == (own if head == "local" else set())
    everything = frozenset(shapes)
    assert build("adapters", "full").roles(shapes, 0).up == everything


# --- warm start ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("exported")
    adapter, base = Lora(r=3, alpha=5), bases("bert", CLASSIFY)
    tensors = _shapes_and_values(adapter, base)
    adapter.export(base, tensors, folder)
    return folder, tensors


def test_an_exported_folder_can_be_read_back(exported: tuple[Path, Tensors]) -> None:
    folder, tensors = exported
    found = Lora(r=3, alpha=5).restore(folder, shapes_of(tensors))
    assert list(found) == list(tensors)
    assert all(np.array_equal(found[k], tensors[k]) for k in tensors)
    assert all(v.dtype == np.float32 for v in found.values())


def test_a_folder_that_peft_wrote_can_be_read(bases: Bases, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = bases("llama", LANGUAGE)
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base.model), config)
    model.save_pretrained(str(tmp_path))
    adapter, batch = Lora(r=3, alpha=5), inputs(3)
    tensors = adapter.restore(tmp_path, adapter.shapes(base.outline))
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(_logits(adapter, base, tensors, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lora(r=2, alpha=5)", r"holds r=3, the plan says 2; make the adapter line agree"),
        ("lora(r=3, alpha=4)", r"holds lora_alpha=5, the plan says 4.0"),
        ("lora(r=3, alpha=5, rslora=True)", r"holds use_rslora=False, the plan says True"),
    ],
)
def test_another_function_is_not_read_as_this_one(
    exported: tuple[Path, Tensors], spec: str, message: str
) -> None:
    folder, tensors = exported
    with pytest.raises(ModelError, match=message):
        build("adapters", spec).restore(folder, shapes_of(tensors))


def test_what_does_not_fit_is_named(exported: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder, tensors = exported
    adapter, shapes = Lora(r=3, alpha=5), shapes_of(tensors)
    name = next(iter(shapes))
    cases: list[tuple[Mapping[str, tuple[int, ...]], str]] = [
        ({k: s for k, s in shapes.items() if k != name}, f"holds {name}, which the plan's adapter"),
        ({**shapes, "more": (1,)}, "has no more, which the plan's adapter has"),
        ({**shapes, name: (9, 9)}, rf"{name} is \(3, 16\), the plan expects \(9, 9\)"),
    ]
    for wrong, message in cases:
        with pytest.raises(ModelError, match=message):
            adapter.restore(folder, wrong)
    with pytest.raises(ModelError, match="not a PEFT folder"):
        adapter.restore(tmp_path, shapes)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for change, message in (
        ({"peft_type": "IA3"}, "holds peft_type=IA3, the plan says LORA"),
        ({"use_dora": True}, "uses use_dora"),
        ({"alpha_pattern": {"query": 9}}, "uses alpha_pattern"),
    ):
        text = json.dumps({**config, **change})
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=message):
            adapter.restore(tmp_path, shapes)
    (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(FedPeftError, match="not JSON"):
        adapter.restore(tmp_path, shapes)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match="cannot be read"):
        adapter.restore(tmp_path, shapes)
