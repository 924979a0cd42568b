"""Two-level k-means: even coarse clusters, exact shares of the centers, the same at any number of ranks and after a kill."""

import json
from dataclasses import astuple

import faiss
import numpy as np
import pytest
from kmeans_ranks import cluster_on_ranks
from processes import ROOT, run_script
from test_kmeans import cluster, mean_cosine, mixture, write_features

from mlcd_ds.clustering import kmeans
from mlcd_ds.clustering.iterations import IterationStore
from mlcd_ds.clustering.kmeans import SphericalKMeans
from mlcd_ds.clustering.nearest import GroupedSearch, index_of
from mlcd_ds.clustering.two_level import CAP, TwoLevelKMeans, centers_per_group, given_up
from mlcd_ds.data.centers import Centers
from mlcd_ds.errors import ConfigError, DataError


def fit(features, k, iterations=6, seed=0, limit=10**6, keep=None, resume=None, **levels):
    flat = SphericalKMeans(k, iterations, limit, seed)
    return TwoLevelKMeans(flat, **levels).fit(features, lambda _: None, resume, keep)


def phases(result):
    return [iteration.phase for iteration in result.history]


def skewed(seed=0, n=8000, d=16, groups=300):
    """A mixture whose first groups have most of the rows."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, groups + 1)
    means = generator.normal(size=(groups, d))
    return means[generator.choice(groups, n, p=share / share.sum())] + 0.4 * generator.normal(size=(n, d))


@pytest.mark.parametrize("coarse", [None, 7, 1, 100])
def test_it_is_nearly_as_good_as_flat(tmp_path, coarse):
    """k not a multiple of the coarse clusters; one of them (then it is flat); as many of them as centers."""
    rows = skewed()
    features = write_features(tmp_path / "f", np.array_split(rows, 3))
    flat = SphericalKMeans(100, 10, 10**6, 0).fit(features, lambda _: None)
    result = fit(features, 100, 10, coarse=coarse)
    assert result.centers_kd.shape == (100, 16) and result.sizes_k.sum() == len(rows)
    assert mean_cosine(rows, result.centers_kd) > 0.98 * mean_cosine(rows, flat.centers_kd)
    assert phases(result)[:10] == ["coarse"] * 10 and phases(result)[10:] == ["fine"] * 4 + ["global"] * 2
    assert [iteration.number for iteration in result.history] == list(range(len(result.history)))
    inside, over_all, last = result.history[-3:]
    # Every feature finds a center as near among many as among some, and the update only helps.
    assert inside.objective - 1e-6 <= inside.updated <= over_all.objective + 1e-6 <= over_all.updated + 2e-6
    assert over_all.updated <= last.objective + 1e-6 <= last.updated + 2e-6
    assert last.updated <= mean_cosine(rows, result.centers_kd) + 1e-5


def test_coarse_clusters_are_even_and_centers_are_shared_by_size(tmp_path):
    rows = skewed(n=12_000)
    features = write_features(tmp_path / "f", np.array_split(rows, 3))
    states = []
    fit(features, 200, keep=states.append, coarse=12)
    plain = SphericalKMeans(12, 20, 10**6, 0).fit(features, lambda _: None)
    aside = next(state for state in states if state.history[-1].phase == "fine").aside
    sizes, given = aside["sizes"], np.diff(aside["first"])
    assert sizes.sum() == 12_000 and given.sum() == 200
    assert sizes.max() <= 1.2 * CAP * 1000 < plain.sizes_k.max()
    np.testing.assert_allclose(given, sizes * 200 / 12_000, atol=1)
    # What the first fine iteration started from: features of the own coarse cluster, all different.
    model = TwoLevelKMeans(SphericalKMeans(200, 6, 10**6, 0), coarse=12)
    coarse = [state for state in states if state.history[-1].phase == "coarse"][-1]
    start = model.second.begin(features, model.first, coarse)
    _, found = index_of(coarse.centers_kd).search(start.centers_kd, 1)
    assert np.array_equal(found[:, 0], np.repeat(np.arange(12), given))
    assert len(np.unique(start.centers_kd, axis=0)) == 200


@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ([50, 30, 20], 10),
        ([1000, 1, 1, 1], 4),
        ([5, 0, 5, 1], 11),
        ([333, 333, 334], 100),
        ([7, 1, 1, 90, 0, 1], 37),
        ([400_000_000 // 7] * 7, 1_000_000),
    ],
)
def test_centers_per_group_add_up(sizes, k):
    given = centers_per_group(sizes, k)
    sizes = np.array(sizes)
    assert given.sum() == k
    assert (given <= sizes).all() and (given[sizes > 0] >= 1).all()
    quota = sizes * k / sizes.sum()
    assert ((given >= np.floor(quota)) & (given <= np.maximum(np.ceil(quota), 1)) | (quota.min() < 1)).all()


def test_the_smallest_are_given_up_while_the_largest_is_beyond_its_cap():
    assert not given_up(np.array([100, 120, 80, 140])).any()  # share 110, cap 165
    assert given_up(np.array([300, 100, 20, 20])).tolist() == [False, False, True, False]
    assert given_up(np.array([960, 10, 20, 10])).tolist() == [False, True, True, True]
    assert given_up(np.array([4, 1, 1, 1])).sum() <= 3
    assert not given_up(np.array([7])).any()


def test_impossible_shares_are_refused():
    for sizes, k in (([5, 5], 11), ([5, 5, 5], 2)):
        with pytest.raises(ValueError, match=f"{k} centers for"):
            centers_per_group(sizes, k)


def test_as_many_centers_as_features_and_duplicates(tmp_path):
    """Coarse clusters with fewer different features than centers: nothing is lost, no center is no number."""
    rows = np.repeat(mixture(n=40), 3, axis=0)
    for name, k in (("a", 120), ("b", 60)):
        result = fit(write_features(tmp_path / name, np.array_split(rows, 2)), k, coarse=6)
        np.testing.assert_allclose(np.linalg.norm(result.centers_kd, axis=1), 1, atol=1e-5)
        assert result.sizes_k.sum() == 120
    same = write_features(tmp_path / "same", [np.ones((50, 24))])
    assert np.isfinite(fit(same, 10).centers_kd).all()


def test_too_many_centers_or_coarse_clusters_are_refused(tmp_path):
    features = write_features(tmp_path / "f", [mixture(n=50)])
    with pytest.raises(DataError, match=r"--k 51 is more than the 50 features"):
        fit(features, 51)
    with pytest.raises(ConfigError, match=r"--coarse 11 is more than --k 10: use about 3"):
        fit(features, 10, coarse=11)


def test_grouped_search_is_the_masked_search():
    generator = np.random.default_rng(0)
    rows, centers = mixture(n=300).astype(np.float32), mixture(seed=1, n=40).astype(np.float32)
    first, groups = np.array([0, 5, 5, 6, 40]), np.sort(generator.choice([0, 2, 3], 300))
    scores = rows @ centers.T
    for group in (0, 2, 3):
        outside = (np.arange(40) < first[group]) | (np.arange(40) >= first[group + 1])
        scores[np.ix_(groups == group, outside)] = -9
    cosine, found = GroupedSearch(centers, first).search(rows, np.bincount(groups))
    assert np.array_equal(found, scores.argmax(1))
    np.testing.assert_allclose(cosine, scores.max(1), atol=1e-6)
    cosine, found = GroupedSearch(centers, first).search(rows[:0], np.zeros(4, int))
    assert cosine.shape == found.shape == (0,)


def test_search_in_several_groups_is_the_masked_search():
    generator = np.random.default_rng(0)
    rows, centers = mixture(n=300).astype(np.float32), mixture(seed=1, n=40).astype(np.float32)
    first, groups = np.array([0, 5, 5, 6, 40]), np.argsort(generator.random((300, 4)), axis=1)[:, :2]
    owner = np.repeat(np.arange(4), np.diff(first))
    scores = np.where((owner == groups[:, :1]) | (owner == groups[:, 1:]), rows @ centers.T, -9)
    cosine, found = GroupedSearch(centers, first).search_several(rows, groups)  # group 1 has no centers
    assert np.array_equal(found, scores.argmax(1))
    np.testing.assert_allclose(cosine, scores.max(1), atol=1e-6)


def test_ranks_do_not_matter(tmp_path):
    """1, 2 and 3 ranks, a sample or all features, a start from given coarse centers, each backend."""
    rows = mixture(n=2000)
    write_features(tmp_path / "f", np.array_split(rows, 3))
    np.save(tmp_path / "start.npy", rows[:9].astype(np.float32))
    common = {"two_level": True, "iterations": 4, "seed": 3}
    cases = [
        common | {"k": 50, "max_points_per_center": 20},
        common | {"k": 61, "max_points_per_center": 10**6, "coarse": 9, "init": str(tmp_path / "start.npy")},
        common | {"k": 61, "max_points_per_center": 10**6, "coarse": 20, "refinements": 2, "backend": "torch"},
        common | {"k": 61, "max_points_per_center": 10**6, "coarse": 20, "refinements": 2, "probes": 3},
    ]
    cluster_on_ranks(tmp_path, cases)


def test_killed_in_each_phase_it_goes_on_at_another_number_of_ranks(tmp_path, monkeypatch):
    """Killed after the second coarse, the second fine and the first global iteration; and the last state begins nothing."""
    features = write_features(tmp_path / "f", np.array_split(mixture(n=2000), 3))
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 170)  # the worker's
    settings = {"k": 50, "iterations": 8, "max_points_per_center": 10**6, "seed": 1}
    levels = {"refinements": 2, "probes": 3}
    clustering = TwoLevelKMeans(SphericalKMeans(**settings), **levels)
    whole = clustering.fit(features, lambda _: None)
    assert phases(whole)[-6:] == ["fine"] * 4 + ["global"] * 2
    fine = phases(whole).index("fine")
    assert fine == 8
    store = tmp_path / "store"
    for world_size, last in ((2, 2), (1, fine + 2), (3, fine + 5), (2, None)):
        case = settings | levels | {"two_level": True, "store": str(store), "killed_after": last}
        (tmp_path / "cases.json").write_text(json.dumps([case]))
        arguments = [ROOT / "tests" / "kmeans_worker.py", tmp_path / "f", tmp_path / "cases.json", tmp_path]
        ended = run_script(world_size, arguments)
        if last is None:
            assert [rank.code for rank in ended] == [0, 0], ended[0].output[-3000:]
        else:
            assert ended[0].code == -9, ended[0].output[-3000:]
            assert len(json.loads((store / "state.json").read_text())["history"]) == last
    found = np.load(tmp_path / "case0_world2_rank1.npz")
    np.testing.assert_allclose(found["centers"], whole.centers_kd, atol=2e-5)
    np.testing.assert_allclose(found["objective"], [entry.objective for entry in whole.history], rtol=1e-6)
    state = IterationStore(store, {"case": 0}).load()
    again = clustering.fit(features, lambda _: None, state)
    assert np.array_equal(again.centers_kd, state.centers_kd) and again.sizes_k is None
    assert astuple(again.check) == pytest.approx(astuple(whole.check), rel=1e-6)


def test_a_damaged_file_beside_the_centers_is_found(tmp_path):
    features = write_features(tmp_path / "f", [mixture(n=500)])
    store = IterationStore(tmp_path / "s", {})
    fit(features, 20, 3, keep=store.save, refinements=0)
    assert store.verify()
    (file,) = (tmp_path / "s").glob("aside_*.npz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="aside_.*missing or damaged"):
        store.verify()


def test_tool_prints_the_objective_before_and_after(tmp_path):
    rows = mixture(n=1000)
    write_features(tmp_path / "f", np.array_split(rows, 2))
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", "--two_level", "--coarse=4")
    assert ended.code == 0, ended.output
    described = json.loads((tmp_path / "c" / "centers.json").read_text())
    before, after = described["history"][-2]["objective"], described["history"][-1]["updated"]
    assert f"to the nearest of all {before:.4f} before, at least {after:.4f} after 2 iteration(s)" in ended.output
    assert described["two_level"] and (described["coarse"], described["refinements"]) == (4, 2)
    centers = np.array(Centers.load(tmp_path / "c").array)
    index = faiss.IndexFlatIP(24)
    index.add(centers)
    assert after - 1e-5 <= mean_cosine(rows, centers)
    (ended,) = cluster(tmp_path / "f", tmp_path / "c")
    assert ended.code == 3 and "holds other centers (" in ended.output and "two_level" in ended.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coarse=4"], "--coarse 4 is for --two_level"),
        (["--refinements=3"], "--refinements 3 is for --two_level"),
        (["--probes=8"], "--probes 8 is for --two_level"),
        (["--two_level", "--coarse=21"], "--coarse 21 is more than --k 20"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, words):
    (ended,) = cluster(tmp_path / "f", tmp_path / "c", *flags)
    assert ended.code == 2 and words in ended.output, ended.output
