"""Label shards, and what a run refuses to start on."""

import dataclasses
import errno
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from toy_data import INFO, encode, labels_of, make_shards, picture, write_labels

from mlcd_ds.data import storage
from mlcd_ds.data.labels import check_label_folder, read_dropped, read_label_info, read_label_shard, write_label_shard
from mlcd_ds.data.shards import build_shard_table
from mlcd_ds.data.tar_index import index_path
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import DataError
from mlcd_ds.topology import Topology

LABELS = np.array([[4, 2, 9], [7, -1, -1], [-1, -1, -1], [49, 0, -1]], np.int32)
COSINES = np.array([[0.5, 0.25, 0.125], [0.75, 0, 0], [0, 0, 0], [1, -1, 0]], np.float16)
KEYS = ["a", "b", "ü", "d"]


def test_round_trip(tmp_path):
    path = tmp_path / "labels" / "00000.parquet"
    write_label_shard(path, KEYS, LABELS, COSINES, INFO)
    shard = read_label_shard(path)
    assert shard.keys == KEYS and shard.info == INFO
    assert shard.labels.dtype == np.int32 and (shard.labels == LABELS).all()
    assert shard.cosines.dtype == np.float16 and (shard.cosines == COSINES).all()
    assert read_label_info(path) == (INFO, 4)
    assert [file.name for file in path.parent.iterdir()] == ["00000.parquet"]
    bytes_before = path.read_bytes()
    write_label_shard(path, KEYS, LABELS, COSINES, INFO)
    assert path.read_bytes() == bytes_before


def test_the_file_is_what_the_design_says(tmp_path):
    write_label_shard(tmp_path / "x.parquet", KEYS, LABELS, COSINES, INFO)
    table = pq.read_table(tmp_path / "x.parquet")
    assert {field.name: field.type for field in table.schema} == {
        "key": pa.string(),
        "label": pa.list_(pa.int32()),
        "cosine": pa.list_(pa.float16()),
    }
    assert table.column("label").to_pylist() == [[4, 2, 9], [7], [], [49, 0]]


def failing_reads(monkeypatch, number, times):
    """The first `times` reads of a file, by whatever function, fail."""
    left, opened = [times], Path.open

    def failing(path, *arguments, **options):
        file = opened(path, *arguments, **options)

        class Failing(io.BufferedReader):
            def read(self, *size):
                if left[0]:
                    left[0] -= 1
                    raise OSError(number, os.strerror(number))
                return super().read(*size)

        return Failing(file.detach())

    monkeypatch.setattr(Path, "open", failing)


READERS = {
    "rows": lambda path: read_label_shard(path).keys,
    "footer": read_label_info,
    "dropped": read_dropped,
}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_disk_or_file_server_that_comes_back_is_waited_for(tmp_path, monkeypatch, reader, number):
    write_label_shard(path := tmp_path / "x.parquet", KEYS, LABELS, COSINES, INFO, dropped=2)
    expected, waits = reader(path), []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    failing_reads(monkeypatch, number, 3)
    assert reader(path) == expected
    assert waits == list(storage.RETRY_SECONDS[:3])


@pytest.mark.parametrize(
    "number, message", [(errno.EIO, "cannot be read: .*Write the labels again"), (errno.ESTALE, "Its file server")]
)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_disk_or_file_server_that_stays_away_is_an_error_with_the_file(
    tmp_path, monkeypatch, reader, number, message
):
    write_label_shard(path := tmp_path / "x.parquet", KEYS, LABELS, COSINES, INFO)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    failing_reads(monkeypatch, number, 10**6)
    with pytest.raises(DataError, match=f"the label file {path}.*{message}"):
        reader(path)


def test_a_shard_without_rows(tmp_path):
    nothing = np.zeros((0, 3))
    write_label_shard(tmp_path / "x.parquet", [], nothing, nothing, INFO)
    assert read_label_shard(tmp_path / "x.parquet").labels.shape == (0, 3)


@pytest.mark.parametrize(
    "keys, labels, message",
    [
        (KEYS, np.where(LABELS == 49, 50, LABELS), "label 50, outside 0..49"),
        (KEYS, np.where(LABELS == 49, -3, LABELS), "label -3"),
        (["a", "b", "a", "d"], LABELS, "'a' comes twice"),
        (KEYS, LABELS[:, ::-1], "padding"),
        (KEYS[:3], LABELS, "must both be"),
    ],
)
def test_wrong_labels_are_not_written(tmp_path, keys, labels, message):
    with pytest.raises(ValueError, match=message):
        write_label_shard(tmp_path / "x.parquet", keys, labels, COSINES, INFO)
    assert not list(tmp_path.iterdir())


def foreign(path, labels, cosines=None, metadata=True, keys=None, info=INFO):
    """A file that our writer would not make."""
    cosines = cosines or [[0.5] * len(row or []) for row in labels]
    columns = {
        "key": pa.array(keys or [f"k{i}" for i in range(len(labels))]),
        "label": pa.array(labels, pa.list_(pa.int32())),
        "cosine": pa.array([np.float16(row) for row in cosines], pa.list_(pa.float16())),
    }
    table = pa.table(columns).replace_schema_metadata(
        {b"mlcd_ds.labels": info if isinstance(info, bytes) else info.to_json().encode()} if metadata else None
    )
    pq.write_table(table, path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": [[1], [50]]}, "'k1' has label 50, outside 0..49"),
        ({"labels": [[1], [-2]]}, "'k1' has label -2"),
        ({"labels": [[1], [1, 2, 3, 4]]}, "a row of 4 entries, l is 3"),
        ({"labels": [[1], None]}, "nulls"),
        ({"labels": [[1], [2]], "keys": ["a", "a"]}, "'a' comes twice"),
        ({"labels": [[1], [2]], "cosines": [[0.5], [float("nan")]]}, "'k1' are not all numbers"),
        ({"labels": [[1]], "metadata": False}, "is not a label file"),
        ({"labels": [[1]], "info": b"{}"}, "bad metadata"),
        ({"labels": [[1]], "info": b"not json"}, "bad metadata"),
        (
            {"labels": [[1]], "info": dataclasses.replace(INFO, format_version=2)},
            "format version 2, this program reads 1",
        ),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, arguments, message):
    path = tmp_path / "00003.parquet"
    foreign(path, **arguments)
    with pytest.raises(DataError, match=message) as caught:
        read_label_shard(path)
    assert str(path) in str(caught.value) and "tools/assign_labels.py" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "columns", "absent"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "00003.parquet"
    write_label_shard(path, KEYS, LABELS, COSINES, INFO)
    data = path.read_bytes()
    if damage == "columns":
        pq.write_table(pa.table({"key": ["a"]}), path)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello world, hello"}[damage])
    for read in (read_label_shard, read_label_info):
        with pytest.raises(DataError, match=str(path)):
            read(path)


def test_a_label_that_is_changed_in_the_file_is_found(tmp_path):
    """Parquet itself would hand out the other label: it checks nothing."""
    path = tmp_path / "00003.parquet"
    write_label_shard(path, KEYS, LABELS, COSINES, INFO)
    table = pq.read_table(path)
    rows = table.column("label").to_pylist()
    rows[1] = [8]
    changed = table.set_column(1, table.schema.field("label"), pa.array(rows, pa.list_(pa.int32())))
    pq.write_table(changed, path)
    with pytest.raises(DataError, match="00003.parquet: its rows do not match their SHA-256"):
        read_label_shard(path)
    old = {key: value for key, value in table.schema.metadata.items() if key != b"mlcd_ds.sha256"}
    pq.write_table(table.replace_schema_metadata(old), path)  # as earlier versions wrote it
    assert (read_label_shard(path).labels == LABELS).all()


# ------------------------------------------------------------------------------------------------ a folder of them

NAMES = ["00000", "00001", "00002"]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        write_labels(tmp_path, name, [str(j) for j in range(i + 1)])
    return tmp_path


def test_a_good_folder(folder):
    assert check_label_folder(folder, NAMES, 3) == (INFO, (1, 2, 3))
    assert check_label_folder(folder, NAMES[1:2], 2) == (INFO, (2,))


def test_folders_that_do_not_fit(folder, tmp_path):
    with pytest.raises(DataError, match=r"2 of 5 shards have no label file in .*, e.g. x.parquet, y.parquet"):
        check_label_folder(folder, [*NAMES, "x", "y"], 3)
    with pytest.raises(DataError, match="store 3 centers an image, --num_positives asks for 8"):
        check_label_folder(folder, NAMES, 8)
    with pytest.raises(DataError, match="does not exist"):
        check_label_folder(tmp_path / "absent", NAMES, 3)


@pytest.mark.parametrize(
    "field, value", [("num_classes", 60), ("num_positives", 2), ("centers_hash", "other"), ("feature_model", "hf:x")]
)
def test_mixed_folders_are_refused(folder, field, value):
    write_labels(folder, NAMES[2], ["0"], dataclasses.replace(INFO, **{field: value}))
    with pytest.raises(DataError, match=f"00000.parquet and .*00002.parquet do not belong together: {field}"):
        check_label_folder(folder, NAMES, 2)


# ------------------------------------------------------------------------------------------------ tars and labels


def table_on_ranks(world_size, shards, *labels_dirs, allowed=0.01, num_positives=3):
    """One table or error message per rank."""

    def build(topology):
        try:
            return build_shard_table(shards, labels_dirs, num_positives, allowed, None, topology)
        except DataError as error:
            return str(error)

    return run_ranks(world_size, build)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_knows_the_whole_table(tmp_path, world_size):
    shards = make_shards(tmp_path, [3, 5, 2])
    tables = table_on_ranks(world_size, shards, tmp_path / "labels")
    for table in tables:
        assert table == tables[0] and table.fingerprint() == tables[0].fingerprint()
        assert table.counts == (3, 5, 2) and table.num_samples == 10 and table.labels_infos == (INFO,)
        for shard in range(3):  # kept from the check, or read again
            contents = table.load(shard)
            assert contents.labels.tolist() == [labels_of(contents.key(i)).tolist() for i in range(len(contents))]
            assert contents.labelled.all()
    assert sum(len(table.kept) for table in tables) == 3


def test_the_fingerprint_tells_other_data(tmp_path):
    shards = make_shards(tmp_path, [3, 3])
    topology = Topology.single()
    prints = {
        build_shard_table(part, [tmp_path / "labels"], l, 0.0, None, topology).fingerprint()
        for part, l in [(shards, 3), (shards[::-1], 3), (shards[:1], 3), (shards, 2)]
    }
    assert len(prints) == 4


def rewritten(folder, shards, keys):
    """Other contents in place of the second tar and its labels."""
    write_tar(shards[1], [(key, {"jpg": encode(picture(int(key)))}) for key in keys])
    write_labels(folder / "labels", "00001", keys)


def test_the_fingerprint_tells_other_images_in_equally_many_and_the_order_of_the_same(tmp_path):
    shards = make_shards(tmp_path, [3, 5])
    keys = [f"00001{i:04d}" for i in range(5)]
    before = table_on_ranks(2, shards, tmp_path / "labels")[1]
    rewritten(tmp_path, shards, [keys[1], keys[0], *keys[2:]])
    moved = table_on_ranks(1, shards, tmp_path / "labels")[0]
    assert moved.fingerprint() == before.fingerprint()
    assert moved.order("plan").split("-")[0] == "plan" and moved.order("plan") != before.order("plan")
    with pytest.raises(DataError, match=r"00001.tar changed .*other keys or the same in another order.*--resume auto"):
        dataclasses.replace(before, kept={}).load(1)
    rewritten(tmp_path, shards, [f"00002{i:04d}" for i in range(5)])
    other = table_on_ranks(1, shards, tmp_path / "labels")[0]
    (names, keys_before), (names_now, keys_now) = (table.fingerprint().split("-") for table in (before, other))
    assert names == names_now and keys_before != keys_now
    with pytest.raises(DataError, match=r"00001.tar changed .*other keys"):
        dataclasses.replace(before, kept={}).load(1)
    rewritten(tmp_path, shards, keys)
    assert table_on_ranks(1, shards, tmp_path / "labels")[0] == before


def test_the_order_within_a_damaged_tar_is_known_by_its_index_alone(tmp_path):
    shards = make_shards(tmp_path, [3, 5])
    one = Topology.single()

    def table(index=None):
        return build_shard_table(shards, [tmp_path / "labels"], 3, 1.0, None, one, index_folder=index)

    before = table(tmp_path / "index")
    for shard in shards:
        with open(shard, "r+b") as file:  # noqa: PTH123
            file.truncate(2500)
    assert table().order("plan") == before.order("plan") != "plan"
    index_path(shards[0]).unlink()
    assert table().order("plan") == "plan" and table().fingerprint() == before.fingerprint()


def cut_a_tar(folder, shards):
    data = (folder / "tars" / "00001.tar").read_bytes()
    (folder / "tars" / "00001.tar").write_bytes(data[:1500])


def remove_labels(folder, shards):
    (folder / "labels" / "00001.parquet").unlink()


def remove_the_folder(folder, shards):
    (folder / "labels").rename(folder / "elsewhere")


def other_k(folder, shards):
    keys = [f"00001{i:04d}" for i in range(5)]
    write_labels(folder / "labels", "00001", keys, dataclasses.replace(INFO, num_classes=51))


def lacking_keys(folder, shards):
    write_labels(folder / "labels", "00001", ["000010003"])


def labels_of_other_tars(folder, shards):
    for name in ("00000", "00001", "00002"):
        write_labels(folder / "labels", name, ["7", "8"])


def no_images(folder, shards):
    write_tar(folder / "tars" / "00001.tar", [("a", {"txt": b"text"})])


def a_link_loop(folder, shards):
    (folder / "tars" / "00001.tar").unlink()
    (folder / "tars" / "00001.tar").symlink_to(folder / "tars" / "00001.tar")


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_a_tar, r"the tar .*00001.tar is cut"),
        (remove_labels, r"1 of 3 shards have no label file in .*00001.parquet.*Run tools/assign_labels.py"),
        (remove_the_folder, "the label folder .* does not exist"),
        (other_k, "00001.parquet do not belong together: num_classes 50 against 51"),
        (lacking_keys, r"4 of 10 images have no label .*00001.tar: 4 of 5, e.g. 000010000, 000010001, 000010002"),
        (labels_of_other_tars, "10 of 10 images have no label"),
        (no_images, r"00001.tar holds no image: found a.\*"),
        (a_link_loop, "cannot read the tar .*00001.tar"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_input_stops_every_rank_with_one_message(tmp_path, damage, message, world_size):
    shards = make_shards(tmp_path, [3, 5, 2])
    damage(tmp_path, shards)
    found = table_on_ranks(world_size, shards, tmp_path / "labels")
    assert all(isinstance(text, str) and text == found[0] for text in found)
    with pytest.raises(DataError, match=message):
        raise DataError(found[0])


TEXT = dataclasses.replace(INFO, num_classes=60, centers_hash="text")


def second_folder(folder, lacking=(), info=TEXT):
    """Labels of the same tars by other centers, without the keys in `lacking`."""
    for shard, count in enumerate((3, 5, 2)):
        keys = [f"{shard:05d}{i:04d}" for i in range(count)]
        write_labels(folder / "text", f"{shard:05d}", [key for key in keys if key not in lacking], info)
    return folder / "text"


@pytest.mark.parametrize("kept", [0, 100])
def test_labels_of_two_folders_stand_side_by_side(tmp_path, monkeypatch, kept):
    """An image that one folder lacks counts as without label."""
    monkeypatch.setattr("mlcd_ds.data.shards.KEPT_SAMPLES", kept)
    shards = make_shards(tmp_path, [3, 5, 2])
    text = second_folder(tmp_path, lacking=("000010002",))
    write_labels(tmp_path / "labels", "00002", ["000020001"])
    tables = table_on_ranks(2, shards, tmp_path / "labels", text, allowed=0.2, num_positives=2)
    for table in tables:
        assert [info.num_classes for info in table.labels_infos] == [50, 60]
        assert table.without_label == 2 and table.fingerprint() == tables[0].fingerprint()
        for shard, lacking in enumerate(([], [2], [0])):
            contents = table.load(shard)
            assert np.nonzero(~contents.labelled)[0].tolist() == lacking
            for row in np.nonzero(contents.labelled)[0]:
                two = labels_of(contents.key(row))[:2].tolist()
                assert contents.labels[row].tolist() == two + two
    one = table_on_ranks(1, shards, tmp_path / "labels", allowed=0.2, num_positives=2)[0]
    assert one.without_label == 1 and one.fingerprint() != tables[0].fingerprint()


def test_two_folders_that_do_not_fit(tmp_path):
    shards = make_shards(tmp_path, [3, 5, 2])
    labels, keys = tmp_path / "labels", [f"00001{i:04d}" for i in range(5)]
    text = second_folder(tmp_path, lacking=keys)

    def message(**options):
        first, second = table_on_ranks(2, shards, labels, text, **options)
        assert first == second
        return first

    assert f"5 of 10 images have no label in {labels} (0) or {text} (5), more than" in message()
    assert "00001.tar: 5 of 5, e.g. 000010000" in message()
    second_folder(tmp_path, info=dataclasses.replace(INFO, num_positives=2))
    assert f"labels in {text} store 2 centers an image, --num_positives asks for 3" in message()
    second_folder(tmp_path)
    write_labels(text, "00001", keys)
    assert "do not belong together: num_classes 60 against 50" in message()
    (text / "00002.parquet").unlink()
    assert f"1 of 3 shards have no label file in {text}" in message()
    text.rename(tmp_path / "elsewhere")
    assert f"the label folder {text} does not exist" in message()


def test_too_few_labels_and_no_shards(tmp_path):
    shards = make_shards(tmp_path, [3])
    assert "asks for 4" in table_on_ranks(2, shards, tmp_path / "labels", num_positives=4)[0]
    assert "no shards" in table_on_ranks(1, [], tmp_path / "labels")[0]


def test_several_damaged_tars_are_counted(tmp_path):
    shards = make_shards(tmp_path, [2, 2, 2])
    for shard in shards[1:]:
        with open(shard, "r+b") as file:  # noqa: PTH123
            file.truncate(1500)
    assert "1 more of the 3 shards" in table_on_ranks(2, shards, tmp_path / "labels")[1]


def test_missing_and_surplus_labels_below_the_limit_are_counted(tmp_path):
    shards = make_shards(tmp_path, [3, 5])
    write_labels(tmp_path / "labels", "00001", [f"00001{i:04d}" for i in range(1, 9)])
    table = table_on_ranks(2, shards, tmp_path / "labels", allowed=0.34)[0]
    assert table.counts == (3, 5) and table.without_label == 1 and table.surplus_labels == 4
    assert any(line.startswith("4 labels are of images that the tars lack") for line in table.unused())
    assert table.load(1).labelled.tolist() == [False, True, True, True, True]


def test_images_that_tars_have_lost_without_a_trace_count_towards_the_limit(tmp_path):
    """Whole members are gone, the tars are valid: the labels of these tars tell, and img2dataset's _stats.json."""
    shards = make_shards(tmp_path, [40, 5, 20])
    for shard, left in ((0, 4), (2, 19)):
        keys = [f"{shard:05d}{i:04d}" for i in range(left)]
        stats = Path(shards[shard]).with_name(f"{shard:05d}_stats.json")
        before = stats.read_bytes()
        write_tar(shards[shard], [(key, {"jpg": encode(picture(int(key)))}) for key in keys])
        stats.write_bytes(before)
    first, second = table_on_ranks(2, shards, tmp_path / "labels", allowed=0.5)
    assert first == second and "37 of 65 labelled images are not in their tars, more than --max_skipped_" in first
    assert "00000.tar: 36 of 40; " in first and "00002.tar: 1 of 20. Fetch" in first
    table = table_on_ranks(2, shards, tmp_path / "labels", allowed=0.57)[1]
    assert table.surplus_labels == table.lacking_images == 37
    assert (
        f"37 samples fewer than the _stats.json beside the tars say: did tars lose some? E.g. {shards[0]}"
        in table.unused()
    )
    # A run meant for some of the tars has label files of all.
    assert table_on_ranks(2, shards[1:2], tmp_path / "labels", allowed=0.0)[1].unused() == ()
    stats.write_text("[]")  # somebody else's
    assert table_on_ranks(1, shards, tmp_path / "labels", allowed=0.57)[0].lacking_images == 36


def test_odd_members_show_in_the_table(tmp_path):
    make_shards(tmp_path, [2])
    path = tmp_path / "tars" / "00000.tar"
    data = path.read_bytes()
    with tarfile.open(path, "w") as tar:
        for name in ("000000000.jpg", "000000000.jpg", "000000001.jpg", "x.txt"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("l.jpg")
        link.type = tarfile.SYMTYPE
        tar.addfile(link)
    assert path.read_bytes() != data
    table = table_on_ranks(1, [str(path)], tmp_path / "labels")[0]
    assert (table.counts, table.duplicates, table.ignored, table.without_image) == ((2,), 1, 1, 1)


def test_a_shard_that_changes_after_the_start_is_refused(tmp_path):
    shards = make_shards(tmp_path, [3, 5])
    table = table_on_ranks(2, shards, tmp_path / "labels")[1]
    make_shards(tmp_path, [4])
    with pytest.raises(DataError, match=r"00000.tar or its labels changed .*now 4"):
        table.load(0)
