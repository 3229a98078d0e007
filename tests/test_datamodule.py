import pytest
import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.pixels import SparsePixels


def setup(**kwargs):
    data = ThreeSevenDataModule(**kwargs)
    data.setup()
    return data


def as_rows(images):
    return {image.numpy().tobytes() for image in images}


def test_hold_out_takes_the_same_share_of_both_digits():
    data = setup()
    assert len(data.train) == len(data.train.y) == 12396 - 1239
    assert (data.val.y == 1).sum() == round(0.1 * 6131)
    assert (data.val.y == 0).sum() == round(0.1 * 6265)


def test_training_and_held_out_images_are_all_of_the_training_set():
    data, whole = setup(), setup(val_fraction=0)
    assert as_rows(data.train.images) | as_rows(data.val.images) == as_rows(whole.train.images)
    assert len(data.train.images) + len(data.val.images) == len(whole.train.images) == 12396


def test_hold_out_depends_on_the_seed_alone():
    first, again, other = setup(), setup(), setup(seed=1)
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_without_a_hold_out_no_validation_runs():
    assert setup(val_fraction=0).val_dataloader() == []


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_an_extreme_hold_out_leaves_one_image_of_each_digit(val_fraction):
    data = setup(val_fraction=val_fraction)
    for split in (data.train, data.val):
        assert set(split.y.unique().tolist()) == {0.0, 1.0}


def test_default_is_one_batch_of_the_whole_set():
    data = setup(val_fraction=0, pixels="dense")
    ((x, y, rows),) = data.train_dataloader()
    assert x.shape == (12396, 784)
    assert y.shape == (12396, 1)
    assert rows == 12396


def test_mini_batches_are_shuffled_in_training_only():
    data = setup(batch_size=1000)
    assert [len(y) for _, y, _ in data.train_dataloader()] == [1000] * 11 + [157]
    first_trained, first_tested = (next(iter(loader)).x for loader in (data.train_dataloader(), data.test_dataloader()))
    assert not torch.equal(first_trained[0], data.train.images[0].flatten() / 255)
    assert torch.equal(first_tested, data.test.images[:1000].flatten(1) / 255)


def test_full_mnist_serves_any_two_digits(small_mnist):
    data = setup(source="torchvision", data_dir=str(small_mnist), digits=(8, 1), val_fraction=0.5)
    assert len(data.train.y) == len(data.val.y) == 30
    assert data.test.y.sum() == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "disk"}, "source must be one of bundled, torchvision, got 'disk'"),
        ({"digits": (3, 3)}, r"two different digits from 0 to 9, such as \[3, 7\], got \[3, 3\]"),
        ({"digits": (3, 10)}, r"got \[3, 10\]"),
        ({"digits": (-1, 3)}, r"got \[-1, 3\]"),
        ({"digits": (3,)}, r"got \[3\]"),
        ({"digits": (1, 3, 7)}, r"got \[1, 3, 7\]"),
        ({"digits": (1, 8)}, r"holds the digits \[3, 7\], got digits \[1, 8\]; .* torchvision"),
        ({"batch_size": 0}, "at least 1, .* got 0"),
        ({"batch_size": -5}, "at least 1, .* got -5"),
        ({"val_fraction": -0.1}, "from 0 to less than 1, got -0.1"),
        ({"val_fraction": 1}, "from 0 to less than 1, got 1"),
        ({"val_fraction": float("nan")}, "from 0 to less than 1, got nan"),
        ({"pixels": "csr"}, "pixels must be auto, dense or sparse, got 'csr'"),
        ({"seed": -1}, "from 0 to 2147483647, got -1"),
    ],
)
def test_arguments_out_of_range_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ThreeSevenDataModule(**arguments)


def test_a_batch_size_above_the_set_s_is_the_full_batch_and_says_so_once(trainer):
    data, model = ThreeSevenDataModule(batch_size=11158), LitThreeSeven()
    with pytest.warns(UserWarning, match="batch_size 11158 is more than the 11157 training images") as said:
        trainer(max_epochs=3).fit(model, data)
    assert sum("batch_size" in str(warning.message) for warning in said) == 1
    assert model.trainer.global_step == 3
    assert isinstance(next(iter(data.train_dataloader())).x, SparsePixels)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ({"batch_size": 64}, {}, "batch_size makes mini-batches"),
        ({}, {"precision": "64-true"}, "the Trainer's precision is 64-true"),
    ],
)
def test_sparse_pixels_are_refused_where_they_can_t_work_and_auto_is_dense(trainer, arguments, options, sentence):
    with pytest.raises(UserError, match=f"pixels=sparse can't work here: {sentence}.*; use pixels=auto"):
        trainer(**options).fit(LitThreeSeven(), ThreeSevenDataModule(pixels="sparse", **arguments))
    data = ThreeSevenDataModule(**arguments)
    trainer(max_epochs=1, **options).fit(LitThreeSeven(), data)
    assert isinstance(next(iter(data.train_dataloader())).x, torch.Tensor)
