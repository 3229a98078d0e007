"""Ray Train: the main recipe on two workers gives the published bits, even if a worker is killed during training.

pip install 'ray[train]'
python scripts/examples/ray_train.py --out logs/ray

Ray saves a checkpoint every 100 epochs in --out, and resumes from the last one. Its own logs are in /tmp/ray.
"""

import argparse
import os
import tempfile
from pathlib import Path

import lightning as L

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.checkpoints import WholeCheckpointIO
from lit_threeseven.errors import needed

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
with needed("Ray", "ray[train]"):
    import ray.train.lightning
    import ray.train.torch
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig


class Report(ray.train.lightning.RayTrainReportCallback):
    """Give Ray a checkpoint after each validation, and remember the epoch in which this attempt began."""

    began = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the epoch."""
        self.began = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skip epochs without a validation."""
        if (trainer.current_epoch + 1) % 100 == 0:
            super().on_train_epoch_end(trainer, pl_module)


def train() -> int:
    """Train in a worker; return the number of epochs that an earlier attempt had trained."""
    tempfile.tempdir = str(Path.cwd())  # a folder of Ray's, in which Ray's callback leaves empty folders behind
    L.seed_everything(0)
    last, report = ray.train.get_checkpoint(), Report()
    trainer = L.Trainer(
        max_epochs=2000,
        check_val_every_n_epoch=100,
        num_sanity_val_steps=0,
        accelerator="cpu",
        devices="auto",
        strategy=ray.train.lightning.RayDDPStrategy(),
        plugins=[ray.train.lightning.RayLightningEnvironment(), WholeCheckpointIO()],
        callbacks=[report],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = ray.train.lightning.prepare_trainer(trainer)
    path = last and str(Path(last.path, Report.CHECKPOINT_NAME))
    trainer.fit(LitThreeSeven(), ThreeSevenDataModule(), ckpt_path=path, weights_only=True)
    return report.began


def main() -> None:
    """Train, and print the best epoch and its digest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/ray"), help="folder to write (default: logs/ray)")
    args = parser.parse_args()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    run = RunConfig(
        storage_path=str(args.out.resolve()),
        name="threeseven",
        failure_config=FailureConfig(max_failures=1),
        checkpoint_config=CheckpointConfig(1, checkpoint_score_attribute="val/loss", checkpoint_score_order="min"),
    )
    result = ray.train.torch.TorchTrainer(train, scaling_config=ScalingConfig(num_workers=2), run_config=run).fit()
    checkpoint, metrics = min(result.best_checkpoints, key=lambda pair: pair[1]["val/loss"])
    ray.shutdown()
    print(f"resumed after {result.return_value} epochs; the best epoch was {metrics['epoch']}")
    model = LitThreeSeven.load_from_checkpoint(Path(checkpoint.path, Report.CHECKPOINT_NAME))
    print(f"digest {model.digest()}")


if __name__ == "__main__":
    main()
