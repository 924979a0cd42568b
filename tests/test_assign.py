"""Label shards: the nearest centers exactly, by many ranks, resumed, refused where features and centers do not fit."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import ROOT, run_script
from test_kmeans import mixture, write_features

from mlcd_ds.clustering import regroup
from mlcd_ds.clustering.assign import assign_labels, recall
from mlcd_ds.clustering.progress import FolderProgress
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
    ended = run_script(2, [ROOT / "tools" / "assign_labels.py", *flags], fresh=True)
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


def write_published(folder, rows, tars, files, seed=None, column="key"):
    """Rows as clip-retrieval publishes them: img2dataset's keys of `tars` tars, in files of so many rows, without a
    features.json. seed: of the order of the rows; None: that of the tars."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    keys = np.array(
        [f"{tar:05d}{row:04d}" for tar, part in enumerate(np.array_split(rows, tars)) for row in range(len(part))]
    )
    order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
    for number, part in enumerate(np.split(order, np.cumsum(files)[:-1])):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[part])
        texts = [f"tars/{key}.jpg" for key in keys[part]] if column == "image_path" else keys[part].tolist()
        table = pa.table({column: texts, "caption": ["c"] * len(part)})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.mark.parametrize("column", ["key", "image_path"])
def test_published_files_of_many_tars_give_the_labels_of_one_file_per_tar(prepared, monkeypatch, column):
    """Any order of the rows, any length of the files, pieces shorter than them."""
    folder, rows, centers = prepared
    save_centers(folder / "c2", centers, {"feature_model": "unknown:p"})
    expected = np.argsort(-exact(rows, centers), axis=1)[:, :8]
    monkeypatch.setattr(regroup, "PIECE_ROWS", 90)
    write_published(folder / "p", rows, 3, [200, 130, 170], seed=0, column=column)
    settings = {"features": folder / "p", "centers": folder / "c2", "tar_of_key": 5}
    summary = assign(folder, **settings)
    labels, _, shards = labels_of(folder)
    assert np.array_equal(labels, expected)
    assert [len(shard.keys) for shard in shards] == [167, 167, 166]
    assert summary.images == 500 and summary.already == 0 and not (folder / "l" / "pieces").exists()
    before = {path.name: path.read_bytes() for path in (folder / "l").iterdir()}
    again = assign(folder, **settings)
    assert (again.images, again.already) == (0, 3)
    (folder / "l" / "00001.parquet").unlink()
    assert assign(folder, **settings).already == 2
    assert {path.name: path.read_bytes() for path in (folder / "l").iterdir()} == before
    flags = {"features": folder / "p", "centers": folder / "c2", "output_dir": folder / "l", "tar_of_key": 5}
    assert (
        recall(AssignConfig(**{n: str(v) if hasattr(v, "parts") else v for n, v in flags.items()}, verify=300)) == 1.0
    )


def test_what_cannot_be_grouped_is_named(prepared):
    folder, rows, centers = prepared
    save_centers(folder / "c2", centers, {"feature_model": "unknown:p"})
    write_published(folder / "p", rows, 3, [500])
    settings = {"features": folder / "p", "centers": folder / "c2"}
    with pytest.raises(DataError, match=r"'000000000' does not begin with the 12 characters.*--tar_of_key right"):
        assign(folder, **settings, tar_of_key=12, output_dir=folder / "l2")
    assign(folder, **settings, tar_of_key=5)
    with pytest.raises(DataError, match=r"other settings .*'tar_of_key': 5.* then"):
        assign(folder, **settings)
    table = pq.read_table(folder / "p" / "metadata" / "metadata_0.parquet")
    keys = table.column("key").to_pylist()
    keys[7] = keys[3]
    pq.write_table(pa.table({"key": keys}), folder / "p" / "metadata" / "metadata_0.parquet")
    with pytest.raises(
        DataError, match=r"key '000000003' comes twice among the features of tar '00000' \(in the files 0\)"
    ):
        assign(folder, **settings, tar_of_key=5, output_dir=folder / "l3")


@pytest.mark.parametrize("tar_of_key", [None, 5])
def test_dropped_rows_have_no_label_and_are_counted(prepared, tar_of_key):
    folder, rows, centers = prepared
    bad = rows.copy()
    bad[[3, 200]], bad[201, 5] = 0, np.nan
    write_features(folder / "g", np.array_split(bad, 3))
    settings = {"features": folder / "g", "tar_of_key": tar_of_key}
    with pytest.raises(DataError, match=r"img_emb_00000.npy: row 3 \(key '000000003'\) is all zeros.*--drop_bad_rows"):
        assign(folder, **settings)
    summary = assign(folder, **settings, drop_bad_rows=True)
    labels, cosines, shards = labels_of(folder)
    good = np.ones(500, bool)
    good[[3, 200, 201]] = False
    assert np.array_equal(labels[good], np.argsort(-exact(rows, centers), axis=1)[good, :8])
    assert (labels[~good] == -1).all() and (cosines[~good] == 0).all()
    assert sum(len(shard.keys) for shard in shards) == 500  # they stand there, with empty lists
    assert summary.dropped == 3 and summary.labels_per_image == 8
    assert assign(folder, **settings, drop_bad_rows=True).dropped == 3  # found finished
    flags = {"features": folder / "g", "centers": folder / "c", "output_dir": folder / "l"} | {"tar_of_key": tar_of_key}
    config = AssignConfig(
        **{n: str(v) if hasattr(v, "parts") else v for n, v in flags.items()}, verify=500, drop_bad_rows=True
    )
    assert recall(config) == 1.0


def test_the_bar_is_of_the_whole_job(tmp_path, capsys):
    """Two ranks: what the other one finishes, and what was there before, is seen in the folder."""
    files = {f"{shard}.parquet": shard for shard in "abcd"}
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "b.parquet.host.7.tmp").write_bytes(b"")
    two = Topology(0, 2, 0, 2, torch.device("cpu"))
    with FolderProgress("labels", two, tmp_path, files, {"a": 10, "b": 20, "c": 30, "d": 40}.__getitem__) as progress:
        assert (progress.images, progress.estimated_total()) == (10, 40)
        progress.add(5)
        progress.started -= 1
        assert progress.rate() == pytest.approx(10, rel=0.2)  # both ranks, at this one's rate
        (tmp_path / "c.parquet").write_bytes(b"")
        progress.look()
        assert (progress.images, progress.own_unfinished, progress.estimated_total()) == (40, 5, 80)
        progress.add(15)
        (tmp_path / "b.parquet").write_bytes(b"")
        progress.finish()
        progress.look()
        assert progress.images == 60 and progress.rate() == pytest.approx(50, rel=0.3)
        (tmp_path / "d.parquet").write_bytes(b"")
    shown = capsys.readouterr().err
    assert "100/100 images" in shown and "on 2 rank(s), 4/4 shards, left 0:00:00" in shown


def test_two_ranks_group_by_tar(prepared):
    """Each has a piece and some tars; the bytes are those of one process, and the bar is of both."""
    folder, rows, centers = prepared
    save_centers(folder / "c2", centers, {"feature_model": "unknown:p"})
    write_published(folder / "p", rows, 5, [240, 260], seed=1)
    settings = {"features": folder / "p", "centers": folder / "c2", "tar_of_key": 5}
    assign(folder, **settings)
    flags = [f"--{name}={value}" for name, value in (settings | {"output_dir": folder / "l2"}).items()]
    ended = run_script(2, [ROOT / "tools" / "assign_labels.py", *flags])
    assert [rank.code for rank in ended] == [0, 0], ended[0].output + ended[1].output
    assert "500 images labelled now, 0 shards were finished before" in ended[0].output
    assert "500/500 images" in ended[0].output and ended[1].output == ""
    whole = {path.name: path.read_bytes() for path in (folder / "l").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "l2").iterdir()} == whole
    assert sorted(whole) == sorted(["grouped.json", "labels.json", *(f"{tar:05d}.parquet" for tar in range(5))])
