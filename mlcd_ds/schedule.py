"""How long a run is: epochs, samples or steps come in, optimizer steps go out, once."""

import math
from dataclasses import dataclass
from fractions import Fraction

from mlcd_ds.config import RunSettings
from mlcd_ds.errors import ConfigError

WARMUP_SHARE = Fraction(1, 10)
"""The warm-up is at most this share of the run (the paper's own is 2,000 of about 390,000 steps)."""


@dataclass(frozen=True)
class RunLength:
    """The length of a run. total_steps and warmup_steps are optimizer steps; samples = total_steps * global batch;
    epochs = samples / samples of an epoch; notes say why.
    """

    total_steps: int
    warmup_steps: int
    samples: int
    epochs: float
    notes: tuple[str, ...]


def resolve_run_length(config: RunSettings, *, samples_per_epoch: int, global_batch: int) -> RunLength:
    """Turns --epochs, --samples or --steps (or the default number of epochs) into steps, rounded up to whole batches.

    Raises ConfigError when the data set is empty.
    """
    if samples_per_epoch < 1:
        raise ConfigError(f"an epoch has {samples_per_epoch} samples: --shards {config.shards} holds no labelled image")
    if config.steps is not None:
        steps, why = config.steps, f"--steps {config.steps}"
    elif config.samples is not None:
        steps = math.ceil(Fraction(config.samples, global_batch))
        why = f"--samples {config.samples:,} / batch {global_batch:,}, rounded up"
    else:
        epochs = config.epochs if config.epochs is not None else config.default_epochs
        # Fraction of the decimal text: 0.7 epochs of 1,000 samples are 700 samples, not 699.99...
        steps = math.ceil(Fraction(repr(float(epochs))) * samples_per_epoch / global_batch)
        source = f"--epochs {epochs:g}" if config.epochs is not None else f"{epochs:g} epochs (no length was given)"
        why = f"{source} x {samples_per_epoch:,} samples / batch {global_batch:,}, rounded up"
    samples = steps * global_batch
    epochs_seen = samples / samples_per_epoch
    notes = [f"{steps:,} steps: {why}; {samples:,} samples, {epochs_seen:.4g} epochs"]
    warmup = min(config.warmup_steps, math.floor(steps * WARMUP_SHARE))
    if warmup < config.warmup_steps:
        notes.append(f"warm-up {warmup:,} steps, a tenth of the run, instead of --warmup_steps {config.warmup_steps:,}")
    if global_batch > samples_per_epoch:
        notes.append(f"one step takes {global_batch:,} samples, more than the {samples_per_epoch:,} of an epoch")
    return RunLength(steps, warmup, samples, epochs_seen, tuple(notes))
