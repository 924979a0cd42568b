"""Reading tars, decoding and the whole loader, on one core, against webdataset and plain Pillow.

All times are CPU seconds of one process with one thread, so that other work on the machine counts little; contenders take
turns, the least of the rounds counts.
"""

import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image

from mlcd_ds.config import BenchDataConfig, RunConfig
from mlcd_ds.data.decode import ImageError
from mlcd_ds.data.labels import LabelsInfo, label_path, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader, build_shard_table
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.tar_index import find_index, write_index
from mlcd_ds.data.tars import (
    expand_shards,
    image_extension,
    import_webdataset,
    local_shard,
    read_samples,
    shard_name,
    write_tar,
)
from mlcd_ds.data.transforms import (
    _crop_box,
    decode_center_crop,
    decode_random_resized_crop,
    resize_shorter_and_center_crop,
)
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.files import write_json
from mlcd_ds.topology import Topology

MAX_PIXELS = 50_000_000
NUM_CLASSES, NUM_LABELS = 1000, 8
SMALL_SIDE = 32


def bench_data(config: BenchDataConfig) -> dict:
    """Measures what `config` asks for, prints tables, returns (and writes to config.output) all numbers."""
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {config.output}: its folder does not exist")
    given = [
        f"--{name} {getattr(config, name)}" for name in type(config).model_fields if name in config.model_fields_set
    ]
    flags = [flag for flag in given if not flag.startswith(("--output ", "--shards "))]
    if config.shards is not None:
        flags.insert(0, f"--shards {'::'.join(Path(part).name for part in config.shards.split('::'))}")
    result: dict = {
        "command": " ".join(["python tools/bench.py data", *flags]),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "webdataset": import_webdataset().__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(config, Path(folder), result)
    finally:
        torch.set_num_threads(threads)
    return result


def _measure(config: BenchDataConfig, folder: Path, result: dict) -> None:
    if config.shards:
        sets = {"--shards": (_linked(config.shards, folder / "given"), config.image_size)}
    else:
        print(f"making {config.images} pictures of 1600 x 1200", flush=True)
        sets = {"1600 x 1200": (_made(folder / "large", config.images, 1600, 1200, config.seed), config.image_size)}
    small = _made(folder / "small", config.small_images, SMALL_SIDE, SMALL_SIDE, config.seed)
    rewritten = _rewritten(small, folder / "small_by_webdataset")
    if config.image_size != SMALL_SIDE:  # else what was asked for is as small, and its rows would come twice
        sets["32 x 32"] = small, SMALL_SIDE

    def keep(part: str, name: str, row: dict) -> None:
        result.setdefault(part, {})[name] = row
        if config.output is not None:
            write_json(Path(config.output), result)

    for name, shards in (
        *((name, shards) for name, (shards, _) in sets.items()),
        ("32 x 32, by webdataset", rewritten),
    ):
        keep("tars", name, _time_tars(name, shards, config.repeats))
    for name, (shards, size) in sets.items():
        keep("decode", name, _time_decode(name, shards, size, config))
    for name, (shards, size) in sets.items():
        keep("loader", name, _time_loader(name, shards, size, config, folder / f"labels of {name}"))


# --- what is read ---------------------------------------------------------------------------------------------------


def _linked(spec: str, folder: Path) -> list[Path]:
    """Links to the user's tars, so that indexes can be written beside them."""
    folder.mkdir()
    links = []
    for shard in expand_shards(spec):
        link = folder / f"{shard_name(shard)}.tar"
        link.symlink_to(local_shard(shard, None).resolve())
        links.append(link)
    return links


def _made(folder: Path, images: int, width: int, height: int, seed: int) -> list[Path]:
    """One tar of JPEGs with a caption and a JSON each."""
    samples = (
        (f"{i:09d}", {"jpg": made_photograph(seed + i, width, height), "txt": b"a picture", "json": b'{"a": 1}'})
        for i in range(images)
    )
    write_tar(folder / "00000.tar", samples)
    return [folder / "00000.tar"]


def made_photograph(seed: int, width: int, height: int) -> bytes:
    """A JPEG with a photograph's falling spectrum: blobs of all sizes, edges, some noise."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, np.float32)
    cells = 4
    while cells <= min(width, height) // 2:
        blobs = generator.integers(0, 256, (max(2, cells * height // width), cells, 3), dtype=np.uint8)
        blown = np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels += (blown - 128) * (2.0 / cells**0.7)
        cells *= 2
    for _ in range(20):
        top, left = generator.integers(height), generator.integers(width)
        pixels[top : top + height // 5, left : left + width // 6] *= generator.uniform(0.5, 1.3)
    pixels += generator.normal(0, 2, pixels.shape).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _rewritten(shards: list[Path], folder: Path) -> list[Path]:
    """The same samples as webdataset's own writer lays them down: an extended header before every member."""
    folder.mkdir()
    for shard in shards:
        with (folder / shard.name).open("wb") as file, import_webdataset().TarWriter(file) as writer:
            for key, members in read_samples(shard):
                writer.write({"__key__": key, **members})
    return [folder / shard.name for shard in shards]


# --- tars -----------------------------------------------------------------------------------------------------------


def _time_tars(name: str, shards: list[Path], repeats: int) -> dict:
    for shard in shards:
        write_index(find_index(shard).index)

    def ours(walk: bool) -> tuple[int, int]:
        samples = size = 0
        for shard in shards:
            index = None if walk else find_index(shard).index
            for _, members in read_samples(shard, index=index):
                samples += 1
                size += sum(map(len, members.values()))
        return samples, size

    def theirs() -> tuple[int, int]:
        samples = size = 0
        for sample in _webdataset_samples(shards):
            samples += 1
            size += sum(len(value) for key, value in sample.items() if key[:2] != "__")
        return samples, size

    contenders = {"webdataset": theirs, "walk": lambda: ours(True), "index": lambda: ours(False)}
    found = {contender: run() for contender, run in contenders.items()}
    if len(set(found.values())) > 1:
        raise RuntimeError(f"the readers disagree about {name}: {found}")
    samples = found["walk"][0]
    seconds = _in_turn(contenders, repeats)
    row = {
        "samples": samples,
        "bytes": found["walk"][1],
        "seconds": seconds,
        **{f"{contender}_samples_per_second": samples / least for contender, least in seconds.items()},
        "walk_per_webdataset": seconds["webdataset"] / seconds["walk"],
        "index_per_webdataset": seconds["webdataset"] / seconds["index"],
    }
    print(
        f"tars, {name}: {samples} samples; webdataset {row['webdataset_samples_per_second']:,.0f} samples/s, walk "
        f"{row['walk_samples_per_second']:,.0f} ({row['walk_per_webdataset']:.1f}x), index "
        f"{row['index_samples_per_second']:,.0f} ({row['index_per_webdataset']:.1f}x)",
        flush=True,
    )
    return row


def _webdataset_samples(shards: list[Path]) -> Iterator[dict]:
    webdataset = import_webdataset()
    for shard in shards:
        with shard.open("rb") as stream:
            files = webdataset.tariterators.tar_file_expander([{"url": str(shard), "stream": stream}])
            for sample in webdataset.tariterators.group_by_keys(files):
                if image_extension(sample):
                    yield sample


# --- decoding -------------------------------------------------------------------------------------------------------


def pillow_center_crop(data: bytes, size: int) -> np.ndarray:
    """What our decoding replaces: Pillow's full decode, bicubic resize of the shorter side, central square."""
    return resize_shorter_and_center_crop(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), size)


def pillow_random_crop(data: bytes, size: int, scale_min: float, generator: np.random.Generator) -> np.ndarray:
    """The same for a random resized crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, width, height = _crop_box(*image.size, scale_min, generator)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.asarray(crop)


def _time_decode(name: str, shards: list[Path], size: int, config: BenchDataConfig) -> dict:
    images: dict[str, bytes] = {}
    unreadable, lost, decibels = 0, [], []
    for shard in shards:
        for key, members in read_samples(shard):
            if len(images) == config.images:
                break
            data = members[image_extension(members)]
            try:
                expected = pillow_center_crop(data, size)
            except OSError:
                unreadable += 1
                continue
            try:
                found = decode_center_crop(data, MAX_PIXELS, size)
            except ImageError as error:
                lost.append(f"{shard.stem}/{key}: {error}")
                continue
            error = np.square(found.astype(np.float64) - expected).mean()
            decibels.append(10 * np.log10(255**2 / max(error, 1e-3)))
            images[key] = data
    if not images:
        raise DataError(f"no image of {name} can be read: {unreadable} not by Pillow, {len(lost)} not by us")

    def drawn(crop: Callable, *before: object) -> Callable:
        """The same crop of an image in each round, another of each image."""
        return lambda data, number: crop(data, *before, np.random.default_rng([config.seed, number]))

    contenders = {
        "pillow": lambda data, _: pillow_center_crop(data, size),
        "ours": lambda data, _: decode_center_crop(data, MAX_PIXELS, size),
        "pillow_random": drawn(pillow_random_crop, size, 0.4),
        "ours_random": drawn(decode_random_resized_crop, MAX_PIXELS, size, 0.4, False),
    }
    if all(data[:3] == b"\xff\xd8\xff" for data in images.values()):
        # An eighth of the size is next to no arithmetic, but all bits are read: what any decoder of whole files takes.
        contenders["bits"] = lambda data, _: simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
    seconds = dict.fromkeys(contenders, 0.0)
    for number, data in enumerate(images.values()):
        least = _in_turn({name: _call(run, data, number) for name, run in contenders.items()}, config.repeats)
        seconds = {name: seconds[name] + least[name] for name in seconds}
    row = {
        "images": len(images),
        "size": size,
        "mean_bytes": sum(map(len, images.values())) / len(images),
        "seconds": seconds,
        **{f"{name}_images_per_second": len(images) / total for name, total in seconds.items()},
        "ours_per_pillow": seconds["pillow"] / seconds["ours"],
        "random_per_pillow": seconds["pillow_random"] / seconds["ours_random"],
        "decibels": {"mean": np.mean(decibels), "median": np.median(decibels), "lowest": min(decibels)},
        "unreadable_by_pillow": unreadable,
        "lost": lost,
    }
    row["decibels"] = {name: round(float(value), 2) for name, value in row["decibels"].items()}
    bits = ""
    if "bits" in seconds:
        row["bits_of_ours_random"] = seconds["bits"] / seconds["ours_random"]
        bits = f" (reading the bits is {row['bits_of_ours_random']:.0%} of ours)"
    print(
        f"decode, {name}: {len(images)} images to {size}; center crop {row['ours_images_per_second']:.0f} images/s against "
        f"{row['pillow_images_per_second']:.0f} ({row['ours_per_pillow']:.2f}x), random crop "
        f"{row['random_per_pillow']:.2f}x{bits}; {row['decibels']['mean']:.1f} dB (lowest {row['decibels']['lowest']:.1f}), "
        f"{len(lost)} lost",
        flush=True,
    )
    return row


def _call(run: Callable, data: bytes, number: int) -> Callable[[], object]:
    return lambda: run(data, number)


# --- the whole loader -----------------------------------------------------------------------------------------------


def _time_loader(name: str, shards: list[Path], size: int, config: BenchDataConfig, labels: Path) -> dict:
    """Batches of images and labels, in the process that measures."""
    info = LabelsInfo(NUM_CLASSES, NUM_LABELS, "none", "none")
    for shard in shards:
        keys = find_index(shard).index.keys
        generator = np.random.default_rng(0)
        rows = np.stack([generator.choice(NUM_CLASSES, NUM_LABELS, replace=False) for _ in keys])
        write_label_shard(label_path(labels, shard.stem), keys, rows, np.zeros(rows.shape), info)
    settings = RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-", workers=0, shuffle_window=256)
    one = Topology.single()
    table = build_shard_table([str(shard) for shard in shards], [labels], NUM_LABELS, 1.0, None, one)
    batch = min(config.batch_size, table.num_samples)
    steps = table.num_samples // batch

    def ours() -> int:
        plan = EpochPlan(0, table.counts, batch, settings.shuffle_window)
        loader = ImageLabelLoader(settings, table, plan, size, one)
        return sum(len(images.keys) for images in loader.iterate(0, steps))

    def theirs(decode: Callable) -> int:
        batches = images = 0
        pending = []
        for number, sample in enumerate(_webdataset_samples(shards)):
            generator = np.random.default_rng(number)
            crop = decode(sample[image_extension(sample)], generator)
            pending.append(torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))))
            if len(pending) == batch:
                images += len(torch.stack(pending))
                batches, pending = batches + 1, []
            if batches == steps:
                break
        return images

    def with_ours(data: bytes, generator: np.random.Generator) -> np.ndarray:
        return decode_random_resized_crop(data, MAX_PIXELS, size, settings.crop_scale_min, settings.flip, generator)

    def with_pillow(data: bytes, generator: np.random.Generator) -> np.ndarray:
        crop = pillow_random_crop(data, size, settings.crop_scale_min, generator)
        return crop[:, ::-1] if settings.flip and generator.random() < 0.5 else crop

    contenders = {
        "ours": ours,
        "webdataset": lambda: theirs(with_ours),
        "webdataset_pillow": lambda: theirs(with_pillow),
    }
    seconds = _in_turn(contenders, config.repeats)
    images = steps * batch
    row = {
        "images": images,
        "batch": batch,
        "seconds": seconds,
        **{f"{contender}_images_per_second": images / least for contender, least in seconds.items()},
        "ours_per_webdataset": seconds["webdataset"] / seconds["ours"],
        "ours_per_webdataset_pillow": seconds["webdataset_pillow"] / seconds["ours"],
    }
    print(
        f"loader, {name}: {row['ours_images_per_second']:.0f} images/s; webdataset with the same transforms "
        f"{row['webdataset_images_per_second']:.0f} (ours {row['ours_per_webdataset']:.2f}x), with Pillow's "
        f"{row['webdataset_pillow_images_per_second']:.0f} (ours {row['ours_per_webdataset_pillow']:.2f}x)",
        flush=True,
    )
    return row


def _in_turn(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least CPU seconds of each, over rounds in which each runs once."""
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            started = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - started)
    return least
