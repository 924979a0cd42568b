"""The DeepSpeed JSON, read strictly and resolved: what DeepSpeed would ignore or guess becomes a right value or an error.

Three steps, because the length of the run (in steps) needs the global batch, and the schedule needs the length:

    raw = load_deepspeed_config(path)                       # hjson: comments and bare keys are fine
    batch = BatchSizes.resolve(raw, world_size)
    settings = resolve_deepspeed_config(raw, batch=batch, total_steps=..., warmup_steps=..., ...)

All of it is a function of the file, the number of ranks and the kind of device, so every rank comes to the same verdict
before any process group forms. DeepSpeed itself is not needed here.
"""

import copy
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hjson

from mlcd_ds import ds_rules as rules
from mlcd_ds.config import DeepSpeedDefaults
from mlcd_ds.ds_keys import AUTO, KNOWN_KEYS, TOP_LEVEL_BATCH_KEYS, check_keys
from mlcd_ds.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """global_batch = micro_batch * accumulation * world_size, all in images; `notes` say what was worked out."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int
    notes: tuple[str, ...]

    @property
    def images_per_rank(self) -> int:
        """Images of one rank in one optimizer step."""
        return self.micro_batch * self.accumulation

    @staticmethod
    def resolve(raw: dict, world_size: int, going_on_with: int | None = None) -> "BatchSizes":
        """DeepSpeed's rule: any two of the three sizes give the third. "auto" counts as absent.

        going_on_with: the global batch of a run that is resumed. It stays (unless the JSON now names another, which the
        run folder refuses): the accumulation follows the number of ranks, and where the micro-batch of the JSON does not
        fit, the largest smaller one that does is taken.
        Raises ConfigError when nothing is given or the product does not come out, with the numbers and the world sizes
        near `world_size` that fit.
        """
        check_keys(raw)
        given = {key: None if raw.get(key) == AUTO else raw.get(key) for key in TOP_LEVEL_BATCH_KEYS}
        for key, value in given.items():
            if value is not None and value < 1:
                raise ConfigError(f'"{key}" is {value}: it must be at least 1')
        total, micro, accumulation = (None if value is None else int(value) for value in given.values())
        notes = []
        if going_on_with is not None and total in (None, going_on_with):
            return _kept_batch(going_on_with, micro, accumulation, world_size)
        if total is None and micro is None:
            raise ConfigError(
                'the DeepSpeed JSON has no batch size: set "train_batch_size" (images of an optimizer step over all ranks) '
                'and "train_micro_batch_size_per_gpu" (images of one forward pass)'
            )
        if total is None:
            accumulation = accumulation or 1
            total = micro * accumulation * world_size
            notes.append(f"the global batch follows the number of ranks: {micro} x {accumulation} x {world_size}")
        if micro is None:
            micro = max(1, total // (world_size * (accumulation or 1)))
            accumulation = accumulation or 1
            notes.append(f"micro batch: {total} images / {world_size} ranks / accumulation {accumulation} = {micro}")
        if accumulation is None:
            accumulation = max(1, total // (micro * world_size))
            notes.append(f"accumulation: {total} images / (micro batch {micro} x {world_size} ranks) = {accumulation}")
        if micro * accumulation * world_size != total:
            raise ConfigError(_batch_mismatch(total, given, micro, accumulation, world_size))
        return BatchSizes(total, micro, accumulation, world_size, tuple(notes))


def _kept_batch(total: int, micro: int | None, accumulation: int | None, world_size: int) -> BatchSizes:
    """The sizes of a resumed run: `total` images a step, no more of them in a forward pass than the JSON allows."""
    images_per_rank, left = divmod(total, world_size)
    if left:
        fits = [n for n in range(1, total + 1) if total % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - world_size))[:6])
        raise ConfigError(
            f"the run goes on with its global batch of {total} images, which {world_size} ranks cannot share evenly. "
            f"Numbers of ranks near {world_size} that can: {', '.join(map(str, near))}"
        )
    wanted = micro or max(1, images_per_rank // (accumulation or 1))
    fitting = max(size for size in range(1, min(wanted, images_per_rank) + 1) if images_per_rank % size == 0)
    needed = images_per_rank // fitting
    notes = []
    if (micro, accumulation) != (fitting, needed):
        changed = f", instead of micro-batches of {micro}" if micro not in (None, fitting) else ""
        notes.append(
            f"the run goes on with its global batch: {total} images = {fitting} a micro-batch x {needed} accumulated x "
            f"{world_size} ranks{changed}"
        )
    return BatchSizes(total, fitting, needed, world_size, tuple(notes))


def _batch_mismatch(total: int, given: dict, micro: int, accumulation: int, world_size: int) -> str:
    all_given = given["gradient_accumulation_steps"] is not None and given["train_micro_batch_size_per_gpu"] is not None
    unit = accumulation if given["gradient_accumulation_steps"] is not None else 1
    unit *= micro if given["train_micro_batch_size_per_gpu"] is not None else 1
    fits = [n for n in range(1, total // unit + 1) if total % (n * unit) == 0] if total >= unit else []
    if all_given:
        fits = [n for n in fits if n * unit == total]
    near = sorted(sorted(fits, key=lambda n: abs(n - world_size))[:6])
    sizes = f"numbers of ranks near {world_size} that fit: {', '.join(map(str, near))}" if near else "no number fits"
    drop = '; or leave "gradient_accumulation_steps" out, so that it follows the number of ranks' if all_given else ""
    return (
        f'the batch sizes do not fit {world_size} ranks: "train_batch_size" {total} is not "train_micro_batch_size_per_gpu" '
        f'{micro} x "gradient_accumulation_steps" {accumulation} x {world_size} ranks = '
        f"{micro * accumulation * world_size}. With these sizes, {sizes}{drop}"
    )


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What the DeepSpeed JSON comes to for this run.

    json: the dict for `deepspeed.initialize`, without any "auto". Batch sizes in images. `notes`: sentences for people,
    what was worked out and why.
    """

    json: dict
    global_batch: int
    micro_batch: int
    accumulation: int
    zero_stage: int
    precision: Literal["float32", "bfloat16"]
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    gradient_clipping: float
    activation_checkpointing: bool
    notes: tuple[str, ...]

    @property
    def images_per_rank(self) -> int:
        """Images of one rank in one optimizer step."""
        return self.micro_batch * self.accumulation


def load_deepspeed_config(path: str) -> dict:
    """Reads the JSON (or hjson) file at `path` and checks its keys; raises ConfigError naming the file and the line."""
    file = Path(path).expanduser()
    if not file.is_file():
        # DeepSpeed takes a path that does not exist for base64 and dies with a padding error.
        what = "is a folder" if file.is_dir() else "does not exist"
        beside = sorted(other.name for other in file.parent.glob("*.json")) if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, n=1)
        hint = f" Did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"--deepspeed_config {path} {what}.{hint} The shipped ones are in ds_configs/.")
    try:
        raw = hjson.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_pairs)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            "Look for a missing comma or brace there or just above."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path} must hold one object {{...}} with DeepSpeed's keys; see ds_configs/")
    try:
        check_keys(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return raw


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ConfigError(f"key {', '.join(map(repr, twice))} stands twice in the block with the keys {sorted(result)}")
    return result


def resolve_deepspeed_config(
    raw: dict,
    *,
    batch: BatchSizes,
    total_steps: int,
    warmup_steps: int,
    output_dir: str,
    device_type: str,
    defaults: DeepSpeedDefaults,
) -> DeepSpeedSettings:
    """The settings that `raw` comes to on devices of `device_type` ("cuda" or "cpu") in a run of `total_steps`.

    `raw` is left as it is. Raises ConfigError with the key, its value, and what to write.
    """
    check_keys(raw)
    config = rules.with_whole_numbers(copy.deepcopy(raw), KNOWN_KEYS)
    notes = list(batch.notes)
    rules.drop_switched_off(config)
    config.update(
        train_batch_size=batch.global_batch,
        train_micro_batch_size_per_gpu=batch.micro_batch,
        gradient_accumulation_steps=batch.accumulation,
    )
    precision = rules.resolve_precision(config, device_type, notes)
    zero_stage = rules.resolve_zero(config, device_type, defaults, notes)
    rules.resolve_data_types(config, precision, zero_stage, notes)
    rules.refuse_other_averages(config)
    clipping = rules.resolve_clipping(config, defaults, notes)
    optimizer = rules.resolve_optimizer(config, device_type, defaults, notes)
    rules.resolve_scheduler(config, optimizer["lr"], total_steps, warmup_steps, defaults, notes)
    rules.resolve_activation_checkpointing(config, device_type, notes)
    rules.resolve_monitors(config, output_dir, defaults, notes)
    rules.resolve_rest(config, defaults, notes)
    return DeepSpeedSettings(
        json=config,
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        zero_stage=zero_stage,
        precision=precision,
        learning_rate=float(optimizer["lr"]),
        weight_decay=float(optimizer["weight_decay"]),
        betas=tuple(optimizer["betas"]),
        eps=float(optimizer["eps"]),
        gradient_clipping=clipping,
        activation_checkpointing="activation_checkpointing" in config,
        notes=tuple(notes),
    )
