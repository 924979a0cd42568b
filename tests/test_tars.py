"""Tars: every way to name them, every layout, every kind of damage."""

import contextlib
import errno
import gzip
import http.client
import http.server
import io
import json
import os
import resource
import socket
import tarfile
import threading
import urllib.error
from pathlib import Path

import pytest

from mlcd_ds.data import storage, tars
from mlcd_ds.data.storage import RETRY_SECONDS, UnreadableError
from mlcd_ds.data.tars import (
    OpenTar,
    examine_tar,
    expand_shards,
    index_tar,
    local_shard,
    read_member,
    read_samples,
    shard_name,
    split_name,
    write_tar,
)
from mlcd_ds.errors import DataError


def build(path, members, format=tarfile.PAX_FORMAT):
    """members: (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


# ------------------------------------------------------------------------------------------------ which shards


def test_braces_keep_their_order_and_globs_are_sorted(tmp_path):
    touch(tmp_path, "00002.tar", "00010.tar", "00001.tar", "b/z.tar")
    at = str(tmp_path)
    assert expand_shards(f"{at}/{{00010,{{00001..00002}}}}.tar") == [f"{at}/0{n}.tar" for n in ("0010", "0001", "0002")]
    assert expand_shards(f"{at}/*.tar") == [f"{at}/0{n}.tar" for n in ("0001", "0002", "0010")]
    assert expand_shards(f"{at}/00001.tar::{at}/b/*.tar") == [f"{at}/00001.tar", f"{at}/b/z.tar"]
    assert expand_shards(f"file://{at}/00001.tar") == [f"{at}/00001.tar"]


def test_a_list_file_keeps_its_order_and_finds_tars_beside_it(tmp_path):
    touch(tmp_path, "a.tar", "b.tar", "c.tar")
    (tmp_path / "list.txt").write_text(f"# mine\n\nb.tar\n{tmp_path}/{{a,c}}.tar\n  https://host/x/d.tar\n")
    assert expand_shards(str(tmp_path / "list.txt")) == [
        *(str(tmp_path / name) for name in ("b.tar", "a.tar", "c.tar")),
        "https://host/x/d.tar",
    ]


def test_a_file_with_glob_marks_in_its_name_is_itself(tmp_path):
    touch(tmp_path, "part[1].tar")
    assert expand_shards(str(tmp_path / "part[1].tar")) == [str(tmp_path / "part[1].tar")]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{at}/*.tgz", "no tars match"),
        ("", "no tars match"),
        ("{at}/{{00000..00003}}.tar", r"3 of the 4 tars .* do not exist, e.g. .*00001.tar, .*00002.tar"),
        ("{at}/00000.tar::{at}/00000.tar", "named '00000'"),
        ("{at}/00000.tar::{at}/b/00000.tar", "named '00000'.*rename"),
        ("pipe:curl https://host/x.tar", "refused"),
        ("{at}/b", "is a folder: name the tars in it"),
        ("s3://bucket/*.tar", "Use braces"),
        ("{at}/none.txt", "cannot read the shard list"),
        ("{at}/list.txt", "another list"),
    ],
)
def test_shard_lists_that_cannot_be_meant(tmp_path, spec, message):
    touch(tmp_path, "00000.tar", "b/00000.tar")
    (tmp_path / "list.txt").write_text("other.txt\n")
    with pytest.raises(DataError, match=message):
        expand_shards(spec.format(at=tmp_path))


def test_shard_names():
    assert shard_name("/a/b/00012.tar") == "00012"
    assert shard_name("https://host/x/00012.tar?token=1/2") == "00012"


# ------------------------------------------------------------------------------------------------ remote shards


def test_a_remote_tar_is_fetched_once(tmp_path):
    import fsspec

    path = tmp_path / "00007.tar"
    write_tar(path, [("a", {"jpg": b"123"})])
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/00007.tar", path.read_bytes())
    cached = local_shard("memory://bucket/00007.tar", tmp_path / "cache")
    memory.rm("/bucket/00007.tar")
    assert local_shard("memory://bucket/00007.tar", tmp_path / "cache") == cached
    assert cached.name == "00007.tar" and cached.read_bytes() == path.read_bytes()
    assert local_shard(str(path), None) == path


def test_a_tar_over_http_and_one_that_is_not_there(tmp_path):
    write_tar(tmp_path / "00001.tar", [("a", {"jpg": b"123"})])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        cached = local_shard(f"{base}/00001.tar", tmp_path / "cache")
        assert cached.read_bytes() == (tmp_path / "00001.tar").read_bytes()
        with pytest.raises(DataError, match=f"cannot fetch {base}/absent.tar"):
            local_shard(f"{base}/absent.tar", tmp_path / "cache")
        server.shutdown()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [cached]


@pytest.mark.parametrize(
    "url, cache, message",
    [
        ("s3://bucket/1.tar", None, "--shard_cache"),
        ("pipe:cat x.tar", "cache", "refused"),
        ("nosuch://host/1.tar", "cache", "cannot fetch nosuch://host/1.tar"),
        ("memory://bucket/absent.tar", "cache", "cannot fetch"),
    ],
)
def test_remote_tars_that_cannot_be_had(tmp_path, url, cache, message):
    with pytest.raises(DataError, match=message):
        local_shard(url, cache and str(tmp_path / cache))


def test_webdataset_is_imported_in_its_safe_mode(tmp_path):
    with pytest.raises(DataError):
        local_shard("nosuch://host/1.tar", str(tmp_path))
    assert os.environ["WDS_SECURE"] == "1"


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path, format):
    long = "" if format == tarfile.USTAR_FORMAT else "n" * 150
    members = [(f"dir/{i:04d}{long}.{ext}", os.urandom(i * 37)) for i in range(30) for ext in ("JPG", "txt", "json")]
    path = build(tmp_path / "x.tar", members, format)
    index = index_tar(path)
    assert index.keys == tuple(f"{i:04d}{long}" for i in range(30))
    with tarfile.open(path) as tar:
        for info in tar:
            key, extension = split_name(info.name)
            assert index.members[key][extension] == (info.offset_data, info.size)
            assert read_member(path, *index.members[key][extension]) == tar.extractfile(info).read()
    assert (index.duplicates, index.ignored, index.without_image) == (0, 0, ())
    assert [key for key, _ in read_samples(path)] == list(index.keys)


def test_pax_names_and_sizes_beyond_the_plain_header(tmp_path):
    info = tarfile.TarInfo("日本.jpg")
    info.size, info.mtime = 3, 1.5
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        tar.addfile(info, io.BytesIO(b"abc"))
    assert list(read_samples(path)) == [("日本", {"jpg": b"abc"})]


def test_webdataset_reads_the_same_samples(tmp_path):
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    samples = [(f"{i:05d}", {"jpg": os.urandom(50), "json": b"{}", "seg.png": b"p"}) for i in range(20)]
    write_tar(tmp_path / "x.tar", samples)
    with (tmp_path / "x.tar").open("rb") as file:
        samples_of = group_by_keys({**member, "__url__": "x"} for member in tar_file_iterator(file))
        theirs = [{k: v for k, v in sample.items() if k[:2] != "__" or k == "__key__"} for sample in samples_of]
    assert [(sample.pop("__key__"), sample) for sample in theirs] == list(read_samples(tmp_path / "x.tar"))


def test_odd_members_are_joined_or_counted(tmp_path):
    folder, link, hard = (tarfile.TarInfo(name) for name in ("dir.jpg", "link.jpg", "hard.jpg"))
    folder.type, link.type, hard.type = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    link.linkname = hard.linkname = "/etc/passwd"
    path = build(
        tmp_path / "x.tar",
        [
            *(folder, link, hard),
            ("b.txt", b"first"),  # interleaved: its image comes later
            ("a.b.jpg", b"key a, extension b.jpg: no image"),
            ("../../b.JPG", b"image"),
            ("c.jpg", b"one"),
            ("other/c.jpg", b"two"),
            ("noextension", b""),
            ("._c.jpg", b"a Mac's side file"),
            ("d.png", b"png"),
            ("d.jpg", b"jpg"),
        ],
    )
    index = index_tar(path)
    assert index.keys == ("b", "c", "d") and index.without_image == ("a",)
    assert index.duplicates == 1 and index.ignored == 4
    assert dict(read_samples(path, ["jpg"])) == {"b": {"jpg": b"image"}, "c": {"jpg": b"one"}, "d": {"jpg": b"jpg"}}
    assert index.image("d") == index.members["d"]["jpg"]


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def good(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"k{i}", {"jpg": bytes([i + 1]) * (400 + 300 * i), "txt": b"t"}) for i in range(4)])
    return tmp_path / "x.tar"


def test_every_cut_is_found(good):
    data, index = good.read_bytes(), index_tar(good)
    with tarfile.open(good) as tar:
        end = max(info.offset_data + (info.size + 511) // 512 * 512 for info in tar)
    for length in range(0, len(data), 128):
        good.write_bytes(data[:length])
        if length >= end + 512:  # only padding is lost
            assert index_tar(good).keys == index.keys
        else:
            with pytest.raises(DataError, match=f"{good}"):
                index_tar(good)


@pytest.mark.parametrize(
    "position, message",
    [
        (700, "cut inside a member: 'k0.jpg' at byte 512 has 400 bytes.*ends at byte 700"),
        (1024, "at the end of a member, before the end mark of the archive: byte 1024"),
        (1200, "in a header: byte 1024"),
    ],
)
def test_a_cut_tar_says_where(good, position, message):
    good.write_bytes(good.read_bytes()[:position])
    with pytest.raises(DataError, match=message) as caught:
        list(read_samples(good))
    assert "Fetch or write it again" in str(caught.value)


def test_a_damaged_header_is_found_wherever_the_damage_is(good):
    data = good.read_bytes()
    for byte in range(1024, 1024 + 500, 7):
        flipped = bytearray(data)
        flipped[byte] ^= 0x10
        good.write_bytes(flipped)
        with pytest.raises(DataError, match=r"damaged header at byte 1024 \(after member 'k0.jpg'\)"):
            index_tar(good)


def test_a_zeroed_region_is_not_an_end(good):
    data = bytearray(good.read_bytes())
    data[1024:1536] = bytes(512)
    good.write_bytes(data)
    with pytest.raises(DataError, match="end mark at byte 1024, but more data"):
        index_tar(good)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"<html>" + b"404 not found " * 100, "HTML page"),
        (gzip.compress(bytes(10240)) + bytes(600), "gzip"),
        (gzip.compress(bytes(10240), mtime=0x6B078601) + bytes(600), "gzip"),  # its signed bytes add up to -256
        (os.urandom(2000), "not a tar file"),
    ],
)
def test_files_that_are_no_tars(tmp_path, data, message):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=message):
        index_tar(tmp_path / "x.tar")
    with pytest.raises(DataError, match="cannot read"):
        index_tar(tmp_path / "absent.tar")


def test_reading_beyond_the_end_is_an_error(good):
    with pytest.raises(DataError, match="did the file change"):
        read_member(good, 10**6, 5)
    with pytest.raises(DataError, match="did the file change"):
        read_member(b"abc", 1, 5)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_shrinks_while_it_is_walked_is_damaged(tmp_path, monkeypatch, format):
    """It would end the process (SIGBUS) if it were mapped. PAX: an extended header names a path, so the careful walk."""
    members = [(f"{'k' * 120 if format == tarfile.PAX_FORMAT else 'k'}{i}.jpg", bytes(9000)) for i in range(8)]
    contents = build(tmp_path / "x.tar", members, format).read_bytes()
    monkeypatch.setattr(tars, "WINDOW", 512)
    monkeypatch.setattr(tars, "LARGE_WINDOW", 512)
    read, shrunk = OpenTar.read, 0
    for victim in range(40):
        (tmp_path / "x.tar").write_bytes(contents)
        calls = iter(range(1000))

        def shrinking(self, start, stop, calls=calls, victim=victim):
            if next(calls) == victim:
                os.truncate(self.path, max(0, start - 4000))
            return read(self, start, stop)

        monkeypatch.setattr(OpenTar, "read", shrinking)
        index, damage = examine_tar(tmp_path / "x.tar")
        assert damage is not None or len(index.keys) == 8
        assert damage is None or "is cut" in str(damage)
        shrunk += damage is not None
    assert shrunk >= 8


def test_a_tar_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"k{i}", {"jpg": os.urandom(50_000)}) for i in range(20)])
    index = index_tar(tmp_path / "x.tar")
    samples = read_samples(tmp_path / "x.tar")
    assert next(samples)[0] == "k0"
    os.truncate(tmp_path / "x.tar", index.image("k9")[0] + 49_999)
    with pytest.raises(DataError, match="became shorter while it was read: k9.jpg is cut"):
        list(samples)
    with pytest.raises(DataError, match="its index says .*: did the file change"):
        next(read_samples(tmp_path / "x.tar", index=index))


# ------------------------------------------------------------------------------------------------ machines


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited between tries."""
    slept = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


def failing(monkeypatch, name, number, times):
    """os.open or os.pread fails so often."""
    function, left = getattr(os, name), iter(range(times))

    def call(path, *arguments, **options):
        is_tar = name == "pread" or str(path).endswith(".tar")
        if is_tar and next(left, None) is not None:
            raise OSError(number, os.strerror(number), None if name == "pread" else str(path))
        return function(path, *arguments, **options)

    monkeypatch.setattr(tars.os, name, call)


def test_too_many_open_files_are_no_damage_of_a_tar(good, waits):
    """A limit that is really met. The message names it, and the cure."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        limit = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 5
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        for read in (
            index_tar,
            examine_tar,
            lambda path: read_member(path, 0, 1),
            lambda path: list(read_samples(path)),
        ):
            with pytest.raises(UnreadableError) as caught:
                read(good)
    for words in (str(good), "Too many open files", f"have {limit} files open", "ulimit -n 4096", "--workers"):
        assert words in str(caught.value)
    assert waits == [] and len(index_tar(good).keys) == 4


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("open", errno.ENFILE, "fs.file-max"),
        ("open", errno.ENOMEM, "no memory left.*--workers"),
        ("pread", errno.ENOMEM, "no memory left.*--workers"),
        ("open", errno.EACCES, f"User {os.getuid()} may not read it"),
        ("open", errno.ESTALE, "file server does not answer"),
        ("pread", errno.ESTALE, "file server does not answer"),
        ("pread", errno.ENOTCONN, "file server does not answer"),
    ],
)
def test_what_the_machine_lacks_is_no_damage_of_a_tar(good, monkeypatch, waits, name, number, words):
    failing(monkeypatch, name, number, 10**6)
    with pytest.raises(UnreadableError, match=f"cannot read the tar .*x.tar: .*{words}"):
        examine_tar(good)
    tried_again = number in (errno.ESTALE, errno.ENOTCONN)
    assert waits == (list(RETRY_SECONDS) if tried_again else [])


@pytest.mark.parametrize("name", ["open", "pread"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_or_file_server_that_comes_back_is_waited_for(good, monkeypatch, waits, name, number):
    whole = index_tar(good)
    failing(monkeypatch, name, number, 4)
    assert examine_tar(good) == (whole, None)
    assert sum(waits) > 0


def test_a_disk_that_fails_for_good_is_damage(good, monkeypatch, waits):
    """What lies before the place is used; where nothing can be read, nothing."""
    whole, pread = index_tar(good), os.pread
    bad = whole.image("k2")[0] + 1000

    def failing_there(file, size, start):
        if start < bad <= start + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, size, start)

    monkeypatch.setattr(tars, "WINDOW", 512)
    monkeypatch.setattr(tars, "LARGE_WINDOW", 512)
    bad = whole.image("k2")[0] - 256  # its header
    monkeypatch.setattr(tars.os, "pread", failing_there)
    index, damage = examine_tar(good)
    assert index.keys == ("k0", "k1") and "cannot read the tar" in str(damage) and "Input/output error" in str(damage)
    assert waits == list(RETRY_SECONDS)
    failing(monkeypatch, "open", errno.EIO, 10**6)
    index, damage = examine_tar(good)
    assert index.keys == () and not isinstance(damage, UnreadableError)


def test_a_tar_that_is_another_behind_a_stale_handle_is_not_read_on(good, monkeypatch, waits):
    with OpenTar(good) as tar:
        Path(good).write_bytes(good.read_bytes() + bytes(512))
        failing(monkeypatch, "pread", errno.ESTALE, 2)
        with pytest.raises(UnreadableError, match="became another while it was read.*--resume auto"):
            tar.read(0, 512)


def test_a_full_cache_is_no_missing_tar(tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    write_tar(tmp_path / "away" / "x.tar", [("k", {"jpg": b"x"})])
    for number, words in ((errno.ENOSPC, "make room in --shard_cache"), (errno.EACCES, "Are the credentials valid")):

        def full(path, write, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(tars, "write_bytes", full)
        with pytest.raises(UnreadableError, match=f"cannot fetch .*{words}"):
            local_shard(f"local://{tmp_path}/away/x.tar", tmp_path / "cache")


class Answer(Exception):
    """As aiohttp's and gcsfs's: an HTTP status."""

    def __init__(self, status):
        super().__init__(f"HTTP {status}")
        self.status = status


class ServerDisconnectedError(Exception):
    """aiohttp's has this name."""


def wrapped(error):
    """As fsspec's http does with all errors."""
    wrong = FileNotFoundError("http://away/1.tar")
    wrong.__cause__ = error
    return wrong


def curl(code):
    return OSError(f"((['curl', '-f', '-s', '-L', 'http://127.0.0.1:1/1.tar'],), {{}}): exit {code} (read) {{}}")


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    TimeoutError(),
    urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")),
    urllib.error.HTTPError("http://away/1.tar", 503, "Service Unavailable", {}, None),
    http.client.IncompleteRead(b"half"),
    ServerDisconnectedError(),
    Answer(429),
    wrapped(Answer(502)),
    wrapped(ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    curl(56),
]
FINAL = [FileNotFoundError("1.tar"), Answer(404), wrapped(Answer(403)), Answer(501), ValueError("odd"), curl(3)]


def remote(monkeypatch, errors, data=b"tar"):
    """Every fetch fails half way with the next of `errors`, until there is none."""
    left = iter(errors)

    def opened(url):
        class Source(io.BytesIO):
            def read(self, size=-1):
                if self.tell() and (error := next(left, None)) is not None:
                    raise error
                return super().read(2)

        return Source(data)

    monkeypatch.setattr(tars, "_open_remote", opened)


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_a_server_that_comes_back_is_waited_for(tmp_path, monkeypatch, waits, error):
    remote(monkeypatch, [error, error, error, error])
    assert local_shard("http://away/1.tar", tmp_path).read_bytes() == b"tar"
    assert waits == list(RETRY_SECONDS)
    waits.clear()
    remote(monkeypatch, [error] * 5)
    with pytest.raises(UnreadableError, match="cannot fetch http://away/2.tar .*server does not answer, after 5 tries"):
        local_shard("http://away/2.tar", tmp_path)
    assert waits == list(RETRY_SECONDS) and len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("error", FINAL, ids=str)
def test_what_a_server_answers_is_not_asked_again(tmp_path, monkeypatch, waits, error):
    remote(monkeypatch, [error])
    with pytest.raises(DataError, match="cannot fetch http://away/1.tar") as caught:
        local_shard("http://away/1.tar", tmp_path)
    assert waits == [] and not isinstance(caught.value, UnreadableError)


@pytest.mark.parametrize("status, away", [(404, False), (403, False), (503, True), (200, True)])
def test_curl_which_tells_no_status_is_followed_by_a_question(tmp_path, monkeypatch, waits, status, away):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    remote(monkeypatch, [curl(22)])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/1.tar"
        if away:
            assert local_shard(url, tmp_path).read_bytes() == b"tar"
        else:
            with pytest.raises(DataError, match="exit 22"):
                local_shard(url, tmp_path)
        server.shutdown()
    assert waits == list(RETRY_SECONDS[:away])


# ------------------------------------------------------------------------------------------------ writing


def test_written_tars_are_plain_equal_and_whole(tmp_path):
    samples = [(f"{i:09d}", {"jpg": os.urandom(i), "txt": b"hello"}) for i in range(25)]
    assert write_tar(tmp_path / "a" / "00001.tar", iter(samples)) == 25
    write_tar(tmp_path / "b.tar", samples)
    assert (tmp_path / "a" / "00001.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert list(read_samples(tmp_path / "b.tar")) == samples
    assert json.loads((tmp_path / "a" / "00001_stats.json").read_text()) == {"count": 25, "successes": 25}
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert all(info.mtime == 0 and not info.pax_headers for info in tar)


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "first", "k" * 101])
def test_keys_that_would_not_survive_are_refused_and_nothing_is_left(tmp_path, key):
    with pytest.raises(DataError, match="cannot write"):
        write_tar(tmp_path / "x.tar", [("first", {"jpg": b"1"}), (key, {"jpg": b"2"})])
    assert list(tmp_path.iterdir()) == []
