"""Notebooks: what README's snippet leaves in one, and two processes started from one."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

PROJECT = Path(__file__).parents[1]
TWO = """
import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.watch import FitProgressBar


class Writer(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        torch.save([answer["rows"] for answer in predictions], f"rows{trainer.global_rank}.pt")


torch.set_num_threads(1)
L.seed_everything(0)
model, data = LitThreeSeven(), ThreeSevenDataModule()
options = {"logger": False, "enable_checkpointing": False, "callbacks": [FitProgressBar(), Writer("epoch")]}
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_notebook", max_epochs=20, **options)
trainer.fit(model, data)
trainer.predict(model, data, return_predictions=False)
print(model.digest())
"""


def execute(code: str, folder: Path) -> list[dict]:
    """What a notebook with one cell shows below it; an error in it is raised."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook.cells[0].outputs


@pytest.mark.slow
def test_readme_s_snippet_leaves_a_few_lines_in_a_notebook(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text("utf-8"), re.DOTALL)
    outputs = execute(code, tmp_path)
    texts = [output.get("text") or output["data"]["text/plain"] for output in outputs]
    assert len(texts) < 30
    assert sum(text.count("\n") for text in texts) < 60
    bars = [text for text in texts if text.startswith("Training |")]
    assert [
        re.fullmatch(r"Training \|█{20}\| epoch 2,000 of 2,000, loss 0\.\d+, 00:00 left", bar) is None for bar in bars
    ] == [False]
    assert re.search(r"test/accuracy.*0\.98", "".join(texts))
    assert any(re.search(r"^W +\(784, 1\) +784$", text, re.MULTILINE) for text in texts)
    assert "other params" not in "".join(texts)


@pytest.mark.slow
def test_two_processes_started_from_a_notebook_train_and_predict(tmp_path, trainer):
    outputs = execute(TWO, tmp_path)
    torch.manual_seed(0)
    model = LitThreeSeven()
    trainer(max_epochs=20).fit(model, ThreeSevenDataModule())
    assert outputs[-1]["text"].splitlines()[-1] == model.digest()
    rows = torch.cat([torch.cat(torch.load(tmp_path / f"rows{rank}.pt")) for rank in range(2)])
    assert rows.sort().values.tolist() == list(range(2038))
