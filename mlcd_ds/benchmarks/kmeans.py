"""The searches for the nearest centers against a bare matrix product, and whole iterations against faiss.Kmeans.

Shapes: n features, k centers, d dimensions, b features of a block, l nearest ones wanted.
"""

import json
import platform
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mlcd_ds.benchmarks.timing import Contender, command_line, in_processes, peak_bytes, table, time_in_turn, time_once
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import SphericalKMeans
from mlcd_ds.clustering.nearest import BACKENDS, TILE_FEATURES, TorchSearch, index_of
from mlcd_ds.clustering.two_level import TwoLevelKMeans
from mlcd_ds.config import BenchKMeansConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.files import write_json
from mlcd_ds.topology import Topology

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OBJECTIVE_ROWS = 65_536
GPU_ITERATION_POINTS = 10_000_000
ITERATION_BLOCK = 65_536

LAION = {"n": 400_000_000, "k": 1_000_000, "d": 768}
"""What one iteration is extrapolated to."""
LAION_DEVICES = (8, 64)


def bench_kmeans(config: BenchKMeansConfig) -> dict:
    """Measures what `config` asks for, prints tables, returns (and writes to config.output) all numbers.

    Raises ConfigError for flags that do not fit together.
    """
    tops, backends, iterations = _checked(config)
    import faiss  # a second of import time that only clustering needs

    topology = Topology.single("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = topology.device.type == "cuda"
    if on_gpu and config.clock == "cpu":
        raise ConfigError("--clock cpu says nothing of what a GPU does: leave it out")
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    device = f"cuda, {torch.cuda.get_device_name()}" if on_gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    result = {
        "command": command_line("kmeans", config),
        "device": device,
        "threads": threads,
        "clock": config.clock,
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "python": platform.python_version(),
    }
    print(
        f"k-means on {device}: {threads} threads, {config.clock} time, torch {torch.__version__}, faiss {faiss.__version__}"
    )
    if config.search:
        result["search"] = _time_searches(config, tops, backends, topology)
        print(_search_table(result["search"]))
    if config.memory:
        result["memory"] = [_memory_of(config, name, top) for name in backends for top in tops]
        print(table([{"search": row["search"], "extra MB": f"{row['bytes'] / 2**20:.0f}"} for row in result["memory"]]))
    if config.lloyd:
        result["lloyd"] = [_time_lloyd(config, count, backends, topology) for count in iterations]
        print(_lloyd_table(result["lloyd"]))
    if config.levels:
        result["levels"] = _time_levels(config, backends[0], topology)
        print(_levels_table(result["levels"]))
    points = config.iteration_points or (GPU_ITERATION_POINTS if on_gpu else None)
    if points:
        result["iteration"] = one_iteration(
            points, config.iteration_k, config.iteration_d, topology.device, seed=config.seed
        )
        print(_iteration_table(result["iteration"]))
    if config.output is not None:
        write_json(Path(config.output), result)
    return result


def _checked(config: BenchKMeansConfig) -> tuple[list[int], list[str], list[int]]:
    """The lists among the flags; ConfigError for what is none or does not fit."""
    for name, least in (("tops", 1), ("lloyd_iterations", 1), ("levels_probes", 0)):
        if not re.fullmatch(r"\d+(,\d+)*", text := getattr(config, name)) or min(map(int, text.split(","))) < least:
            raise ConfigError(f"--{name} {text!r}: expected whole numbers from {least}, like 1,8")
    tops, iterations = ([int(part) for part in text.split(",")] for text in (config.tops, config.lloyd_iterations))
    backends = config.backends.split(",")
    if not set(backends) <= set(BACKENDS):
        raise ConfigError(f"--backends {config.backends!r}: expected some of {', '.join(BACKENDS)}, joined by commas")
    if max(tops) > config.k:
        raise ConfigError(f"--tops {config.tops}: {max(tops)} nearest of --k {config.k} centers")
    if config.lloyd_k > config.lloyd_points:
        raise ConfigError(f"--lloyd_k {config.lloyd_k} is more than --lloyd_points {config.lloyd_points}")
    if config.levels_k > config.levels_points:
        raise ConfigError(f"--levels_k {config.levels_k} is more than --levels_points {config.levels_points}")
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {config.output}: its folder does not exist")
    return tops, backends, iterations


def _unit_rows(n: int, d: int, seed: int) -> np.ndarray:
    """Random directions, float32 [n, d]."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows).numpy()


# --- searches -------------------------------------------------------------------------------------------------------


def bare_product(rows_nd: torch.Tensor, centers_kd: torch.Tensor) -> Contender:
    """All scores, a block of features after the other into the same memory, and nothing done with them."""
    blocks = rows_nd.split(TILE_FEATURES)
    scores_bk = torch.empty(len(blocks[0]), len(centers_kd), device=rows_nd.device, dtype=rows_nd.dtype)

    def run() -> None:
        for block_bd in blocks:
            torch.mm(block_bd, centers_kd.T, out=scores_bk[: len(block_bd)])

    return run


def exact_ids(rows_nd: np.ndarray, centers_kd: np.ndarray, top: int) -> np.ndarray:
    """int64 [n, top], by products in float64."""
    rows, centers = torch.from_numpy(rows_nd).split(TILE_FEATURES), torch.from_numpy(centers_kd).double()
    return torch.cat([(block.double() @ centers.T).topk(top, dim=1)[1] for block in rows]).numpy()


def _time_searches(config: BenchKMeansConfig, tops: list[int], backends: list[str], topology: Topology) -> dict:
    """Seconds of each search and of the bare product, in turn; shares of ids that are the exact ones."""
    rows, centers = _unit_rows(config.points, config.d, config.seed), _unit_rows(config.k, config.d, config.seed + 1)
    kind = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
    factors = [torch.from_numpy(array).to(topology.device, kind) for array in (rows, centers)]
    contenders: dict[str, Contender] = {"product": bare_product(*factors)}
    indexes = {name: index_of(centers, name, topology.device, config.nprobe) for name in backends}
    exact = exact_ids(rows, centers, max(tops))
    found = {}
    for name, index in indexes.items():
        for top in tops:
            contenders[f"{name} top-{top}"] = lambda index=index, top=top: index.search(rows, top)
            ids = index.search(rows, top)[1]
            found[f"{name} top-{top}"] = float((ids[:, :, None] == exact[:, None, :top]).any(2).mean())
    seconds = time_in_turn(
        contenders, config.repeats, topology, lambda what: print(f"searches: {what}", flush=True), CLOCKS[config.clock]
    )
    least = seconds["product"]["min"]
    work = config.points * config.k * config.d
    return {
        "points": config.points,
        "k": config.k,
        "d": config.d,
        "nprobe": config.nprobe,
        "seconds": seconds,
        "found": found,
        "per_product": {name: times["min"] / least for name, times in seconds.items()},
        "points_centers_dim_per_second": {name: work / times["min"] for name, times in seconds.items()},
    }


def _search_table(search: dict) -> str:
    lines = [
        {
            "search": name,
            "ms": f"{times['min'] * 1e3:.1f}",
            "(median)": f"{times['median'] * 1e3:.1f}",
            "/product": f"{search['per_product'][name]:.2f}",
            "1e9 points x centers x dim/s": f"{search['points_centers_dim_per_second'][name] / 1e9:.1f}",
            "exact ids": f"{search['found'][name]:.2%}" if name in search["found"] else "-",
        }
        for name, times in search["seconds"].items()
    ]
    return f"{search['points']} features, {search['k']} centers, {search['d']} dimensions\n{table(lines)}"


def _memory_of(config: BenchKMeansConfig, backend: str, top: int) -> dict:
    """Peak bytes of building the index and searching, beyond features, centers and answers."""
    print(f"memory of {backend} top-{top}", flush=True)
    total = in_processes(1, _memory_on_rank, config, backend, top)
    return {"search": f"{backend} top-{top}", "bytes": total - config.points * top * 12}


def _memory_on_rank(rank: int, config: BenchKMeansConfig, backend: str, top: int, folder: Path) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    rows, centers = _unit_rows(config.points, config.d, config.seed), _unit_rows(config.k, config.d, config.seed + 1)
    warm = centers[: max(64, top)]
    index_of(warm, backend, device, config.nprobe).search(rows[:64], min(top, len(warm)))
    return peak_bytes(lambda: index_of(centers, backend, device, config.nprobe).search(rows, top), device)


# --- whole iterations -----------------------------------------------------------------------------------------------


def mixture(n: int, d: int, groups: int, seed: int) -> np.ndarray:
    """float16 [n, d]: points about random means."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(groups, d)).astype(np.float32)
    noise = 0.7 * generator.standard_normal((n, d), dtype=np.float32)
    return (means[generator.integers(0, groups, n)] + noise).astype(np.float16)


def write_folder(folder: Path, rows_nd: np.ndarray) -> FeatureFolder:
    """A features folder of one shard."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    np.save(folder / "img_emb" / "img_emb_00000.npy", rows_nd)
    keys = pa.array(map(str, range(len(rows_nd))), pa.string())
    pq.write_table(pa.table({"key": keys}), folder / "metadata" / "metadata_00000.parquet")
    (folder / "features.json").write_text(json.dumps({"model": "mixture"}))
    return FeatureFolder(folder)


def _time_lloyd(config: BenchKMeansConfig, iterations: int, backends: list[str], topology: Topology) -> dict:
    """Seconds and objective of ours, of faiss.Kmeans from the same start, and of faiss's SuperKmeans (from its own).

    Ours reads float16 from a memory-mapped file in each iteration; faiss is given float32 unit rows in memory.
    """
    import faiss

    n, d, k = config.lloyd_points, config.lloyd_d, config.lloyd_k
    centers: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        features = write_folder(Path(folder), mixture(n, d, k, config.seed))
        rows = features.unit_rows("00000", 0, n)
        start = rows[np.random.default_rng(config.seed).choice(n, k, replace=False)]
        np.save(Path(folder) / "start.npy", start)

        def ours(backend: str) -> Contender:
            def run() -> None:
                kmeans = SphericalKMeans(
                    k,
                    iterations,
                    n,
                    config.seed,
                    topology,
                    str(Path(folder) / "start.npy"),
                    backend,
                    config.nprobe,
                    -1.0,
                )
                centers[backend] = kmeans.fit(features, lambda _: None).centers_kd

            return run

        def theirs() -> None:
            settings = {"niter": iterations, "spherical": True, "max_points_per_centroid": n, "seed": config.seed}
            kmeans = faiss.Kmeans(d, k, min_points_per_centroid=1, **settings)
            kmeans.train(rows, init_centroids=start)
            centers["faiss.Kmeans"] = kmeans.centroids

        def super_kmeans() -> None:
            settings = {"niter": iterations, "spherical": True, "max_points_per_centroid": n, "seed": config.seed}
            kmeans = faiss.SuperKmeans(d, k, min_points_per_centroid=1, **settings)
            kmeans.train(rows)
            centers["faiss.SuperKmeans"] = kmeans.centroids

        contenders: dict[str, Contender] = {name: ours(name) for name in backends} | {"faiss.Kmeans": theirs}
        if hasattr(faiss, "SuperKmeans") and d >= 2 * faiss.SuperKMeansParameters().d_prime_min:  # else it refuses
            contenders["faiss.SuperKmeans"] = super_kmeans
        contenders["product"] = bare_product(torch.from_numpy(rows), torch.from_numpy(start))

        def say(what: str) -> None:
            print(f"{iterations} iteration(s): {what}", flush=True)

        seconds = time_in_turn(contenders, config.lloyd_repeats, topology, say, CLOCKS[config.clock])
        objective = {
            name: float(index_of(found, "torch").search(rows, 1)[0].mean(dtype=np.float64))
            for name, found in centers.items()
        }
    return {"points": n, "k": k, "d": d, "iterations": iterations, "seconds": seconds, "objective": objective}


def _lloyd_table(measured: list[dict]) -> str:
    lines = []
    for row in measured:
        product = row["seconds"]["product"]["min"] * row["iterations"]
        theirs = row["seconds"]["faiss.Kmeans"]["min"]
        for name, objective in row["objective"].items():
            least = row["seconds"][name]["min"]
            lines.append(
                {
                    "k-means": name,
                    "iterations": str(row["iterations"]),
                    "s": f"{least:.2f}",
                    "/bare products": f"{least / product:.2f}",
                    "/faiss.Kmeans": f"{least / theirs:.2f}",
                    "objective": f"{objective:.5f}",
                }
            )
    first = measured[0]
    return f"{first['points']} features, {first['k']} centers, {first['d']} dimensions\n{table(lines)}"


# --- two levels -----------------------------------------------------------------------------------------------------


def _time_levels(config: BenchKMeansConfig, backend: str, topology: Topology) -> dict:
    """Seconds of flat k-means and of two levels, each once a round in turn, and what they find.

    All read float16 from a memory-mapped file in each iteration. cpu_seconds are those of this process: a busy machine
    moves them less. objective: exact mean cosine of up to OBJECTIVE_ROWS of the features to the centers.
    """
    n, d, k = config.levels_points, config.levels_d, config.levels_k
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        features = write_folder(Path(folder), mixture(n, d, k, config.seed))

        def clustering(name: str, probes: int | None) -> Contender:
            def run() -> None:
                flat = SphericalKMeans(
                    k,
                    config.levels_iterations,
                    n,
                    config.seed,
                    topology,
                    backend=backend,
                    nprobe=config.nprobe,
                    stop_below=-1.0,
                )
                model = flat if probes is None else TwoLevelKMeans(flat, refinements=2 if probes else 1, probes=probes)
                results[name] = model.fit(features, lambda _: None)

            return run

        contenders = {"flat": clustering("flat", None)}
        for probes in map(int, config.levels_probes.split(",")):
            name = f"two levels, {f'{probes} probes' if probes else 'all centers'}"
            contenders[name] = clustering(name, probes)
        seconds, cpu_seconds = ({name: [] for name in contenders} for _ in range(2))
        for _ in range(config.levels_repeats):
            for name, contender in contenders.items():
                started = time.process_time()
                seconds[name].append(time_once(contender, topology))
                cpu_seconds[name].append(time.process_time() - started)
                print(f"levels: {name} {seconds[name][-1]:.1f} s", flush=True)
        rows = features.unit_rows("00000", 0, min(n, OBJECTIVE_ROWS))
        objective = {
            name: float(index_of(result.centers_kd, "torch").search(rows, 1)[0].mean(dtype=np.float64))
            for name, result in results.items()
        }
    checks = {name: result.check and asdict(result.check) for name, result in results.items()}
    return {
        "points": n,
        "k": k,
        "d": d,
        "iterations": config.levels_iterations,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "objective": objective,
        "search_check": {name: check for name, check in checks.items() if check},
    }


def _levels_table(measured: dict) -> str:
    flat = {what: min(measured[what]["flat"]) for what in ("seconds", "cpu_seconds")}
    lines = []
    for name, objective in measured["objective"].items():
        least = {what: min(measured[what][name]) for what in flat}
        lines.append(
            {
                "k-means": name,
                "s": f"{least['seconds']:.1f}",
                "flat/": f"{flat['seconds'] / least['seconds']:.1f}",
                "CPU s": f"{least['cpu_seconds']:.1f}",
                "CPU flat/": f"{flat['cpu_seconds'] / least['cpu_seconds']:.1f}",
                "objective": f"{objective:.5f}",
                "of flat": f"{objective / measured['objective']['flat'] - 1:+.2%}",
                "nearest found": f"{measured['search_check'][name]['found']:.2%}"
                if name in measured["search_check"]
                else "-",
            }
        )
    sizes = f"{measured['points']} features, {measured['k']} centers, {measured['d']} dimensions"
    return f"{sizes}, {measured['iterations']} iterations\n{table(lines)}"


# --- one iteration on the device ------------------------------------------------------------------------------------


def one_iteration(n: int, k: int, d: int, device: torch.device, seed: int = 0, block: int = ITERATION_BLOCK) -> dict:
    """One iteration over n float16 features that lie on `device`, from random centers: seconds, and what they mean at
    LAION's size on several such devices.

    The search is TorchSearch, the features never leave the device. The extrapolation divides the products among them
    and leaves out what was not measured: reading the features, and the two collectives of k d floats.
    """
    features_nd, centers_kd = random_on_device(n, k, d, device, seed)
    found: dict = {}

    def run() -> None:
        found["centers"], found["objective"] = lloyd_step(features_nd, centers_kd, block)

    seconds = time_once(run, Topology.single(device))
    scale = LAION["n"] / n * LAION["k"] / k * LAION["d"] / d
    return {
        "points": n,
        "k": k,
        "d": d,
        "device": str(device),
        "seconds": seconds,
        "objective": found["objective"],
        "points_centers_dim_per_second": n * k * d / seconds,
        "laion": LAION,
        "extrapolated_hours": {str(count): seconds * scale / count / 3600 for count in LAION_DEVICES},
        "bytes_each_collective": LAION["k"] * LAION["d"] * 4,
    }


def random_on_device(n: int, k: int, d: int, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(features float16 [n, d], centers float32 [k, d]), random directions made on `device`, block by block."""
    generator = torch.Generator(device).manual_seed(seed)
    features_nd = torch.empty(n, d, dtype=torch.float16, device=device)
    centers_kd = torch.empty(k, d, device=device)
    for whole in (features_nd, centers_kd):
        for part in whole.split(ITERATION_BLOCK):
            part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, generator=generator, device=device)))
    return features_nd, centers_kd


def lloyd_step(features_nd: torch.Tensor, centers_kd: torch.Tensor, block: int) -> tuple[torch.Tensor, float]:
    """(new unit centers [k, d], mean cosine to the old ones); a center without members stays."""
    search = TorchSearch(centers_kd)
    sums_kd, total = torch.zeros_like(centers_kd), torch.zeros((), dtype=torch.float64, device=centers_kd.device)
    for block_bd in features_nd.split(block):
        unit_bd = torch.nn.functional.normalize(block_bd.float())
        cosine_b1, nearest_b1 = search.search_tensor(unit_bd, 1)
        sums_kd.index_add_(0, nearest_b1[:, 0], unit_bd)
        total += cosine_b1.sum(dtype=torch.float64)
    lengths_k1 = sums_kd.norm(dim=1, keepdim=True)
    new_kd = torch.where(lengths_k1 > 0, sums_kd / lengths_k1.clamp_min(1e-12), centers_kd)
    return new_kd, float(total) / len(features_nd)


def _iteration_table(iteration: dict) -> str:
    lines = [
        {
            "features": f"{iteration['points']:,}",
            "centers": f"{iteration['k']:,}",
            "d": str(iteration["d"]),
            "devices": f"1 {iteration['device']}",
            "one iteration": f"{iteration['seconds']:.2f} s",
        }
    ]
    for count, hours in iteration["extrapolated_hours"].items():
        lines.append(
            {
                "features": f"{LAION['n']:,}",
                "centers": f"{LAION['k']:,}",
                "d": str(LAION["d"]),
                "devices": f"{count} such",
                "one iteration": f"{hours:.2f} h, extrapolated: products alone",
            }
        )
    return table(lines)
