"""One tar of everything that comes from the web, through table and loader: each sample is used, or counted by reason."""

import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from toy_data import INFO, encode, labels_of, picture, write_labels

from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.config import RunConfig
from mlcd_ds.data.labels import LabelsInfo, label_path, read_label_shard, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader, build_shard_table
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.tars import expand_shards, import_webdataset, index_tar, local_shard, shard_name
from mlcd_ds.errors import DataError, UserError
from mlcd_ds.topology import Topology

RGB = Image.fromarray(picture(1))
ROTATED = b"Exif\0\0II" + struct.pack("<HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than the file could fill."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


USED = {
    "cmyk.jpg": encode(RGB.convert("CMYK")),
    "gray.jpg": encode(RGB.convert("L")),
    "palette.png": encode(RGB.convert("P"), "PNG"),
    "transparent_palette.png": encode(RGB.convert("P"), "PNG", transparency=3),
    "rgba.png": encode(RGB.convert("RGBA"), "PNG"),
    "gray_alpha.png": encode(RGB.convert("LA"), "PNG"),
    "sixteen_bits.png": encode(np.asarray(RGB.convert("L")).astype(np.uint16) * 257, "PNG"),
    "one_bit.png": encode(RGB.convert("1"), "PNG"),
    "rotated.jpg": encode(RGB, exif=ROTATED),
    "progressive.jpg": encode(RGB, progressive=True),
    "animated.webp": encode(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(picture(2))]),
    "pixel.png": encode(np.full((1, 1, 3), 7, np.uint8), "PNG"),
    "pixel.jpg": encode(np.full((1, 1, 3), 7, np.uint8)),
    "line.png": encode(np.full((1, 3000, 3), 7, np.uint8), "PNG"),
    "png_named.jpg": encode(RGB, "PNG"),
    "jpeg_named.png": encode(RGB),
    "UPPER.JPG": encode(RGB),
    "../../../etc/traversal.jpg": encode(RGB),
    "/absolute/path.jpg": encode(RGB),
}
SKIPPED = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"<html>404 not found</html>", "not_an_image"),
    "gif.jpg": (encode(RGB, "GIF"), "not_an_image"),
    "half.jpg": (encode(RGB, quality=95)[:-700], "broken"),
    "half.png": (encode(RGB, "PNG")[:-900], "broken"),
    "half.webp": (encode(RGB, "WEBP")[:-200], "broken"),
    "lying.png": (bomb(3000, 3000), "broken"),
    "bomb.png": (bomb(20_000, 20_000), "too_large"),
    "small_bomb.png": (bomb(9_500, 9_500), "too_large"),  # below the size at which Pillow warns
    "bomb_of_32_bits.png": (bomb(2**31 - 1, 2**31 - 1), "too_large"),
}


def make_zoo(folder):
    """Members out of order: captions first, images in random order, then more captions; and what is no sample at all."""
    images = [*USED.items(), *((name, data) for name, (data, _) in SKIPPED.items())]
    # Keys are numbers for their labels; the name's folder and extension stay.
    numbered = {name: f"{i:04d}" for i, (name, _) in enumerate(images)}

    def renamed(name: str) -> str:
        head, base = name.rpartition("/")[::2]
        return f"{head}/{numbered[name]}.{base.partition('.')[2]}".removeprefix("" if head else "/")

    members = [(renamed(name), data) for name, data in images]
    order = np.random.default_rng(0).permutation(len(members))
    captions = [(f"{number}.txt", b"a caption") for number in numbered.values()]
    members = [*captions[::2], *(members[i] for i in order), *captions[1::2]]
    members += [(renamed("gray.jpg"), b"a second image of that name"), ("9999.b.jpg", b"key 9999, extension b.jpg")]
    (folder / "tars").mkdir()
    path = folder / "tars" / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("8888.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_labels(folder / "labels", "00000", numbered.values())
    return path, numbered


def read_all(folder, path):
    settings = RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-", workers=0, num_positives=3)
    table = build_shard_table([str(path)], [folder / "labels"], 3, 1.0, None, Topology.single())
    loader = ImageLabelLoader(
        settings, table, EpochPlan(0, table.counts, table.num_samples, 8), 24, Topology.single(), folder / "skipped"
    )
    (batch,) = loader.iterate(0, 1)
    return table, loader.ledger, batch


def test_every_animal_of_the_zoo_is_used_or_counted_with_its_reason(tmp_path):
    before = set(tmp_path.parent.rglob("*traversal*"))
    path, numbered = make_zoo(tmp_path)
    table, ledger, batch = read_all(tmp_path, path)
    assert table.num_samples == len(USED) + len(SKIPPED) == ledger.read
    assert (table.duplicates, table.ignored, table.without_image) == (1, 1, 1)
    expected = {numbered[name]: reason for name, (_, reason) in SKIPPED.items()}
    found = {name.split("/")[1].split(":")[0]: name.split(": ")[1] for name in ledger.names}
    assert found == expected
    assert sorted(key for key in batch.keys if key) == sorted(numbered[name] for name in USED)
    for key, labels, image in zip(batch.keys, batch.labels_BL, batch.images_BCHH, strict=True):
        if key:
            assert labels.tolist() == labels_of(key).tolist()
        else:
            assert (labels == NO_IMAGE).all() and not image.any()
    assert len((tmp_path / "skipped" / "rank_00000.txt").read_text().splitlines()) == len(SKIPPED)
    assert set(tmp_path.parent.rglob("*traversal*")) == before  # nothing is ever written by a member's name


@pytest.mark.parametrize("where", ["member", "boundary", "header", "end blocks"])
def test_a_truncated_zoo_is_told_and_counted_wherever_it_ends(tmp_path, where):
    path, numbered = make_zoo(tmp_path)
    data = path.read_bytes()
    index = index_tar(path)
    last = max(index.image(key)[0] for key in index.keys)
    with tarfile.open(path) as tar:
        end = max(member.offset_data + (member.size + 511) // 512 * 512 for member in tar)
    cut = {"member": last + 3, "boundary": last - 512, "header": last - 100, "end blocks": end}[where]
    path.write_bytes(data[:cut])
    there = {key for key, members in index.members.items() if sum(index.image(key)) <= cut}
    lost = len(numbered) - len(there)
    assert lost == (0 if where == "end blocks" else 1)
    if lost:
        with pytest.raises(
            DataError, match=r"00000.tar is cut .*byte .*Fetch or write it again.* 1 of 29 images are lost"
        ):
            build_shard_table([str(path)], [tmp_path / "labels"], 3, 0.01, None, Topology.single())
    table, ledger, batch = read_all(tmp_path, path)
    assert table.quarantined[0][:2] == (0, lost) and "00000.tar is cut" in table.unused()[-1]
    assert table.num_samples == len(numbered) == ledger.read and ledger.skipped["damaged_tar"] == lost
    assert {key for key in batch.keys if key} == there & {numbered[name] for name in USED}


# ------------------------------------------------------------------------------------------------ files that want to run


class Evil:
    """Unpickled, it makes the folder `owned`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "owned"),)


def evil_npy(folder) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(folder)], object), allow_pickle=True)
    return buffer.getvalue()


def evil_pickle(folder) -> bytes:
    import pickle

    return pickle.dumps(Evil(folder))


def test_pickles_inside_tars_are_bytes_like_any_other(tmp_path):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        contents = {"npy": evil_npy(tmp_path), "pyd": evil_pickle(tmp_path), "pkl": evil_pickle(tmp_path)}
        contents |= {"pth": evil_pickle(tmp_path), "jpg": encode(RGB)}
        for key, extensions in (
            ("0001", contents),
            ("0002", {"jpg": contents["npy"]}),
            ("0003", {"jpg": contents["pyd"]}),
        ):
            for extension, data in extensions.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_labels(tmp_path / "labels", "00000", ["0001", "0002", "0003"])
    _, ledger, batch = read_all(tmp_path, path)
    assert sorted(batch.keys) == ["", "", "0001"] and ledger.skipped == {"not_an_image": 2}
    assert not (tmp_path / "owned").exists()


def test_a_pickle_in_place_of_labels_or_centers_is_refused(tmp_path):
    from mlcd_ds.data.centers import Centers, load_center_rows

    for data in (evil_npy(tmp_path), evil_pickle(tmp_path)):
        (tmp_path / "00000.parquet").write_bytes(data)
        with pytest.raises(DataError, match=r"00000\.parquet cannot be read"):
            read_label_shard(tmp_path / "00000.parquet")
        (tmp_path / "centers.npy").write_bytes(data)
        with pytest.raises(UserError):
            load_center_rows(Centers.load(tmp_path), 0, 1, 1, 2)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("url", ["pipe:touch {at}/owned", "pipe:touch {at}/owned; cat x.tar #.tar"])
def test_a_pipe_never_runs_a_shell(tmp_path, url):
    url = url.format(at=tmp_path)
    (tmp_path / "list.txt").write_text(url + "\n")
    for spec in (url, str(tmp_path / "list.txt")):
        with pytest.raises(DataError, match="would run a shell command and is refused"):
            expand_shards(spec)
    with pytest.raises(DataError, match="would run a shell command and is refused"):
        local_shard(url, tmp_path / "cache")
    with pytest.raises(ValueError, match="unsafe"):
        import_webdataset().gopen(url, "rb")
    assert not (tmp_path / "owned").exists()


def test_a_pipe_that_is_allowed_is_read_and_webdataset_stays_secure(tmp_path):
    tar, _ = make_zoo(tmp_path)
    url = f"pipe:cat {tar}"
    (tmp_path / "list.txt").write_text(url + "\n")
    assert expand_shards(url, allow_pipe=True) == expand_shards(str(tmp_path / "list.txt"), allow_pipe=True) == [url]
    assert shard_name(url) == "00000" and shard_name("pipe:aws s3 cp s3://b/00012.tar -") == "00012"
    copy = local_shard(url, tmp_path / "cache", allow_pipe=True)
    assert copy.read_bytes() == tar.read_bytes() and os.environ["WDS_SECURE"] == "1"
    failing = f"pipe:cat {tar}; exit 3"
    with pytest.raises(DataError, match="failed with exit code 3"):
        local_shard(failing, tmp_path / "cache", allow_pipe=True)
    with pytest.raises(DataError, match="is refused"):  # what came through a pipe once needs leave again
        local_shard(url, tmp_path / "cache")
    labels, one = [tmp_path / "labels"], Topology.single()
    table = build_shard_table([url], labels, 3, 1.0, str(tmp_path / "cache"), one, allow_pipe=True)
    assert table.names == ("00000",) and table.num_samples == len(USED) + len(SKIPPED)


def test_a_url_with_shell_characters_is_one_argument(tmp_path):
    with pytest.raises(DataError, match="cannot fetch"):
        local_shard(f"nosuch://host/x;touch {tmp_path}/owned;.tar", tmp_path / "cache")
    with pytest.raises(DataError, match="cannot fetch"):
        local_shard(f"http://127.0.0.1:9/x;touch$IFS{tmp_path}/owned;$(touch {tmp_path}/owned).tar", tmp_path / "cache")
    assert not (tmp_path / "owned").exists()


def test_label_metadata_is_data(tmp_path):
    info = LabelsInfo(INFO.num_classes, 3, "__import__('os').system('x')", "../../etc/passwd")
    write_label_shard(label_path(tmp_path, "x"), ["a"], np.array([[1, 2, 3]]), np.zeros((1, 3)), info)
    assert read_label_shard(label_path(tmp_path, "x")).info == info
