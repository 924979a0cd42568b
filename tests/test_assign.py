"""Label shards: the nearest centers exactly, by many ranks, resumed, refused where features and centers do not fit."""

import numpy as np
import pytest
from processes import ROOT, run_script
from test_kmeans import mixture, write_features

from mlcd_ds.clustering.assign import assign_labels, recall
from mlcd_ds.config import AssignConfig
from mlcd_ds.data.centers import Centers, save_centers
from mlcd_ds.data.labels import read_label_shard, write_label_shard
from mlcd_ds.errors import DataError
from mlcd_ds.topology import Topology


@pytest.fixture
def prepared(tmp_path):
    """500 features in 3 shards and 30 centers of the same model."""
    rows = mixture(n=500)
    write_features(tmp_path / "f", np.array_split(rows, 3))
    centers = mixture(seed=5, n=30).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    save_centers(tmp_path / "c", centers, {"feature_model": "toy"})
    return tmp_path, rows, centers


def assign(folder, **changes):
    settings = {
        "features": folder / "f",
        "centers": folder / "c",
        "output_dir": folder / "l",
        "batch_size": 64,
    } | changes
    return assign_labels(
        AssignConfig(**{n: str(v) if hasattr(v, "parts") else v for n, v in settings.items()}), Topology.single()
    )


def labels_of(folder):
    shards = [read_label_shard(folder / "l" / f"{shard:05d}.parquet") for shard in range(3)]
    return np.concatenate([s.labels for s in shards]), np.concatenate([s.cosines for s in shards]), shards


def exact(rows, centers):
    rows = rows.astype(np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ centers.astype(np.float64).T


def test_labels_are_the_nearest_centers_in_order(prepared):
    folder, rows, centers = prepared
    summary = assign(folder)
    labels, cosines, shards = labels_of(folder)
    cosine = exact(rows, centers)
    expected = np.argsort(-cosine, axis=1)[:, :8]
    assert np.array_equal(labels, expected)
    np.testing.assert_allclose(cosines, np.take_along_axis(cosine, expected, 1), atol=1e-3)
    assert all(len(set(row)) == 8 for row in labels.tolist())
    assert [s.keys[0] for s in shards] == ["000000000", "000010000", "000020000"]
    info = shards[0].info
    assert (info.num_classes, info.num_positives, info.feature_model) == (30, 8, "toy")
    assert info.centers_hash == Centers.load(folder / "c").hash
    assert summary.images == 500 and summary.labels_per_image == 8
    assert summary.nearest == pytest.approx(cosine.max(1).mean(), rel=1e-4)


def test_threshold_keeps_only_near_centers(prepared):
    folder, rows, centers = prepared
    assign(folder, threshold=0.3)
    labels, _, _ = labels_of(folder)
    cosine = exact(rows, centers)
    expected = np.minimum((cosine >= 0.3).sum(1), 8)
    near = np.abs(cosine - 0.3).min(1) > 1e-4
    assert np.array_equal((labels >= 0).sum(1)[near], expected[near])
    assert expected.min() < 8 and expected.max() > 0  # the threshold bites, and not everywhere


def test_finished_shards_stay(prepared):
    folder, *_ = prepared
    assign(folder)
    times = {path.name: path.stat().st_mtime_ns for path in (folder / "l").glob("*.parquet")}
    (folder / "l" / "00001.parquet").unlink()
    (folder / "l" / "00001.parquet.tmp").write_bytes(b"half")
    summary = assign(folder)
    assert summary.already == 2 and summary.images == 167
    for name in ("00000.parquet", "00002.parquet"):
        assert (folder / "l" / name).stat().st_mtime_ns == times[name]
    assert len(read_label_shard(folder / "l" / "00001.parquet").keys) == 167


def test_labels_of_another_threshold_are_not_mixed_in(prepared):
    folder, *_ = prepared
    assign(folder)
    with pytest.raises(DataError, match=r"made with other settings .*'threshold': None.* then, .*'threshold': 0.3"):
        assign(folder, threshold=0.3)


def test_changed_centers_and_damaged_labels_are_refused(prepared):
    folder, _, centers = prepared
    assign(folder)
    damaged = folder / "l" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(DataError, match=r"00001.parquet cannot be read.*Remove that file first"):
        assign(folder)
    np.save(folder / "c" / "centers.npy", centers[::-1].copy())
    with pytest.raises(DataError, match=r"centers.npy is not the file that centers.json beside it describes"):
        assign(folder, output_dir=folder / "l2")


def test_what_does_not_fit_is_refused(prepared):
    folder, _, centers = prepared
    with pytest.raises(DataError, match="--top 31 is more than the 30 centers"):
        assign(folder, top=31)
    assign(folder)
    with pytest.raises(DataError, match="holds labels of other centers or another --top"):
        assign(folder, top=5)
    save_centers(folder / "other", centers, {"feature_model": "another"})
    with pytest.raises(DataError, match=r"'toy' with 24 dimensions.*'another' with 24"):
        assign(folder, centers=folder / "other", output_dir=folder / "l2")
    save_centers(folder / "narrow", centers[:, :10], {"feature_model": "toy"})
    with pytest.raises(DataError, match=r"with 24 dimensions.*with 10"):
        assign(folder, centers=folder / "narrow", output_dir=folder / "l2")
    (folder / "narrow" / "centers.json").unlink()
    with pytest.raises(DataError, match="has not finished there"):
        assign(folder, centers=folder / "narrow", output_dir=folder / "l2")
    assert not (folder / "l2").exists()


def test_two_ranks_share_the_shards(prepared):
    folder, *_ = prepared
    assign(folder)
    flags = [f"--features={folder / 'f'}", f"--centers={folder / 'c'}", f"--output_dir={folder / 'l2'}"]
    ended = run_script(2, [ROOT / "tools" / "assign_labels.py", *flags])
    assert [rank.code for rank in ended] == [0, 0], ended[0].output
    assert "0 shards were finished before; 8.00 labels an image" in ended[0].output
    for path in (folder / "l").iterdir():
        assert (folder / "l2" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("backend", ["faiss", "torch", "ivf"])
def test_verify_reports_the_recall_of_the_search(prepared, backend):
    folder, *_ = prepared
    flags = {"features": folder / "f", "centers": folder / "c", "output_dir": folder / "l", "top": 4, "assign": backend}
    arguments = [f"--{name}={value}" for name, value in (flags | {"verify": 200, "nprobe": 1}).items()]
    for ended in run_script(2, [ROOT / "tools" / "assign_labels.py", *arguments]):
        assert ended.code == 0, ended.output
    found = recall(AssignConfig(**{n: str(v) if hasattr(v, "parts") else v for n, v in flags.items()}, verify=500))
    assert found == 1.0  # 30 centers make one list
    # Damage half of the labels of one shard: the recall says so.
    path = folder / "l" / "00000.parquet"
    shard = read_label_shard(path)
    labels = shard.labels.copy()
    for row in labels:
        unused = [center for center in range(30) if center not in row[:2]]
        row[2:] = unused[-2:]
    write_label_shard(path, shard.keys, labels, shard.cosines, shard.info)
    assert (
        recall(AssignConfig(**{n: str(v) if hasattr(v, "parts") else v for n, v in flags.items()}, verify=500)) < 0.95
    )
