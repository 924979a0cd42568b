"""Spherical k-means: as good as faiss, deterministic, no empty cluster left, one clear word about bad input."""

import itertools
import json
import os
import signal
import threading
import time
from dataclasses import asdict

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kmeans_ranks import cluster_on_ranks
from processes import ROOT, run_script, start_ranks, wait_ranks

from mlcd_ds.clustering import kmeans as kmeans_module
from mlcd_ds.clustering import nearest as nearest_module
from mlcd_ds.clustering.ahead import ahead
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import SphericalKMeans, split_largest
from mlcd_ds.clustering.nearest import index_of
from mlcd_ds.data.centers import Centers
from mlcd_ds.errors import ConfigError, DataError


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
    return SphericalKMeans(k, iterations, limit, seed).fit(features, lambda _: None)


def objectives(result):
    return [iteration.objective for iteration in result.history]


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
    assert objectives(result)[-1] > objectives(result)[0]
    np.testing.assert_allclose(np.linalg.norm(result.centers_kd, axis=1), 1, atol=1e-5)
    assert result.sizes_k.sum() == len(rows) == result.num_used


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_from_the_same_start_it_is_faiss(tmp_path, backend):
    """Equal iterations over the same features, none left out on either side: the objective within 0.5%."""
    rows = mixture(n=5000, d=32, groups=200)
    features = write_features(tmp_path / "f", np.array_split(rows, 2))
    unit = np.concatenate([features.unit_rows(name, 0, 2500) for name in features.names])
    np.save(tmp_path / "start.npy", unit[:120])
    ours = SphericalKMeans(120, 8, 10**6, 0, init=str(tmp_path / "start.npy"), backend=backend)
    centers = ours.fit(features, lambda _: None).centers_kd
    theirs = faiss.Kmeans(32, 120, niter=8, spherical=True, max_points_per_centroid=10**6)
    theirs.train(unit, init_centroids=unit[:120])
    assert mean_cosine(rows, centers) == pytest.approx(mean_cosine(rows, theirs.centroids), rel=0.005)


def test_one_iteration_is_lloyds(tmp_path):
    """Against a dense float64 computation from the same initial rows."""
    rows = mixture(n=300)
    features = write_features(tmp_path / "f", [rows])
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    start = unit[[3, 40, 77, 150, 299]]
    np.save(tmp_path / "start.npy", start * 3)
    cosine = unit @ start.T
    sums = np.stack([unit[cosine.argmax(1) == center].sum(0) for center in range(5)])
    result = SphericalKMeans(5, 1, 1000, 0, init=str(tmp_path / "start.npy")).fit(features, lambda _: None)
    np.testing.assert_allclose(result.centers_kd, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-5)
    assert objectives(result) == pytest.approx([cosine.max(1).mean()], rel=1e-6)
    assert result.sizes_k.tolist() == np.bincount(cosine.argmax(1), minlength=5).tolist()


def test_ranks_do_not_matter_nor_does_a_stop_between(tmp_path):
    """1, 2 and 3 ranks, k not divisible by them, blocks smaller than shards, all features or a sample of them; and a
    clustering that goes on from its fourth iteration."""
    features = write_features(tmp_path / "f", np.array_split(mixture(n=2000), 3))
    states = []
    SphericalKMeans(31, 7, 10**6, 0).fit(features, lambda _: None, keep=states.append)
    assert [len(state.history) for state in states] == list(range(1, 8))
    np.save(tmp_path / "fourth.npy", states[3].centers_kd)
    cases = [
        {"k": k, "iterations": 6, "max_points_per_center": limit, "seed": 3} for k in (20, 50) for limit in (10**6, 20)
    ]
    history = [asdict(iteration) for iteration in states[3].history]
    resumed = {"k": 31, "iterations": 7, "max_points_per_center": 10**6, "seed": 0}
    cases.append(resumed | {"resume": str(tmp_path / "fourth.npy"), "history": history})
    for alone, others in cluster_on_ranks(tmp_path, cases):
        for found in others:
            assert np.array_equal(found["moved"][-3:], alone["moved"][-3:])
    np.testing.assert_allclose(alone["centers"], states[-1].centers_kd, atol=2e-5)
    done = SphericalKMeans(31, 7, 10**6, 0).fit(features, lambda _: None, resume=states[-1])
    assert np.array_equal(done.centers_kd, states[-1].centers_kd)
    assert done.sizes_k is None


def test_it_ends_early_when_nothing_moves(tmp_path):
    features = write_features(tmp_path / "f", [mixture(n=400, groups=4)])
    result = SphericalKMeans(4, 100, 10**6, 0).fit(features, lambda _: None)
    assert len(result.history) < 100
    assert result.history[-1].moved == 0
    sooner = SphericalKMeans(4, 100, 10**6, 0, stop_below=0.2).fit(features, lambda _: None)
    assert len(sooner.history) <= len(result.history)
    assert sooner.history[-1].moved <= 0.2


def test_plus_plus_finds_every_group_where_random_rows_miss_some(tmp_path):
    """Tight groups, one center each: the best possible objective is near 1."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(40, 24))
    rows = np.repeat(means, 50, axis=0) + 0.01 * generator.normal(size=(2000, 24))
    features = write_features(tmp_path / "f", [rows])
    plus = SphericalKMeans(40, 3, 10**6, 0, init="kmeans++-subset").fit(features, lambda _: None)
    random = SphericalKMeans(40, 3, 10**6, 0).fit(features, lambda _: None)
    assert objectives(plus)[-1] > 0.995 > objectives(random)[-1]
    with pytest.raises(ConfigError, match="meant for up to 20000 centers"):
        SphericalKMeans(20_001, 1, 10**6, 0, init="kmeans++-subset")._initial(features, [], np.array([1]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((3, 24), np.float32), r"float32 \[3, 24\], expected floats \[5, 24\]"),
        (np.zeros((5, 24), np.float32), "row 0 has no direction"),
        (np.ones((5, 24), np.int64), "expected floats"),
    ],
)
def test_initial_centers_that_do_not_fit_are_refused(tmp_path, array, words):
    features = write_features(tmp_path / "f", [mixture(n=50)])
    np.save(tmp_path / "start.npy", array)
    with pytest.raises(DataError, match=words):
        SphericalKMeans(5, 1, 100, 0, init=str(tmp_path / "start.npy")).fit(features, lambda _: None)
    with pytest.raises(DataError, match="cannot be read.*expected random, kmeans"):
        SphericalKMeans(5, 1, 100, 0, init="randm").fit(features, lambda _: None)


@pytest.mark.parametrize("top", [1, 5])
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_exact_searches_find_the_nearest(monkeypatch, backend, top):
    monkeypatch.setattr(nearest_module, "TILE_CENTERS", 64)
    monkeypatch.setattr(nearest_module, "TILE_FEATURES", 50)
    rows, centers = mixture(n=130).astype(np.float32), mixture(seed=1, n=333).astype(np.float32)
    exact = rows.astype(np.float64) @ centers.astype(np.float64).T
    cosine, ids = index_of(centers, backend).search(rows, top)
    assert np.array_equal(ids, np.argsort(-exact, axis=1)[:, :top])
    np.testing.assert_allclose(cosine, -np.sort(-exact, axis=1)[:, :top], atol=1e-5)


@pytest.mark.parametrize("columns", [4 * 64 * 5, 4 * 64 * 5 + 64, 64, 1000])
def test_largest_of_groups_are_the_largest(columns):
    """The same values as a plain top-k, at columns that hold them: with ties, and columns that fill no group."""
    scores = torch.randint(-3000, 3000, (40, columns), generator=torch.Generator().manual_seed(0)).float()
    found, at = nearest_module._largest(scores, 5)
    assert torch.equal(found, scores.topk(5, dim=1)[0])
    assert torch.equal(scores.gather(1, at), found)
    assert all(len(set(row)) == 5 for row in at.tolist())


def test_candidates_in_bfloat16_are_ranked_again_in_float32(monkeypatch):
    """The GPU's path, on the CPU: nearly all ids are the exact ones, and the cosines of those found are exact."""
    monkeypatch.setattr(nearest_module, "GPU_TILE_CENTERS", 64)
    rows, centers = mixture(n=400).astype(np.float32), mixture(seed=1, n=333).astype(np.float32)
    search = index_of(centers, "torch")
    search.is_exact, search.factor_kd = False, search.centers_kd.bfloat16()
    search._scores = search._scores.bfloat16()
    cosine, ids = search.search(rows, 8)
    exact, expected = index_of(centers, "faiss").search(rows, 8)
    assert (ids == expected).mean() > 0.999
    np.testing.assert_allclose(cosine[ids == expected], exact[ids == expected], atol=1e-5)


def test_inverted_file_is_nearly_exact_and_exact_with_all_lists():
    rows, centers = mixture(n=500).astype(np.float32), mixture(seed=1, n=4000).astype(np.float32)
    _, exact = index_of(centers, "faiss").search(rows, 1)
    _, some = index_of(centers, "ivf", nprobe=16).search(rows, 1)
    _, every = index_of(centers, "ivf", nprobe=10**6).search(rows, 1)
    assert (some == exact).mean() > 0.9
    assert (every == exact).mean() > 0.999


def test_seed_matters_and_from_given_centers_the_split_over_shards_does_not(tmp_path):
    rows = mixture(n=1000)
    one, again = (fit(write_features(tmp_path / name, [rows]), 20) for name in "ab")
    assert np.array_equal(one.centers_kd, again.centers_kd)
    assert not np.allclose(one.centers_kd, fit(FeatureFolder(tmp_path / "a"), 20, seed=1).centers_kd, atol=1e-3)
    np.save(tmp_path / "start.npy", rows[:20].astype(np.float32))
    split = write_features(tmp_path / "c", np.array_split(rows, 4))
    results = [
        SphericalKMeans(20, 8, 10**6, 0, init=str(tmp_path / "start.npy")).fit(features, lambda _: None).centers_kd
        for features in (FeatureFolder(tmp_path / "a"), split)
    ]
    np.testing.assert_allclose(*results, atol=1e-4)


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
    assert result.history[-1].empty == 4


def test_members_that_cancel_out_leave_a_center_that_can_be_used(tmp_path):
    rows = mixture(n=20)
    features = write_features(tmp_path / "f", [np.concatenate([rows, -rows])])
    for k in (1, 2):
        centers = fit(features, k, iterations=3).centers_kd
        np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)


def test_sample_is_uniform_over_shards_and_rows(tmp_path):
    features = write_features(tmp_path / "f", np.array_split(mixture(n=3000), 3))
    seen = np.zeros(3000)
    for seed in range(200):
        kmeans = SphericalKMeans(10, 2, 60, seed)
        blocks = kmeans_module._blocks(features)
        counts = kmeans._sample_counts([block.stop - block.start for block in blocks])
        assert counts.sum() == 600
        for block, count in zip(blocks, counts, strict=True):
            rows = kmeans._rows(block, count)
            assert len(rows) == count and (np.diff(rows) > 0).all()
            seen[1000 * block.number + rows] += 1
    # Binomial(200, 0.2): mean 40, deviation 5.7.
    assert abs(seen.mean() - 40) < 1e-9
    assert 10 < seen.min() and seen.max() < 75
    assert kmeans.fit(features, lambda _: None).num_used == 600


def test_more_centers_than_features_and_bad_rows_are_refused(tmp_path):
    features = write_features(tmp_path / "f", [mixture(n=50)])
    with pytest.raises(DataError, match=r"--k 51 is more than the 50 features"):
        fit(features, 51)
    rows = mixture(n=50)
    rows[17, 3] = np.nan
    with pytest.raises(DataError, match=r"img_emb_00000.npy: row 17 .*no numbers"):
        fit(write_features(tmp_path / "g", [rows]), 5)


def cluster(features, output, *flags, world_size=1, fresh=False):
    given = {flag.partition("=")[0] for flag in flags}
    defaults = [flag for flag in ("--k=20", "--iterations=5") if flag.partition("=")[0] not in given]
    arguments = [f"--features={features}", f"--output_dir={output}", *defaults, *flags]
    return run_script(world_size, [ROOT / "tools" / "cluster.py", *arguments], fresh=fresh)


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
    first, before = (tmp_path / "c" / "centers.npy").read_bytes(), np.array(centers.array)

    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25")
    assert ended.code == 0 and "are there already" in ended.output
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25", "--seed=1")
    assert ended.code == 3 and "seed 0 then, 1 now" in ended.output
    write_features(tmp_path / "g", np.array_split(mixture(n=1000), 4))  # as many features, of other shards
    (ended,) = cluster(tmp_path / "g", tmp_path / "c", "--max_points_per_center=25")
    assert ended.code == 3 and "holds other centers (features_fingerprint" in ended.output
    # Killed before centers.json: not taken for whole, and made again, by another number of ranks.
    (tmp_path / "c" / "centers.json").unlink()
    (tmp_path / "c" / "centers.npy").write_bytes(first[:50])
    with pytest.raises(DataError):
        Centers.load(tmp_path / "c")
    (ended, other) = cluster(tmp_path / "f", tmp_path / "c", "--max_points_per_center=25", world_size=2, fresh=True)
    assert (ended.code, other.code) == (0, 0), ended.output
    assert "going on" not in ended.output
    np.testing.assert_allclose(Centers.load(tmp_path / "c").array, before, atol=2e-5)


def test_killed_tool_goes_on_at_another_number_of_ranks(tmp_path):
    """Killed after any iteration but the last; a half-written file beside the state is nothing to it."""
    write_features(tmp_path / "f", np.array_split(mixture(n=4000), 2))
    (ended,) = cluster(tmp_path / "f", tmp_path / "whole", "--iterations=400", "--k=150")
    assert ended.code == 0, ended.output
    flags = [f"--features={tmp_path / 'f'}", f"--output_dir={tmp_path / 'c'}", "--k=150", "--iterations=400"]
    started = start_ranks(2, [ROOT / "tools" / "cluster.py", *flags])
    state = tmp_path / "c" / "iterations" / "state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started[0][0].pid, signal.SIGKILL)
    os.kill(started[1][0].pid, signal.SIGKILL)
    wait_ranks(started)
    reached = len(json.loads(state.read_text())["history"])
    (state.parent / "centers_00399.npy.tmp").write_bytes(b"half")
    (wrong,) = cluster(tmp_path / "f", tmp_path / "c", "--iterations=400", "--k=151")
    assert wrong.code == 3 and "another clustering (k 150 then, 151 now)" in wrong.output
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--iterations=400", "--k=150")
    assert ended.code == 0, ended.output
    assert f"going on after iteration {reached} of 400" in ended.output
    whole, resumed = Centers.load(tmp_path / "whole").array, Centers.load(tmp_path / "c").array
    np.testing.assert_allclose(resumed, whole, atol=1e-4)
    assert not state.parent.exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "c" / "tensorboard"))
    events.Reload()
    history = json.loads((tmp_path / "c" / "centers.json").read_text())["history"]
    assert [point.step for point in events.Scalars("Cluster/objective")] == [entry["number"] for entry in history]


def test_bad_rows_of_one_rank_are_everybodys_message(tmp_path):
    rows = mixture(n=200)
    bad = rows.copy()
    bad[17] = np.nan
    write_features(tmp_path / "f", [rows, bad])
    for ended in cluster(tmp_path / "f", tmp_path / "c", world_size=2):
        assert ended.code == 3, ended.output
        assert "img_emb_00001.npy: row 17" in ended.output
    assert not (tmp_path / "c" / "centers.json").exists()


def test_tool_refuses_more_centers_than_features(tmp_path):
    write_features(tmp_path / "f", [mixture(n=10)])
    (ended,) = cluster(tmp_path / "f", tmp_path / "c")
    assert ended.code == 3 and "error: --k 20 is more than the 10 features" in ended.output
    assert not (tmp_path / "c").exists()


def test_bad_rows_are_dropped_where_asked(tmp_path):
    """Two ranks: the centers are those of the features without them; how many is counted, and part of what is told apart."""
    rows = mixture(n=400)
    bad = rows.copy()
    bad[[0, 17, 399]], bad[250, 3] = 0, np.inf
    write_features(tmp_path / "bad", np.split(bad, [200]))
    good = np.delete(rows, [0, 17, 250, 399], axis=0)
    clean = write_features(tmp_path / "clean", np.split(good, [198]))
    expected = SphericalKMeans(20, 5, 10**6, 0).fit(clean, lambda _: None)
    ended, other = cluster(
        tmp_path / "bad", tmp_path / "c", "--drop_bad_rows", "--max_points_per_center=1e6", world_size=2
    )
    assert (ended.code, other.code) == (0, 0), ended.output + other.output
    assert "--drop_bad_rows: 4 of 400 features are left out, most of them, 2, in" in ended.output
    np.testing.assert_allclose(Centers.load(tmp_path / "c").array, expected.centers_kd, atol=2e-5)
    described = json.loads((tmp_path / "c" / "centers.json").read_text())
    assert (described["dropped_rows"], described["num_features"], described["num_used"]) == (4, 396, 396)
    features = FeatureFolder(tmp_path / "bad")
    features.drop({name: features.bad_rows(name) for name in features.names})
    with pytest.raises(DataError, match="--k 397 is more than the 396 features"):
        fit(features, 397)


def test_blocks_are_made_ahead_one_at_a_time_in_their_order():
    """Two blocks at most are in the making or in use; what making one raises comes in its turn; leaving ends the thread."""
    started, go = [], threading.Event()

    def make(number: int, name: str) -> str:
        started.append(number)
        if number == 3:
            raise DataError("block 3 is bad")
        assert go.wait(10)
        return f"{name}{number}"

    gpu = torch.device("cuda")  # a name alone: nothing is put there
    blocks = ahead(make, zip(itertools.count(), "abcdef", strict=False), gpu)
    go.set()
    assert next(blocks) == "a0"
    go.clear()
    while len(started) < 2:
        time.sleep(0.001)
    time.sleep(0.01)
    assert started == [0, 1]  # the next one is begun while the caller has this one, and no other
    go.set()
    assert [next(blocks), next(blocks)] == ["b1", "c2"]
    with pytest.raises(DataError, match="block 3 is bad"):
        next(blocks)
    assert 5 not in started and not _ahead_threads()
    left = ahead(make, [(0, "a"), (1, "b"), (2, "c")], gpu)
    for _ in left:
        break
    left.close()
    assert not _ahead_threads()
    assert list(ahead(make, [], gpu)) == []
    started.clear()
    for block in ahead(make, [(0, "a"), (1, "b")], torch.device("cpu")):
        assert not _ahead_threads() and len(started) == 1 + int(block[1:])  # on CPUs each when it is asked for


def _ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_what_an_approximate_search_misses_is_counted(tmp_path):
    """On all features, where there are no more than are looked at."""
    rows = mixture(n=1500)
    features = write_features(tmp_path / "f", np.array_split(rows, 2))
    settings = {"k": 200, "iterations": 2, "max_points_per_center": 100, "seed": 0}
    assert SphericalKMeans(**settings).fit(features, lambda _: None).check is None
    result = SphericalKMeans(**settings, backend="ivf", nprobe=1).fit(features, lambda _: None)
    unit = np.concatenate([features.unit_rows(name, 0, 750) for name in features.names])
    cosines = unit @ result.centers_kd.T
    cosine, found = index_of(result.centers_kd, "ivf", nprobe=1).search(unit, 1)
    check = result.check
    assert check.features == 1500 and 0.2 < check.found < 0.99
    assert check.found == pytest.approx((found[:, 0] == cosines.argmax(1)).mean(), abs=2e-3)
    assert check.exact == pytest.approx(cosines.max(1).mean(), rel=1e-5)
    assert check.approximate == pytest.approx(cosine.mean(), rel=1e-5)
