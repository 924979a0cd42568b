"""Features to centers: spherical k-means, on one process or many.

python tools/cluster.py --features features/ --k 1000 --output_dir centers/
deepspeed --hostfile hosts tools/cluster.py --features features/ --k 1000000 --output_dir centers/
python tools/cluster.py --dry_run --num_features 400000000 --dim 768 --k 1000000 --gpus 64 --tflops 300
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import fire
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli, collectives
from mlcd_ds.clustering import plan
from mlcd_ds.clustering.assign import load_checked_centers
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.iterations import IterationStore
from mlcd_ds.clustering.kmeans import Iteration, KMeansResult, SphericalKMeans
from mlcd_ds.clustering.two_level import FINE, GLOBAL, TwoLevelKMeans
from mlcd_ds.config import ClusterConfig
from mlcd_ds.data.centers import read_description, save_centers
from mlcd_ds.errors import ConfigError, DataError, differences
from mlcd_ds.files import remove_stale
from mlcd_ds.topology import Topology


def main(config: ClusterConfig) -> None:
    """Clusters unit-length features into k centers by Lloyd's iterations; the same command goes on where it was killed."""
    lacking = [f"--{name}" for name in ("features", "output_dir") if getattr(config, name) is None]
    if lacking and not config.dry_run:
        raise ConfigError(f"{' and '.join(lacking)} must be given, but for a --dry_run with --num_features and --dim")
    topology = Topology.from_environment().start(config.timeout_minutes)
    if config.dry_run:
        tell_plan(config, topology)
        return
    folder = Path(config.output_dir)
    features = FeatureFolder(config.features)
    dropped = drop_bad_rows(features, topology) if config.drop_bad_rows else None
    made_from = description(config, features, dropped)
    if collectives.on_main(topology, is_there, folder, made_from, config):
        return
    collectives.on_main(topology, remove_stale, folder, folder / "iterations")
    store = IterationStore(folder / "iterations", made_from)
    resume = store.load() if collectives.on_main(topology, store.verify) else None
    result = run(config, features, topology, store, resume)
    if topology.is_main:
        publish(config, features, made_from, result)
        store.remove()
    topology.stop()


def tell_plan(config: ClusterConfig, topology: Topology) -> None:
    """Prints what this clustering would take."""
    features = FeatureFolder(config.features) if config.features else None
    job = plan.Job(
        num_features=features.num_features if features else config.num_features,
        dim=features.dim if features else config.dim,
        k=config.k,
        ranks=config.gpus or topology.world_size,
        iterations=config.iterations,
        max_points_per_center=config.max_points_per_center,
        backend=config.assign,
        nprobe=config.nprobe,
        device="cuda" if config.gpus else topology.device.type,
        coarse=(config.coarse or round(config.k**0.5)) if config.two_level else None,
        refinements=config.refinements,
        probes=config.probes,
        blocks=len(features.names) if features else 0,
    )
    given = {
        "search": config.tflops and config.tflops * 1e12,
        "prepare": config.prepare_gb_per_s and config.prepare_gb_per_s * 1e9,
        "disk": config.disk_gb_per_s and config.disk_gb_per_s * 1e9,
        "link": config.link_gb_per_s and config.link_gb_per_s * 1e9,
    }
    if job.k > job.num_features:
        raise ConfigError(f"--k {job.k} is more than the {job.num_features} features")
    rates = plan.measure(job, topology, features, Path(config.output_dir) if config.output_dir else None, given)
    if topology.is_main:
        print(plan.card(job, rates, topology.device.type))
    topology.stop()


def drop_bad_rows(features: FeatureFolder, topology: Topology) -> int:
    """One pass over all features, each rank its share of the files: how many rows have no direction. They are hidden."""
    own = range(topology.rank, len(features.names), topology.world_size)
    found = {}
    for i in tqdm(own, desc="looking for bad rows", unit="file", disable=not topology.is_main):
        rows = features.bad_rows(features.names[i])
        if len(rows):
            found[features.names[i]] = rows
    bad = {name: rows for part in collectives.gather_objects(found, topology) for name, rows in part.items()}
    dropped = sum(map(len, bad.values()))
    if topology.is_main:
        worst = max(bad, key=lambda name: len(bad[name]), default=None)
        most = "" if worst is None else f", most of them, {len(bad[worst])}, in {features.image_file(worst)}"
        print(f"--drop_bad_rows: {dropped:,} of {features.num_features:,} features are left out{most}")
    features.drop(bad)
    return dropped


def description(config: ClusterConfig, features: FeatureFolder, dropped: int | None) -> dict:
    """What decides the centers, but for the number of ranks, which moves rounding only."""
    return {
        "k": config.k,
        "d": features.dim,
        "seed": config.seed,
        "iterations": config.iterations,
        "max_points_per_center": config.max_points_per_center,
        "init": config.init,
        "assign": config.assign,
        "stop_below": config.stop_below,
        "feature_model": features.model,
        "num_features": features.num_features,
        "features_fingerprint": features.fingerprint(),
        "two_level": config.two_level or None,  # what is None may as well be missing
        "coarse": config.coarse,
        "refinements": config.refinements if config.two_level else None,
        "probes": config.probes if config.two_level else None,
        **({"nprobe": config.nprobe} if config.assign == "ivf" else {}),
        **({} if dropped is None else {"dropped_rows": dropped}),
    }


def is_there(folder: Path, made_from: dict, config: ClusterConfig) -> bool:
    """Whether these very centers are finished; DataError for others."""
    before = read_description(folder)
    if before is None:
        return False
    differs = differences(before, made_from)
    if differs:
        raise DataError(
            f"{folder} holds other centers ({differs}). Choose another --output_dir, or remove that folder."
        )
    load_checked_centers(folder)
    IterationStore(folder / "iterations", made_from).remove()  # a job killed at its very end has left them
    print(f"{folder}: these {config.k} centers are there already")
    return True


def run(config: ClusterConfig, features: FeatureFolder, topology: Topology, store: IterationStore, resume):
    """k-means with a progress bar and TensorBoard curves on rank 0."""
    limit = config.k * config.max_points_per_center
    if topology.is_main and features.num_features > limit:
        print(
            f"using a uniform sample of {limit:,} of the {features.num_features:,} features "
            f"(--max_points_per_center {config.max_points_per_center})"
        )
    kmeans = SphericalKMeans(
        config.k,
        config.iterations,
        config.max_points_per_center,
        config.seed,
        topology,
        init=config.init,
        backend=config.assign,
        nprobe=config.nprobe,
        stop_below=config.stop_below,
    )
    if config.two_level:
        kmeans = TwoLevelKMeans(kmeans, config.coarse, config.refinements, config.probes)
    done = len(resume.history) if resume else 0
    if topology.is_main and done:
        print(f"going on after iteration {done} of {kmeans.total_iterations}")
    with tqdm(
        total=kmeans.total_iterations, initial=done, desc="k-means", unit="iteration", disable=not topology.is_main
    ) as bar:

        def tell(iteration: Iteration) -> None:
            moved = "" if iteration.moved is None else f", {iteration.moved:.2%} moved"
            bar.set_description("k-means" if iteration.phase is None else f"k-means, {iteration.phase}")
            bar.set_postfix_str(f"mean cosine {iteration.objective:.4f}, {iteration.empty} empty{moved}")
            bar.update()

        result = kmeans.fit(features, tell, resume, store.save)
    return result


def publish(config: ClusterConfig, features: FeatureFolder, made_from: dict, result: KMeansResult) -> None:
    """Writes the centers and how they came about, and says it."""
    last = result.history[-1]
    first = next(iteration for iteration in result.history if iteration.phase == last.phase)
    facts = {
        "features": str(features.path),
        "num_used": result.num_used,
        "objective": [iteration.objective for iteration in result.history],
        "reseeded": [iteration.empty for iteration in result.history],
        "history": [asdict(iteration) for iteration in result.history],
        **({} if result.check is None else {"search_check": asdict(result.check)}),
    }
    sizes = ""
    if result.sizes_k is not None:  # a run killed after its last iteration has not counted again
        edges = [0, 1, *(2**power for power in range(1, 40) if 2 ** (power - 1) <= result.sizes_k.max())]
        histogram = np.histogram(result.sizes_k, edges)[0].tolist()
        facts["size_histogram"] = [{"from": low, "count": count} for low, count in zip(edges, histogram, strict=False)]
        sizes = (
            f"; cluster sizes {result.sizes_k.min()} to {result.sizes_k.max()}, median {int(np.median(result.sizes_k))}"
        )
    save_centers(Path(config.output_dir), result.centers_kd, made_from | json.loads(json.dumps(facts)))
    if config.two_level:
        print(refined(result))
    if result.check is not None:
        check = result.check
        print(
            f"the search that is not exact, on {check.features:,} random features and these centers: it finds the nearest "
            f"of {check.found:.1%}; mean cosine {check.approximate:.4f} to what it finds, {check.exact:.4f} to the nearest"
        )
    print(
        f"{config.output_dir}: {config.k} centers of {result.num_used} features; mean cosine to the nearest "
        f"{last.objective:.4f} (first iteration {first.objective:.4f}){sizes}; {last.empty} empty in the last of "
        f"{len(result.history)} iterations"
    )


def refined(result: KMeansResult) -> str:
    """The objective inside the coarse clusters, and before and after the iterations over all centers."""
    inside = [iteration for iteration in result.history if iteration.phase == FINE][-1]
    over_all = [iteration for iteration in result.history if iteration.phase == GLOBAL]
    text = f"mean cosine to the center inside the own coarse cluster {inside.updated:.4f}"
    if over_all:
        text += (
            f"; to the nearest of all {over_all[0].objective:.4f} before, at least {over_all[-1].updated:.4f} after "
            f"{len(over_all)} iteration(s) over all centers"
        )
    return text


if __name__ == "__main__":
    cli.run(fire.Fire, main, ClusterConfig)
