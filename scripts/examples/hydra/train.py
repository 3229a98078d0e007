"""Hydra: network, data, Trainer, logger and callbacks come from config.yaml and its groups; each can be replaced.

pip install hydra-core
python scripts/examples/hydra/train.py model.lr=0.5 logger=tensorboard trainer.max_epochs=200 hydra.run.dir=logs/hydra

A run's settings, curves and checkpoints are in Hydra's folder: outputs/DATE/TIME if hydra.run.dir isn't given.
"""

import lightning as L

from lit_threeseven.errors import needed

with needed("Hydra", "hydra-core"):
    import hydra
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    """Train, and test the best weights."""
    L.seed_everything(config.seed)
    made = hydra.utils.instantiate(config, _convert_="all")
    trainer = made["trainer"](logger=made["logger"], callbacks=[*made["callbacks"].values()])
    trainer.fit(made["model"], made["data"])
    trainer.test(made["model"], made["data"], ckpt_path="best", weights_only=True)
    print(f"digest {made['model'].digest()}")


if __name__ == "__main__":
    main()
