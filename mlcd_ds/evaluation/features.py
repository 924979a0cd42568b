"""Images with true classes to frozen features: what every probe starts from.

Shapes: n images, d feature width, C classes, H height = width in pixels.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlcd_ds import checkpoint
from mlcd_ds.clustering.features import FeatureFolder, batches_of_images, load_extractor
from mlcd_ds.config import ProbeConfig
from mlcd_ds.data.tars import IMAGE_EXTENSIONS, expand_shards, index_tar, local_shard, read_samples, shard_name
from mlcd_ds.errors import ConfigError, DataError

SPLITS = ("train", "test")
KINDS = "run:PATH, untrained:PATH, features:TRAIN_FOLDER+TEST_FOLDER, hf:FOLDER (CLIP or MLCD) or builtin:FILE.npz"


@dataclass(frozen=True)
class LabelledFeatures:
    """features: float32 [n, d]. classes: the true classes of each image. skipped: {reason: images left out}."""

    features: np.ndarray
    classes: list[tuple[int, ...]]
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Something that turns uint8 [n, 3, H, H] into float [n, d] features."""

    image_size: int
    embed: Callable[[torch.Tensor], torch.Tensor]


def read_features(config: ProbeConfig, split: str, device: torch.device) -> LabelledFeatures:
    """Features and true classes of one split's tars. Raises DataError or CheckpointError for what is missing."""
    spec = config.train_shards if split == "train" else config.test_shards
    shards = [
        local_shard(shard, config.shard_cache, config.allow_pipe) for shard in expand_shards(spec, config.allow_pipe)
    ]
    kind, value = split_model(config.model)
    if kind == "features":
        return _from_folder(config, feature_folders(value)[SPLITS.index(split)], shards, split)
    return _through_encoder(config, load_probed(config, device), shards, split, device)


def split_model(model: str) -> tuple[str, str]:
    """('run', 'PATH') of 'run:PATH'. Raises ConfigError for an unknown kind."""
    kind, colon, value = model.partition(":")
    if not colon or not value or kind not in ("run", "untrained", "features", "hf", "builtin"):
        raise ConfigError(f"--model {model!r}: expected {KINDS}")
    return kind, value


def feature_folders(value: str) -> tuple[Path, Path]:
    """(train, test) of 'TRAIN+TEST'."""
    train, plus, test = value.partition("+")
    if not (plus and train and test):
        raise ConfigError(
            f"--model features:{value}: two folders are wanted, features:TRAIN_FOLDER+TEST_FOLDER, found one"
        )
    return Path(train), Path(test)


def load_probed(config: ProbeConfig, device: torch.device) -> Encoder:
    """The encoder that `config.model` names; vision transformers give the features before the projection."""
    kind, value = split_model(config.model)
    if kind in ("run", "untrained", "hf"):
        path = f"hf:{value}" if kind == "hf" else value
        model = checkpoint.load_encoder(path, untrained=kind == "untrained", seed=config.seed).to(device)
        # Before the projection: that one serves the training's task, and CLIP's protocol leaves it out too.
        return Encoder(model.config.image_size, model.forward_features)
    extractor = load_extractor(config.model, device, "auto")
    return Encoder(extractor.image_size, extractor.embed_images)


# ---------------------------------------------------------------------------------------------- true classes


def true_classes(path: Path, key: str, members: dict[str, bytes], classes_key: str) -> tuple[int, ...]:
    """The classes of KEY.json's list, or of KEY.cls. Raises DataError where neither says any."""
    expected = f"expected a list of whole numbers from 0 in {key}.json under {classes_key!r}, or one in {key}.cls"
    try:
        if "json" in members and classes_key in (record := json.loads(members["json"])):
            found = record[classes_key]
        elif "cls" in members:
            found = [int(word) for word in members["cls"].split()]
        else:
            raise DataError(
                f"{path}: image {key} has no true classes: {expected}. Name another field by --classes_key, or probe tars "
                "that have them."
            )
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: the true classes of {key} cannot be read ({error}): {expected}") from None
    if not isinstance(found, list) or not all(type(number) is int and number >= 0 for number in found):
        raise DataError(f"{path}: the true classes of {key} are {str(found)[:60]!r}: {expected}")
    return tuple(sorted(set(found)))


def class_matrix(classes: list[tuple[int, ...]], names: list[int]) -> np.ndarray:
    """bool [n, C]: image i is of class names[c]."""
    column = {name: c for c, name in enumerate(names)}
    matrix = np.zeros((len(classes), len(names)), dtype=bool)
    for row, found in enumerate(classes):
        matrix[row, [column[name] for name in found]] = True
    return matrix


# ---------------------------------------------------------------------------------------------- from images or folders


def _through_encoder(
    config: ProbeConfig, encoder: Encoder, shards: list[Path], split: str, device: torch.device
) -> LabelledFeatures:
    total = sum(len(index_tar(shard).keys) for shard in shards)
    features, classes, skipped = [], [], Counter()
    bar = tqdm(total=total, desc=f"{split} features", unit="img", disable=None)
    with torch.inference_mode(), bar:
        for shard in shards:
            samples = read_samples(shard, (*IMAGE_EXTENSIONS, "json", "cls"))
            for batch in batches_of_images(
                samples, encoder.image_size, config.batch_size, config.workers, config.max_pixels
            ):
                skipped.update(reason.partition(":")[0] for _, reason in batch.skipped)
                if batch.keys:
                    features.append(encoder.embed(batch.images.to(device)).float().cpu().numpy())
                pairs = zip(batch.keys, batch.parts, strict=True)
                classes += [true_classes(shard, key, parts, config.classes_key) for key, parts in pairs]
                bar.update(len(batch.keys) + len(batch.skipped))
                if skipped:
                    bar.set_postfix(skipped=skipped.total())
    return _checked(config, split, features, classes, skipped)


def _from_folder(config: ProbeConfig, path: Path, shards: list[Path], split: str) -> LabelledFeatures:
    """Joins stored features with the classes in the tars, by shard name and key."""
    folder = FeatureFolder(path)
    features, classes, skipped = [], [], Counter()
    for shard in tqdm(shards, desc=f"{split} features", unit="shard", disable=None):
        name = shard_name(shard)
        if name not in folder.names:
            raise DataError(
                f"{path} has no features of {shard}: expected metadata/metadata_{name}.parquet. Extract them with "
                "tools/extract_features.py, or give the folder of the other split."
            )
        row_of = {key: row for row, key in enumerate(folder.keys(name))}
        rows = []
        for key, parts in read_samples(shard, ("json", "cls")):
            found = true_classes(shard, key, parts, config.classes_key)
            if key in row_of:
                rows.append(row_of[key])
                classes.append(found)
            else:
                skipped["without a feature"] += 1
        features.append(np.asarray(folder.array(name)[np.array(rows, dtype=np.int64)], dtype=np.float32))
    return _checked(config, split, features, classes, skipped)


def _checked(config: ProbeConfig, split: str, features: list, classes: list, skipped: Counter) -> LabelledFeatures:
    total = len(classes) + skipped.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    if skipped.total() > config.max_skipped_fraction * total:
        raise DataError(
            f"{skipped.total()} of {total} {split} images cannot be used ({reasons}), more than --max_skipped_fraction "
            f"{config.max_skipped_fraction:g} allows. Mend or take out these images, or extract their features again."
        )
    if not classes:
        raise DataError(f"the {split} tars hold no image")
    array = np.concatenate(features)
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        raise DataError(
            f"the features of {int(broken.sum())} of {len(array)} {split} images are no finite numbers "
            f"({config.model}): extract them again, or take another checkpoint"
        )
    return LabelledFeatures(array, classes, dict(skipped))
