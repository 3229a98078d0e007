"""A trained network shared as a folder, and read again here and by Hugging Face's mixin."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.networks import LitThreeSevenMLP

HUB = """
import sys
from huggingface_hub import PyTorchModelHubMixin
from lit_threeseven import LitThreeSeven

class Shared(PyTorchModelHubMixin, LitThreeSeven):
    pass

print(Shared.from_pretrained(sys.argv[1]).digest())
"""


@pytest.mark.parametrize("model", [LitThreeSeven(0.5, digits=(1, 8)), LitThreeSevenMLP([5, 3], gain=2.0)])
def test_a_network_comes_back_with_the_same_bits_and_arguments(model, tmp_path):
    model.save_pretrained(tmp_path / "net")
    again = type(model).from_pretrained(tmp_path / "net")
    assert again.digest() == model.digest()
    assert repr(again) == repr(model)
    assert not again.training
    assert load_file(tmp_path / "net/model.safetensors").keys() == model.state_dict().keys()


def test_the_card_tells_data_recipe_metrics_digest_and_licences(trainer, tmp_path):
    model, data, run = LitThreeSeven(), ThreeSevenDataModule(seed=5), trainer(max_epochs=7)
    run.fit(model, data)
    (found,) = run.test(model, data, verbose=False)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    accuracy = f"| test/accuracy | {found['test/accuracy']:.4f} |"
    for row in (model.digest(), "| steps | 7 |", "| data.seed | 5 |", "| model.lr | 1.0 |", accuracy):
        assert row in card
    assert "CC BY-SA 3.0" in card
    assert "license: apache-2.0" in card


def test_the_command_writes_a_card_of_a_run_s_checkpoint(cli):
    cli("fit", "--trainer.max_epochs", "20")
    code, output, error = cli("export", "best", "--to", "safetensors", "--out", "shared")
    assert (code, error) == (0, "")
    assert "are the network's, to the last bit" in output
    card = (cli.folder / "shared/README.md").read_text()
    for row in ("| steps | 20 |", "| optimizer | GradientDescent |", "| of 2,038 test images right | 97."):
        assert row in card


def test_another_class_s_folder_and_damaged_ones_are_refused(tmp_path):
    model = LitThreeSeven()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is of lit_threeseven\.module\.LitThreeSeven, not .*LitThreeSevenMLP"):
        LitThreeSevenMLP.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for W, sentence in ((torch.zeros(3, 1), r"W \(3, 1\)"), (torch.full((784, 1), float("inf")), "not finite")):
        save_file({"W": W, "b": torch.zeros(1)}, weights)
        with pytest.raises(UserError, match=sentence):
            LitThreeSeven.from_pretrained(tmp_path)
    weights.write_bytes(content[:1000])
    with pytest.raises(UserError, match="damaged"):
        LitThreeSeven.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError):
        LitThreeSeven.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        LitThreeSeven.from_pretrained(tmp_path / "nowhere")


@pytest.mark.slow
def test_hugging_face_s_mixin_reads_the_folder(tmp_path):
    import subprocess
    import sys

    model = LitThreeSeven(0.5)
    model.save_pretrained(tmp_path)
    result = subprocess.run([sys.executable, "-c", HUB, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == model.digest(), result.stderr
