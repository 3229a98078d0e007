from pathlib import Path
from typing import Any

import pytest
import torch
from build_bundle import idx_bytes
from torch import Tensor

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset
from lit_threeseven.datamodule import takes_bytes
from lit_threeseven.networks import LitThreeSevenMLP


def setup(**kwargs: Any) -> ThreeSevenDataModule:
    data = ThreeSevenDataModule(**kwargs)
    data.setup()
    return data


def as_rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_hold_out_takes_the_same_fraction_of_both_digits():
    data = setup()
    assert len(data.train) == 12396 - 1239
    _, y = data.val.tensors
    assert (y == 1).sum() == round(0.1 * 6131)
    assert (y == 0).sum() == round(0.1 * 6265)


def test_training_and_held_out_images_are_all_of_the_training_set():
    data, whole = setup(), setup(val_fraction=0)
    assert as_rows(data.train.tensors[0]) | as_rows(data.val.tensors[0]) == as_rows(whole.train.tensors[0])
    assert len(data.train) + len(data.val) == len(whole.train) == 12396


def test_hold_out_depends_on_the_seed_alone():
    first, again, other = setup(), setup(), setup(seed=1)
    assert torch.equal(first.val.tensors[0], again.val.tensors[0])
    assert not torch.equal(first.val.tensors[0], other.val.tensors[0])


def test_without_a_hold_out_the_validation_loader_is_empty():
    assert setup(val_fraction=0).val_dataloader() == []


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_an_extreme_hold_out_leaves_one_image_of_each_digit(val_fraction):
    data = setup(val_fraction=val_fraction)
    for split in (data.train, data.val):
        assert set(split.tensors[1].unique().tolist()) == {0.0, 1.0}


def test_default_is_one_batch_of_the_whole_set():
    data = setup(val_fraction=0)
    ((x, y),) = data.train_dataloader()
    assert x.shape == (12396, 784)
    assert y.shape == (12396, 1)


def test_mini_batches_are_shuffled_in_training_only():
    data = setup(batch_size=1000)
    assert [len(y) for _, y in data.train_dataloader()] == [1000] * 11 + [157]
    first_trained, first_tested = (next(iter(loader)).x for loader in (data.train_dataloader(), data.test_dataloader()))
    assert not torch.equal(first_trained[0], data.train.tensors[0][0].flatten() / 255)
    assert torch.equal(first_tested, data.test.tensors[0][:1000].flatten(1) / 255)


def test_full_mnist_serves_any_two_digits(small_mnist):
    data = setup(source="torchvision", data_dir=str(small_mnist), digits=(8, 1), val_fraction=0.5)
    assert len(data.train) == len(data.val) == 30
    assert data.test.tensors[1].sum() == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "disk"}, "source must be bundled or torchvision, got 'disk'"),
        ({"digits": (3, 3)}, r"two different digits from 0 to 9, such as \(3, 7\), got \(3, 3\)"),
        ({"digits": (3, 10)}, r"got \(3, 10\)"),
        ({"digits": (-1, 3)}, r"got \(-1, 3\)"),
        ({"digits": (3,)}, r"got \(3,\)"),
        ({"digits": (1, 3, 7)}, r"got \(1, 3, 7\)"),
        ({"digits": (1, 8)}, r"holds the digits \(3, 7\), not \(1, 8\); .* source=.torchvision."),
        ({"data_dir": "/data"}, 'data_dir="/data" is not used by the bundled data; use source="torchvision"'),
        ({"batch_size": 0}, "at least 1, .* got 0"),
        ({"batch_size": -5}, "at least 1, .* got -5"),
        ({"val_fraction": -0.1}, "from 0 to less than 1, got -0.1"),
        ({"val_fraction": 1}, "from 0 to less than 1, got 1"),
        ({"val_fraction": float("nan")}, "from 0 to less than 1, got nan"),
        ({"seed": -1}, "from 0 to 2147483647, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ThreeSevenDataModule(**arguments)


def test_a_batch_size_larger_than_the_training_set_is_a_full_batch_with_one_warning(trainer):
    data, model = ThreeSevenDataModule(batch_size=11158), LitThreeSeven()
    with pytest.warns(UserWarning, match="batch_size=11158 exceeds the 11157 training images") as said:
        trainer(max_epochs=3).fit(model, data)
    assert sum("batch_size" in str(warning.message) for warning in said) == 1
    assert model.trainer.global_step == 3
    assert len(data.train_dataloader()) == 1


class Inherits(LitThreeSeven):
    """Overrides nothing that sees pixels."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class OwnForward(LitThreeSeven):
    """Says nothing of bytes."""

    def forward(self, x):
        return super().forward(x)


class OwnForwardOfBytes(OwnForward):
    takes_bytes = True

    def forward(self, x):
        return super().forward(x)


class AnotherParameter(OwnForwardOfBytes):
    """`linear` would not add up the gradient of its temperature over processes."""

    takes_bytes = True

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.sigmoid(self.logits(x) / self.temperature)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (LitThreeSeven, True),
        (AnotherParameter, False),
        (Inherits, True),
        (OwnForward, False),
        (OwnForwardOfBytes, True),
        (LitThreeSevenMLP, False),
    ],
)
def test_only_a_class_that_says_so_gets_bytes_in_its_own_methods(network, expected, trainer):
    model, data = network(), ThreeSevenDataModule()
    assert takes_bytes(model) == expected
    trainer(max_epochs=1).fit(model, data)
    assert next(iter(data.train_dataloader())).x.dtype == (torch.uint8 if expected else torch.float32)


def test_a_network_in_another_precision_gets_floats(trainer):
    data = ThreeSevenDataModule()
    trainer(max_epochs=1, precision="64-true").fit(LitThreeSeven(), data)
    assert next(iter(data.train_dataloader())).x.dtype == torch.float32


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        ("train_dataloader", 11157),
        ("val_dataloader", 1239),
        ("test_dataloader", 2038),
        ("predict_dataloader", 2038),
    ],
)
def test_a_loader_works_without_a_call_to_setup(loader, rows):
    data = ThreeSevenDataModule(batch_size=1000)
    assert sum(len(y) for _, y in getattr(data, loader)()) == rows


def test_setup_reads_what_a_stage_needs():
    data = ThreeSevenDataModule()
    data.setup("test")
    assert not hasattr(data, "train")
    assert len(data.test) == 2038


@pytest.fixture
def one_of_each(tmp_path: Path) -> Path:
    """An MNIST root with one training image and one test image of a three and of a seven."""
    raw = dataset.raw_folder(tmp_path)
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(torch.zeros(2, 28, 28).byte()))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor([3, 7]).byte()))
    return tmp_path


def test_one_image_of_each_digit_is_too_few_to_hold_one_out(one_of_each):
    data = ThreeSevenDataModule(source="torchvision", data_dir=str(one_of_each))
    with pytest.raises(ValueError, match=r"val_fraction=0.1 needs two training images of each digit; use 0"):
        data.setup()


def test_one_image_of_each_digit_trains_without_a_hold_out(one_of_each, trainer):
    data = ThreeSevenDataModule(source="torchvision", data_dir=str(one_of_each), val_fraction=0)
    run = trainer()
    run.fit(LitThreeSeven(), data)
    assert run.global_step == 3


def test_images_of_other_digits_than_the_network_s_are_refused(trainer, small_mnist):
    model = LitThreeSeven()
    start = model.W.clone()
    data = ThreeSevenDataModule(digits=(1, 8), source="torchvision", data_dir=small_mnist)
    with pytest.raises(ValueError, match=r"digits=\(1, 8\), and the network digits=\(3, 7\); make them the same"):
        trainer().fit(model, data)
    assert torch.equal(model.W, start)


def test_digits_in_the_reverse_order_are_refused(trainer):
    with pytest.raises(ValueError, match=r"digits=\(7, 3\), and the network digits=\(3, 7\)"):
        trainer().test(LitThreeSeven(), ThreeSevenDataModule(digits=(7, 3)))
