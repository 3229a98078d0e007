import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import functional

from lit_threeseven import ThreeSevenDataModule
from lit_threeseven.augment import affine
from lit_threeseven.batches import Batches

IMAGES = ThreeSevenDataModule().train_dataloader().dataset.tensors[0][:20]
CHANGE = partial(affine, rotation=20, zoom=0.2, shift=3)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values).expand(len(IMAGES), 5)


@pytest.mark.parametrize(
    ("limits", "values", "expected"),
    [
        ({}, (1, 1, 1, 1, 1), IMAGES),
        ({"shift": 3}, (0, 0, 0, 1, 0), torch.nn.functional.pad(IMAGES, (3, 0))[..., :28]),
        ({"shift": 2}, (0, 0, 0, 0, -1), torch.nn.functional.pad(IMAGES, (0, 0, 0, 2))[:, 2:]),
        ({"rotation": 90}, (1, 0, 0, 0, 0), IMAGES.rot90(-1, (1, 2))),
        ({"rotation": 180}, (-1, 0, 0, 0, 0), IMAGES.rot90(2, (1, 2))),
    ],
)
def test_images_are_moved_and_turned_by_as_much_as_it_says(limits, values, expected):
    assert (affine(IMAGES, numbers(*values), **limits).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("angle", "zoom", "shift"), [(15, 1.1, (1.5, -2)), (-8, 0.85, (0, 1)), (0, 1.2, (0, 0))])
def test_images_are_those_of_torchvision_s_affine_change(angle, zoom, shift):
    z = (zoom - 1) / 0.2
    ours = affine(IMAGES, numbers(angle / 20, z, z, shift[0] / 2, shift[1] / 2), rotation=20, zoom=0.2, shift=2)
    # torchvision zooms before it turns, which is the same where both sides grow alike
    theirs = functional.affine_image(
        IMAGES.unsqueeze(1).float(), angle, list(shift), zoom, [0.0], functional.InterpolationMode.BILINEAR
    )
    assert (ours - theirs.squeeze(1)).abs().max() <= 1


def test_width_and_height_change_each_on_its_own():
    wide, high = (affine(IMAGES, numbers(0, *part, 0, 0), zoom=0.1).float().sum((1, 2)) for part in ((1, 0), (0, 1)))
    whole = IMAGES.float().sum((1, 2))
    assert (wide / whole).mean() == pytest.approx(1.1, abs=0.01)
    assert (high / whole).mean() == pytest.approx(1.1, abs=0.01)
    assert not torch.equal(wide, high)


def batches(world_size: int, epochs: int = 1, **options) -> list[list[torch.Tensor]]:
    """The pixels of each global batch of each epoch, put together from the shares."""
    data = TensorDataset(IMAGES, torch.zeros(len(IMAGES), 1))
    loaders = [Batches(data, share=(r, world_size), change=CHANGE, **options) for r in range(world_size)]
    return [[torch.cat([share.x for share in shares]) for shares in zip(*loaders, strict=True)] for _ in range(epochs)]


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("world_size", [2, 3, 30])
def test_changes_are_the_same_on_any_number_of_processes(world_size, batch_size):
    (one,), (several,) = (batches(n, batch_size=batch_size, shuffle=True) for n in (1, world_size))
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize("batch_size", [None, 20, 5])
def test_each_epoch_and_each_batch_has_its_own_changes(batch_size):
    first, second = batches(1, epochs=2, batch_size=batch_size)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    data = TensorDataset(IMAGES[:1].repeat(6, 1, 1), torch.zeros(6, 1))
    rows = torch.cat([batch.x for batch in Batches(data, 3, change=CHANGE)])
    assert len(rows.unique(dim=0)) == 6


def test_changes_are_not_drawn_from_the_numbers_of_the_order():
    order = np.random.default_rng((0, 0)).random(5)
    seen = []
    data = TensorDataset(IMAGES, torch.zeros(len(IMAGES), 1))
    list(Batches(data, change=lambda images, numbers: seen.append(numbers) or images))
    assert not np.allclose(seen[0][0].numpy(), order * 2 - 1)
    assert -1 <= seen[0].min() < -0.9 < 0.9 < seen[0].max() <= 1


def test_only_training_images_are_changed_and_none_of_a_few_to_overfit(trainer):
    data = ThreeSevenDataModule(rotation=15, batch_size=100)
    plain = ThreeSevenDataModule(batch_size=100)
    for loader in ("val_dataloader", "test_dataloader"):
        assert torch.equal(next(iter(getattr(data, loader)())).x, next(iter(getattr(plain, loader)())).x)
    changed, unchanged = (next(iter(module.train_dataloader())) for module in (data, plain))
    assert torch.equal(changed.rows, unchanged.rows)
    assert not torch.equal(changed.x, unchanged.x)
    data.trainer = trainer(overfit_batches=2)
    assert data.train_dataloader().change is None


@pytest.mark.parametrize("bad", [{"rotation": -1}, {"rotation": math.nan}, {"zoom": 1}, {"shift": 29}])
def test_limits_out_of_range_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be from 0 to .*, got {value}"):
        ThreeSevenDataModule(**bad)
