"""Vision models: their image processors, and bytes that become what these make of images."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, DeiTImageProcessorPil, ViTImageProcessorPil

from fedpeft.data._images import pixels
from fedpeft.errors import ModelError
from fedpeft.models._base import load_tokenizer
from fedpeft.models._images import Floats, suit_images
from fedpeft.models._vision import loaded_name
from tests.architectures import SIDE, checkpoint, fresh_base
from tests.pictures import images

HEAD = "image-classification"
SIZE = {"height": SIDE, "width": SIDE}


class Probe(torch.nn.Module):
    """A model that gives back what it is given."""

    def __init__(self, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=kind))

    @property
    def base_model(self) -> Probe:
        return self

    def forward(self, pixel_values: torch.Tensor, more: Any = None) -> torch.Tensor:
        return pixel_values


PROCESSORS = [
    ViTImageProcessorPil(size=SIZE),
    ViTImageProcessorPil(size=SIZE, image_mean=[0.48, 0.45, 0.4], image_std=[0.22, 0.23, 0.3]),
    ViTImageProcessorPil(size=SIZE, do_normalize=False),
    ViTImageProcessorPil(size=SIZE, rescale_factor=1 / 127.5),
    ViTImageProcessorPil(size=SIZE, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3),
    DeiTImageProcessorPil(size={"height": 12, "width": 12}, crop_size=SIZE),
]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("named", [True, False])
def test_a_model_sees_what_the_processor_makes(processor: Any, named: bool) -> None:
    given = [Image.fromarray(image) for image in images(6, 3)[0]]
    wanted = np.stack(processor(given)["pixel_values"]).astype(np.float32)
    cut = torch.from_numpy(np.stack([pixels(processor, image) for image in given]))
    model = Probe()
    suit_images(model, processor)
    found = model(pixel_values=cut) if named else model(cut)
    assert (cut.dtype, found.dtype) == (torch.uint8, torch.float32)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=2e-6)
    for kind, close in ((torch.float64, 2e-6), (torch.bfloat16, 0.02)):
        found = model.to(kind)(cut)
        assert found.dtype == kind
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=close, atol=close)


def test_floats_pass_as_they_are() -> None:
    model = Probe()
    suit_images(model, PROCESSORS[0])
    given = torch.rand(2, 3, 4, 4)
    assert model(given) is given
    assert model(pixel_values=given, more=None) is given


def test_a_model_with_its_hook_can_be_sent_and_copied(tmp_path: Path) -> None:
    base = fresh_base(checkpoint("vit", tmp_path / "vit"), HEAD, ("a", "b"))
    given = torch.from_numpy(
        np.stack([pixels(base.tokenizer, Image.fromarray(images(1, 0)[0][0]))])
    )
    model: Any = base.model
    expected = model(given).logits
    assert expected.dtype == torch.float64
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given).logits, expected)
    with torch.inference_mode():  # what is kept there must do in training, too
        model(given)
    model.requires_grad_(True)
    model(given).logits.sum().backward()


def test_a_base_for_images_is_what_transformers_computes(tmp_path: Path) -> None:
    import transformers

    folder = checkpoint("vit-classifier", tmp_path / "vit")
    base = fresh_base(folder, HEAD, ("a", "b", "c", "d"), double=False)
    assert not base.missing
    assert base.tokenizer.size.height == SIDE
    theirs: Any = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    given = [Image.fromarray(image) for image in images(5, 0)[0]]
    made = AutoImageProcessor.from_pretrained(folder)(given, return_tensors="pt")
    cut = np.stack([pixels(base.tokenizer, image) for image in given])
    ours: Any = base.model(pixel_values=torch.from_numpy(cut))
    torch.testing.assert_close(ours.logits, theirs(**made).logits, rtol=1e-5, atol=1e-5)
    base.save_pretrained(tmp_path / "saved", base.model.state_dict())
    assert load_tokenizer(str(tmp_path / "saved"), HEAD).to_dict() == base.tokenizer.to_dict()


def test_a_grey_model_takes_grey_images(tmp_path: Path) -> None:
    base = fresh_base(checkpoint("vit-grey", tmp_path / "vit"), HEAD, ("a", "b"), double=False)
    cut = pixels(base.tokenizer, Image.fromarray(images(1, 0)[0][0]))
    assert cut.shape == (1, SIDE, SIDE)
    found: Any = base.model(pixel_values=torch.from_numpy(cut[None]))
    assert found.logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": {"height": 9, "width": 9}}, r"of 9 x 9 and the model takes 8 x 8; set its size"),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"1 channels \(image_mean\) .* takes 3"),
        ({"size": {"longest": 9}}, r"cannot load its image processor|cannot be used"),
        ({"image_processor_type": "NoSuch"}, r"cannot load its image processor: Unrecognized"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder = checkpoint("vit", tmp_path / "vit")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(folder), HEAD)


def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    folder = checkpoint("vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config.json; save its image proc"):
        load_tokenizer(str(folder), HEAD)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load its image processor"):
        load_tokenizer(str(folder), HEAD)
    with pytest.raises(ModelError, match=r"not on this machine.*give a local folder"):
        load_tokenizer("org/no-such-model", HEAD)


def test_an_architecture_without_an_image_classifier_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load its model|has no preprocessor_config"):
        fresh_base(bert, HEAD, ("a", "b"))


def test_names_of_files_and_of_text_models() -> None:
    old, new = (
        "encoder.layer.3.attention.attention.query.bias",
        "vit.layers.3.attention.q_proj.bias",
    )
    for name in (old, f"vit.{old}", new):
        assert loaded_name(name, {"model_type": "vit"}) == new
    for name in ("embeddings.LayerNorm.weight", "encoder.layer.0.output.dense.bias"):
        assert loaded_name(name, {"model_type": "bert"}) == name


def test_a_hook_has_one_number_per_channel() -> None:
    hook = Floats((2.0, 3.0), (-1.0, 0.5))
    given = torch.tensor([[[[10]], [[20]]]], dtype=torch.uint8)
    (found,), rest = hook(Probe(), (given,), {"flag": True})
    assert found.flatten().tolist() == [19.0, 60.5]
    assert rest == {"flag": True}
