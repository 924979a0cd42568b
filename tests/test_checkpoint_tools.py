"""tools/checkpoint.py: verify, list and consolidate (reshard needs the engine: test_world_size.py)."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file
from test_checkpoint import TINY, damage_bit

from mlcd_ds import checkpoint, checkpoint_tools
from mlcd_ds.checkpoint import CheckpointStore, save_rows
from mlcd_ds.config import CheckpointPathConfig, ConsolidateConfig, ReshardConfig
from mlcd_ds.errors import CheckpointError, ConfigError, NewerFormatError, SaveError
from mlcd_ds.files import write_json
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.partition import ClassPartition
from mlcd_ds.topology import Topology

CENTERS = {"head": torch.arange(22.0).view(11, 2), "head_1": torch.arange(10.0).view(5, 2)}


def make_run(folder, steps=(2, 4)):
    """Checkpoints as three ranks with two heads write them, but for the engine's part."""
    store = CheckpointStore(folder, Topology.single(), keep_last=9, heads=2)
    for step in steps:
        staging = store.stage(step)
        for head, centers in CENTERS.items():
            partition = ClassPartition(len(centers), 3)
            for shard in range(3):
                rows = slice(partition.start(shard), partition.stop(shard))
                tensors = {
                    "centers": centers[rows] + step,
                    "steps": torch.zeros(partition.size(shard), dtype=torch.int32),
                }
                save_rows(staging / head, rows.start, rows.stop, len(centers), tensors)
        checkpoint.save_encoder(staging / "encoder", "tiny", TINY, VisionTransformer(TINY, seed=step).state_dict())
        (staging / "engine").mkdir()
        torch.save({"step": step}, staging / "engine" / "mp_rank_00_model_states.pt")
        write_json(staging / "state.json", {"step": step, "world_size": 3, "zero_stage": 2})
        store.publish(step, shards=3)
    facts = {"global_batch": 24, "world_size": 3}
    write_json(folder / "config.json", {"settings": {}, "facts": facts, "deepspeed": {}})
    return folder


def verify(path):
    checkpoint_tools.verify(CheckpointPathConfig(path=str(path)))


def test_whole_run_verifies(tmp_path, capsys):
    verify(make_run(tmp_path))
    assert capsys.readouterr().out == "step_000000002: ok\nstep_000000004: ok\n"
    verify(tmp_path / "checkpoints" / "step_000000002")
    assert capsys.readouterr().out == "step_000000002: ok\n"


def test_every_damaged_part_is_named(tmp_path, capsys):
    path = make_run(tmp_path) / "checkpoints" / "step_000000004"
    damage_bit(path / "encoder" / "encoder.safetensors")
    (path / "head" / "rows_0000000000_0000000004.safetensors").unlink()
    (path / "state.json").write_text((path / "state.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"1 of 2 checkpoint\(s\) in .* cannot be used"):
        verify(tmp_path)
    out = capsys.readouterr().out
    assert "step_000000002: ok\nstep_000000004: 3 problem(s)\n" in out
    for words in (
        "encoder.safetensors has changed",
        "rows_0000000000_0000000004.safetensors is missing",
        "bytes, the manifest",
    ):
        assert words in out


def test_every_flipped_bit_is_found(tmp_path):
    """A bit in the first, the middle and the last byte of each file, and bits all over the manifest."""
    path = make_run(tmp_path, steps=(2,)) / "checkpoints" / "step_000000002"
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for place in {*range(8 * 30), *range(0, 8 * len(whole), 37)}:  # each of the format's version
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        manifest.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read_manifest(path)
        assert not isinstance(caught.value, NewerFormatError)  # which would not let a run fall back
    manifest.write_bytes(whole)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == 6 + 2 + 1 + 1 + 1
    for file in files:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            data = bytearray(whole)
            data[place] ^= 1 << place % 8
            file.write_bytes(data)
            with pytest.raises(CheckpointError):
                verify(path)
        file.write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("text", ["null", "[]", "3"])
def test_list_tells_of_a_state_of_another_shape(tmp_path, capsys, text):
    (make_run(tmp_path) / "checkpoints" / "step_000000004" / "state.json").write_text(text)
    checkpoint_tools.list_checkpoints(CheckpointPathConfig(path=str(tmp_path)))
    assert "state.json cannot be read" in capsys.readouterr().out.splitlines()[-1]


def test_list_tells_step_date_size_ranks_and_what_is_missing(tmp_path, capsys):
    path = make_run(tmp_path) / "checkpoints" / "step_000000004"
    (path / "head" / "rows_0000000000_0000000004.safetensors").unlink()
    checkpoint_tools.list_checkpoints(CheckpointPathConfig(path=str(tmp_path)))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "written", "size", "ranks", "ZeRO", "files"]
    step, date, _, _, unit, ranks, stage, state = first.split()
    assert (step, unit, ranks, stage, state) == ("2", "MB", "3", "2", "ok")
    assert date.count("-") == 2
    assert second.split()[0] == "4" and second.endswith("rows_0000000000_0000000004.safetensors is missing")


def test_consolidated_folder_has_the_encoder_and_each_heads_centers(tmp_path, capsys):
    run, target = make_run(tmp_path / "run"), tmp_path / "weights"
    checkpoint_tools.consolidate(ConsolidateConfig(path=str(run), output_dir=str(target)))
    assert sorted(path.name for path in target.iterdir()) == [
        "centers.safetensors", "centers_1.safetensors", "encoder.json", "encoder.safetensors",
    ]  # fmt: skip
    for head, name in (("head", "centers"), ("head_1", "centers_1")):
        assert torch.equal(load_file(target / f"{name}.safetensors")["centers"], CENTERS[head] + 4)
    encoder = checkpoint.load_encoder(target)
    assert all(
        torch.equal(a, b)
        for a, b in zip(encoder.parameters(), VisionTransformer(TINY, seed=4).parameters(), strict=True)
    )
    with pytest.raises(CheckpointError, match="exists: choose another folder"):
        checkpoint_tools.consolidate(ConsolidateConfig(path=str(run), output_dir=str(target)))


def test_resharding_divides_the_rows_anew(tmp_path):
    run, target = make_run(tmp_path / "run"), tmp_path / "run2"

    def to_universal(source, folder):
        folder.mkdir()
        shutil.copytree(source / "engine", folder / "engine")

    config = ReshardConfig(path=str(run), world_size=2, output_dir=str(target))
    checkpoint_tools.reshard(config, to_universal)
    path = target / "checkpoints" / "step_000000004"
    assert checkpoint.read_state(path).state == {
        "step": 4,
        "world_size": 2,
        "zero_stage": 2,
        "engine_format": "universal",
    }
    for head, centers in CENTERS.items():
        names = sorted(file.name for file in (path / head).iterdir())
        half = (len(centers) + 1) // 2
        assert names == [
            f"rows_{0:010d}_{half:010d}.safetensors",
            f"rows_{half:010d}_{len(centers):010d}.safetensors",
        ]
        parts = [load_file(path / head / name) for name in names]
        assert torch.equal(torch.cat([part["centers"] for part in parts]), centers + 4)
        assert all(part["steps"].dtype == torch.int32 for part in parts)
    assert json.loads((target / "config.json").read_text())["facts"] == {"global_batch": 24, "world_size": 2}
    assert sorted(p.name for p in (target / "checkpoints").iterdir()) == ["latest", "step_000000004"]
    verify(target)
    with pytest.raises(CheckpointError, match="is not empty"):
        checkpoint_tools.reshard(config, to_universal)
    with pytest.raises(ConfigError, match="which 5 ranks cannot share evenly"):
        checkpoint_tools.reshard(
            ReshardConfig(path=str(run), world_size=5, output_dir=str(tmp_path / "x")), to_universal
        )
    with pytest.raises(ConfigError, match="5 classes cannot be split over 6 ranks"):
        checkpoint_tools.reshard(
            ReshardConfig(path=str(run), world_size=6, output_dir=str(tmp_path / "x")), to_universal
        )
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch):
    run = str(make_run(tmp_path / "run"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_tools, "save_tensors", full)
    monkeypatch.setattr(checkpoint, "save_rows", full)
    out = str(tmp_path / "out")
    with pytest.raises(SaveError, match="out could not be written, nothing of it is left: .*No space left"):
        checkpoint_tools.consolidate(ConsolidateConfig(path=run, output_dir=out))
    with pytest.raises(SaveError, match="out could not be written, nothing of it is left: .*No space left"):
        checkpoint_tools.reshard(
            ReshardConfig(path=run, world_size=2, output_dir=out),
            lambda source, folder: shutil.copytree(source, folder),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damaged_or_missing_checkpoints_are_refused(tmp_path):
    path = make_run(tmp_path / "run") / "checkpoints" / "step_000000004"
    damage_bit(path / "head" / "rows_0000000000_0000000004.safetensors")
    consolidate = ConsolidateConfig(path=str(tmp_path / "run"), output_dir=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="has changed since it was written.*Name another step"):
        checkpoint_tools.consolidate(consolidate)
    with pytest.raises(CheckpointError, match="holds no checkpoint: expected a run folder"):
        verify(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format_version": 3}
    write_json(path / "manifest.json", manifest | {"sha256": checkpoint.manifest_digest(manifest)})
    with pytest.raises(CheckpointError, match="1 of 2"):
        verify(tmp_path / "run")
    with pytest.raises(CheckpointError, match="a later version has written it"):
        checkpoint_tools.consolidate(consolidate)
    described = json.loads((path / "encoder" / "encoder.json").read_text()) | {"format_version": 2}
    write_json(path / "encoder" / "encoder.json", described)
    with pytest.raises(NewerFormatError, match="Update this program"):
        checkpoint.load_encoder(path)


def test_door_ends_with_one_message_and_the_exit_code(tmp_path):
    path = make_run(tmp_path) / "checkpoints" / "step_000000004"
    damage_bit(path / "state.json")
    tool = ROOT / "tools" / "checkpoint.py"
    for arguments, code, words in (
        (["verify", "--path", tmp_path], 4, "1 of 2 checkpoint(s)"),
        (["prune"], 2, "no sub-command 'prune': expected one of verify, list, reshard, consolidate"),
    ):
        done = subprocess.run([sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == code
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
