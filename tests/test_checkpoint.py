"""Checkpoints: published whole or not at all, damage found by name, rows found by their address."""

import errno
import json
import os
import shutil
import stat
import threading
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from mlcd_ds import checkpoint, files, run_loop
from mlcd_ds.checkpoint import CheckpointStore, load_rows, published, save_rows
from mlcd_ds.data import storage
from mlcd_ds.data.storage import UnreadableError
from mlcd_ds.errors import CheckpointError, NewerFormatError, SaveError
from mlcd_ds.files import save_tensors, sha256, write_json
from mlcd_ds.models.vit import VisionTransformer, VitConfig
from mlcd_ds.partition import ClassPartition
from mlcd_ds.topology import Topology

TINY = VitConfig(
    image_size=8, patch_size=4, layers=1, width=8, heads=2, mlp_width=16, embed_dim=4, rope=False, activation="gelu",
    norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_sight(monkeypatch):
    """What is missing is waited for, not for a minute here."""
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 0.1)


def store(folder, keep_last=3):
    return CheckpointStore(folder, Topology.single(), keep_last)


def write(folder, step, keep_last=3):
    writer = store(folder, keep_last)
    staging = writer.stage(step)
    save_rows(staging / "head", 0, 5, 5, {"centers": torch.full((5, 2), float(step))})
    save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    write_json(staging / "state.json", {"step": step})
    return writer.publish(step)


def test_newest_is_found_and_old_ones_are_pruned(tmp_path):
    assert store(tmp_path).find() is None
    for step in (2, 10, 30, 400):
        write(tmp_path, step)
    assert [path.name for path in published(tmp_path / "checkpoints")] == [
        "step_000000010",
        "step_000000030",
        "step_000000400",
    ]
    assert store(tmp_path).find().step == 400
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000000400\n"


def test_staged_checkpoint_is_never_found_and_goes_with_the_next_save(tmp_path):
    write(tmp_path, 1)
    staging = store(tmp_path).stage(2)
    (staging / "state.json").write_text('{"step": 2}')
    assert store(tmp_path).find().step == 1
    write(tmp_path, 3)
    assert not staging.exists()


@pytest.mark.parametrize(("part", "words"), [("head", "1 of the 1 files in head/"), ("ranks", "ranks/rank_00000")])
def test_part_that_rank_0_does_not_see_is_not_published(tmp_path, part, words):
    """As where the hosts of a run have different disks under the same path."""
    writer = store(tmp_path)
    staging = writer.stage(1)
    if part != "head":
        save_rows(staging / "head", 0, 5, 5, {"centers": torch.zeros(5, 2)})
    if part != "ranks":
        save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    with pytest.raises(CheckpointError, match=f"lacks {words}.*same file system"):
        writer.publish(1)
    assert published(tmp_path / "checkpoints") == []


def test_a_part_that_comes_into_sight_late_is_waited_for(tmp_path, monkeypatch):
    """As on a network file system: rank 0 lists, and another rank hashes, what a third has written a moment ago."""
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 60.0)
    writer = store(tmp_path)
    staging = writer.stage(1)
    fill(staging, 1)
    hidden = staging / "ranks" / checkpoint.rank_file(0)
    hidden.rename(tmp_path / "hidden")
    late = threading.Timer(0.5, lambda: (tmp_path / "hidden").rename(hidden))
    late.start()
    path = writer.publish(1)
    late.join()
    checkpoint.verify(path)
    looks = iter((False, False, True))
    assert files.comes_into_sight(lambda: next(looks)) and not files.comes_into_sight(lambda: False, seconds=0.1)


def write_on_two(folder, monkeypatch, after_rank_1=lambda path: None):
    """A checkpoint of two ranks, each of which reports its file of the engine's."""

    def on(topology):
        def parts(staging):
            partition = ClassPartition(5, 2)
            start, stop = partition.start(topology.rank), partition.stop(topology.rank)
            save_rows(staging / "head", start, stop, 5, {"centers": torch.zeros(stop - start, 2)})
            save_tensors(staging / "ranks" / checkpoint.rank_file(topology.rank), {"torch": torch.get_rng_state()})
            own = staging / "engine" / f"states_{topology.rank}.pt"
            own.parent.mkdir(exist_ok=True)
            own.write_bytes(bytes(100))
            if topology.is_main:
                write_json(staging / "state.json", {"step": 1})
            return [own]

        class Store(CheckpointStore):
            def _agree(self, staging, problem):
                super()._agree(staging, problem)
                if topology.rank == 1 and not agreed:  # once: when all have written
                    agreed.append(True)
                    after_rank_1(staging / "engine" / "states_1.pt")

        agreed = []
        return Store(folder, topology, 3).write(1, parts)

    return run_ranks(2, on)[0]


@pytest.mark.parametrize("seen", [None, 40])
def test_what_a_rank_has_written_must_be_seen_whole(tmp_path, monkeypatch, seen):
    """A file of DeepSpeed's that a network file system lists late, or shorter than it is."""

    def hide(path):
        path.unlink() if seen is None else path.write_bytes(bytes(seen))

    what = "engine/states_1.pt" if seen is None else "60 of the 100 bytes of engine/states_1.pt"
    with pytest.raises(CheckpointError, match=f"lacks {what}, though every rank has written its own"):
        write_on_two(tmp_path, monkeypatch, hide)
    assert published(tmp_path / "checkpoints") == []


def test_what_a_rank_has_written_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 60.0)

    def hide(path):
        path.write_bytes(bytes(40))
        threading.Timer(0.3, lambda: path.write_bytes(bytes(100))).start()

    path = write_on_two(tmp_path, monkeypatch, hide)
    checkpoint.verify(path)
    assert checkpoint.read_manifest(path)["engine/states_1.pt"]["bytes"] == 100
    assert len(checkpoint.read_manifest(path)) == 7


def test_rows_of_every_head_must_be_there(tmp_path):
    writer = CheckpointStore(tmp_path, Topology.single(), 3, heads=2)
    staging = writer.stage(1)
    save_rows(staging / "head", 0, 5, 5, {"centers": torch.zeros(5, 2)})
    save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    with pytest.raises(CheckpointError, match="lacks 1 of the 1 files in head_1/"):
        writer.publish(1)
    save_rows(staging / checkpoint.head_folder(1), 0, 3, 3, {"centers": torch.zeros(3, 2)})
    checkpoint.verify(writer.publish(1))


def test_kill_anywhere_inside_publish_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Each step of publishing in turn is where the process ends; nothing after it happens."""

    class Killed(BaseException):
        pass

    steps = ["sync_file", "sha256", "write_json", "sync_folder", "write_text"]
    seen = set()
    for name in steps:
        for call in range(1, 6):
            folder = tmp_path / f"{name}{call}"
            write(folder, 1)
            writer, calls = store(folder), 0
            original = getattr(checkpoint, name)

            def dying(*arguments, original=original, call=call):
                nonlocal calls
                calls += 1
                if calls == call:
                    raise Killed
                return original(*arguments)

            staging = writer.stage(2)
            save_rows(staging / "head", 0, 5, 5, {"centers": torch.zeros(5, 2)})
            save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
            write_json(staging / "state.json", {"step": 2})
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, name, dying)
                try:
                    writer.publish(2)
                except Killed:
                    seen.add(name)
            found = store(folder).find(lambda text: pytest.fail(text))
            assert found.step in (1, 2)
            write(folder, 3)
            assert store(folder).find().step == 3
    assert seen == set(steps)


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
    "bit": (damage_bit, "SHA-256"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("part", ["head/rows_0000000000_0000000005.safetensors", "state.json"])
def test_damaged_part_is_named_and_the_one_before_is_taken(tmp_path, how, part):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2) / part
    action, words = DAMAGE[how]
    action(damaged)
    said = []
    assert store(tmp_path).find(said.append).step == 1
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert words in said[0]
    # The run comes to that step again: its new checkpoint is published, found and kept.
    assert (tmp_path / "checkpoints" / "damaged_step_000000002").is_dir()
    write(tmp_path, 2, keep_last=1)
    assert store(tmp_path).find(said.append).step == 2
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["step_000000002"]


@pytest.mark.parametrize("text", ["null", "[]", '{"step": 2', "{}"])
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_whatever_is_wrong_the_checkpoint_before_is_taken(tmp_path, name, text):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    (path / name).write_text(text)
    manifest = json.loads((path / "manifest.json").read_text()) if name == "state.json" else None
    if manifest:  # a damage that the digest does not show
        del manifest["sha256"]
        manifest["files"]["state.json"] = {"bytes": len(text), "sha256": sha256(path / name)}
        write_json(path / "manifest.json", manifest)
    said = []
    assert store(tmp_path).find(said.append).step == 1
    assert "step_000000002 is not usable" in said[0]


@pytest.mark.parametrize("files", [[], {"state.json": {}}, {"state.json": None}, {"state.json": {"bytes": 12}}])
def test_manifests_of_another_shape(tmp_path, files):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    write_json(path / "manifest.json", {"format_version": 1, "files": files})
    assert store(tmp_path).find(lambda _: None).step == 1


def failing(monkeypatch, number, times):
    """The digest of the next files, so many times in vain."""
    left, original = iter(range(times)), checkpoint.sha256

    def digest(path):
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return original(path)

    monkeypatch.setattr(checkpoint, "sha256", digest)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_checkpoint_on_a_disk_or_file_server_that_comes_back_is_taken(tmp_path, monkeypatch, number):
    for step in (1, 2):
        write(tmp_path, step)
    failing(monkeypatch, number, times=4)
    assert store(tmp_path).find(lambda text: pytest.fail(text)).step == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EMFILE, "ulimit -n"), (errno.ESTALE, "its server is up"), (errno.EACCES, "may not read")],
)
def test_what_the_machine_lacks_is_no_damage_of_a_checkpoint(tmp_path, monkeypatch, number, cure, ranks):
    """On every rank, though one alone meets it."""
    for step in (1, 2):
        write(tmp_path, step)
    failing(monkeypatch, number, times=5 if number == errno.ESTALE else 1)

    def find(topology):
        with pytest.raises(UnreadableError, match=f"cannot read the checkpoint's .*step_000000002/.*{cure}"):
            CheckpointStore(tmp_path, topology, 3).find(lambda text: pytest.fail(text))

    run_ranks(ranks, find)
    assert [checkpoint.step_of(path) for path in published(tmp_path / "checkpoints")] == [1, 2]


def test_a_bad_disk_is_damage_of_what_lies_on_it(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    failing(monkeypatch, errno.EIO, times=5)
    assert store(tmp_path).find(lambda text: None).step == 1


@pytest.mark.parametrize("name", ["manifest.json", "head/rows_0000000000_0000000005.safetensors"])
def test_a_published_file_that_comes_into_sight_late_is_waited_for(tmp_path, monkeypatch, name):
    """As after a start on another host than the last one's."""
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 60.0)
    write(tmp_path, 1)
    hidden = write(tmp_path, 2) / name
    hidden.rename(tmp_path / "hidden")
    late = threading.Timer(0.3, lambda: (tmp_path / "hidden").rename(hidden))
    late.start()
    assert store(tmp_path).find(lambda text: pytest.fail(text)).step == 2
    late.join()


def test_a_damaged_checkpoint_that_cannot_be_set_aside_ends_the_start(tmp_path, monkeypatch):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "state.json").write_text("")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint.Path, "rename", read_only)

    def find(topology):
        with pytest.raises(
            CheckpointError, match="cannot be set aside as damaged_step_000000002 .Read-only.*rename or"
        ):
            CheckpointStore(tmp_path, topology, 3).find(lambda text: None)

    run_ranks(2, find)


def test_copies_that_users_made_are_neither_found_nor_pruned(tmp_path):
    copy = write(tmp_path, 1).with_name("step_000000001_best")
    shutil.copytree(copy.with_name("step_000000001"), copy)
    for step in (2, 3, 4):
        write(tmp_path, step, keep_last=1)
    assert copy.is_dir()
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["step_000000004"]


def test_manifest_missing_or_broken(tmp_path):
    for text in (None, "{", "[]", '{"format_version": 0, "files": {}}', '{"format_version": "9", "files": {}}'):
        path = write(tmp_path, 7)
        manifest = path / "manifest.json"
        manifest.unlink() if text is None else manifest.write_text(text)
        with pytest.raises(CheckpointError, match="no checkpoint in .* is whole.*--output_dir"):
            store(tmp_path).find(lambda _: None)
        for file in path.rglob("*"):
            file.unlink() if file.is_file() else None
        for folder in sorted(path.rglob("*"), reverse=True):
            folder.rmdir()
        path.rmdir()


def test_a_manifest_of_before_it_had_a_checksum_is_read(tmp_path):
    path = write(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    write_json(path / "manifest.json", manifest)
    assert store(tmp_path).find(lambda text: pytest.fail(text)).step == 2


def test_a_bit_of_the_version_that_flips_is_damage(tmp_path):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 3'))
    assert store(tmp_path).find(lambda text: None).step == 1


def test_newer_format_is_no_damage(tmp_path):
    """It is neither set aside nor passed over: the run would go back to an older checkpoint and write over the newer."""
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    later = manifest | {"format_version": 2, "another": "key"}
    write_json(path / "manifest.json", later | {"sha256": checkpoint.manifest_digest(later)})
    with pytest.raises(NewerFormatError, match="format version 2, this program reads 1: a later version.*Update"):
        store(tmp_path).find(lambda text: pytest.fail(text))
    assert path.is_dir()
    with pytest.raises(CheckpointError, match="Update this program"):
        checkpoint.verify(path)


def test_a_checkpoint_from_before_ledgers_goes_on_with_sums_that_begin_at_its_step(tmp_path, capsys):
    """One that cannot be read is an error, before anything is loaded."""
    found, taken, totals = checkpoint.read_state(write(tmp_path, 2)), [], {"columns": ["decoded"], "shards": {"0": [3]}}
    found.state["skipped_steps"], found.state["world_size"] = 4, 1
    engine, plan = SimpleNamespace(load=lambda *_: None), SimpleNamespace(length=SimpleNamespace(total_steps=9))

    def resume():
        return run_loop.resume(found, 0, plan, engine, SimpleNamespace(go_on_from=taken.append), Topology.single())

    assert resume() == 2 and engine.skipped_steps == 4 and taken == []
    warning, resumed = capsys.readouterr().out.splitlines()
    assert "WARNING" in warning and "no ledger.json" in warning and "count from step 2 on" in warning
    assert resumed.startswith("resumed from")
    write_json(found.path / "ledger.json", totals)
    assert resume() == 2 and taken == [totals]
    assert "WARNING" not in capsys.readouterr().out
    engine.load = lambda *_: pytest.fail("loaded")
    for broken in ("{", "[]", "null", '{"columns": ["decoded"], "shards": {"0": [3, 4]}}', '{"columns": []}'):
        (found.path / "ledger.json").write_text(broken)
        with pytest.raises(CheckpointError, match="ledger.json cannot be read"):
            resume()


@pytest.mark.parametrize(("saved", "loaded"), [(1, 3), (3, 1), (2, 3), (3, 2), (2, 2), (4, 3), (2, 4)])
def test_rows_are_found_at_another_number_of_ranks(tmp_path, saved, loaded):
    values, steps = torch.randn(11, 3), torch.arange(11, dtype=torch.int32)
    partition = ClassPartition(11, saved)
    for shard in range(saved):
        rows = slice(partition.start(shard), partition.stop(shard))
        save_rows(tmp_path, rows.start, rows.stop, 11, {"centers": values[rows], "steps": steps[rows]})
    partition = ClassPartition(11, loaded)
    for shard in range(loaded):
        start, stop = partition.start(shard), partition.stop(shard)
        into = {
            "centers": torch.full((stop - start, 3), torch.nan),
            "steps": torch.zeros(stop - start, dtype=torch.int32),
        }
        load_rows(tmp_path, start, stop, 11, into)
        assert torch.equal(into["centers"], values[start:stop])
        assert torch.equal(into["steps"], steps[start:stop])


def test_rows_that_do_not_fit_are_named(tmp_path):
    save_rows(tmp_path, 0, 4, 11, {"centers": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match="does not hold row 4 of the head"):
        load_rows(tmp_path, 0, 11, 11, {"centers": torch.zeros(11, 3)})
    with pytest.raises(CheckpointError, match="is of 11 classes, this run has 12"):
        load_rows(tmp_path, 0, 4, 12, {"centers": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match=r"float32 \[3\] a row, this run has torch.float32 \[5\]"):
        load_rows(tmp_path, 0, 4, 11, {"centers": torch.zeros(4, 5)})


def test_encoder_comes_back_bit_for_bit_from_every_kind_of_folder(tmp_path):
    model = VisionTransformer(TINY, seed=3)
    writer = store(tmp_path)
    staging = writer.stage(1)
    save_rows(staging / "head", 0, 5, 5, {"centers": torch.zeros(5, 2)})
    save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    checkpoint.save_encoder(staging / "encoder", "tiny", TINY, model.state_dict())
    write_json(staging / "state.json", {"step": 1})
    folder = writer.publish(1)
    for path in (tmp_path, folder, folder / "encoder"):
        loaded = checkpoint.load_encoder(path)
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    untrained = checkpoint.load_encoder(tmp_path, untrained=True, seed=4)
    assert not torch.equal(untrained.projection.weight, model.projection.weight)
    assert torch.equal(untrained.projection.weight, VisionTransformer(TINY, seed=4).projection.weight)


def test_encoder_that_is_missing_damaged_or_another_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no encoder: expected a run folder"):
        checkpoint.load_encoder(tmp_path)
    folder = tmp_path / "encoder"
    checkpoint.save_encoder(folder, "tiny", TINY, VisionTransformer(TINY, seed=0).state_dict())
    wider = VisionTransformer(TINY.model_copy(update={"width": 16}), seed=0)
    with pytest.raises(CheckpointError, match="another architecture.*--model"):
        checkpoint.load_weights(wider, folder)
    (folder / "encoder.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="encoder.safetensors cannot be read"):
        checkpoint.load_encoder(tmp_path)


def test_checkpoints_of_every_nth_step_stay_beside_the_last(tmp_path):
    for step in range(1, 8):
        writer = CheckpointStore(tmp_path, Topology.single(), keep_last=2, keep_every=3)
        writer.write(step, lambda folder, step=step: fill(folder, step))
    assert [checkpoint.step_of(path) for path in published(tmp_path / "checkpoints")] == [3, 6, 7]


def fill(staging, step):
    save_rows(staging / "head", 0, 5, 5, {"centers": torch.full((5, 2), float(step))})
    save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    write_json(staging / "state.json", {"step": step})


@pytest.mark.parametrize("name", ["stage", "write", "sync_file", "write_json", "sync_folder"])
def test_a_save_that_cannot_be_written_leaves_the_one_before_and_nothing_else(tmp_path, monkeypatch, name):
    writer = store(tmp_path)
    writer.write(1, lambda folder: fill(folder, 1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if name == "stage":
            patch.setattr(checkpoint.Path, "mkdir", full)
        elif name != "write":
            patch.setattr(checkpoint, name, full)
        function = full if name == "write" else lambda folder: fill_with_files(folder, 2)
        with pytest.raises(SaveError, match="step_000000002.tmp could not be written on rank.*No space left"):
            writer.write(2, function)
    assert list((tmp_path / "checkpoints").glob("*.tmp")) == []
    found = published(tmp_path / "checkpoints")
    assert [checkpoint.step_of(path) for path in found] == [1]
    checkpoint.verify(found[-1])
    writer.write(3, lambda folder: fill(folder, 3))
    assert store(tmp_path).find().step == 3


def test_a_hint_that_cannot_be_written_is_told_and_old_checkpoints_make_room(tmp_path, monkeypatch, capsys):
    """`latest` is for people: the checkpoint is whole without it, and a full disk gets room only by what is pruned."""

    def full(*_):
        raise OSError(28, "No space left on device")

    writer = store(tmp_path, keep_last=1)
    writer.write(1, lambda folder: fill(folder, 1))
    monkeypatch.setattr(checkpoint, "write_text", full)
    for step in (2, 3):
        writer.write(step, lambda folder, step=step: fill(folder, step))
    assert [checkpoint.step_of(path) for path in published(tmp_path / "checkpoints")] == [3]
    assert store(tmp_path).find().step == 3
    assert "latest could not be written, step_000000003 was: [Errno 28]" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders_takes_saves(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refusing)
    if number == errno.EIO:
        with pytest.raises(SaveError, match="Input/output error"):
            store(tmp_path).write(1, lambda folder: fill(folder, 1))
    else:
        checkpoint.verify(store(tmp_path).write(1, lambda folder: fill(folder, 1)))


def fill_with_files(staging, step):
    """`fill` past a `write_json` that fails."""
    save_rows(staging / "head", 0, 5, 5, {"centers": torch.full((5, 2), float(step))})
    save_tensors(staging / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
    (staging / "state.json").write_text('{"step": 2}')
