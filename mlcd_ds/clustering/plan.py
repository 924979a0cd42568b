"""What a clustering will take, before it is started: FLOPs, bytes and memory by arithmetic, hours from measured rates.

In an iteration of `kmeans` blocks are read, made into unit rows, searched and added up; then sums are reduced, centers
gathered and kept. Where a GPU searches, a thread has the next block made ready meanwhile, so that the longer of both counts.

Shapes: n features in use, k centers, d dimensions, W ranks, K coarse clusters of a two-level clustering.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import collectives
from mlcd_ds.benchmarks.timing import in_processes, time_once
from mlcd_ds.clustering.features import CACHED_ROWS, FeatureFolder, to_unit_rows
from mlcd_ds.clustering.kmeans import BLOCK_ROWS
from mlcd_ds.clustering.nearest import CENTERS_PER_LIST, TILE_CENTERS, TILE_FEATURES, index_of
from mlcd_ds.clustering.two_level import COARSE_POINTS, PROBES, levels_iterations
from mlcd_ds.topology import Topology

FEATURE_BYTES = 2
"""Of a value on the disk: float16."""
PAGE = 4096
UNEVEN = 1.1
"""Products inside coarse clusters over those of even ones, the mean square of their shares: 1.06 was measured."""
BOOKS_BYTES = 150
"""Of a center: sizes, flags, and the heap that splits large clusters."""
FAISS_GPU_SCRATCH = 1_536 << 20
"""What faiss's GPU resources set aside by default."""

MEASURED_CENTERS, MEASURED_CPU_CENTERS = 65_536, 8_192
MEASURED_SECONDS = 0.5
MEASURED_FILE, MEASURED_SUM = 256 << 20, 16 << 20
"""Sizes of what is timed: centers to search on a GPU and a CPU, seconds, bytes read, bytes summed over ranks."""


@dataclass(frozen=True)
class Job:
    """A clustering: all that its cost depends on. device: "cpu" or "cuda". coarse: K, None for one level.

    blocks: of features, at least n / BLOCK_ROWS; a shard has one of its own.
    """

    num_features: int
    dim: int
    k: int
    ranks: int
    iterations: int
    max_points_per_center: int
    backend: str
    nprobe: int
    device: str
    coarse: int | None = None
    refinements: int = 2
    probes: int = 16
    blocks: int = 0

    @property
    def used(self) -> int:
        """n: all features, or the sample."""
        return min(self.num_features, self.k * self.max_points_per_center)

    @property
    def centers_bytes(self) -> int:
        """k d float32."""
        return 4 * self.k * self.dim


@dataclass(frozen=True)
class Pass:
    """One pass over features. rows: features that are looked at, and flops, over all ranks.

    read, sent: bytes of one rank. kept: bytes that rank 0 writes and hashes.
    """

    name: str
    times: int
    rows: int
    flops: float
    read: float
    sent: float
    kept: float = 0


@dataclass(frozen=True)
class Rates:
    """Of one rank: FLOP/s of the search, bytes per second of the rest. sources: of each, given or measured how.

    search: and adding up to sums. prepare: float16 features made float32 unit rows. disk: read. link: sent in collectives.
    """

    search: float
    prepare: float
    disk: float
    link: float
    sources: dict[str, str]


def search_flops(n: float, k: int, d: int, backend: str = "faiss", nprobe: int = 16) -> float:
    """2 n k d for the exact searches; an inverted file compares with its lists, then with the centers of some of them."""
    if backend != "ivf":
        return 2.0 * n * k * d
    lists = max(1, min(round(4 * math.sqrt(k)), k // CENTERS_PER_LIST))
    return 2.0 * n * d * (lists + min(nprobe, lists) * k / lists)


def read_bytes(num_features: int, used: int, d: int) -> float:
    """Of one pass over `used` of the features on the disk. A page is read when any of its rows is wanted."""
    row = FEATURE_BYTES * d
    share = used / num_features
    touched = 1 - (1 - share) ** (1 + PAGE / row) if share < 1 else 1.0
    return min(num_features * row * touched, used * (row + PAGE))


def summed_bytes(size: float, ranks: int) -> float:
    """Sent by a rank that reduce-scatters `size` bytes and gathers as many, round a ring; an all-reduce sends the same."""
    return 2 * size * (ranks - 1) / ranks


def passes(job: Job) -> list[Pass]:
    """What the clustering does, in its order."""
    n, d, W = job.used, job.dim, job.ranks
    read = read_bytes(job.num_features, n, d) / W
    sent = summed_bytes(job.centers_bytes, W)
    drawn = min(read, job.k * (FEATURE_BYTES * d + PAGE) / W)
    exact = search_flops(n, job.k, d, job.backend, job.nprobe)
    lloyd = Pass("iterations over all centers", job.iterations, n, exact, read, sent, job.centers_bytes)
    if job.coarse is None:
        return [Pass("start: centers drawn", 1, job.k, 0, drawn, sent), lloyd]
    K = job.coarse
    sample, coarse_bytes = min(job.num_features, COARSE_POINTS * K), 4 * K * d
    blocks = max(job.blocks, -(-job.num_features // BLOCK_ROWS))
    inside = search_flops(n, job.k / K, d) * UNEVEN
    coarsely, fine, narrow = levels_iterations(job.iterations)
    several = search_flops(n, K, d) + job.probes * inside if 0 < job.probes < K else exact
    coarse_read = read_bytes(job.num_features, sample, d) / W
    coarse_flops, coarse_sent = search_flops(sample, K, d), summed_bytes(coarse_bytes, W)
    return [
        Pass("coarse iterations", coarsely, sample, coarse_flops, coarse_read, coarse_sent),
        Pass("features to coarse clusters", 1, n, search_flops(n, K, d), read, summed_bytes(8 * blocks * K, W)),
        Pass("centers drawn inside them", 1, n, 0, read, sent),
        Pass("iterations inside them", narrow, n, inside, read, sent, job.centers_bytes),
        Pass(f"inside {PROBES} of them", fine - narrow, n, min(PROBES, K) * inside, read, sent, job.centers_bytes),
        Pass("iterations over all centers", job.refinements, n, several, read, sent, job.centers_bytes),
    ]


def label_pass(job: Job) -> Pass:
    """tools/assign_labels.py with these centers: all features, each once."""
    read = read_bytes(job.num_features, job.num_features, job.dim) / job.ranks
    flops = search_flops(job.num_features, job.k, job.dim, job.backend, job.nprobe)
    return Pass("assign_labels", 1, job.num_features, flops, read, 0)


def seconds(one: Pass, job: Job, rates: Rates) -> dict[str, float]:
    """Of a pass, by part. Rank 0 keeps the centers while the others wait: written, and read again to be hashed."""
    return {
        "search": one.flops / job.ranks / rates.search,
        "preparing": FEATURE_BYTES * job.dim * one.rows / job.ranks / rates.prepare,
        "disk": one.read / rates.disk,
        "network": one.sent / rates.link if one.sent else 0.0,
        "keeping": 2 * one.kept / rates.disk,
    }


def whole_seconds(parts: dict[str, float], device: str) -> float:
    """Of a pass, of whose parts (see `seconds`) some go on at the same time."""
    alone = parts["network"] + parts["keeping"]
    if device == "cpu":
        return parts["preparing"] + parts["search"] + parts["disk"] + alone
    return max(parts["search"], parts["preparing"] + parts["disk"]) + alone


def kmeans_memory(job: Job, block_rows: int = BLOCK_ROWS) -> tuple[dict[str, int], dict[str, int]]:
    """(on the device, on the host): bytes of one rank by part at its peak, without the interpreter and its libraries.

    On a CPU the first is empty. Mapped pages of features come on top: the system takes them back when memory is short.
    The GPU's part is arithmetic that no GPU has confirmed yet.
    """
    C, W = job.centers_bytes, job.ranks
    share = -(-job.used // W)
    block = 4 * min(block_rows, share) * job.dim
    lists = max(1, min(round(4 * math.sqrt(job.k)), job.k // CENTERS_PER_LIST))
    inverted = C + 8 * job.k + 4 * lists * job.dim
    scores = min(TILE_FEATURES, share, block_rows) * min(TILE_CENTERS, job.k)
    books = {"books": BOOKS_BYTES * job.k + 8 * share}
    if job.coarse is not None:
        books["books"] += 16 * job.coarse * max(job.blocks, -(-job.num_features // BLOCK_ROWS))
    if job.device == "cpu":
        searching = {"faiss": C, "ivf": inverted, "torch": 4 * scores}[job.backend] + 2 * block
        # gloo reduces a copy of the sums and hands over the rank's part; the search is over by then.
        reducing = C + C // W if W > 1 else 0
        what = {"the search": searching} if searching >= reducing else {"copies while summing": reducing}
        return {}, {"centers": C, "sums": C} | what | books
    searching = {"faiss": C // 2 + FAISS_GPU_SCRATCH, "ivf": 0, "torch": C + C // 2 + 2 * scores}[job.backend]
    reducing = C // W
    device = {
        "sums": C,
        "the search" if searching >= reducing else "own sums": max(searching, reducing),
        "block": block,
    }
    host = {"centers": C, "new centers": C, "blocks": 3 * block} | books
    if job.backend == "ivf":
        host["the search"] = inverted
    return device, host


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    job: Job,
    topology: Topology,
    features: FeatureFolder | None,
    folder: Path | None,
    given: dict[str, float | None],
) -> Rates:
    """The rates of this machine, in a few seconds; those in `given` (search in FLOP/s, the rest in bytes/s) are not timed.

    features: files to read for the disk's rate; else a file is written into `folder` (or the system's temporary folder).
    Every rank must call it: the link is timed between the ranks of this start, or between two processes of this machine.
    """
    timed: dict[str, Callable[[], tuple[float, str]]] = {
        "search": lambda: _search_rate(job, topology),
        "prepare": lambda: _prepare_rate(job),
        "disk": lambda: _disk_rate(features, folder),
        "link": lambda: _link_rate(topology) if job.ranks > 1 else (math.inf, "not needed"),
    }
    found: dict[str, tuple[float, str]] = {}
    for name, time_it in timed.items():
        value = given.get(name)
        found[name] = (value, "given") if value is not None else time_it()
    return Rates(*(found[name][0] for name in timed), {name: source for name, (_, source) in found.items()})


def _repeat(work: Callable[[], object]) -> float:
    """Seconds of one call: the fastest within MEASURED_SECONDS, at least two, after one that is not counted."""
    work()
    taken: list[float] = []
    while sum(taken) < MEASURED_SECONDS or len(taken) < 2:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _random_rows(rows: int, d: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, d), np.float32).astype(np.float16)


def _search_rate(job: Job, topology: Topology) -> tuple[float, str]:
    k = min(job.k, MEASURED_CPU_CENTERS if topology.device.type == "cpu" else MEASURED_CENTERS)
    centers, _ = to_unit_rows(_random_rows(k, job.dim))
    index = index_of(centers, job.backend, topology.device, job.nprobe)
    rows = 256 if topology.device.type == "cpu" else 16_384
    block, _ = to_unit_rows(_random_rows(rows, job.dim))
    sums = torch.zeros(k, job.dim, device=topology.device)

    def search_and_add() -> None:
        nearest = torch.from_numpy(index.search(block, 1)[1][:, 0])
        sums.index_add_(0, nearest.to(sums.device), torch.from_numpy(block).to(sums.device))

    taken = _repeat(search_and_add)
    rate = search_flops(rows, k, job.dim, job.backend, job.nprobe) / taken
    return rate, f"measured: {job.backend}, {rows:,} features against {k:,} centers on this {topology.device.type}"


def _prepare_rate(job: Job) -> tuple[float, str]:
    rows = min(BLOCK_ROWS, max(256, (32 << 20) // (FEATURE_BYTES * job.dim)))
    block = _random_rows(rows, job.dim)
    unit = np.empty((rows, job.dim), np.float32)

    def prepare() -> None:
        for first in range(0, rows, CACHED_ROWS):
            part = slice(first, first + CACHED_ROWS)
            to_unit_rows(block[part], unit[part])

    return block.nbytes / _repeat(prepare), "measured: float16 rows made unit rows on this CPU"


def _disk_rate(features: FeatureFolder | None, folder: Path | None) -> tuple[float, str]:
    if features is not None:
        files, where = [features.image_file(name) for name in features.names], f"the files of {features.path}"
        rate, size = _read_rate(files)
        return rate, f"measured: {size / 1e6:,.0f} MB of {where}"
    place = next((str(parent) for parent in [folder, *folder.parents] if parent.is_dir()), None) if folder else None
    with tempfile.TemporaryDirectory(dir=place, prefix="mlcd_ds_disk.") as temporary:
        file = Path(temporary) / "block"
        block = np.random.default_rng(0).bytes(16 << 20)
        with file.open("wb") as out:
            for _ in range(MEASURED_FILE // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        rate, size = _read_rate([file])
        return rate, f"measured: {size / 1e6:,.0f} MB written to and read from {Path(temporary).parent}"


def _read_rate(files: list[Path]) -> tuple[float, int]:
    """(bytes per second, bytes) of up to MEASURED_FILE bytes, not from the page cache."""
    size, taken = 0, 0.0
    buffer = bytearray(8 << 20)
    for file in files:
        with file.open("rb", buffering=0) as source:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while size < MEASURED_FILE and (got := source.readinto(buffer)):
                size += got
            taken += time.perf_counter() - started
        if size >= MEASURED_FILE:
            break
    return size / taken, size


def _link_rate(topology: Topology) -> tuple[float, str]:
    if topology.is_distributed:
        where = f"between the {topology.world_size} ranks of this start"
        return _summing_rate(topology), f"measured: {where}"
    return in_processes(
        2, _link_between_two
    ), "measured: between two processes of this machine, which is not your network"


def _link_between_two(rank: int, folder: Path) -> float:
    topology = Topology.on_this_machine(rank, 2, folder / "store")
    rate = _summing_rate(topology)
    topology.stop()
    return rate


def _summing_rate(topology: Topology) -> float:
    W = topology.world_size
    sums = torch.zeros(MEASURED_SUM // 4 // W * W, 1, device=topology.device)

    def work() -> None:
        collectives.all_gather(collectives.reduce_scatter(sums, topology), topology)

    taken = min(time_once(work, topology) for _ in range(4))
    slowest = collectives.max_(torch.tensor([taken], dtype=torch.float64, device=topology.device), topology)
    return summed_bytes(4 * len(sums), W) / float(slowest)


# ------------------------------------------------------------------------------------------------- telling


def card(job: Job, rates: Rates, measured_on: str) -> str:
    """The plan for people. measured_on: the device type of this process."""
    n, W = job.num_features, job.ranks
    kind = "GPU" if job.device == "cuda" else "CPU"
    lines = [
        f"{n:,} features of {job.dim} dimensions into {job.k:,} centers on {W} {kind} rank(s), search {job.backend}, "
        f"{job.iterations} iterations"
        + ("" if job.coarse is None else f", two levels with {job.coarse:,} coarse clusters"),
        f"used            {job.used:,} features"
        + (
            f", a uniform sample (--max_points_per_center {job.max_points_per_center})"
            if job.used < n
            else ": all of them"
        ),
        f"search          {rates.search / 1e12:.4g} TFLOP/s a rank ({rates.sources['search']})",
        f"preparing       {rates.prepare / 1e9:.3g} GB/s a rank ({rates.sources['prepare']})",
        f"disk            {rates.disk / 1e9:.3g} GB/s a rank ({rates.sources['disk']}); shared by the ranks of a disk",
    ]
    if W > 1:
        lines.append(f"network         {rates.link / 1e9:.3g} GB/s sent by a rank ({rates.sources['link']})")
    if job.device != measured_on and rates.sources["search"] != "given":
        lines.append(
            f"{'':16}the search was timed on this {measured_on}, which says nothing of a {kind}: give --tflops for hours "
            "that mean something"
        )
    lines += ["", f"{'':30}times  FLOPs each   GB read   GB sent  seconds each     hours", f"{'':43}  a rank    a rank"]
    total = 0.0
    todo = passes(job)
    for one in todo:
        taken = whole_seconds(seconds(one, job, rates), job.device)
        total += taken * one.times
        lines.append(_row(one, taken))
    lines.append(f"{'total':76}{total / 3600:>10.4g}")
    parts = seconds(todo[-1], job, rates)
    shares = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items() if value)
    hidden = "one after the other" if job.device == "cpu" else "preparing and disk behind the search, or it behind them"
    lines.append(f"an iteration over all centers: {shares}; {hidden}")
    labels = label_pass(job)
    lines.append(_row(labels, whole_seconds(seconds(labels, job, rates), job.device)) + "   (afterwards)")
    lines += ["", "memory of a rank, beside the interpreter and its libraries"]
    for place, sizes in zip(("GPU", "host"), kmeans_memory(job), strict=True):
        if sizes:
            each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
            lines.append(f"{place:16}{sum(sizes.values()) / 1e9:.2f} GB: {each}")
    return "\n".join(lines)


def _row(one: Pass, taken: float) -> str:
    return (
        f"{one.name:29}{one.times:>6}{one.flops:>12.2e}{one.read / 1e9:>10.4g}{one.sent / 1e9:>10.4g}{taken:>14.4g}"
        f"{taken * one.times / 3600:>10.4g}"
    )
