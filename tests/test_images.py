"""Plans of images, as a whole: planned, run in groups and processes, resumed, evaluated, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from fedpeft.adapters._stacked import StackedLora
from fedpeft.cli import app
from fedpeft.driver import simulate
from fedpeft.errors import DataError, ModelError
from fedpeft.federation import deal
from fedpeft.flower.config import run_config
from fedpeft.inference import load_exported
from fedpeft.plan import Plan
from fedpeft.preview import preview
from fedpeft.site import Site, encode
from fedpeft.spec import build
from fedpeft.tokens import Tokens
from tests.architectures import SIDE, checkpoint
from tests.pictures import LABELS, TEST, TRAIN, image_archive, image_lines, image_plan, images

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and images."""
    folder = tmp_path_factory.mktemp("images")
    image_lines(folder)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run."""
    simulate(image_plan(place), out=place / "run", engine=build("engine", "inline(group=4)"))
    return place / "run"


def same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        np.testing.assert_allclose(value, b.tensors[name], rtol=tolerance, atol=tolerance)


def test_a_plan_of_images_is_previewed_without_weights(place: Path) -> None:
    found = preview(image_plan(place))
    assert found["classes"] == list(LABELS)
    assert found["records"]["test"] == TEST
    assert found["bytes"]["exact"]
    assert not found["warnings"]
    site = Site(image_plan(place), deal(image_plan(place)))
    assert found["parameters"]["trained"] == sum(v.size for v in site.initial.values())
    site.close()


def test_bytes_stay_bytes_in_memory_and_on_disk(place: Path) -> None:
    plan = image_plan(place)
    federation = deal(plan)
    for _ in range(2):  # made, then mapped
        found = encode(plan, federation).train
        assert isinstance(found, Tokens)
        values = found.columns["pixel_values"].values
        assert values.dtype == np.uint8
        assert values.shape == (TRAIN, 3, SIDE, SIDE)
        assert values.nbytes == TRAIN * 3 * SIDE * SIDE
        assert found.lengths.tolist() == [1] * TRAIN
    site = Site(plan, federation)
    (client, *_) = federation.train
    batch = site.learner.collate(list(site.train(client)), [1.0] * len(site.train(client)))
    assert batch.inputs["pixel_values"].dtype == torch.uint8
    assert site.train(client)[0]["pixel_values"].shape == (3, SIDE, SIDE)
    site.close()


def test_clients_really_share_passes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each does what it does alone."""
    seen, forward = list[int](), StackedLora.__call__

    def watched(self: Any, params: Any, inputs: Any, dropout: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(len(next(iter(params.values()))))
        return forward(self, params, inputs, dropout)

    monkeypatch.setattr(StackedLora, "__call__", watched)
    plan = image_plan(place, evaluate="none")
    together = simulate(plan, engine=build("engine", "inline(group=8)"))
    assert seen == [4] * 4  # two rounds of two steps, all four clients in each
    seen.clear()
    alone = simulate(plan)
    assert seen == [1] * 16
    same(together, alone, 2e-5)


@pytest.mark.parametrize("adapter", ["lora(r=4, dropout=0.2)", "full"])
def test_processes_give_the_same_bits(place: Path, adapter: str) -> None:
    plan, threads = image_plan(place, adapter=adapter), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inline = simulate(plan, engine=build("engine", "inline"))
    finally:
        torch.set_num_threads(threads)
    processes = simulate(plan, engine=build("engine", "processes(workers=2, threads=1)"))
    same(inline, processes)


def test_an_interrupted_run_is_resumed_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    plan, rounds = image_plan(place, rounds=3), list[int]()
    whole = simulate(plan, out=tmp_path / "whole")
    from fedpeft.watching import Quiet

    class Stops(Quiet):
        def round(self, line: Any) -> None:
            rounds.append(line["round"])
            if len(rounds) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=tmp_path / "cut", watch=Stops())
    assert len(rounds) == 2
    same(simulate(plan, out=tmp_path / "cut", resume=True), whole)


def test_peft_loads_the_adapter_with_the_same_logits(run: Path, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["modules_to_save"] == ["classifier"]
    base = AutoModelForImageClassification.from_pretrained(place / "vit", num_labels=3)
    theirs = PeftModel.from_pretrained(base, run / "adapter").eval()
    given = [Image.fromarray(image) for image in images(TEST, 1)[0]]
    made = AutoImageProcessor.from_pretrained(place / "vit")(given, return_tensors="pt")
    probable = theirs(**made).logits.softmax(-1).max(-1)
    ours = load_exported(run).classify([{"image": image} for image in given])
    assert [LABELS[i] for i in probable.indices] == [each["label"] for each in ours]
    np.testing.assert_allclose(
        [each["probability"] for each in ours], probable.values.detach(), atol=1e-4
    )


def _json(*arguments: str) -> Any:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return (
        [json.loads(line) for line in done.output.splitlines()]
        if "predict" in arguments
        else (json.loads(done.output))
    )


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_commands_take_images(
    run: Path, place: Path, tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapter == "full":
        run = tmp_path / "run"
        simulate(image_plan(place, adapter="full"), out=run)
    (last,) = (json.loads(t) for t in (run / "rounds.jsonl").read_text().splitlines()[-1:])
    scored = _json("eval", str(run))
    assert scored["records"] == TEST
    assert scored["loss"] == pytest.approx(last["test/loss"], abs=1e-5)
    path = sorted((place / "pictures" / "test" / "owl").iterdir())[0]
    (guess,) = _json("predict", str(run), str(path))
    assert guess["label"] in LABELS
    monkeypatch.setattr("fedpeft.inference._PIECE", 5)
    assert _json("eval", str(run)) == pytest.approx(scored, abs=1e-6)
    every = _json("predict", str(run), "--data", f"imagefolder(train={str(path.parents[1])!r})")
    assert len(every) == TEST
    assert guess in every
    merged = tmp_path / "merged"
    assert CliRunner().invoke(app, ["export", str(run), "--merged", "--out", str(merged)]).output
    assert (merged / "preprocessor_config.json").is_file()
    assert _json("eval", str(merged))["loss"] == pytest.approx(scored["loss"], abs=1e-5)


@pytest.mark.parametrize("adapter", ["lora(r=4, targets='all-linear')", "full"])
def test_a_run_starts_from_another_one(place: Path, tmp_path: Path, adapter: str) -> None:
    """The files of a whole model have other names than the model."""
    plan = image_plan(place, adapter=adapter, rounds=1)
    first = simulate(plan, out=tmp_path / "first")
    again = image_plan(place, adapter=adapter, rounds=1, warm_start=str(tmp_path / "first/adapter"))
    site = Site(again, deal(again))
    assert {k: v.tobytes() for k, v in site.initial.items()} == {
        k: v.tobytes() for k, v in first.tensors.items()
    }
    site.close()
    same(simulate(plan, out=tmp_path / "first", resume=True), first)


def test_other_models_and_data(place: Path, tmp_path: Path) -> None:
    archive = image_archive(tmp_path / "pets.npz")
    for kind in ("deit-teacher", "swin", "convnext"):
        plan = image_plan(
            place,
            model=str(checkpoint(kind, tmp_path / kind)),
            data=f"npz(file={str(archive)!r})",
            rounds=1,
        )
        together = simulate(plan, engine=build("engine", "inline(group=4)"))
        same(together, simulate(plan), 5e-5)
        assert "test/accuracy" in together.history[-1]


def test_a_bfloat16_base_is_near_the_exact_one(place: Path) -> None:
    exact = simulate(image_plan(place, rounds=1)).history[-1]
    near = simulate(image_plan(place, rounds=1, precision="bfloat16")).history[-1]
    assert near["test/loss"] == pytest.approx(exact["test/loss"], abs=0.05)


def test_folders_become_absolute_for_flower(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = image_lines(place) | {"data": "imagefolder(train='pictures/train', test='./none')"}
    assert "test='./none'" in str(run_config(Plan.from_lines(lines))["data"])
    lines["data"] = "imagefolder(train='pictures/train', test='./pictures/test')"
    data = str(run_config(Plan.from_lines(lines))["data"])
    assert str(place / "pictures" / "train") in data
    assert str(place / "pictures" / "test") in data


def test_labels_deal_images_to_clients(place: Path) -> None:
    federation = deal(image_plan(place, partition="shards(per_client=1)", clients=3))
    for rows in federation.train.values():
        assert len({federation.splits.train[i]["label"] for i in rows}) == 1


def test_what_cannot_be_used_is_refused_before_a_model_loads(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = image_lines(tmp_path)
    path = tmp_path / "pictures" / "train" / "dog" / "001.png"
    path.write_bytes(path.read_bytes()[:-60])
    monkeypatch.setattr("fedpeft.site.load_base", None)
    with pytest.raises(DataError, match=r"data: train: row 13: .*dog/001.png: no image, or a dam"):
        simulate(Plan.from_lines(lines), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    processor = tmp_path / "vit" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace('"height": 8', '"height": 16'))
    for refuse in (preview, simulate):
        with pytest.raises(ModelError, match=r"16 x 8 and the model takes 8 x 8"):
            refuse(Plan.from_lines(lines))
    (tmp_path / "pictures" / "test" / "dog").rename(tmp_path / "pictures" / "test" / "dgo")
    with pytest.raises(DataError, match=r"data: test: row 5 has the label 'dgo', which no"):
        preview(Plan.from_lines(lines))


def test_the_command_plans_images(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(image_lines(place)))
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert done.exit_code == 0
    assert "clients can share passes" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ("full", "3e-3"),
        ("lora(r=8, targets='all-linear')", "1e-2"),
    ],
)
def test_a_vit_learns_fashion(
    shared: Callable[[str], Path], tmp_path: Path, adapter: str, rate: str
) -> None:
    archive = shared("vision/fashion_mnist.npz")
    model = fashion_vit(tmp_path / "vit")
    plan = Plan.from_lines(
        {
            "model": str(model),
            "task": "classify_images",
            "data": f"npz(file={str(archive)!r})",
            "partition": "dirichlet(alpha=1.0)",
            "clients": 16,
            "cohort": "uniform(size=8)",
            "adapter": adapter,
            "trainer": f"plain(lr={rate}, steps=10, batch=16)",
            "rounds": 20,
            "eval_every": 20,
            "evaluate": "test",
        }
    )
    result = simulate(plan, engine=build("engine", "inline(group=8)"))
    assert result.history[-1]["test/accuracy"] > 0.3  # thrice what always the same class has


def fashion_vit(folder: Path) -> Path:
    """Write a random ViT for grey images of 28 x 28 pixels."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=28,
        patch_size=7,
        num_channels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTModel(config).save_pretrained(folder)
    processor = {"size": {"height": 28, "width": 28}, "image_mean": [0.29], "image_std": [0.35]}
    made: Any = transformers.ViTImageProcessorPil(**processor)
    made.save_pretrained(folder)
    return folder
