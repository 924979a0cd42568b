"""Models with an image and a text side, and the images and texts of evaluation sets passed through them.

Shapes: n images, m texts, D width of the joint embedding.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mlcd_ds import checkpoint
from mlcd_ds.clustering.features import batches_of_images, load_extractor, resolved_precision
from mlcd_ds.config import TextEvaluationConfig
from mlcd_ds.data.tars import IMAGE_EXTENSIONS, local_shard, read_samples
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.datasets import check_root, dataset_type, identify, locate, shards_of_split, split_names
from mlcd_ds.topology import Topology


@dataclass(frozen=True)
class Towers:
    """name: of the architecture. identity: what its embeddings depend on beside images and texts: architecture, hashes of
    the weights, precision. image_size: pixels.

    embed_images: uint8 [n, 3, H, H] to float32 [n, D] on the CPU, unit rows. embed_texts: texts to the same.
    """

    name: str
    identity: str
    image_size: int
    embed_images: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[Sequence[str]], torch.Tensor]


def load_towers(config: TextEvaluationConfig, device: torch.device) -> Towers:
    """run:RUN (one on captions) or hf:FOLDER (a CLIPModel with its tokenizer). Raises ConfigError for any other model."""
    kind, _, path = config.model.partition(":")
    if kind not in ("run", "hf") or not path:
        raise ConfigError(
            f"--model {config.model!r}: expected run:RUN, a run on captions (train.py --objective clip), or hf:FOLDER, a "
            "CLIPModel with its tokenizer"
        )
    precision = resolved_precision(config.precision, device)
    extractor = load_extractor(config.model, device, precision, with_texts=True)
    name = Path(path).name
    if kind == "run":
        encoder = json.loads((checkpoint.find_encoder(path) / "encoder.json").read_text())["model"]
        name = f"{encoder}+{checkpoint.load_text(path).name}"
    return Towers(
        name, f"{extractor.name}:{precision}", extractor.image_size, extractor.embed_images, extractor.embed_texts
    )


def embed_distinct(towers: Towers, texts: Sequence[str], batch_size: int, what: str, shown: bool) -> torch.Tensor:
    """float32 [m, D], unit rows. Equal texts are embedded once, so that they have equal embeddings."""
    distinct = list(dict.fromkeys(texts))
    parts = []
    with tqdm(total=len(distinct), desc=what, unit="text", disable=None if shown else True) as bar:
        for start in range(0, len(distinct), batch_size):
            parts.append(towers.embed_texts(distinct[start : start + batch_size]))
            bar.update(len(parts[-1]))
    row = {text: i for i, text in enumerate(distinct)}
    found = torch.cat(parts)[[row[text] for text in texts]]
    if not torch.isfinite(found).all():
        raise DataError("the embeddings of some texts are no finite numbers: take another checkpoint")
    return found


@dataclass(frozen=True)
class EmbeddedBatch:
    """features: float32 [n, D], unit rows, of usable images of one tar. keys; parts: bytes of their members."""

    shard: Path
    features: torch.Tensor
    keys: list[str]
    parts: list[dict[str, bytes]]


def embedded_batches(
    config: TextEvaluationConfig,
    towers: Towers,
    shards: Sequence[str],
    extensions: Sequence[str],
    skipped: Counter,
    shown,
) -> Iterator[EmbeddedBatch]:
    """The images of `shards`, a batch at a time, with their members of `extensions`. skipped: is told what was left out."""
    with tqdm(desc="images", unit="img", disable=None if shown else True) as bar:
        for shard in shards:
            path = local_shard(shard, config.shard_cache)
            samples = read_samples(path, (*IMAGE_EXTENSIONS, *extensions))
            for batch in batches_of_images(
                samples, towers.image_size, config.batch_size, config.workers, config.max_pixels
            ):
                skipped.update(reason.partition(":")[0] for _, reason in batch.skipped)
                bar.update(len(batch.keys) + len(batch.skipped))
                if batch.keys:
                    features = towers.embed_images(batch.images)
                    if not torch.isfinite(features).all():
                        raise DataError(
                            f"embeddings of images in {path} are no finite numbers: take another checkpoint"
                        )
                    yield EmbeddedBatch(path, features, batch.keys, batch.parts)


@dataclass(frozen=True)
class TestSet:
    """A set to test on; nothing is learnt, so that it needs no train/. folder: None where tars were named one by one."""

    name: str
    folder: Path
    shards: list[str]


def find_test_sets(config: TextEvaluationConfig, files: Sequence[str] | None) -> tuple[list[TestSet], list[str]]:
    """(the sets of --datasets below --root, with the tars of --split; those that are left out, with the reason).

    "all": every folder that holds `files`; None: every set for retrieval (dataset_type.txt). One that lacks some of the
    files is left out, and so is a known set that is named and not there.
    Raises DataError where no set is left, and as `datasets.locate`.
    """
    root, left_out = check_root(config.root), []
    names = split_names(config.datasets)
    if config.datasets == "all":
        names = []
        for path in sorted(root.iterdir()):
            if not (path / config.split).is_dir() or (dataset_type(path) == "retrieval") != (files is None):
                continue
            lacking = [name for name in files or () if not (path / name).is_file()]
            if lacking:
                left_out.append(f"{path.name} (no {lacking[0]})")
            else:
                names.append(path.name)
        if not names:
            needed = "dataset_type.txt that says retrieval" if files is None else " and ".join(files) or "no captions"
            without = f"; left out: {', '.join(left_out)}" if left_out else ""
            raise DataError(
                f"--root {root} holds no set: expected folders with {config.split}/*.tar and {needed}{without}"
            )
    found, missing = locate(config.root, names, (config.split,))
    if not found:
        raise DataError(
            f"none of the sets {config.datasets!r} lies below {root}: expected folders like "
            f"{root / identify(names[0]).folders()[-1]} with {config.split}/ (0.tar ... and nshards.txt in it)"
        )
    sets = [TestSet(known.result_name, folder, shards_of_split(folder, config.split)) for known, folder in found]
    return sets, [*left_out, *(f"{name} (not there)" for name in missing)]


def own_share(items: Sequence, topology: Topology) -> list:
    """Every W-th of `items`, from this rank's on."""
    return list(items)[topology.rank :: topology.world_size]


def read_lines(path: Path, what: str, cure: str) -> list[str]:
    """The lines of a text file. Raises DataError with `cure` where there is none, or an empty one before the last.

    An empty line left out would give all the names behind it another number.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, the {what}, cannot be read ({error}): {cure}") from None
    if not lines:
        raise DataError(f"{path}, the {what}, is empty: {cure}")
    if "" in lines:
        raise DataError(f"{path}, the {what}: line {lines.index('') + 1} of {len(lines)} is empty: {cure}")
    return lines
