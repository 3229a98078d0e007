import shutil
import socketserver
import threading
from pathlib import Path

import pytest
import torch
from processes import CONTEXT
from torchvision.datasets import MNIST

from lit_threeseven import dataset
from lit_threeseven.dataset import load, raw_folder
from lit_threeseven.download import download
from lit_threeseven.errors import UserError


@pytest.fixture(scope="module")
def training_set():
    return load(dataset.BUNDLED_ROOT, (3, 7), train=True)


def test_training_set_has_the_article_s_threes_and_sevens(training_set):
    images, y = training_set
    assert images[y[:, 0] == 1].shape == (6131, 28, 28)
    assert images[y[:, 0] == 0].shape == (6265, 28, 28)


def test_test_set_has_1010_threes_and_1028_sevens():
    images, y = load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    assert images.shape == (2038, 28, 28)
    assert (y == 1).sum() == 1010
    assert (y == 0).sum() == 1028


def test_labels_are_one_column_of_ones_and_zeros(training_set):
    _, y = training_set
    assert y.shape == (12396, 1)
    assert y.dtype == torch.float32
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_first_digit_gets_label_1(training_set):
    _, y = training_set
    _, reversed_y = load(dataset.BUNDLED_ROOT, (7, 3), train=True)
    assert torch.equal(reversed_y, 1 - y)


def test_bundle_is_an_ordinary_torchvision_root():
    reference = MNIST(dataset.BUNDLED_ROOT, train=False, download=False)
    images, y = load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    assert torch.equal(reference.data, images)
    assert torch.equal(reference.targets == 3, y[:, 0] == 1)


def test_origin_and_licence_stand_beside_the_bundle():
    text = (dataset.BUNDLED_ROOT / "README.md").read_text()
    for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert word in text


def test_any_two_digits_of_a_full_root_can_be_read(small_mnist):
    images, y = load(small_mnist, (1, 8), train=True)
    assert images.shape == (60, 28, 28)
    assert (images[:, 2, 0] == 255).eq(y[:, 0] == 1).all()
    assert (images[:, 16, 0] == 255).eq(y[:, 0] == 0).all()


HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: content + b"x", "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: content[:7], "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: b"", "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: b"\0\0\x08\x01" + content[4:], "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: content[:4] + bytes(4) + content[8:16], "not an intact MNIST file"),
        ("train-images-idx3-ubyte", lambda content: HTML, "not an intact MNIST file"),
        ("train-images-idx3-ubyte", None, "No such file"),
        ("t10k-images-idx3-ubyte", lambda content: content[:11] + b"\x0e\0\0\0\x38" + content[16:], r"\(100, 14, 56\)"),
        ("t10k-labels-idx1-ubyte", lambda content: HTML, "not an intact MNIST file"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-10] + b"\x63" * 10, "labels up to 99"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:4] + b"\0\0\0\x05" + b"\1" * 5, "has 5 labels"),
    ],
)
def test_a_damaged_file_is_named_with_its_damage(copied_mnist, name, damage, reason):
    path = raw_folder(copied_mnist) / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=reason) as error:
        load(copied_mnist, (3, 7), train=name.startswith("train"))
    assert str(path.parent) in str(error.value)
    assert path.name in str(error.value)
    assert "Delete" in str(error.value)


def test_a_bundle_that_was_tampered_with_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "bundled"
    shutil.copytree(dataset.BUNDLED_ROOT, root)
    monkeypatch.setattr(dataset, "BUNDLED_ROOT", root)
    path = raw_folder(root) / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    load(dataset.BUNDLED_ROOT, (3, 7), train=True)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte .*SHA-256 sum differs.* Reinstall"):
        load(dataset.BUNDLED_ROOT, (3, 7), train=False)


def test_a_root_without_one_of_the_digits_is_refused():
    with pytest.raises(UserError, match="has no image of the digit 1"):
        load(dataset.BUNDLED_ROOT, (3, 1), train=True)


def test_mnist_is_downloaded_where_it_is_absent(mirror, tmp_path):
    download(tmp_path / "new" / "data")
    images, _ = load(tmp_path / "new" / "data", (1, 8), train=False)
    assert images.shape == (20, 28, 28)
    assert {path.name for path in raw_folder(tmp_path / "new" / "data").iterdir()} == set(dataset.FILES)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_files_that_are_there_are_not_downloaded_again(small_mnist, no_network):
    download(small_mnist)
    assert load(small_mnist, (3, 7), train=False)[0].shape == (20, 28, 28)


def test_archives_put_there_by_hand_need_no_network(mirror, no_network, tmp_path):
    raw = raw_folder(tmp_path / "data")
    shutil.copytree(mirror, raw)
    download(tmp_path / "data")
    assert load(tmp_path / "data", (3, 7), train=False)[0].shape == (20, 28, 28)


def test_without_a_network_the_sentence_names_folder_files_and_the_bundled_data(no_network, tmp_path):
    with pytest.raises(UserError, match="could not be downloaded to") as error:
        download(tmp_path / "new" / "data")
    for part in (str(raw_folder(tmp_path / "new" / "data")), *dataset.FILES, "bundled"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_serves_a_page_leaves_nothing_behind(mirror, tmp_path):
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(HTML)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="could not be downloaded to"):
        download(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_mirror_that_does_not_speak_http_leaves_a_sentence_and_nothing_else(tmp_path, monkeypatch):
    class Garbage(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"\x00\xff\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        with pytest.raises(UserError, match=r"could not be downloaded to \S+ \(.+\)\. Put its four files") as error:
            download(tmp_path / "data")
        server.shutdown()
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"), [(ConnectionResetError(), "ConnectionResetError"), (OSError("a\nb\n"), "b")]
)
def test_a_failed_download_is_reported_in_a_sentence(tmp_path, monkeypatch, error, reason):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(UserError, match=rf"could not be downloaded to \S+ \({reason}\)\. Put"):
        download(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(small_mnist, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    download("~/mnist")
    assert load("~/mnist", (3, 7), train=False)[0].shape == (20, 28, 28)
    assert (tmp_path / "mnist").is_dir()
    assert not (tmp_path / "~").exists()


def prepare_and_load(mirrors: list[str], resources: list[tuple[str, str]], root: Path) -> None:
    MNIST.mirrors, MNIST.resources = mirrors, resources
    download(root)
    assert len(load(root, (3, 7), train=True)[0]) == 60


@pytest.mark.slow
def test_processes_that_prepare_one_folder_at_once_do_each_other_no_harm(mirror, tmp_path):
    arguments = (MNIST.mirrors, MNIST.resources, tmp_path / "data")
    processes = [CONTEXT.Process(target=prepare_and_load, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {path.name for path in raw_folder(tmp_path / "data").iterdir()} == set(dataset.FILES)
