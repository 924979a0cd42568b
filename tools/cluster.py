"""Features to centers: spherical k-means.

python tools/cluster.py --features features/ --k 1000 --output_dir centers/
"""

import sys
from pathlib import Path

import fire
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.clustering.assign import load_checked_centers
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import SphericalKMeans
from mlcd_ds.config import ClusterConfig
from mlcd_ds.data.centers import read_description, save_centers
from mlcd_ds.errors import DataError
from mlcd_ds.topology import Topology


def main(config: ClusterConfig) -> None:
    """Clusters unit-length features into k centers, by Lloyd's iterations on one process."""
    topology = Topology.from_environment()
    if not topology.is_main:
        return
    if topology.is_distributed:
        print(f"clustering runs on one process: the other {topology.world_size - 1} ranks have nothing to do")
    folder = Path(config.output_dir)
    features = FeatureFolder(config.features)
    made_from = {
        "k": config.k,
        "d": features.dim,
        "seed": config.seed,
        "iterations": config.iterations,
        "max_points_per_center": config.max_points_per_center,
        "feature_model": features.model,
        "num_features": features.num_features,
        "features_fingerprint": features.fingerprint(),
    }
    before = read_description(folder)
    if before is not None:
        if any(before.get(name) != value for name, value in made_from.items()):
            differs = ", ".join(
                f"{n} {before.get(n)!r} then, {v!r} now" for n, v in made_from.items() if before.get(n) != v
            )
            raise DataError(
                f"{folder} holds other centers ({differs}). Choose another --output_dir, or remove that folder."
            )
        load_checked_centers(folder)
        print(f"{folder}: these {config.k} centers are there already")
        return
    result = run(config, features)
    edges = [0, 1, *(2**power for power in range(1, 40) if 2 ** (power - 1) <= result.sizes_k.max())]
    histogram = np.histogram(result.sizes_k, edges)[0].tolist()
    save_centers(
        folder,
        result.centers_kd,
        made_from
        | {
            "features": str(features.path),
            "num_used": result.num_used,
            "objective": result.objective,
            "reseeded": result.reseeded,
            "size_histogram": [{"from": low, "count": count} for low, count in zip(edges, histogram, strict=False)],
        },
    )
    print(
        f"{folder}: {config.k} centers of {result.num_used} features; mean cosine to the nearest {result.objective[-1]:.4f} "
        f"(first iteration {result.objective[0]:.4f}); cluster sizes {result.sizes_k.min()} to {result.sizes_k.max()}, "
        f"median {int(np.median(result.sizes_k))}; {result.reseeded[-1]} empty in the last iteration"
    )


def run(config: ClusterConfig, features: FeatureFolder):
    """k-means with a progress bar."""
    limit = config.k * config.max_points_per_center
    if features.num_features > limit:
        print(
            f"using a uniform sample of {limit:,} of the {features.num_features:,} features "
            f"(--max_points_per_center {config.max_points_per_center})"
        )
    kmeans = SphericalKMeans(config.k, config.iterations, config.max_points_per_center, config.seed)
    with tqdm(total=config.iterations, desc="k-means", unit="iteration") as bar:

        def tell(iteration: int, objective: float, empty: int) -> None:
            bar.set_postfix_str(f"mean cosine {objective:.4f}, {empty} empty")
            bar.update()

        return kmeans.fit(features, tell)


if __name__ == "__main__":
    cli.run(fire.Fire, main, ClusterConfig)
