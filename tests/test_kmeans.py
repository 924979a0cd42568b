"""Spherical k-means: as good as faiss, deterministic, no empty cluster left, one clear word about bad input."""

import json

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import ROOT, run_script

from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import SphericalKMeans, split_largest
from mlcd_ds.data.centers import Centers
from mlcd_ds.errors import DataError


def write_features(folder, shards, model="toy"):
    """A features folder of float arrays [n, d], one a shard."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for shard, array in enumerate(shards):
        np.save(folder / "img_emb" / f"img_emb_{shard:05d}.npy", np.asarray(array, np.float16))
        keys = [f"{shard:05d}{row:04d}" for row in range(len(array))]
        pq.write_table(pa.table({"key": keys}), folder / "metadata" / f"metadata_{shard:05d}.parquet")
    (folder / "features.json").write_text(json.dumps({"model": model}))
    return FeatureFolder(folder)


def mixture(seed=0, n=6000, d=24, groups=60):
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(groups, d))
    rows = means[generator.integers(0, groups, n)] + 0.5 * generator.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def fit(features, k, iterations=12, seed=0, limit=10**6):
    return SphericalKMeans(k, iterations, limit, seed).fit(features, lambda *_: None)


def mean_cosine(rows, centers):
    index = faiss.IndexFlatIP(centers.shape[1])
    index.add(np.ascontiguousarray(centers))
    rows = rows.astype(np.float32)
    return float(index.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), 1)[0].mean())


@pytest.mark.parametrize("k", [40, 100])
def test_objective_is_as_good_as_faiss(tmp_path, k):
    rows = mixture()
    result = fit(write_features(tmp_path / "f", np.array_split(rows, 3)), k)
    theirs = faiss.Kmeans(rows.shape[1], k, niter=12, spherical=True, seed=1, max_points_per_centroid=10**6)
    theirs.train(rows.astype(np.float32))
    assert mean_cosine(rows, result.centers_kd) >= 0.995 * mean_cosine(rows, theirs.centroids)
    assert result.objective[-1] > result.objective[0]
    np.testing.assert_allclose(np.linalg.norm(result.centers_kd, axis=1), 1, atol=1e-5)
    assert result.sizes_k.sum() == len(rows) == result.num_used


def test_one_iteration_is_lloyds(tmp_path):
    """Against a dense float64 computation from the same initial rows."""
    rows = mixture(n=300)
    features = write_features(tmp_path / "f", [rows])
    start = np.sort(np.random.default_rng(0).choice(300, 5, replace=False, shuffle=False))
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosine = unit @ unit[start].T
    sums = np.stack([unit[cosine.argmax(1) == center].sum(0) for center in range(5)])
    result = fit(features, 5, iterations=1)
    np.testing.assert_allclose(result.centers_kd, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-5)
    assert result.objective == pytest.approx([cosine.max(1).mean()], rel=1e-6)


def test_split_over_shards_does_not_matter_and_the_seed_does(tmp_path):
    rows = mixture(n=1000)
    one = fit(write_features(tmp_path / "a", [rows]), 20)
    again = fit(FeatureFolder(tmp_path / "a"), 20)
    other = fit(write_features(tmp_path / "b", np.array_split(rows, 4)), 20)
    assert np.array_equal(one.centers_kd, again.centers_kd)
    np.testing.assert_allclose(one.centers_kd, other.centers_kd, atol=1e-4)
    assert not np.allclose(one.centers_kd, fit(FeatureFolder(tmp_path / "a"), 20, seed=1).centers_kd, atol=1e-3)


def test_empty_clusters_take_half_of_the_largest():
    centers = np.eye(4, dtype=np.float32)
    sizes = np.array([0, 10, 30, 0])
    assert split_largest(centers, sizes, np.zeros(4, bool)) == 2
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    # Both empty ones lie beside the largest (2), or its half; the other (1) keeps its place.
    assert np.array_equal(centers[1], [0, 1, 0, 0])
    for row in (0, 3):
        assert centers[row, 2] > 0.999
    assert split_largest(centers, np.ones(4), np.zeros(4, bool)) == 0


def test_duplicates_beyond_k_are_reported_not_hidden(tmp_path):
    rows = np.repeat(np.eye(6), 50, axis=0)
    result = fit(write_features(tmp_path / "f", [rows]), 10)
    assert np.isfinite(result.centers_kd).all()
    assert (result.sizes_k > 0).sum() == 6
    assert result.reseeded[-1] == 4


def test_members_that_cancel_out_leave_a_center_that_can_be_used(tmp_path):
    rows = mixture(n=20)
    features = write_features(tmp_path / "f", [np.concatenate([rows, -rows])])
    for k in (1, 2):
        centers = fit(features, k, iterations=3).centers_kd
        np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)


def test_sample_is_uniform_over_shards(tmp_path):
    features = write_features(tmp_path / "f", np.array_split(mixture(n=3000), 3))
    kmeans = SphericalKMeans(10, 2, 60, 0)
    selected = kmeans._sample(features, np.random.default_rng(0))
    assert sum(len(rows) for rows in selected.values()) == 600
    assert all(150 < len(rows) < 250 and (np.diff(rows) > 0).all() for rows in selected.values())
    assert kmeans.fit(features, lambda *_: None).num_used == 600


def test_more_centers_than_features_and_bad_rows_are_refused(tmp_path):
    features = write_features(tmp_path / "f", [mixture(n=50)])
    with pytest.raises(DataError, match=r"--k 51 is more than the 50 features"):
        fit(features, 51)
    rows = mixture(n=50)
    rows[17, 3] = np.nan
    with pytest.raises(DataError, match=r"img_emb_00000.npy: row 17 .*no numbers"):
        fit(write_features(tmp_path / "g", [rows]), 5)


def cluster(features, output, *flags, world_size=1):
    arguments = [f"--features={features}", f"--output_dir={output}", "--k=20", "--iterations=5", *flags]
    return run_script(world_size, [ROOT / "tools" / "cluster.py", *arguments])


def test_tool_writes_reuses_and_refuses(tmp_path):
    write_features(tmp_path / "f", np.array_split(mixture(n=1000), 2))
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25")
    assert ended.code == 0, ended.output
    assert "using a uniform sample of 500 of the 1,000 features" in ended.output
    centers = Centers.load(tmp_path / "c")
    assert centers.array.shape == (20, 24) and centers.feature_model == "toy"
    described = json.loads((tmp_path / "c" / "centers.json").read_text())
    assert described["num_used"] == 500 and len(described["objective"]) == 5
    assert sum(entry["count"] for entry in described["size_histogram"]) == 20
    first = (tmp_path / "c" / "centers.npy").read_bytes()

    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25")
    assert ended.code == 0 and "are there already" in ended.output
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25", "--seed=1")
    assert ended.code == 3 and "seed 0 then, 1 now" in ended.output
    write_features(tmp_path / "g", np.array_split(mixture(n=1000), 4))  # as many features, of other shards
    (ended,) = cluster(tmp_path / "g", tmp_path / "c", "--max_points_per_center=25")
    assert ended.code == 3 and "holds other centers (features_fingerprint" in ended.output
    # Killed before centers.json: not taken for whole, and made again with the same bytes.
    (tmp_path / "c" / "centers.json").unlink()
    (tmp_path / "c" / "centers.npy").write_bytes(first[:50])
    with pytest.raises(DataError):
        Centers.load(tmp_path / "c")
    (ended, other) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25", world_size=2)
    assert (ended.code, other.code) == (0, 0), ended.output
    assert (tmp_path / "c" / "centers.npy").read_bytes() == first


def test_tool_refuses_more_centers_than_features(tmp_path):
    write_features(tmp_path / "f", [mixture(n=10)])
    (ended,) = cluster(tmp_path / "f", tmp_path / "c")
    assert ended.code == 3 and "error: --k 20 is more than the 10 features" in ended.output
    assert not (tmp_path / "c").exists()
