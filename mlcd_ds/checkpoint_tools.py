"""What tools/checkpoint.py does with checkpoints that no run is using: verify, list, reshard, consolidate."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mlcd_ds import checkpoint
from mlcd_ds.checkpoint import LEDGER, Checkpoint, CheckpointStore
from mlcd_ds.config import CheckpointPathConfig, ConsolidateConfig, ReshardConfig
from mlcd_ds.ds_config import BatchSizes
from mlcd_ds.errors import CheckpointError
from mlcd_ds.files import nothing_half, save_tensors, whole_folder, write_json
from mlcd_ds.partition import ClassPartition
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.topology import Topology
from mlcd_ds.universal import ENGINE_TAG, UNIVERSAL, refuse_foreign_pickles

THREADS = 4
"""Files that are read at a time: a disk array wants more than one reader, and hashing leaves Python's lock."""


def verify(config: CheckpointPathConfig) -> None:
    """Reads every file of a checkpoint, or of all of a run, and compares it with the manifest: sizes and SHA-256.

    Names every file that is missing or changed, and every pickle that would import what DeepSpeed's do not. Ends with an
    error when there is one.
    """
    paths = find_checkpoints(Path(config.path))
    damaged = 0
    for path in paths:
        problems = list(problems_of(path, contents=True))
        damaged += bool(problems)
        print(f"{path.name}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
        for problem in problems:
            print(f"  {problem}")
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(paths)} checkpoint(s) in {config.path} cannot be used: see above. --resume auto passes over "
            "damaged ones; put back a copy, or remove them."
        )


def list_checkpoints(config: CheckpointPathConfig) -> None:
    """Prints a line for each checkpoint: step, when it was written, size, ranks, ZeRO stage, and whether all is there.

    Looks at names and sizes only; `verify` reads the files.
    """
    rows = [("step", "written", "size", "ranks", "ZeRO", "files")]
    for path in find_checkpoints(Path(config.path)):
        rows.append(_row(path))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def reshard(config: ReshardConfig, to_universal: Callable[[Path, Path], None]) -> None:
    """Makes a run folder with one checkpoint that fits another number of ranks, without training.

    The engine's part is brought into DeepSpeed's universal form, which any number of ranks and the ZeRO stages 1 to 3 read;
    the heads' rows are divided anew. The old run stays as it is, its curves with it. Go on with
    `train.py --output_dir NEW --resume auto`; train.py would do the same work at its start by itself.

    to_universal: engine.to_universal; only who reshards imports DeepSpeed.
    """
    found = _newest_whole(Path(config.path))
    target = Path(config.output_dir)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"--output_dir {target} is not empty: choose another folder")
    run = RunFolder(found.path.parents[1])
    before = run.config()
    if before is None:
        raise CheckpointError(
            f"{run.path} has no config.json: a run folder is needed, with the checkpoint in its checkpoints/"
        )
    global_batch = before["facts"]["global_batch"]
    BatchSizes.resolve({"train_batch_size": global_batch}, config.world_size, global_batch)  # refuses what cannot be
    heads = sorted(path.name for path in found.path.glob("head*"))
    partitions = [ClassPartition(rows_of(found.path / head)[0], config.world_size) for head in heads]
    refuse_foreign_pickles(found.path / ENGINE_TAG)

    with nothing_half(target):
        store = CheckpointStore(target, Topology.single(), keep_last=1, heads=len(heads))
        staging = store.stage(found.step)
        state = found.state | {"world_size": config.world_size}
        if found.state.get("engine_format") == UNIVERSAL or found.state.get("zero_stage") == 0:
            shutil.copytree(found.path / ENGINE_TAG, staging / ENGINE_TAG)
        else:
            scratch = staging.with_name(f"{found.path.name}.universal.tmp")
            to_universal(found.path, scratch)
            (scratch / ENGINE_TAG).rename(staging / ENGINE_TAG)
            shutil.rmtree(scratch)
            state["engine_format"] = UNIVERSAL
        shutil.copytree(found.path / "encoder", staging / "encoder", dirs_exist_ok=True)
        for part in ("text", checkpoint.AVERAGE):
            if (found.path / part).is_dir():
                shutil.copytree(found.path / part, staging / part)
        if (found.path / checkpoint.CLASSIFIER).is_file():
            shutil.copyfile(found.path / checkpoint.CLASSIFIER, staging / checkpoint.CLASSIFIER)
        for head, partition in zip(heads, partitions, strict=True):
            for shard in tqdm(range(config.world_size), desc=head, unit="shard"):
                rows = read_rows(found.path / head, partition.start(shard), partition.stop(shard))
                checkpoint.save_rows(
                    staging / head, partition.start(shard), partition.stop(shard), partition.num_classes, rows
                )
        write_json(staging / "state.json", state)
        if (found.path / LEDGER).is_file():
            shutil.copyfile(found.path / LEDGER, staging / LEDGER)
        facts = before["facts"] | {"world_size": config.world_size}
        write_json(target / "config.json", before | {"facts": facts})
        path = store.publish(found.step, shards=config.world_size)
    print(
        f"{path}: step {found.step}, written by {found.state['world_size']} ranks, now of {config.world_size}. Go on with "
        f"--output_dir {target} --resume auto"
    )


def consolidate(config: ConsolidateConfig) -> None:
    """Writes a checkpoint's encoder, float32, and each head's centers [k, D], one safetensors file each.

    The folder is then as good as a run to every tool that takes an encoder.
    """
    found = _newest_whole(Path(config.path))
    target = Path(config.output_dir)
    if target.exists():
        raise CheckpointError(f"--output_dir {target} exists: choose another folder")
    written = []
    with whole_folder(target) as staging:
        shutil.copytree(found.path / "encoder", staging, dirs_exist_ok=True)
        if (found.path / "text").is_dir():
            shutil.copytree(found.path / "text", staging / "text")
            written.append("text/")
        for folder in sorted(found.path.glob("head*")):
            num_classes, _ = rows_of(folder)
            centers = read_rows(folder, 0, num_classes, only=("centers",))["centers"]
            name = f"centers{folder.name.removeprefix('head')}.safetensors"
            save_tensors(
                staging / name, {"centers": centers}, {"step": str(found.step), "num_classes": str(num_classes)}
            )
            written.append(f"{name} {list(centers.shape)}")
    print(f"{target}: {', '.join(['encoder.safetensors', *written])} of {found.path.name}")


def find_checkpoints(path: Path) -> list[Path]:
    """`path` itself where it is a checkpoint, else those of the run folder `path`, oldest first.

    Raises CheckpointError where there is none.
    """
    if (path / checkpoint.MANIFEST).is_file() or (path / "state.json").is_file():
        return [path]
    found = checkpoint.published(path / "checkpoints") or checkpoint.published(path)
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: expected a run folder with checkpoints/step_*, or a step_* folder"
        )
    return found


def problems_of(path: Path, contents: bool) -> Iterator[str]:
    """What is wrong with a checkpoint, a sentence each; contents: read the files, with a progress bar, too."""
    try:
        files = checkpoint.read_manifest(path)
        checkpoint.read_state(path)
        total = sum(entry["bytes"] for entry in files.values())
    except CheckpointError as error:
        yield str(error)
        return
    except (TypeError, KeyError, AttributeError) as error:
        yield f"{path / checkpoint.MANIFEST} is not what this program writes ({type(error).__name__}: {error})"
        return

    def problem(item) -> tuple[int, str | None]:
        name, expected = item
        try:
            checkpoint.check_file(path, name, expected, contents)
        except CheckpointError as error:
            return expected["bytes"], str(error)
        except OSError as error:
            return expected["bytes"], f"{path / name} cannot be read: {error}"
        return expected["bytes"], None

    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=not contents, leave=False) as bar,
    ):
        for size, found in threads.map(problem, files.items()):
            bar.update(size)
            if found is not None:
                yield found
    if contents:
        try:
            refuse_foreign_pickles(path / ENGINE_TAG)
        except CheckpointError as error:
            yield str(error)


def rows_of(folder: Path) -> tuple[int, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Classes of a head, and {name: (shape of a row, dtype)} of what is kept of each, by its first file of rows.

    Raises CheckpointError where that is missing or no such file.
    """
    path = next(iter(sorted(folder.glob("rows_*.safetensors"))), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no rows_*.safetensors")
    try:
        with safe_open(path, "pt") as file:
            nothing = {name: file.get_slice(name)[:0] for name in file.keys()}
            return int(file.metadata()["num_classes"]), {n: (tuple(t.shape[1:]), t.dtype) for n, t in nothing.items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_rows(folder: Path, start: int, stop: int, only: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """Rows start..stop of a head, whoever wrote them: {name: [stop - start, ...]}; only: these names."""
    num_classes, kinds = rows_of(folder)
    into = {
        name: torch.empty(stop - start, *shape, dtype=dtype)
        for name, (shape, dtype) in kinds.items()
        if only is None or name in only
    }
    checkpoint.load_rows(folder, start, stop, num_classes, into)
    return into


def _newest_whole(path: Path) -> Checkpoint:
    """The newest checkpoint under `path`, every file compared with the manifest; CheckpointError where it is damaged."""
    newest = find_checkpoints(path)[-1].resolve()
    problem = next(problems_of(newest, contents=True), None)
    if problem is not None:
        raise CheckpointError(f"{problem}. Name another step's folder, or mend this one.")
    return checkpoint.read_state(newest)


def _row(path: Path) -> tuple[str, ...]:
    """A line of `list_checkpoints`."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    newest = max((file.stat().st_mtime for file in path.glob("*.json")), default=path.stat().st_mtime)
    problem = next(problems_of(path, contents=False), None)
    try:
        state = checkpoint.read_state(path).state
    except CheckpointError:
        state = {}  # `problem` says so
    return (
        path.name.removeprefix("step_").lstrip("0") or "0",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(newest)),
        f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB",
        str(state.get("world_size", "?")),
        f"{state.get('zero_stage', '?')}" + (" (universal)" if state.get("engine_format") == UNIVERSAL else ""),
        "ok" if problem is None else problem,
    )
