import shutil
import subprocess
import sys

import pytest
import torch
from torchvision.datasets import MNIST

from lit_threeseven import dataset
from lit_threeseven.dataset import flatten, load, prepare, raw_folder
from lit_threeseven.errors import UserError


@pytest.fixture(scope="module")
def training_set():
    return load("bundled", "", (3, 7), train=True)


def test_training_set_has_the_article_s_threes_and_sevens(training_set):
    images, y = training_set
    assert images[y[:, 0] == 1].shape == (6131, 28, 28)
    assert images[y[:, 0] == 0].shape == (6265, 28, 28)


def test_test_set_has_1010_threes_and_1028_sevens():
    images, y = load("bundled", "", (3, 7), train=False)
    assert images.shape == (2038, 28, 28)
    assert (y == 1).sum() == 1010
    assert (y == 0).sum() == 1028


def test_flattened_training_set_is_scaled_to_the_unit_interval(training_set):
    images, _ = training_set
    x = flatten(images)
    assert x.shape == (12396, 784)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(x[5], images[5].reshape(784).to(torch.float32) / 255)


def test_labels_are_one_column_of_ones_and_zeros(training_set):
    _, y = training_set
    assert y.shape == (12396, 1)
    assert y.dtype == torch.float32
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_first_digit_gets_label_1(training_set):
    _, y = training_set
    _, reversed_y = load("bundled", "", (7, 3), train=True)
    assert torch.equal(reversed_y, 1 - y)


def test_bundle_is_an_ordinary_torchvision_root():
    reference = MNIST(dataset.BUNDLED_ROOT, train=False, download=False)
    images, y = load("bundled", "", (3, 7), train=False)
    assert torch.equal(reference.data, images)
    assert torch.equal(reference.targets == 3, y[:, 0] == 1)


def test_origin_and_licence_stand_beside_the_bundle():
    text = (dataset.BUNDLED_ROOT / "README.md").read_text()
    for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert word in text


def test_any_two_digits_of_a_full_root_can_be_read(small_mnist):
    images, y = load("torchvision", small_mnist, (1, 8), train=True)
    assert images.shape == (60, 28, 28)
    assert (images[:, 2, 0] == 255).eq(y[:, 0] == 1).all()
    assert (images[:, 16, 0] == 255).eq(y[:, 0] == 0).all()


HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "bytes where its header announces"),
        ("train-images-idx3-ubyte", lambda content: content + b"x", "bytes where its header announces"),
        ("train-images-idx3-ubyte", lambda content: content[:7], "ends after 7 bytes"),
        ("train-images-idx3-ubyte", lambda content: b"", "ends after 0 bytes"),
        (
            "train-images-idx3-ubyte",
            lambda content: b"\0\0\x08\x01" + content[4:],
            "instead of the header of an IDX",
        ),
        (
            "train-images-idx3-ubyte",
            lambda content: content[:4] + bytes(4) + content[8:16],
            "instead of the header",
        ),
        ("train-images-idx3-ubyte", lambda content: HTML, "begins with b'<!DOCTYPE html"),
        ("t10k-labels-idx1-ubyte", lambda content: HTML, "begins with b'<!DOCTY"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-10] + b"\x63" * 10, "labels up to 99"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:4] + b"\0\0\0\x05" + b"\1" * 5, "holds 5 labels"),
    ],
)
def test_a_damaged_file_is_named_with_its_damage(copied_mnist, name, damage, reason):
    path = raw_folder(copied_mnist) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=reason) as error:
        load("torchvision", copied_mnist, (3, 7), train=name.startswith("train"))
    assert str(path) in str(error.value)
    assert "Delete" in str(error.value)


def test_a_bundle_that_was_tampered_with_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "bundled"
    shutil.copytree(dataset.BUNDLED_ROOT, root)
    monkeypatch.setattr(dataset, "BUNDLED_ROOT", root)
    path = raw_folder(root) / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    load("bundled", "", (3, 7), train=True)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte .*SHA-256 sum differs. Reinstall"):
        load("bundled", "", (3, 7), train=False)


def test_a_root_without_one_of_the_digits_is_refused():
    with pytest.raises(UserError, match="holds no image of the digit 1"):
        load("torchvision", dataset.BUNDLED_ROOT, (3, 1), train=True)


def test_mnist_is_downloaded_where_it_is_absent(mirror, tmp_path):
    prepare("torchvision", tmp_path / "new" / "data")
    images, _ = load("torchvision", tmp_path / "new" / "data", (1, 8), train=False)
    assert images.shape == (20, 28, 28)
    assert {path.name for path in raw_folder(tmp_path / "new" / "data").iterdir()} == set(dataset.FILES)


def test_files_that_are_there_are_not_downloaded_again(small_mnist, no_network):
    prepare("torchvision", small_mnist)
    assert load("torchvision", small_mnist, (3, 7), train=False)[0].shape == (20, 28, 28)


def test_archives_put_there_by_hand_need_no_network(mirror, no_network, tmp_path):
    raw = raw_folder(tmp_path / "data")
    shutil.copytree(mirror, raw)
    prepare("torchvision", tmp_path / "data")
    assert load("torchvision", tmp_path / "data", (3, 7), train=False)[0].shape == (20, 28, 28)


def test_without_a_network_the_sentence_names_folder_files_and_the_bundled_data(no_network, tmp_path):
    with pytest.raises(UserError, match="could not be put into") as error:
        prepare("torchvision", tmp_path / "new" / "data")
    for part in (str(raw_folder(tmp_path / "new" / "data")), *dataset.FILES, "bundled"):
        assert part in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_mirror_that_serves_a_page_leaves_nothing_behind(mirror, tmp_path):
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(HTML)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="could not be put into"):
        prepare("torchvision", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_processes_that_prepare_one_folder_at_once_do_each_other_no_harm(mirror, tmp_path):
    program = f"""
from torchvision.datasets import MNIST
MNIST.mirrors, MNIST.resources = {MNIST.mirrors!r}, {MNIST.resources!r}
from lit_threeseven.dataset import load, prepare
prepare("torchvision", "data")
assert len(load("torchvision", "data", (3, 7), train=True)[0]) == 60
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert {path.name for path in raw_folder(tmp_path / "data").iterdir()} == set(dataset.FILES)
