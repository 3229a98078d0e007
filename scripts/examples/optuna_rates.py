"""Search for a learning rate with Optuna; trials that do worse than the others at the same epoch are pruned.

pip install optuna
python scripts/examples/optuna_rates.py --trials 12
"""

import argparse
import logging

import lightning as L
from typing_extensions import override

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import needed

with needed("Optuna", "optuna"):
    import optuna


class Prune(L.Callback):
    """Report each validation loss to a trial, and end the fit if Optuna prunes the trial."""

    def __init__(self, trial: "optuna.Trial") -> None:
        self.trial = trial

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trial.report(trainer.callback_metrics["val/loss"].item(), trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def search(trials: int, epochs: int = 100) -> "optuna.Study":
    """Train one network for each trial, with a validation every ten epochs; return the study with all losses."""
    data = ThreeSevenDataModule()

    def objective(trial: "optuna.Trial") -> float:
        L.seed_everything(0, verbose=False)
        model = LitThreeSeven(lr=trial.suggest_float("lr", 1e-3, 1e3, log=True))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        every = {"max_epochs": epochs, "check_val_every_n_epoch": 10, "num_sanity_val_steps": 0}
        trainer = L.Trainer(accelerator="cpu", callbacks=[Prune(trial)], enable_model_summary=False, **every, **quiet)
        trainer.fit(model, data)
        return trainer.callback_metrics["val/loss"].item()

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner(n_startup_trials=3)
    )
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="learning rates to try (default: 12)")
    args = parser.parse_args()
    for library in ("lightning.pytorch", "optuna"):
        logging.getLogger(library).setLevel(logging.WARNING)
    study = search(args.trials)
    for trial in study.trials:
        print(
            f"lr {trial.params['lr']:9.4g}  {trial.state.name.lower():8}  {len(trial.intermediate_values)} validations"
        )
    print(f"best lr {study.best_params['lr']:.4g}, validation loss {study.best_value:.4f}")
