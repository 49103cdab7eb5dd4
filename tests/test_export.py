"""A trained network as a file: what it holds, that it predicts the same, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from study import made_cache

from lt_core import cli, export
from lt_core.cache import load_cache
from lt_core.checks import CacheError, InputError
from lt_core.classifiers import CLASSIFIERS, build, predict, prediction, rows
from lt_core.data.augmentation import to_pixels
from lt_core.data.datasets import load_dataset
from lt_core.models import build_backbone

STORED = [
    name for name in CLASSIFIERS if name not in ("dot_product", "causal_norm", "tau_norm", *export.NOT_ROWS)
]
OF_ROWS = [name for name in STORED if name.endswith("_head") or name in ("lws", "crt", "balms")]


@pytest.mark.parametrize("name", [name for name in STORED if name not in OF_ROWS])
def test_every_classifier_of_rows_predicts_the_same(name):
    cache = made_cache("sqrt", 0)
    setting = CLASSIFIERS[name].settings[-1]
    logits = build(cache, name, **setting)(cache.features("test"))
    found = export.rows_of(cache, name, setting)(cache.features("test"))
    torch.testing.assert_close(found.log_softmax(1), logits.log_softmax(1).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OF_ROWS)
def test_every_head_that_is_trained_predicts_the_same(name):
    cache = made_cache("sqrt", 0)
    setting = CLASSIFIERS[name].settings[0]
    logits = build(cache, name, **setting)(cache.features("test"))
    found = export.rows_of(cache, name, setting)(cache.features("test"))
    torch.testing.assert_close(found.log_softmax(1), logits.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_what_is_not_of_this_form_is_refused():
    cache = made_cache("sqrt", 0)
    for name in export.NOT_ROWS:
        with pytest.raises(InputError, match=f"{name} of sqrt cannot be stored"):
            export.rows_of(cache, name, {})
    dot = made_cache("uniform_dot", 0)
    with pytest.raises(InputError, match="cannot be stored"):
        export.rows_of(dot, "dot_product", {})
    assert (
        export.rows_of(dot, "wh20", {})(dot.features("test")).argmax(1).numpy() == predict(dot, "wh20")
    ).all()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The exported `sqrt` and `imagenet_frozen` of the digits, and the folder that they were trained into."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LT_OUTPUT_ROOT", str(folder))
        for name in ("sqrt", "imagenet_frozen"):
            words = ["--profile", "digits", "--backbone", name]
            assert cli.main(["train", *words]) == 0
            assert cli.main(["export", *words, "--out", str(folder / name)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqrt", "imagenet_frozen"])
def test_a_loaded_model_predicts_what_the_cache_says(digits, name):
    model = export.load_model(digits / name)
    cache = load_cache(digits / "caches" / "digits" / name / "seed0")
    pixels = to_pixels(load_dataset("digits").splits["test"].images)
    found = model(pixels).argmax(1).numpy()
    assert (found == predict(cache, "ensemble")).mean() > 0.98  # the cache rounds features to eight bits
    assert model.class_names[3] == "three" and model.config["network"] == "digits_net"


@pytest.mark.slow
def test_the_file_holds_what_the_module_says(digits):
    state = load_file(digits / "sqrt" / "model.safetensors")
    network = {f"backbone.{name}" for name in build_backbone("digits_net").state_dict()}
    own = {"classifier.weight", "classifier.scale", "prototypes", "counts", "rows", "scales", "offsets"}
    assert state.keys() == network | own | {"hybrid.0", "hybrid.20", "hybrid.100"}
    assert torch.equal(state["rows"], torch.stack([state[f"hybrid.{k}"] for k in (0, 20, 100)]))
    config = json.loads((digits / "sqrt" / "config.json").read_text())
    assert config["mean"] == [78.0] and config["std"] == [96.0] and config["input_size"] == 8


@pytest.mark.slow
def test_a_damaged_model_is_refused(digits, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((digits / "sqrt" / name).read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CacheError, match="does not have the hash"):
        export.load_model(tmp_path)
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert export.load_model(tmp_path).class_names[3] == "three"
    config = (tmp_path / "config.json").read_text()
    for change in (("three", "eight"), ("78.0", "18.0"), ("sha256", "sha257")):
        (tmp_path / "config.json").write_text(config.replace(*change))
        with pytest.raises(CacheError):
            export.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    with pytest.raises(CacheError, match="has format version 1, not 2"):
        export.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 2}')
    with pytest.raises(CacheError, match="whole exported model"):
        export.load_model(tmp_path)
    with pytest.raises(CacheError, match="there is no exported model"):
        export.load_model(tmp_path / "nowhere")


def test_without_a_network_it_takes_features(tmp_path):
    cache = made_cache("sqrt", 0)
    found = prediction(cache, "logit_adjustment")
    export.save_model(tmp_path, cache, None, "features", 0, "logit_adjustment", found.setting)
    model = export.load_model(tmp_path)
    assert (model(cache.features("test")).argmax(1).numpy() == found.classes).all()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["hybrid.20"], rows(cache, "wh20")[0])


def test_a_cache_of_fewer_dimensions_is_refused(tmp_path):
    with pytest.raises(InputError, match="keeps 8 of 64 feature dimensions"):
        export.save_model(tmp_path, made_cache("sqrt", 0), build_backbone("digits_net"), "digits_net", 8)
