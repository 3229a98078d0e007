"""The parts by themselves: the data with any network, the network with any data, with and without Lightning."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import BATCH_SIZES, NETWORKS, by_hand, cnn, fabric_loop, fit, linear, tensor_loader, trained
from processes import free_port
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.batches import Batches
from lit_threeseven.functional import mean_squared_error

PROJECT = Path(__file__).parents[1]
PROCESSES = 3
ROWS = 11157  # of the training part
DATA_EXAMPLE, TRAINER_EXAMPLE, LOOP_EXAMPLE = range(3)


def run(command: list[str], folder: Path) -> str:
    """What a program that starts processes prints; they end with it."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.terminate()
    # torch's gloo threads now and then abort a process at its very end, when all is done and printed
    assert process.returncode == 0 or "terminate called without an active exception" in errors, errors
    return output


@pytest.fixture(scope="module")
def on_three_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What networks.py found, by rank."""
    folder = tmp_path_factory.mktemp("three")
    run([networks.__file__, str(PROCESSES), "results.pt"], folder)
    return torch.load(folder / "results.pt", weights_only=True)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same weights within 3e-6 of the largest: far less than a gradient that is slightly off would leave."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 3e-6 * weight.abs().max()


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_subclass_trains_with_the_gradient_of_its_own_loss(network, batch_size):
    assert_close(trained(network, batch_size), by_hand(network, batch_size))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_subclass_trains_with_the_gradient_of_its_own_loss_on_three_processes(
    on_three_processes, network, batch_size
):
    expected = by_hand(network, batch_size, PROCESSES)
    for results in on_three_processes:
        assert_close(results[f"{network.__name__} {batch_size}"], expected)


def test_a_frozen_parameter_stays_where_it_started():
    torch.manual_seed(0)
    start = networks.FrozenBias()
    end = trained(networks.FrozenBias, None)
    assert torch.equal(end["b"], start.b)
    assert not torch.equal(end["W"], start.W)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("stranger", [linear, cnn])
def test_any_network_trains_on_the_data(stranger, batch_size):
    model = stranger()
    fit(model, ThreeSevenDataModule(batch_size=batch_size), max_epochs=5)
    assert model.rows == 5 * ROWS
    assert model.losses[-1] < model.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("stranger", [linear, cnn])
def test_any_network_trains_on_the_data_on_three_processes(on_three_processes, stranger, batch_size):
    shares = [results[f"{stranger.__name__} {batch_size}"] for results in on_three_processes]
    assert sum(share["rows"] for share in shares) == 2 * ROWS
    assert all(share["losses"][-1] < share["losses"][0] for share in shares)


def test_a_plain_loop_trains_on_the_data_without_a_trainer_and_without_setup():
    model = nn.Linear(784, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = ThreeSevenDataModule(batch_size=64)
    rows = 0
    for x, y in data.train_dataloader():
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()
        rows += len(y)
    assert rows == ROWS
    for loader in (data.val_dataloader(), data.test_dataloader()):
        right = sum(((model(x) > 0) == y).sum().item() for x, y in loader)
        assert right > 0.95 * sum(len(y) for _, y in loader)


def fabric_by_hand() -> Tensor:
    """What `fabric_loop` computes, without Fabric."""
    torch.manual_seed(0)
    model = nn.Linear(784, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = ThreeSevenDataModule(batch_size=1000).train_dataloader()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            mean_squared_error(torch.sigmoid(model(x)), y).backward()
            optimizer.step()
    return model.weight.detach()


def test_fabric_takes_the_loaders():
    results = fabric_loop()
    assert results["rows"] == 2 * ROWS
    torch.testing.assert_close(results["weight"], fabric_by_hand())


@pytest.mark.slow
def test_fabric_takes_the_loaders_on_three_processes(on_three_processes):
    shares = [results["fabric"] for results in on_three_processes]
    assert sum(share["rows"] for share in shares) == 2 * ROWS
    torch.testing.assert_close(shares[0]["weight"], fabric_by_hand())


def tensors_by_hand(batches: list[list[int]]) -> dict[str, Tensor]:
    """LitThreeSeven after gradient descent on these rows of `tensor_loader`, one list a step."""
    torch.manual_seed(0)
    model = LitThreeSeven()
    x, y = tensor_loader().dataset.tensors
    for rows in batches:
        model.zero_grad()
        ((model(x[rows]) - y[rows]) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
    return model.state_dict()


TWO_EPOCHS = [list(range(i, i + 500)) for i in range(0, 3000, 500)] * 2


def test_the_network_trains_on_a_plain_dataloader():
    torch.manual_seed(0)
    model = LitThreeSeven()
    fit(model, tensor_loader())
    assert_close(model.state_dict(), tensors_by_hand(TWO_EPOCHS))


@pytest.mark.slow
def test_processes_with_the_same_batches_end_where_one_does(on_three_processes):
    expected = tensors_by_hand(TWO_EPOCHS)
    for results in on_three_processes:
        assert_close(results["tensors False"], expected)


@pytest.mark.slow
def test_lightning_s_distributed_sampler_shares_a_plain_dataloader(on_three_processes):
    dataset = tensor_loader().dataset
    batches = []
    for epoch in range(2):
        samplers = [DistributedSampler(dataset, PROCESSES, rank, seed=0) for rank in range(PROCESSES)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        batches += [[row for order in orders for row in order[i : i + 500]] for i in range(0, 1000, 500)]
    expected = tensors_by_hand(batches)
    for results in on_three_processes:
        assert_close(results["tensors True"], expected)


def first_batches(loader: Batches, passes: int) -> list[Tensor]:
    return [next(iter(loader)).x for _ in range(passes)]


def test_each_pass_over_a_loader_is_an_epoch_with_its_own_order():
    data = ThreeSevenDataModule(batch_size=64)
    first, second = first_batches(data.train_dataloader(), 2)
    again = first_batches(data.train_dataloader(), 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_set_epoch_chooses_the_order_of_an_epoch():
    loader = ThreeSevenDataModule(batch_size=64).train_dataloader()
    epochs = first_batches(loader, 3)
    for epoch in (2, 0, 1):
        loader.sampler.set_epoch(epoch)
        assert torch.equal(first_batches(loader, 1)[0], epochs[epoch])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, PROCESSES])
def test_overfit_batches_repeats_the_same_two_batches_and_fits_them(on_three_processes, devices):
    if devices == 1:
        model = linear()
        fit(model, ThreeSevenDataModule(batch_size=64), overfit_batches=2, max_epochs=60)
        results = [{"losses": model.losses, "batches": len(set(model.seen))}]
    else:
        results = [results["overfit"] for results in on_three_processes]
    assert [result["batches"] for result in results] == [2] * devices

    data = ThreeSevenDataModule(batch_size=64)
    data.setup("fit")
    images, y = data.train[:128]
    tensors = TensorDataset(images.flatten(1) / 255, y)
    plain = linear()
    fit(plain, DataLoader(tensors, batch_size=64), max_epochs=60)
    last = [sum(result["losses"][i] for result in results) / devices for i in (-2, -1)]
    assert last == pytest.approx(plain.losses[-2:], rel=0.1)
    assert max(last) < 0.25 * plain.losses[0]


@pytest.mark.slow
def test_a_loader_handed_to_predict_gives_each_process_its_share_with_row_numbers(on_three_processes):
    shares = [results["predictions"] for results in on_three_processes]
    assert sorted(row for share in shares for row in share) == list(range(2038))
    assert min(map(len, shares)) > 650


def test_the_data_set_of_a_loader_is_an_ordinary_one():
    loader = ThreeSevenDataModule(batch_size=64).train_dataloader()
    assert isinstance(loader.dataset, TensorDataset)
    assert len(loader.dataset) == ROWS
    assert len(loader) == 175
    assert [*loader][174].y.shape == (ROWS - 174 * 64, 1)


def example(number: int) -> str:
    """A block of the package's own page."""
    page = (PROJECT / "lit_threeseven" / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]


def accuracies(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"accuracy\W+([01]\.\d+)", output)]


@pytest.mark.parametrize("number", [TRAINER_EXAMPLE, LOOP_EXAMPLE, DATA_EXAMPLE])
def test_readme_s_examples_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(example(number), {"__name__": "__main__"})
    (accuracy,) = accuracies(capsys.readouterr().out)
    assert accuracy > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("number", [TRAINER_EXAMPLE, LOOP_EXAMPLE])
def test_readme_s_examples_run_unchanged_on_two_processes(number, tmp_path):
    (tmp_path / "example.py").write_text(example(number))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    found = accuracies(run([*command, "example.py"], tmp_path))
    assert len(found) == (1 if number == TRAINER_EXAMPLE else 2)
    assert min(found) > 0.97


def test_network_data_and_batch_say_in_a_line_what_they_are():
    data = ThreeSevenDataModule(batch_size=64, seed=3)
    batch = next(iter(data.train_dataloader()))
    assert repr(LitThreeSeven(lr=0.5)) == "LitThreeSeven(lr=0.5, init_std=0.01, digits=(3, 7))"
    assert re.fullmatch(r"ThreeSevenDataModule\(.*digits=\(3, 7\).* seed=3, .*train=11157, val=1239\)", repr(data))
    assert repr(batch) == "Batch(64 of 64 rows, float32)"
