"""train.py with a fault of one rank: FAIL_RANK raises an OSError in step FAIL_STEP."""

import os

import fire

from mlcd_ds import cli
from mlcd_ds.config import RunConfig
from mlcd_ds.engine import TrainEngine
from mlcd_ds.train import train

train_step = TrainEngine.train_step


def failing_step(engine: TrainEngine, batch, step: int, **options):
    if engine.topology.rank == int(os.environ["FAIL_RANK"]) and step == int(os.environ["FAIL_STEP"]):
        raise OSError(28, "No space left on device")
    return train_step(engine, batch, step, **options)


if __name__ == "__main__":
    TrainEngine.train_step = failing_step
    cli.run(fire.Fire, train, RunConfig)
