"""Images with true classes to frozen features: what every probe starts from, and the folder where they are kept.

    CACHE/ENCODER/00012-TAR.npz    features float32 [n, d], keys, and how many images were skipped for which reason
    CACHE/ENCODER/encoder.json     what ENCODER, a hash of weights, image size, precision and preprocessing with max_pixels,
                                   stands for
    CACHE/hashes/PATH.json         SHA-256 of a tar, with the size and time of change that it had

so features are made once for a tar's bytes and an encoder's weights, wherever both lie.

Shapes: n images, d feature width, C classes, H height = width in pixels.
"""

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlcd_ds import checkpoint
from mlcd_ds.clustering.features import FeatureFolder, batches_of_images, load_extractor
from mlcd_ds.config import EvaluationConfig, TextEvaluationConfig
from mlcd_ds.data.tars import IMAGE_EXTENSIONS, expand_shards, index_tar, local_shard, read_samples, shard_name
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.files import make_folder, sha256, write_bytes, write_json

SPLITS = ("train", "test")
KINDS = "run:PATH, untrained:PATH, features:TRAIN_FOLDER+TEST_FOLDER, hf:FOLDER (CLIP or MLCD) or builtin:FILE.npz"
PREPROCESSING = "shorter side to H, bicubic (Pillow), central square"
CLASS_EXTENSIONS = ("json", "cls", "npy")


@dataclass(frozen=True)
class LabelledFeatures:
    """features: float32 [n, d]. classes: the true classes of each image. skipped: {reason: images left out}."""

    features: np.ndarray
    classes: list[tuple[int, ...]]
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Something that turns uint8 [n, 3, H, H] into float32 [n, d] features on the CPU.

    name: of the architecture. identity: what the features depend on beside the image file, hashed; hexadecimal.
    """

    name: str
    image_size: int
    identity: str
    embed: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ShardFeatures:
    """features: float32 [n, d] of the usable images of one tar, in tar order. keys: theirs. skipped: see above."""

    features: np.ndarray
    keys: list[str]
    skipped: dict[str, int]


def read_features(config: EvaluationConfig, split: str, device: torch.device) -> LabelledFeatures:
    """Features and true classes of --train_shards or --test_shards. Raises DataError or CheckpointError for what is
    missing."""
    spec = config.train_shards if split == "train" else config.test_shards
    kind, _ = split_model(config.model)
    encoder = None if kind == "features" else load_probed(config, device)
    return labelled_features(
        config, encoder, FeatureCache.of(config, encoder), expand_shards(spec, config.allow_pipe), split
    )


def labelled_features(
    config: EvaluationConfig, encoder: Encoder | None, cache: "FeatureCache | None", shards: Sequence[str], split: str
) -> LabelledFeatures:
    """Features and true classes of the images in `shards`; encoder: None for `features:` models. split: for messages."""
    parts = shard_parts(config, encoder, cache, shards, split)
    return _checked(config, split, *zip(*parts, strict=True))


def shard_parts(config, encoder: Encoder | None, cache: "FeatureCache | None", shards: Sequence[str], split: str):
    """Yields (features float32 [n, d], true classes of each image, {reason: images skipped}) of one tar after the other."""
    local = [local_shard(shard, config.shard_cache, config.allow_pipe) for shard in shards]
    if encoder is None:
        folder = FeatureFolder(feature_folders(split_model(config.model)[1])[SPLITS.index(split)])
        for shard in tqdm(local, desc=f"{split} features", unit="shard", disable=None):
            yield _from_folder(config, folder, shard)
        return
    bar = tqdm(
        total=sum(len(index_tar(shard).keys) for shard in local), desc=f"{split} features", unit="img", disable=None
    )
    with bar:
        for shard in local:
            truth = labels_of_shard(shard, config.classes_key)
            found = encode_shard(config, encoder, cache, shard, bar)
            yield found.features, [truth[key] for key in found.keys], found.skipped


def encode_shard(
    config: EvaluationConfig, encoder: Encoder, cache: "FeatureCache | None", shard: Path, bar: tqdm | None = None
) -> ShardFeatures:
    """Features of one local tar: from the cache, else made and put there."""
    found = None if cache is None else cache.load(shard)
    if found is None:
        features, keys, skipped = [], [], Counter()
        samples = read_samples(shard, IMAGE_EXTENSIONS)
        for batch in batches_of_images(
            samples, encoder.image_size, config.batch_size, config.workers, config.max_pixels
        ):
            skipped.update(reason.partition(":")[0] for _, reason in batch.skipped)
            if batch.keys:
                features.append(encoder.embed(batch.images).numpy())
                keys += batch.keys
            if bar is not None:
                bar.update(len(batch.keys) + len(batch.skipped))
                if skipped:
                    bar.set_postfix(skipped=skipped.total())
        array = np.concatenate(features) if features else np.zeros((0, 0), np.float32)
        found = ShardFeatures(array, keys, dict(skipped))
        if cache is not None:
            cache.save(shard, found)
    elif bar is not None:
        bar.update(len(found.keys) + sum(found.skipped.values()))
    return found


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


def load_probed(config: EvaluationConfig, device: torch.device) -> Encoder:
    """The encoder that `config.model` names; vision transformers give the features before the projection."""
    kind, value = split_model(config.model)
    if kind not in ("run", "untrained", "hf"):
        extractor = load_extractor(config.model, device, "float32")
        what = [extractor.name, PREPROCESSING, extractor.image_size, config.max_pixels]
        return Encoder(extractor.name, extractor.image_size, _hashed(what), extractor.embed_images)
    path = f"hf:{value}" if kind == "hf" else value
    model = checkpoint.load_encoder(path, untrained=kind == "untrained", seed=config.seed).to(device)
    # max_pixels decides which images have features at all.
    what = [_digest_of_weights(model), model.config.model_dump(), config.precision, PREPROCESSING, config.max_pixels]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]

    @torch.inference_mode()
    def embed(images_n3HH: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            # Before the projection: that one serves the training's task, and CLIP's protocol leaves it out too.
            return model.forward_features(images_n3HH.to(device)).float().cpu()

    return Encoder(_name_of_architecture(kind, path), model.config.image_size, _hashed(what), embed)


def _name_of_architecture(kind: str, path: str) -> str:
    if kind == "hf":
        return Path(path).name.removeprefix("hf:")
    return checkpoint.encoder_name(path)


def _digest_of_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hashed(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the cache


class FeatureCache:
    """Features of one encoder, a file per tar. Several processes, ranks and commands may share a folder."""

    def __init__(self, folder: str | Path, encoder: Encoder):
        self.hashes = make_folder(Path(folder) / "hashes")
        self.folder = make_folder(Path(folder) / encoder.identity[:24])
        described = {"model": encoder.name, "image_size": encoder.image_size, "preprocessing": PREPROCESSING}
        if not (self.folder / "encoder.json").is_file():
            write_json(self.folder / "encoder.json", described | {"identity": encoder.identity})

    @staticmethod
    def of(config: EvaluationConfig, encoder: Encoder | None) -> "FeatureCache | None":
        """That of --cache; None without it, and for features that are stored anyway."""
        return None if config.cache is None or encoder is None else FeatureCache(config.cache, encoder)

    def file(self, shard: Path) -> Path:
        """Where the features of a tar are, or would be."""
        return self.folder / f"{shard_name(shard)}-{self._hash(shard)[:24]}.npz"

    def load(self, shard: Path) -> ShardFeatures | None:
        """None where there are none yet. Raises DataError for a damaged file."""
        file = self.file(shard)
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                features, keys, skipped = (
                    arrays["features"],
                    arrays["keys"].tolist(),
                    json.loads(str(arrays["skipped"])),
                )
            if features.dtype != np.float32 or features.ndim != 2 or len(features) != len(keys):
                raise ValueError(f"features {features.dtype} {features.shape} for {len(keys)} keys")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"the cached features {file} are damaged ({error}): remove that file") from None
        return ShardFeatures(features, keys, skipped)

    def save(self, shard: Path, found: ShardFeatures) -> None:
        """Under a temporary name first."""
        arrays = {"features": found.features, "keys": np.array(found.keys, dtype=np.str_)}
        write_bytes(self.file(shard), lambda file: np.savez(file, **arrays, skipped=json.dumps(found.skipped)))

    def _hash(self, shard: Path) -> str:
        """SHA-256 of a tar; of one that has not changed since, by its size and time of change, from a note."""
        path = shard.resolve()
        note = self.hashes / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
        try:
            state = {"path": str(path), "bytes": path.stat().st_size, "changed_ns": path.stat().st_mtime_ns}
        except OSError as error:
            raise DataError(f"cannot read the tar {path}: {error}") from None
        if note.is_file():
            try:
                before = json.loads(note.read_text())
                if {name: before.get(name) for name in state} == state and isinstance(before["sha256"], str):
                    return before["sha256"]
            except (ValueError, KeyError, AttributeError):
                pass  # a note that cannot be read is written anew
        found = sha256(path)
        write_json(note, state | {"sha256": found})
        return found


# ---------------------------------------------------------------------------------------------- true classes


def labels_of_shard(shard: Path, classes_key: str) -> dict[str, tuple[int, ...]]:
    """True classes of every image of a tar, by key. Raises DataError where an image has none."""
    samples = read_samples(shard, CLASS_EXTENSIONS)
    return {key: true_classes(shard, key, members, classes_key) for key, members in samples}


def true_classes(path: Path, key: str, members: dict[str, bytes], classes_key: str) -> tuple[int, ...]:
    """The classes of KEY.json's list, of KEY.cls, or of KEY.npy, CLIP_benchmark's row of zeros and ones.

    Raises DataError where none says any.
    """
    expected = f"expected a list of whole numbers from 0 in {key}.json under {classes_key!r}, or one in {key}.cls"
    try:
        if "json" in members and classes_key in (record := json.loads(members["json"])):
            found = record[classes_key]
        elif "cls" in members:
            found = [int(word) for word in members["cls"].split()]
        elif "npy" in members:
            row = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
            if row.ndim != 1 or not np.isin(row, (0, 1)).all():
                raise ValueError(f"{key}.npy holds {row.dtype} {row.shape}, not a row of zeros and ones")
            found = np.flatnonzero(row).tolist()
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


# ---------------------------------------------------------------------------------------------- stored features, checks


def _from_folder(config: EvaluationConfig, folder: FeatureFolder, shard: Path):
    """Joins stored features with the classes in a tar, by shard name and key."""
    name = shard_name(shard)
    if name not in folder.names:
        raise DataError(
            f"{folder.path} has no features of {shard}: expected metadata/metadata_{name}.parquet. Extract them with "
            "tools/extract_features.py, or give the folder of the other split."
        )
    row_of = {key: row for row, key in enumerate(folder.keys(name))}
    truth = labels_of_shard(shard, config.classes_key)
    keys = [key for key in truth if key in row_of]
    rows = np.array([row_of[key] for key in keys], dtype=np.int64)
    lost = len(truth) - len(keys)
    features = np.asarray(folder.array(name)[rows], dtype=np.float32)
    return features, [truth[key] for key in keys], {"without a feature": lost} if lost else {}


def check_usable(config: EvaluationConfig | TextEvaluationConfig, split: str, usable: int, skipped: Counter) -> None:
    """Raises DataError where too many of a split's images were skipped, or none is left."""
    total = usable + skipped.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    if skipped.total() > config.max_skipped_fraction * total:
        raise DataError(
            f"{skipped.total()} of {total} {split} images cannot be used ({reasons}), more than --max_skipped_fraction "
            f"{config.max_skipped_fraction:g} allows. Mend or take out these images, or extract their features again."
        )
    if not usable:
        raise DataError(f"the {split} tars hold no image")


def check_finite(config: EvaluationConfig, split: str, features_nd: np.ndarray) -> None:
    """Raises DataError for features that are no finite numbers."""
    broken = ~np.isfinite(features_nd).all(axis=1)
    if broken.any():
        raise DataError(
            f"the features of {int(broken.sum())} of {len(features_nd)} {split} images are no finite numbers "
            f"({config.model}): extract them again, or take another checkpoint"
        )


def _checked(config: EvaluationConfig, split: str, features: Sequence, classes: Sequence, skipped: Sequence):
    total = sum(map(Counter, skipped), Counter())
    flat = [found for part in classes for found in part]
    check_usable(config, split, len(flat), total)
    array = np.concatenate([part for part in features if len(part)])
    check_finite(config, split, array)
    return LabelledFeatures(array, flat, dict(total))
