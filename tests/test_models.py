"""Finding and loading base models, and reading their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fedpeft.errors import ModelError
from fedpeft.models._base import fingerprint, load_base, load_tokenizer
from fedpeft.models._locate import locate
from fedpeft.models._outline import header, input_limit, outline
from fedpeft.stacking import stack
from tests.architectures import fresh_base

CLASSIFY = "sequence-classification"


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that may be damaged."""
    return Path(shutil.copytree(bert, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-novel", r"neither embedded, nor a folder.*did you mean 'tiny-novels'"),
        ("bert", r"neither embedded, nor a folder, nor a hub id \(org/name\)"),
        ("./nothing", r"no config.json in nothing or .*; give a model folder"),
        ("/a/b/c", r"no config.json in /a/b/c"),
    ],
)
def test_where_a_model_was_looked_for(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(name)


def test_places_of_a_model(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("tiny-novels").origin == "tiny-novels"
    assert locate("tiny_novels").folder == locate("tiny-novels").folder
    assert locate(str(bert)).folder == bert.resolve()
    assert locate("org/name") == type(locate("org/name"))("org/name", "org/name", None)
    monkeypatch.setenv("FEDPEFT_MODELS", str(bert.parent))
    assert locate(bert.name).folder == bert.resolve()
    monkeypatch.setenv("FEDPEFT_MODELS", str(tmp_path))
    with pytest.raises(ModelError):
        locate(bert.name)


def test_a_hub_model_that_cannot_be_had() -> None:
    """Tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(ModelError, match=r"not on this machine.*give a local folder"):
        outline("org/no-such-model", CLASSIFY, 2)
    with pytest.raises(ModelError, match=r"not on this machine.*give a local folder"):
        load_tokenizer("org/no-such-model")
    with pytest.raises(ModelError, match=r"not on this machine.*give a local folder"):
        fingerprint("org/no-such-model")


def test_a_path_means_what_it_means_now(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache by name alone would give the model of another directory, or an old one."""
    for place in ("one", "two"):
        shutil.copytree(bert, tmp_path / place / "model")
    weights = tmp_path / "two" / "model" / "model.safetensors"
    changed = {k: v + np.float32(1) for k, v in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    found = []
    for place in ("one", "two"):
        monkeypatch.chdir(tmp_path / place)
        base = load_base("./model", CLASSIFY, ("a", "b"), "cpu")
        assert load_base("./model", CLASSIFY, ("a", "b"), "cpu") is base
        found.append((fingerprint("./model"), float(base.parameter("bert.pooler.dense.bias")[0])))
    assert found[0][0] == fingerprint(str(bert)) != found[1][0]
    assert found[1][1] == found[0][1] + 1
    save_file({k: v + np.float32(1) for k, v in changed.items()}, weights, {"format": "pt"})
    again = load_base("./model", CLASSIFY, ("a", "b"), "cpu")
    assert float(again.parameter("bert.pooler.dense.bias")[0]) == found[0][1] + 2
    assert fingerprint("./model") not in {f for f, _ in found}
    load_base.cache_clear()


def test_a_base_is_frozen_float32_and_without_dropout(bert: Path) -> None:
    base = fresh_base(bert, CLASSIFY, ("no", "yes"), double=False)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    config: Any = base.model.config
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert config.pad_token_id == base.tokenizer.pad_token_id
    assert base.missing == {"classifier.weight", "classifier.bias"}
    novels = fresh_base("tiny-novels", "causal-lm", double=False)  # stored in bfloat16
    assert {p.dtype for p in novels.model.parameters()} == {torch.float32}
    assert not novels.missing


def test_a_tokenizer_without_padding_pads_with_its_end(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["pad_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="neither a pad nor an end token"):
        load_tokenizer(str(copy))
    path.write_text(json.dumps({**config, "eos_token": "[SEP]"}), encoding="utf-8")
    assert load_tokenizer(str(copy)).pad_token == "[SEP]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "impossible header length"),
        (b"\x10" + b"\0" * 7 + b"no json here....", "not a safetensors file"),
    ],
)
def test_a_damaged_file_is_named(copy: Path, content: bytes, message: str) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        outline(str(copy), CLASSIFY, 2)


def test_a_file_that_was_cut_short_is_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model.safetensors: cut short; fetch the model again"):
        header(path)
    with pytest.raises(ModelError, match="cannot load its model"):
        load_base(str(copy), CLASSIFY, ("a", "b"), "cpu")
    path.unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors; fedpeft reads safetensors"):
        outline(str(copy), CLASSIFY, 2)


def test_a_model_in_several_files_has_the_same_outline(copy: Path) -> None:
    whole = outline(str(copy), CLASSIFY, 3)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({k: tensors[k] for k in names if where[k] == file}, copy / file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (copy / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    cut = outline(str(copy), CLASSIFY, 3)
    assert dict(cut.parameters) == dict(whole.parameters)
    assert dict(cut.linear) == dict(whole.linear)


def test_a_damaged_configuration_is_named(copy: Path) -> None:
    (copy / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config.json: not JSON"):
        outline(str(copy), CLASSIFY, 2)


def test_longest_inputs() -> None:
    assert input_limit({"max_position_embeddings": 514, "model_type": "roberta"}) == 512
    assert input_limit({"max_position_embeddings": 512, "model_type": "bert"}) == 512
    assert input_limit({"n_positions": 1024}) == 1024
    assert input_limit({}) == 2**31


def test_arrays_get_the_client_dimension() -> None:
    arrays: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.float32(2),
    }
    found = stack([arrays], torch.device("cpu"))
    assert found["a"].shape == (1, 3, 2)
    assert found["b"].tolist() == [2.0]
    assert np.array_equal(found["a"][0].numpy(), arrays["a"])
