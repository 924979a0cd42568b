"""Images to features, and the folder they lie in (clip-retrieval's layout, so that published embeddings work as they are).

    features/features.json                 which model, d, and the names of all shards that were asked for
    features/img_emb/img_emb_00012.npy     float16 [n, d], one file per tar, its images in tar order
    features/text_emb/text_emb_00012.npy   the captions' embeddings, where --embedding mean asked for them
    features/metadata/metadata_00012.parquet   column `key`; written last: a shard is finished when it is there. Its
                                         schema's metadata counts the images that were skipped.

Shapes: n images, d features, H the extractor's image side in pixels.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mlcd_ds import checkpoint, collectives
from mlcd_ds.clustering.progress import FolderProgress
from mlcd_ds.config import FeaturesConfig
from mlcd_ds.data.decode import ImageError, decode_image
from mlcd_ds.data.tars import expand_shards, image_extension, local_shard, read_samples, shard_name
from mlcd_ds.data.transforms import decode_center_crop, resize_shorter_and_center_crop
from mlcd_ds.errors import ConfigError, DataError, differences
from mlcd_ds.files import make_folder, remove_stale, sha256, write_bytes, write_json
from mlcd_ds.topology import Topology

FORMAT_VERSION = 1
PATCHES_FILE = "patches.npz"
MIN_IMAGES_TO_JUDGE = 1000
"""The share of unusable images is judged from this many on, and at the end."""
ROWS_AT_A_TIME = 65_536

CACHED_ROWS = 512
"""Features that are read, converted and normalised at a time: 1.5 MB of float32 at 768 dimensions."""
OPEN_ARRAYS = 64
"""Memory-mapped shards that one process keeps open: far below the usual limit of 1024 files."""
_SKIPPED_KEY = b"mlcd_ds.skipped"

Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureExtractor:
    """name: which model, with a hash of its weights. dim: d. image_size: H.

    embed_images: uint8 [n, 3, H, H] to float32 [n, d] on the CPU, unit rows. embed_texts: n strings to the same, or None.
    """

    name: str
    dim: int
    image_size: int
    embed_images: Embed
    embed_texts: Callable[[Sequence[str]], torch.Tensor] | None = None


def resolved_precision(precision: str, device: torch.device) -> str:
    """What "auto" (bfloat16 on GPUs), "float32" or "bfloat16" comes to."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def load_extractor(spec: str, device: torch.device, precision: str, with_texts: bool = False) -> FeatureExtractor:
    """`builtin:PATCHES.npz`, `hf:PATH_OR_NAME` (a transformers CLIP model) or `run:PATH` (an encoder we trained).

    precision: "auto" (bfloat16 on GPUs), "float32" or "bfloat16"; builtin is always float32. Raises ConfigError for any
    other spec.
    """
    kind, _, path = spec.partition(":")
    if kind == "builtin" and path:
        return _builtin(Path(path))
    precision = resolved_precision(precision, device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if kind == "run" and path:
        return _run(path, device, dtype, with_texts)
    if kind == "hf" and path:
        from mlcd_ds.clustering.hf_clip import load_clip

        name, dim, image_size, embed_images, embed_texts = load_clip(path, device, dtype, with_texts)
        return FeatureExtractor(name, dim, image_size, embed_images, embed_texts)
    raise ConfigError(
        f"feature model {spec!r}: expected builtin:patches, builtin:FILE.npz, hf:PATH_OR_NAME or run:PATH"
    )


def _builtin(path: Path) -> FeatureExtractor:
    from mlcd_ds.clustering.builtin_patches import PatchDictionary

    patches = PatchDictionary.load(path)
    return FeatureExtractor(f"builtin:patches:{sha256(path)[:12]}", patches.dim, patches.image_size, patches.embed)


def _run(path: str, device: torch.device, dtype: torch.dtype, with_texts: bool) -> FeatureExtractor:
    folder = checkpoint.find_encoder(path)
    model = checkpoint.load_encoder(folder).to(device, dtype)

    @torch.inference_mode()
    def embed(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(model(images.to(device)).float(), dim=1).cpu()

    name = f"run:{json.loads((folder / 'encoder.json').read_text())['model']}"
    name += f":{sha256(folder / 'encoder.safetensors')[:12]}"
    size = model.config.embed_dim, model.config.image_size
    if not with_texts:
        return FeatureExtractor(name, *size, embed)
    tower = checkpoint.load_text(path)
    text, context = tower.model.to(device, dtype), tower.model.config.context

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> torch.Tensor:
        tokens = torch.from_numpy(tower.tokenizer.encode_all(texts, context)).to(device)
        return torch.nn.functional.normalize(text(tokens).float(), dim=1).cpu()

    name += f":{tower.digest[:12]}"
    return FeatureExtractor(name, *size, embed, embed_texts)


def extract_features(config: FeaturesConfig, topology: Topology) -> dict:
    """Writes the features of all shards, each rank every W-th shard; finished shards are left as they are.

    Returns {"model", "dim", "images", "skipped", "shards", "already"} of this rank. Raises DataError for shards, images or
    features that cannot be used, and for a folder that holds another model's.
    """
    if config.embedding == "mean" and not config.model.startswith(("hf:", "run:")):
        raise ConfigError("--embedding mean needs texts' embeddings: only hf: models and run: on captions have them")
    folder = Path(config.output_dir)
    shards = collectives.on_main(topology, expand_shards, config.shards, config.allow_pipe)
    collectives.on_main(topology, _prepare_builtin, config, shards, folder)
    spec = f"builtin:{folder / PATCHES_FILE}" if config.model == "builtin:patches" else config.model
    extractor = load_extractor(spec, topology.device, config.precision, config.embedding == "mean")
    described = {
        "format_version": FORMAT_VERSION,
        "model": extractor.name + (":mean" if config.embedding == "mean" else ""),
        "dim": extractor.dim,
        "normalised": True,
    }
    collectives.on_main(topology, _claim, folder, described, [shard_name(shard) for shard in shards])
    own = shards[topology.rank :: topology.world_size]
    todo = [shard for shard in own if not _metadata_file(folder, shard_name(shard)).exists()]
    counts = {"images": 0, "skipped": 0, "without_text": 0, "images_before": 0, "skipped_before": 0}
    names: list[str] = []
    # Shards finished by an earlier start count too: starting again must not get round the allowed fraction.
    for shard in own:
        _count_finished(_metadata_file(folder, shard_name(shard)), counts, names)
    files = {_metadata_file(folder, name).name: name for name in map(shard_name, shards)}
    with FolderProgress(
        "features",
        topology,
        folder / "metadata",
        files,
        lambda name: _read_footer(_metadata_file(folder, name)).num_rows,
    ) as progress:
        for shard in todo:
            _extract_shard(shard, folder, extractor, config, counts, names, progress)
            _judge(counts, names, config.max_skipped_fraction, final=False)
        totals = collectives.gather_objects((counts, names), topology)
    everywhere = {name: sum(part[name] for part, _ in totals) for name in counts}
    _judge(everywhere, [name for _, part in totals for name in part], config.max_skipped_fraction, final=True)
    return described | counts | {"shards": len(shards), "already": len(own) - len(todo), "skipped_names": names[:3]}


def _prepare_builtin(config: FeaturesConfig, shards: Sequence[str], folder: Path) -> None:
    """Learns the patch dictionary of `folder` unless it is there; DataError when that was learnt with other settings."""
    if config.model != "builtin:patches":
        return
    from mlcd_ds.clustering.builtin_patches import MAX_SIDE, PatchDictionary, learn_dictionary, learning_settings

    file, now = folder / PATCHES_FILE, learning_settings(config)
    if file.exists():
        before = PatchDictionary.load(file).learnt_with
        if before != now:
            raise DataError(
                f"{file} was learnt with other settings ({differences(before, now)}). Give those, take it as it is with "
                f"--model builtin:{file}, or choose another --output_dir."
            )
        return
    generator = np.random.default_rng(config.seed)
    sampled = [shards[i] for i in np.sort(generator.permutation(len(shards))[:16])]
    per_shard = -(-config.images_to_fit // len(sampled))
    first = next(_decoded(sampled[0], config, None), None)
    if first is None:
        raise DataError(f"{sampled[0]} holds no usable image to learn patches from")
    side = min(MAX_SIDE, *first[1].shape[:2])
    images = []
    for shard in sampled:
        images += [image for _, image, _ in itertools.islice(_decoded(shard, config, side), per_shard)]
    patches = learn_dictionary(np.stack(images).transpose(0, 3, 1, 2), config)
    make_folder(folder)
    patches.save(file)


def _claim(folder: Path, described: dict, names: Sequence[str]) -> None:
    """Notes what the folder is going to hold; shards of earlier calls stay on the list."""
    file = folder / "features.json"
    before = _read_description(file) or described
    if {name: before.get(name) for name in described} != described:
        raise DataError(
            f"{folder} holds features of {before.get('model')!r}, now asked for: {described['model']!r}. Choose another "
            "--output_dir, or remove that folder."
        )
    make_folder(folder)
    remove_stale(folder, *(folder / name for name in ("img_emb", "text_emb", "metadata")))
    now = described | {"shards": sorted({*before.get("shards", []), *names})}
    if now != before:
        write_json(file, now)


def _read_description(file: Path) -> dict | None:
    """features.json; None where there is none. Raises DataError when it is damaged."""
    if not file.exists():
        return None
    try:
        described = json.loads(file.read_text())
        described["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {error}), expected JSON with a field 'model'. Remove it: "
            "tools/extract_features.py writes it anew; without it the features count as of an unknown model."
        ) from None
    return described


def _count_finished(file: Path, counts: dict, names: list[str]) -> None:
    """Adds what a finished shard holds and what was skipped when it was made, from its footer."""
    if not file.exists():
        return
    footer = _read_footer(file)
    counts["images_before"] += footer.num_rows
    skipped = json.loads((footer.metadata or {}).get(_SKIPPED_KEY, b"[0, []]"))
    counts["skipped_before"] += skipped[0]
    names += skipped[1][: max(0, 3 - len(names))]


def _read_footer(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} is missing or damaged ({error}). Remove it and run tools/extract_features.py again: it redoes this "
            "shard."
        ) from None


def _decoded(shard: str, config: FeaturesConfig, side: int | None) -> Iterator[tuple[str, np.ndarray, dict]]:
    """(key, pixels, other parts) of a shard's usable images, cropped to `side` if given. One thread; for sampling."""
    for key, parts in read_samples(local_shard(shard, config.shard_cache, config.allow_pipe)):
        try:
            image = decode_image(parts[image_extension(parts)], config.max_pixels, side)
        except ImageError:
            continue  # counted when its shard is extracted
        yield key, image if side is None else resize_shorter_and_center_crop(image, side), parts


def _extract_shard(
    shard: str,
    folder: Path,
    extractor: FeatureExtractor,
    config: FeaturesConfig,
    counts: dict,
    names: list[str],
    progress: FolderProgress,
) -> None:
    """One shard, from tar to published files."""
    name = shard_name(shard)
    keys: list[str] = []
    images: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    skipped: list[str] = []
    wants_texts = extractor.embed_texts is not None
    for batch in batches_of_images(
        read_samples(local_shard(shard, config.shard_cache, config.allow_pipe)),
        extractor.image_size,
        config.batch_size,
        config.workers,
        config.max_pixels,
        config.fast_images,
    ):
        skipped += [f"{name}/{key}: {reason}" for key, reason in batch.skipped]
        if not batch.keys:
            continue
        features = extractor.embed_images(batch.images)
        broken = ~torch.isfinite(features).all(dim=1)
        if wants_texts:
            texts.append(_text_features(extractor, batch, features, counts))
            broken |= ~torch.isfinite(texts[-1]).all(dim=1)
        if broken.any():
            key = batch.keys[int(broken.nonzero()[0])]
            raise DataError(
                f"{extractor.name} gives features that are no numbers for {int(broken.sum())} image(s) of {shard}, e.g. key "
                f"{key!r}. Try --precision float32, or take the image out."
            )
        keys += batch.keys
        images.append(features)
        progress.add(len(batch.keys))
    counts["images"] += len(keys)
    counts["skipped"] += len(skipped)
    names += skipped[: max(0, 3 - len(names))]
    image_features = torch.cat(images) if images else torch.zeros(0, extractor.dim)
    if wants_texts:
        text_features = torch.cat(texts) if texts else torch.zeros(0, extractor.dim)
        _save(folder / "text_emb" / f"text_emb_{name}.npy", text_features)
        image_features = torch.nn.functional.normalize(image_features + text_features, dim=1)
    _save(folder / "img_emb" / f"img_emb_{name}.npy", image_features)
    metadata = _metadata_file(folder, name)
    metadata.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"key": pa.array(keys, pa.string())})
    table = table.replace_schema_metadata({_SKIPPED_KEY: json.dumps([len(skipped), skipped[:3]])})
    write_bytes(metadata, lambda file: pq.write_table(table, file))
    progress.finish()


def _text_features(
    extractor: FeatureExtractor, batch: "ImageBatch", images: torch.Tensor, counts: dict
) -> torch.Tensor:
    """The captions' embeddings; an image without a caption counts as its own caption, and is counted."""
    has_text = [bool(text) for text in batch.texts]
    counts["without_text"] += len(has_text) - sum(has_text)
    features = images.clone()
    if any(has_text):
        features[torch.tensor(has_text)] = extractor.embed_texts([text for text in batch.texts if text])
    return features


def _save(path: Path, features: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lambda file: np.save(file, features.numpy().astype(np.float16), allow_pickle=False))


def _judge(counts: dict, names: Sequence[str], allowed: float, final: bool) -> None:
    skipped = counts["skipped"] + counts["skipped_before"]
    total = counts["images"] + counts["images_before"] + skipped
    if skipped > allowed * total and (final or total >= MIN_IMAGES_TO_JUDGE):
        raise DataError(
            f"{skipped} of {total} images could not be used, more than --max_skipped_fraction {allowed:g} allows. "
            f"E.g. {'; '.join(names[:3])}. Mend or remove them and remove metadata/metadata_SHARD.parquet of their shards, "
            "which are then done again; or raise the fraction."
        )


@dataclass(frozen=True)
class ImageBatch:
    """images: uint8 [n, 3, H, H]. texts: KEY.txt, "" where there is none. parts: of each sample, extension to bytes.

    skipped: (key, reason) of images in between that could not be used.
    """

    keys: list[str]
    images: torch.Tensor
    texts: list[str]
    parts: list[dict[str, bytes]]
    skipped: list[tuple[str, str]]


def batches_of_images(
    samples: Iterator[tuple[str, dict[str, bytes]]],
    image_size: int,
    batch_size: int,
    workers: int,
    max_pixels: int,
    fast: bool = False,
) -> Iterator[ImageBatch]:
    """Decoded, center-cropped images of `samples` ((key, parts), see tars.read_samples), in order.

    fast: crops of `decode_center_crop` in place of CLIP's exact ones. workers: threads that decode the next batch while the
    caller works on this one (decoding releases the interpreter).
    """

    def decode(sample: tuple[str, dict[str, bytes]]) -> np.ndarray | str:
        try:
            data = sample[1][image_extension(sample[1])]
            if fast:
                return decode_center_crop(data, max_pixels, image_size)
            image = decode_image(data, max_pixels, image_size)
        except ImageError as error:
            return f"{error.reason}: {error}"
        return resize_shorter_and_center_crop(image, image_size)

    def assemble(chunk: list, decoded: list) -> ImageBatch:
        good = [(sample, image) for sample, image in zip(chunk, decoded, strict=True) if not isinstance(image, str)]
        skipped = [(sample[0], image) for sample, image in zip(chunk, decoded, strict=True) if isinstance(image, str)]
        pixels = np.stack([image for _, image in good]) if good else np.zeros((0, image_size, image_size, 3), np.uint8)
        return ImageBatch(
            [sample[0] for sample, _ in good],
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            [sample[1].get("txt", b"").decode("utf-8", "replace").strip() for sample, _ in good],
            [sample[1] for sample, _ in good],
            skipped,
        )

    samples = iter(samples)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting: tuple[list, list] | None = None
        while True:
            chunk = list(itertools.islice(samples, batch_size))
            decoding = [pool.submit(decode, sample) for sample in chunk]
            if waiting is not None:
                yield assemble(waiting[0], [future.result() for future in waiting[1]])
            if not chunk:
                return
            waiting = chunk, decoding


def _metadata_file(folder: Path, name: str) -> Path:
    return folder / "metadata" / f"metadata_{name}.parquet"


def to_unit_rows(values: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(float32 copy [n, d] with rows of length 1, their lengths before [n]); rows of no direction become NaN.

    out: where the copy goes.
    """
    raw = np.array(values, values.dtype.newbyteorder("="))
    unit = np.empty(raw.shape, np.float32) if out is None else out
    torch.from_numpy(unit).copy_(torch.from_numpy(raw))  # ten times as fast as numpy from float16
    lengths = np.sqrt(np.einsum("nd,nd->n", unit, unit))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit /= lengths[:, None]
    return unit, lengths


def _has_no_direction(lengths: np.ndarray) -> np.ndarray:
    return ~np.isfinite(lengths) | (lengths == 0)


class FeatureFolder:
    """Features in clip-retrieval's layout, ours or published ones: those lie in any number of files, in any order.

    model: from features.json; "unknown:FOLDER" where that is missing. dim: d. names: the finished shards', sorted.
    rows: of each. Raises DataError naming the file for: no shard, an unfinished shard, an .npy that is missing, cut or not
    [n, d] floats, rows that do not match the metadata, shards of different d, a damaged features.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._opened = lru_cache(OPEN_ARRAYS)(self.array)
        files = sorted((self.path / "metadata").glob("metadata_*.parquet"))
        if not files:
            raise DataError(
                f"{self.path} holds no features: expected metadata/metadata_*.parquet and img_emb/img_emb_*.npy, as "
                "tools/extract_features.py and clip-retrieval write them"
            )
        self.names = tuple(file.stem.removeprefix("metadata_") for file in files)
        described = _read_description(self.path / "features.json")
        self._refuse_unfinished((described or {}).get("shards", []))
        self.model = described["model"] if described else f"unknown:{self.path.name}"
        shapes = [self._checked_shape(name) for name in self.names]
        self.dim = shapes[0][1]
        for name, (_, dim) in zip(self.names, shapes, strict=True):
            if dim != self.dim:
                raise DataError(
                    f"{self.image_file(name)} has {dim} dimensions, {self.image_file(self.names[0])} has {self.dim}: "
                    "features of different models are mixed. Extract them again into an empty folder."
                )
        self.rows = tuple(rows for rows, _ in shapes)
        self._dropped: dict[str, np.ndarray] = {}

    def drop(self, bad: Mapping[str, np.ndarray]) -> None:
        """Hides rows: `bad` has their sorted numbers by shard. rows, keys and unit_rows then count the others alone.

        To be called once, with rows as `bad_rows` numbers them.
        """
        self._dropped = {name: rows for name, rows in bad.items() if len(rows)}
        self.rows = tuple(
            count - len(self._dropped.get(name, ())) for name, count in zip(self.names, self.rows, strict=True)
        )

    def bad_rows(self, name: str) -> np.ndarray:
        """Numbers, int64 and sorted, of a shard's rows that have no direction: all zeros, or values that are no numbers."""
        array = self.array(name)
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(array), ROWS_AT_A_TIME):
            _, lengths = to_unit_rows(array[start : start + ROWS_AT_A_TIME])
            found.append(start + np.flatnonzero(_has_no_direction(lengths)))
        return np.concatenate(found)

    def _refuse_unfinished(self, asked_for: Sequence[str]) -> None:
        lacking = sorted(set(asked_for) - set(self.names))
        if lacking:
            raise DataError(
                f"{len(lacking)} of the {len(asked_for)} shards that {self.path / 'features.json'} lists have no features "
                f"yet, e.g. {lacking[0]}. Run tools/extract_features.py again, which goes on where it was stopped; or, to "
                f'go on without them, take their names ("{lacking[0]}", ...) out of "shards" in that file.'
            )
        written = {file.stem.removeprefix("img_emb_") for file in (self.path / "img_emb").glob("img_emb_*.npy")}
        unfinished = sorted(written - set(self.names))
        if unfinished:
            raise DataError(
                f"{len(unfinished)} shard(s) in {self.path} are unfinished, e.g. {self.image_file(unfinished[0])} has no "
                f"{_metadata_file(self.path, unfinished[0]).name} yet. Run tools/extract_features.py again, which redoes "
                "them, or remove those files."
            )

    def _checked_shape(self, name: str) -> tuple[int, int]:
        """(n, d) of a shard, whose file is not kept open."""
        shape = self.array(name).shape
        count = _read_footer(_metadata_file(self.path, name)).num_rows
        if shape[0] != count:
            raise DataError(
                f"{self.image_file(name)} has {shape[0]} rows, {_metadata_file(self.path, name)} has {count}: remove both "
                "and run tools/extract_features.py again"
            )
        return shape

    def fingerprint(self) -> str:
        """Changes with model, dimensions, shard names or their numbers of rows; 16 hexadecimal digits."""
        return hashlib.sha256(repr((self.model, self.dim, self.names, self.rows)).encode()).hexdigest()[:16]

    @property
    def num_features(self) -> int:
        """Rows of all shards."""
        return sum(self.rows)

    def array(self, name: str) -> np.ndarray:
        """One shard's features, memory-mapped, [n, d]."""
        file = self.image_file(name)
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"the features {file} cannot be read ({error}): the file is missing or cut. Remove "
                f"{_metadata_file(self.path, name)} and run tools/extract_features.py again: it redoes this shard."
            ) from None
        if array.ndim != 2 or array.dtype.kind != "f":
            raise DataError(f"{file} holds {array.dtype} {list(array.shape)}, expected floats [images, dimensions]")
        return array

    def keys(self, name: str) -> list[str]:
        """The keys of one shard's rows."""
        keys = self.stored_keys(name)
        dropped = self._dropped.get(name)
        return keys if dropped is None else np.delete(np.array(keys, object), dropped).tolist()

    def stored_keys(self, name: str, start: int = 0, stop: int | None = None) -> list[str]:
        """Of rows start..stop, dropped ones counted: column `key`.

        Published folders may have `image_path` alone, whose base name up to the first dot is the key.
        """
        file = _metadata_file(self.path, name)
        try:
            columns = pq.read_schema(file).names
            column = "key" if "key" in columns else "image_path"
            keys = pq.read_table(file, columns=[column]).column(column)[start:stop].to_pylist()
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{file} has no readable column `key` or `image_path`: {error}") from None
        wrong = next((row for row, key in enumerate(keys) if not isinstance(key, str)), None)
        if wrong is not None:
            raise DataError(f"{file}: row {start + wrong} of column `{column}` is {keys[wrong]!r}, expected a text")
        return keys if column == "key" else [path.rsplit("/", 1)[-1].partition(".")[0] for path in keys]

    def unit_rows(
        self, name: str, start: int, stop: int, rows: np.ndarray | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 rows start..stop of a shard (or of its selected `rows`, sorted), each of length 1.

        out: float32 [stop - start or more, d] to write them to: fresh memory costs more than the arithmetic.
        Raises DataError naming file and row for values that are no numbers and for rows of zeros.
        """
        values, bad, lengths = self._unit_rows(name, start, stop, rows, out)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = int(self._on_disk(name, start, stop, rows)[at])
            what = "is all zeros" if lengths[at] == 0 else "has values that are no numbers"
            raise DataError(
                f"{self.image_file(name)}: row {row} (key {self.stored_keys(name)[row]!r}) {what}, {int(bad.sum())} such "
                "row(s) in this block. Extract this shard again, take the image out of the tar, or go on without such rows: "
                "--drop_bad_rows."
            )
        return values

    def usable_rows(
        self, name: str, start: int, stop: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows as from `unit_rows`, whether each can be used [stop - start]); those that cannot are zeros."""
        values, bad, _ = self._unit_rows(name, start, stop, rows)
        values[bad] = 0
        return values, ~bad

    def _unit_rows(
        self, name: str, start: int, stop: int, rows: np.ndarray | None, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        array = self._opened(name)
        dropped = len(self._dropped.get(name, ()))
        stop = min(stop, len(array) - dropped if rows is None else len(rows))
        values = np.empty((stop - start, self.dim), np.float32) if out is None else out[: stop - start]
        lengths = np.empty(stop - start, np.float32)
        for first in range(start, stop, CACHED_ROWS):  # little enough to stay in the cache from step to step
            end = min(first + CACHED_ROWS, stop)
            plain = rows is None and not dropped
            raw = array[slice(first, end) if plain else self._on_disk(name, first, end, rows)]
            part = slice(first - start, end - start)
            _, lengths[part] = to_unit_rows(raw, values[part])
        return values, _has_no_direction(lengths), lengths

    def _on_disk(self, name: str, start: int, stop: int, rows: np.ndarray | None) -> np.ndarray:
        """Numbers in the file of the rows start..stop, or of rows[start:stop], that are counted without the dropped ones."""
        counted = np.arange(start, stop) if rows is None else np.asarray(rows[start:stop])
        dropped = self._dropped.get(name)
        if dropped is None:
            return counted
        # The i-th dropped row has dropped[i] - i kept ones before it.
        return counted + np.searchsorted(dropped - np.arange(len(dropped)), counted, side="right")

    def image_file(self, name: str) -> Path:
        """Where one shard's features lie."""
        return self.path / "img_emb" / f"img_emb_{name}.npy"
