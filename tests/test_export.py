"""Trained networks in other programs: ONNX, torch.export, and pages of other networks."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from lit_threeseven import LitThreeSeven, dataset
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import export
from lit_threeseven.weights import PRETRAINED

NETWORKS = [LitThreeSeven, LitThreeSevenMLP]


@pytest.fixture(scope="module")
def test_set():
    return dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)


def probabilities(model, x):
    with torch.no_grad():
        return model(x).numpy()


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_gives_the_network_s_probabilities_for_any_batch_size(network, cli, test_set, tmp_path):
    file = tmp_path / "model.onnx"
    code, output, _ = cli("export", PRETRAINED / f"{network.__name__}.ckpt", "--to", "onnx", "--out", file)
    assert code == 0
    assert re.search(
        r"probabilities of 2,038 test images are the network's, (within \de-0[78]|to the last bit)", output
    )
    session = onnxruntime.InferenceSession(file)
    assert [(put.name, put.shape, put.type) for put in session.get_inputs()] == [
        ("pixels", ["N", 784], "tensor(float)")
    ]
    assert [put.name for put in session.get_outputs()] == ["probability"]
    assert session.get_modelmeta().custom_metadata_map["digits"] == "[3, 7]"
    assert b"site-packages" not in file.read_bytes()
    x = test_set[0].flatten(1).float() / 255
    for part in (x[:1], x[:7], x):
        (found,) = session.run(None, {"pixels": part.numpy()})
        assert np.abs(found - probabilities(network.from_pretrained(), part)).max() <= 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_export_gives_the_network_s_probabilities_for_any_batch_size(network, cli, test_set, tmp_path):
    file = tmp_path / "model.pt2"
    code, _, _ = cli("export", PRETRAINED / f"{network.__name__}.ckpt", "--to", "torch-export", "--out", file)
    assert code == 0
    extra = {"digits": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["digits"]) == [3, 7]
    assert b"site-packages" not in file.read_bytes()
    x = test_set[0].flatten(1).float() / 255
    for part in (x[:1], x[:7], x):
        assert np.abs(program(part).detach().numpy() - probabilities(network.from_pretrained(), part)).max() <= 1e-6


def test_a_file_that_differs_from_the_network_is_not_kept(test_set, tmp_path, monkeypatch):
    def wrong(model, path, *_):
        path.write_text("wrong")
        return lambda x: model(x) + 2e-6

    monkeypatch.setitem(export.FORMATS, "onnx", wrong)
    with pytest.raises(ValueError, match=r"onnx file differs from the network by [12].\de-06, more than 1e-06"):
        export.export(LitThreeSeven.from_pretrained(), tmp_path / "model.onnx", "onnx", *test_set, test_set[0])
    monkeypatch.setitem(export.FORMATS, "onnx", lambda model, path, *_: path.touch() or (lambda x: x * float("nan")))
    with pytest.raises(ValueError, match="differs from the network"):
        export.export(LitThreeSeven.from_pretrained(), tmp_path / "model.onnx", "onnx", *test_set, test_set[0])
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_an_export_end_with_a_sentence(cli, tmp_path, monkeypatch):
    Path("text.ckpt").write_text("hello")
    for arguments, sentence in {
        ("none.ckpt", "--to", "onnx"): "There is no checkpoint file none.ckpt",
        ("text.ckpt", "--to", "onnx"): "text.ckpt is not a lit-threeseven checkpoint",
        ("pretrained", "--to", "torch-export", "--out", "/proc/x.pt2"): "/proc",
        (PRETRAINED / "LitThreeSevenMLP.ckpt", "--to", "html"): "The page would have 2,5.. KB, at most 300 are allowed",
    }.items():
        code, _, error = cli("export", *arguments)
        assert code == 1
        assert re.search(rf"lit-threeseven: error: .*{sentence}", error)
        assert "\n" not in error
    monkeypatch.setitem(export.FORMATS, "html", lambda *_: __import__("not_installed_here"))
    code, _, error = cli("export", "pretrained", "--to", "html")
    assert (code, "pip install 'lit_threeseven[export]'" in error) == (1, True)
    assert [path.name for path in Path().iterdir()] == ["text.ckpt"]


def test_networks_of_other_digits_are_exported_with_their_own_test_set(cli, small_mnist):
    data = ["--data.source", "torchvision", "--data.data_dir", str(small_mnist), "--data.digits", "[1, 8]"]
    cli("fit", *data, "--trainer.max_epochs", "2", "--run", "other")
    code, output, error = cli("export", "logs/other/checkpoints/best.ckpt", "--to", "html")
    assert code == 1
    assert "The bundle holds the digits (3, 7)" in error
    code, output, error = cli("export", "logs/other/checkpoints/best.ckpt", "--to", "html", "--data_dir", small_mnist)
    assert code == 0
    assert "of 20 test images" in output
    assert '"digits": [1, 8]' in Path("best.html").read_text("utf-8")
