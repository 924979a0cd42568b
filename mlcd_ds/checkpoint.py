"""Checkpoints of a run: publish, find, verify, prune; the head's rows by their address; the encoder for users.

    run/checkpoints/
        latest                      names the newest folder: a hint for people, discovery goes by manifests
        step_000001000/
            manifest.json           size and SHA-256 of every other file, and of itself (`manifest_digest`; older ones lack
                                    it): written last, before the folder gets its name
            state.json              step, samples, world size, what the run was
            ledger.json             samples decoded and skipped, by reason, of each tar, up to this step (older ones lack it)
            engine/...              DeepSpeed's own files
            head/rows_START_STOP.safetensors   centers, moments, step counts of these global rows
            head_1/, head_2/ ...    the same of the other heads, where there are several
            ranks/rank_00000.safetensors       random number generators
            encoder/encoder.safetensors, encoder.json   the encoder alone, float32, for every tool that reads it
            text/text.safetensors, text.json, tokenizer.json   of a run on captions: the text tower with the logits' scale
            classifier.safetensors  of fine-tuning: the classifier
            average/encoder/..., average/classifier.safetensors   of fine-tuning with --ema_decay: both, averaged

A checkpoint is written as step_N.tmp by all ranks, hashed, given its manifest, synced, renamed; then `latest` follows.
Whatever dies before the rename leaves a .tmp folder that nobody reads and the next save removes. What cannot be written on
any rank (a full disk) is a SaveError on all of them, the staged folder goes, those published before stay. All ranks must
see the same file system.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mlcd_ds import collectives
from mlcd_ds.batch import head_suffix
from mlcd_ds.data import tokenizer as tokenizers
from mlcd_ds.data.storage import UnreadableError, cure_of, persistently
from mlcd_ds.data.tokenizer import CaptionTokenizer
from mlcd_ds.errors import CheckpointError, NewerFormatError, SaveError
from mlcd_ds.files import comes_into_sight, save_tensors, sha256, sync_file, sync_folder, write_json, write_text
from mlcd_ds.models import hf, hf_text
from mlcd_ds.models.hf import PROJECTION
from mlcd_ds.models.text import TextConfig, TextTransformer
from mlcd_ds.models.vit import FUNCTION, PRESETS, SHAPE, VisionTransformer, VitConfig, resize_positions
from mlcd_ds.topology import Topology

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REGISTERS = "embeddings.registers"
LEDGER = "ledger.json"
CLASSIFIER = "classifier.safetensors"
AVERAGE = "average"
"""Folder in a checkpoint; RUN/average stands for that of the run's newest."""
HUGGING_FACE = "hf:"
"""Begins the name of an encoder that lies in a Hugging Face folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. state: the content of state.json."""

    path: Path
    step: int
    state: dict


class CheckpointStore:
    """The checkpoints of one run folder, for all ranks of `topology`, with `heads` heads.

    Keeps the last `keep_last`, and those of every `keep_every`-th step, where given, for good.
    """

    def __init__(
        self, run_folder: Path, topology: Topology, keep_last: int, heads: int = 1, keep_every: int | None = None
    ):
        self.folder = run_folder / "checkpoints"
        self.topology = topology
        self.keep_last, self.keep_every = keep_last, keep_every
        self.bytes_published = 0
        """Of the newest checkpoint that was published from here."""
        self.head_folders = [head_folder(index) for index in range(heads)]

    def stage(self, step: int) -> Path:
        """An empty step_N.tmp for all ranks to write into; leftovers of killed saves are removed.

        Raises SaveError, on every rank, where rank 0 cannot make it.
        """
        staging = self.folder / f"{_name(step)}.tmp"
        collectives.on_main(self.topology, self._make_staging, staging)
        return staging

    def _make_staging(self, staging: Path) -> None:
        with _save_errors(staging):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            for part in (*self.head_folders, "ranks", "encoder"):
                (staging / part).mkdir(parents=True)

    def write(self, step: int, write: Callable[[Path], Iterable[Path] | None]) -> Path:
        """Stages, lets every rank `write(folder)` its parts, publishes.

        `write` returns the files that it wrote (rank 0, which lists them all, need not). It must have ended its own
        collectives before the first OSError that it raises. Raises SaveError, on every rank, when anything could not be
        written on any; nothing of the step is then left.
        """
        try:
            staging = self.stage(step)
            written, problem = {}, None
            try:
                written = {str(path.relative_to(staging)): path.stat().st_size for path in write(staging) or ()}
            except OSError as error:
                problem = str(error)
            self._agree(staging, problem)
            return self.publish(step, written=written)
        except SaveError:
            if self.topology.is_main:
                shutil.rmtree(self.folder / f"{_name(step)}.tmp", ignore_errors=True)  # its space may be what is needed
            raise

    def _agree(self, staging: Path, problem: str | None) -> None:
        """Raises SaveError, on every rank, where one has a problem."""
        found = collectives.gather_objects(problem, self.topology)
        bad = {rank: text for rank, text in enumerate(found) if text}
        if bad:
            rank, text = next(iter(bad.items()))
            raise SaveError(f"{staging} could not be written on rank(s) {list(bad)}; rank {rank}: {text}")

    def publish(self, step: int, shards: int | None = None, written: dict[str, int] | None = None) -> Path:
        """Makes the staged checkpoint the newest one. Every rank calls it after writing its parts.

        shards: where one process has written the rows of so many ranks, and no random number generators. written: {name:
        bytes} of this rank's files, without which, and at another size, nothing is published.
        Raises SaveError, on every rank, where a rank cannot read its parts back or rank 0 cannot write; CheckpointError
        where parts are missing.
        """
        staging, final = self.folder / f"{_name(step)}.tmp", self.folder / _name(step)
        reported: dict[str, int] = {}
        for part in collectives.gather_objects(written or {}, self.topology):  # every part is written
            reported.update(part)
        ranks = self.topology.world_size
        # One rank lists: on a network file system the others may see a part later than its writer does.
        files = collectives.on_main(self.topology, _parts, staging, ranks, self.head_folders, shards, reported)
        hashed, problem = {}, None
        try:
            for name, size in list(files.items())[self.topology.rank :: ranks]:
                path = staging / name
                comes_into_sight(partial(_has_size, path, size))  # another host has written it
                sync_file(path)
                hashed[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                if hashed[name]["bytes"] != size:
                    raise OSError(errno.EIO, f"{hashed[name]['bytes']} bytes, its writer says {size}", str(path))
        except OSError as error:
            problem = str(error)
        self._agree(staging, problem)
        everything = {}
        for part in collectives.gather_objects(hashed, self.topology):
            everything.update(part)
        collectives.on_main(self.topology, self._finish, step, staging, final, everything)
        self.bytes_published = sum(entry["bytes"] for entry in everything.values())
        return final

    def _finish(self, step: int, staging: Path, final: Path, files: dict[str, dict]) -> None:
        with _save_errors(staging):
            manifest = {"format_version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
            write_json(staging / MANIFEST, manifest | {"sha256": manifest_digest(manifest)})
            for folder in sorted({(staging / name).parent for name in files}):
                sync_folder(folder)
            staging.rename(final)
            sync_folder(self.folder)
        try:
            write_text(self.folder / "latest", final.name + "\n")
        except OSError as error:  # a hint for people; what is pruned below may make room again
            print(f"WARNING: {self.folder / 'latest'} could not be written, {final.name} was: {error}", flush=True)
        self._prune()

    def newest(self) -> str:
        """The newest published checkpoint, for messages, on every rank; "none" where there is none."""
        found = collectives.on_main(self.topology, published, self.folder)
        return str(found[-1]) if found else "none"

    def find(self, announce=print) -> Checkpoint | None:
        """The newest checkpoint that is whole, verified by all ranks, a share of its files each; None when there is none.

        A damaged one is announced by name, set aside as damaged_step_N, and the one before it taken. Raises, on every
        rank, CheckpointError when there are checkpoints and none is whole, when the damaged one cannot be renamed, or when
        the newest is of a later format; UnreadableError when it cannot be read for a reason that lies in a machine. These
        two are no damage, and going back would throw away work.
        """
        problems, damaged = [], []
        for path in collectives.on_main(self.topology, published, self.folder)[::-1]:
            problem = self._problem(path)
            if problem is None:
                # Out of the way, by a name that nobody looks for: the run will come to this step again, and neither its
                # new checkpoint nor the count of those to keep may meet the old one.
                collectives.on_main(self.topology, _set_aside, damaged)
                return collectives.on_main(self.topology, read_state, path)
            problems.append(problem)
            damaged.append(path)
            if self.topology.is_main:
                announce(f"checkpoint {path.name} is not usable: {problem}")
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {problems[0]}. To start anew, choose another --output_dir."
            )
        return None

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a published checkpoint, the same on every rank; None where nothing is."""
        found = None
        try:
            _wait_for_files(path, self.topology.rank, self.topology.world_size)
            verify(path, self.topology.rank, self.topology.world_size)
            if self.topology.is_main:
                read_state(path)
        except (CheckpointError, UnreadableError) as error:
            found = error
        except MemoryError:
            found = UnreadableError(f"cannot read {path}: {cure_of(errno.ENOMEM)}")
        except Exception as error:  # a bad disk, a manifest of another shape: this checkpoint is not whole
            found = CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})")
        problems = [problem for problem in collectives.gather_objects(found, self.topology) if problem]
        for problem in problems:
            if isinstance(problem, NewerFormatError | UnreadableError):
                raise problem
        return str(problems[0]) if problems else None

    def _prune(self) -> None:
        """Removes what is neither among the last nor to be kept. What cannot be removed stays, and is named."""
        for path in published(self.folder)[: -self.keep_last]:
            if self.keep_every is not None and step_of(path) % self.keep_every == 0:
                continue
            try:
                shutil.rmtree(path)
            except OSError as error:
                print(f"WARNING: the old checkpoint {path} could not be removed: {error}", flush=True)


def _set_aside(damaged: list[Path]) -> None:
    """Renames checkpoints to damaged_step_N. Raises CheckpointError where that cannot be."""
    for path in damaged:
        name = _free_name(path)
        try:
            path.rename(name)
        except OSError as error:
            raise CheckpointError(
                f"the damaged checkpoint {path} cannot be set aside as {name.name} ({error.strerror}), and the run would "
                "meet it again at its step: rename or remove it, or mend the folder's permissions or its disk."
            ) from None


def _free_name(path: Path) -> Path:
    """damaged_step_N, or with a number behind it where that is taken."""
    names = (path.with_name(f"damaged_{path.name}" + (f"_{n}" if n else "")) for n in itertools.count())
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _save_errors(staging: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{staging} could not be written on rank 0: {error}") from error


def step_of(path: Path) -> int:
    """The step in the name of a published checkpoint."""
    return int(path.name.removeprefix("step_"))


def _name(step: int) -> str:
    return f"step_{step:09d}"


def published(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first; copies that users made under other names are not ours."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{9}", path.name) and path.is_dir())


def head_folder(index: int) -> str:
    """Name of the folder with the rows of the `index`-th head."""
    return f"head{head_suffix(index)}"


def _parts(
    staging: Path, world_size: int, head_folders: list[str], shards: int | None, reported: dict[str, int]
) -> dict[str, int]:
    """{name: bytes} of all files of a staged checkpoint. Raises CheckpointError where a rank's part, or a file that
    `reported` names with its bytes, is not among them, nor comes into sight; SaveError where the disk fails.
    """
    found: list[tuple[dict[str, int], list[str]]] = []

    def complete() -> bool:
        found.append(_parts_in_sight(staging, world_size, head_folders, shards, reported))
        return not found[-1][1]

    with _save_errors(staging):
        whole = comes_into_sight(complete)
    if not whole:
        raise CheckpointError(
            f"{staging} lacks {found[-1][1][0]}, though every rank has written its own: do all hosts see the same file "
            "system under --output_dir? Give a folder that they share."
        )
    return found[-1][0]


def _parts_in_sight(
    staging: Path, world_size: int, head_folders: list[str], shards: int | None, reported: dict[str, int]
) -> tuple[dict[str, int], list[str]]:
    """({name: bytes} of all files of a staged checkpoint, the parts that lack among them)."""
    names = {
        str(path.relative_to(staging)): path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()
    }
    ranks = range(world_size if shards is None else 0)
    missing = [f"ranks/{rank_file(rank)}" for rank in ranks if f"ranks/{rank_file(rank)}" not in names]
    shards = world_size if shards is None else shards
    for folder in head_folders:
        rows = [name for name in names if name.startswith(f"{folder}/")]
        if len(rows) != shards:
            missing.append(f"{shards - len(rows)} of the {shards} files in {folder}/")
    for name, size in reported.items():
        if names.get(name) != size:
            missing.append(name if name not in names else f"{size - names[name]} of the {size} bytes of {name}")
    return names, missing


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def rank_file(rank: int) -> str:
    """Name of a rank's own part."""
    return f"rank_{rank:05d}.safetensors"


def manifest_digest(manifest: dict) -> str:
    """SHA-256 of a manifest's content, but for its own "sha256", as JSON with sorted keys, in hexadecimal digits."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} of a checkpoint's files.

    Raises CheckpointError where the manifest is missing or damaged, NewerFormatError where a later version wrote it.
    """
    try:
        manifest = json.loads(_read_text(path / MANIFEST))
        version, files = manifest["format_version"], manifest["files"]
        changed = "sha256" in manifest and manifest["sha256"] != manifest_digest(manifest)
        foreign = sorted(manifest.keys() - {"format_version", "step", "files", "sha256"})
    except FileNotFoundError:
        raise CheckpointError(f"{path / MANIFEST} does not exist: the checkpoint was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}): the checkpoint is damaged") from None
    if changed:
        raise CheckpointError(
            f"{path / MANIFEST} has changed since it was written: its SHA-256 is not the one it holds"
        )
    if foreign and version == FORMAT_VERSION:
        raise CheckpointError(f"{path / MANIFEST} holds {foreign[0]!r}, which nobody writes: the checkpoint is damaged")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}: a later version has written it. "
            "Update this program."
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}")
    return files


def _read_text(file: Path) -> str:
    """The text of a small file of a checkpoint, tried again where a disk or a file server fails."""
    return persistently(file.read_text, f"the checkpoint's {file}")


def _size(file: Path) -> int | None:
    """Bytes of a file of a checkpoint; None where there is none."""
    try:
        found = persistently(file.stat, f"the checkpoint's {file}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _wait_for_files(path: Path, part: int, parts: int) -> None:
    """Waits for manifest and files (every `parts`-th, from `part` on) of a published checkpoint, where they are not all in
    sight: another host may have written them just now. Says nothing about what is then found.
    """

    def in_sight() -> bool:
        if _size(path / MANIFEST) is None:
            return False
        return all(_size(path / name) is not None for name in list(read_manifest(path))[part::parts])

    if not in_sight():
        if part == 0:
            print(f"{path.name}: waits for files that are not in sight, up to a minute", flush=True)
        comes_into_sight(in_sight)


def check_file(path: Path, name: str, expected: dict, contents: bool = True) -> None:
    """Compares one file of a checkpoint with its manifest's entry; contents: False looks at the size alone.

    Raises CheckpointError naming what is missing or changed, UnreadableError where it cannot be read for a reason that lies
    in the machine, OSError for a disk's error that stays.
    """
    file = path / name
    size = _size(file)
    if size is None:
        raise CheckpointError(f"{file} is missing")
    if size != expected["bytes"]:
        raise CheckpointError(f"{file} has {size} bytes, the manifest says {expected['bytes']}")
    if contents and persistently(lambda: sha256(file), f"the checkpoint's {file}") != expected["sha256"]:
        raise CheckpointError(f"{file} has changed since it was written: its SHA-256 is not the manifest's")


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compares every file (or every `parts`-th, from `part` on) with the manifest.

    Raises CheckpointError naming the first that is missing or changed.
    """
    for name, expected in list(read_manifest(path).items())[part::parts]:
        check_file(path, name, expected)


def read_state(path: Path) -> Checkpoint:
    """The checkpoint in `path`, by its state.json."""
    try:
        state = json.loads(_read_text(path / "state.json"))
        return Checkpoint(path, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: {error}") from None


def read_ledger(path: Path) -> dict | None:
    """What `ImageLabelLoader.totals` gave for the checkpoint in `path`; None where that was made before ledgers were kept.

    Raises CheckpointError where it cannot be read.
    """
    file = path / LEDGER
    try:
        totals = json.loads(_read_text(file))
        if all(len(counts) == len(totals["columns"]) for counts in totals["shards"].values()):
            return totals
        problem = "a number for each column was expected of every tar"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{file} cannot be read: {problem}")


def rows_file(start: int, stop: int) -> str:
    """Name of the file with these global rows of a head."""
    return f"rows_{start:010d}_{stop:010d}.safetensors"


def save_rows(folder: Path, start: int, stop: int, num_classes: int, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one shard's rows, each tensor [stop - start, ...], with their global address."""
    address = {"format_version": FORMAT_VERSION, "start": start, "stop": stop, "num_classes": num_classes}
    path = folder / rows_file(start, stop)
    save_tensors(path, tensors, {name: str(value) for name, value in address.items()})


def load_rows(folder: Path, start: int, stop: int, num_classes: int, into: dict[str, torch.Tensor]) -> None:
    """Fills each tensor [stop - start, ...] of `into` with global rows start..stop, whoever wrote them.

    The number of shards may differ from the one that was saved. Raises CheckpointError when rows are missing, or number
    of classes, shape or dtype differ.
    """
    missing = torch.ones(stop - start, dtype=torch.bool)
    for path in sorted(folder.glob("rows_*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                address = file.metadata()
                low, high = int(address["start"]), int(address["stop"])
                if int(address["num_classes"]) != num_classes:
                    raise CheckpointError(f"{path} is of {address['num_classes']} classes, this run has {num_classes}")
                first, last = max(low, start), min(high, stop)
                if first >= last:
                    continue
                for name, tensor in into.items():
                    rows = file.get_slice(name)[first - low : last - low]
                    if rows.dtype != tensor.dtype or rows.shape[1:] != tensor.shape[1:]:
                        raise CheckpointError(
                            f"{path}: {name} is {rows.dtype} {list(rows.shape[1:])} a row, this run has {tensor.dtype} "
                            f"{list(tensor.shape[1:])}"
                        )
                    tensor[first - start : last - start].copy_(rows)
                missing[first - start : last - start] = False
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    if missing.any():
        row = start + int(missing.nonzero()[0])
        raise CheckpointError(f"{folder} does not hold row {row} of the head (and {int(missing.sum()) - 1} others)")


def save_encoder(folder: Path, name: str, config: VitConfig, weights: dict[str, torch.Tensor]) -> None:
    """Writes the encoder alone. weights: float32 state dict. The JSON, written last, marks it as whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "encoder.safetensors", weights)
    write_json(
        folder / "encoder.json", {"format_version": FORMAT_VERSION, "model": name, "config": config.model_dump()}
    )


def save_text(
    folder: Path, name: str, config: TextConfig, weights: dict[str, torch.Tensor], tokenizer: CaptionTokenizer
) -> None:
    """Writes the text tower of a run on captions. weights: float32 state dict, and `log_scale` [1]. The JSON comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "text.safetensors", weights)
    write_text(folder / tokenizers.FILE, tokenizer.text)
    write_json(folder / "text.json", {"format_version": FORMAT_VERSION, "model": name, "config": config.model_dump()})


def save_classifier(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes the classifier of a fine-tuned encoder. weights: float32 `weight` [C, W] and `bias` [C]."""
    save_tensors(file, weights)


@dataclass(frozen=True)
class TextTower:
    """A trained text tower. name: of its preset. log_scale: [1], logits are cosines times its exponential.

    digest: SHA-256 of its weights.
    """

    name: str
    model: TextTransformer
    log_scale: torch.Tensor
    tokenizer: CaptionTokenizer
    digest: str


def text_folder(encoder: Path) -> Path | None:
    """Beside an encoder folder in a checkpoint, within one that `consolidate` made; None where there is none."""
    places = (encoder / "text", encoder.parent / "text")
    return next((folder for folder in places if (folder / "text.json").is_file()), None)


def has_text(path: str | Path) -> bool:
    """Whether a text tower lies beside the encoder under `path` (see `find_encoder`)."""
    return text_folder(find_encoder(path)) is not None


def load_text(path: str | Path) -> TextTower:
    """The text tower that lies beside the encoder under `path` (see `find_encoder`, or hf:FOLDER), float32 on the CPU.

    Raises CheckpointError where there is none, or files are missing or do not fit each other.
    """
    if str(path).startswith(HUGGING_FACE):
        folder = Path(str(path).removeprefix(HUGGING_FACE))
        config, weights, log_scale = hf_text.read_text(folder)
        name, tokenizer = folder.name, CaptionTokenizer.load(folder)
    else:
        folder = text_folder(find_encoder(path))
        if folder is None:
            raise CheckpointError(
                f"{path} has no text tower: its run was trained on labels. Train one on captions: train.py --objective clip "
                f"--init_from {path} --lock_image"
            )
        try:
            described = json.loads((folder / "text.json").read_text())
            name, config = described["model"], TextConfig(**described["config"])
            weights = load_file(folder / "text.safetensors")
            log_scale = weights.pop(hf_text.SCALE)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the text tower in {folder} cannot be read: {error}") from None
        tokenizer = CaptionTokenizer.load(folder)
    model = TextTransformer(config, seed=0)
    own = model.state_dict()
    differing = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if differing or len(weights) != len(own):
        raise CheckpointError(f"{folder}: the text tower's tensors do not fit its config ({_few(differing)})")
    model.load_state_dict(weights)
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return TextTower(name, model.eval(), log_scale, tokenizer, digest.hexdigest())


def find_encoder(path: str | Path) -> Path:
    """The encoder folder of a run folder (its newest checkpoint's), of a checkpoint folder, or `path` itself; RUN/average:
    of the run's averaged weights.

    Raises CheckpointError saying what was looked for.
    """
    path = Path(path)
    candidates = [path, path / "encoder", *(p / "encoder" for p in reversed(published(path / "checkpoints")))]
    if path.name == AVERAGE:
        candidates += [p / AVERAGE / "encoder" for p in reversed(published(path.parent / "checkpoints"))]
    for folder in candidates:
        if (folder / "encoder.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} holds no encoder: expected a run folder with checkpoints/, a step_* folder, or a folder with encoder.json"
    )


def encoder_name(path: str | Path) -> str:
    """Name of the architecture of the encoder under `path` (see `find_encoder`). Raises CheckpointError for a damaged
    file.
    """
    file = find_encoder(path) / "encoder.json"
    try:
        return str(json.loads(file.read_text())["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def load_encoder(path: str | Path, untrained: bool = False, seed: int = 0) -> VisionTransformer:
    """The encoder under `path` (see `find_encoder`, or hf:FOLDER) in evaluation mode, float32 on the CPU.

    untrained: its architecture with initial weights of `seed` instead. Raises CheckpointError when files are missing or
    do not fit each other.
    """
    if str(path).startswith(HUGGING_FACE):
        config, weights = hf.read_folder(str(path).removeprefix(HUGGING_FACE))
        model = VisionTransformer(config, seed=seed)
        if not untrained:
            fit_weights(model, weights, str(path))
        return model.eval()
    folder = find_encoder(path)
    model = VisionTransformer(encoder_config(folder), seed=seed)
    if not untrained:
        load_weights(model, folder)
    return model.eval()


def encoder_config(path: str | Path) -> VitConfig:
    """The architecture of the encoder under `path` (see `find_encoder`, or hf:FOLDER); no weights are read.

    Raises CheckpointError as `load_encoder`.
    """
    if str(path).startswith(HUGGING_FACE):
        return hf.read_config(str(path).removeprefix(HUGGING_FACE))
    folder = find_encoder(path)
    try:
        described = json.loads((folder / "encoder.json").read_text())
        config = VitConfig(**described["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'encoder.json'} cannot be read: {error}") from None
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = ": a later version has written it. Update this program." if newer else ""
        raise (NewerFormatError if newer else CheckpointError)(
            f"{folder} has format version {version}, not {FORMAT_VERSION}{hint}"
        )
    return config


def check_architecture(own: VitConfig, source: VitConfig, where: str) -> None:
    """Raises CheckpointError where weights of an encoder `source` would be another function in one that is `own`.

    Number of heads, activation and norm_eps are in no tensor's shape. What `fit_weights` adapts may differ. where: for
    messages.
    """
    differing = [
        f"{name} {getattr(source, name)} there, {getattr(own, name)} here"
        for name in (*SHAPE, *FUNCTION)
        if getattr(source, name) != getattr(own, name)
    ]
    if differing:
        fitting = [
            name for name, known in PRESETS.items() if all(getattr(known, x) == getattr(source, x) for x in SHAPE)
        ]
        cure = f"Choose --model {' or '.join(fitting)}" if fitting else "No --model has its shape"
        raise CheckpointError(f"{where} holds another architecture ({'; '.join(differing)}). {cure}.")


def load_weights(model: VisionTransformer, path: str | Path) -> list[str]:
    """Copies the weights of an encoder (see `find_encoder`, or hf:FOLDER) into `model`; what had to be adapted, in words.

    Raises CheckpointError naming what does not fit, as `check_architecture` and `fit_weights`.
    """
    check_architecture(model.config, encoder_config(path), str(path))
    if str(path).startswith(HUGGING_FACE):
        _, weights = hf.read_folder(str(path).removeprefix(HUGGING_FACE))
        return fit_weights(model, weights, str(path))
    folder = find_encoder(path)
    try:
        weights = load_file(folder / "encoder.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / 'encoder.safetensors'} cannot be read: {error}") from None
    return fit_weights(model, weights, str(folder))


def fit_weights(model: VisionTransformer, weights: dict[str, torch.Tensor], where: str) -> list[str]:
    """Copies a state dict into `model`, and says what of it had to be adapted.

    Learned positions of another resolution are resized; without a projection (Hugging Face's MLCD has none) the model
    keeps its own, as it does its registers. Raises CheckpointError for any other difference. where: for messages.
    """
    weights, own, adapted = dict(weights), model.state_dict(), []
    positions, wanted = weights.get("embeddings.positions"), own.get("embeddings.positions")
    both = positions is not None and wanted is not None
    if both and positions.shape[1] == wanted.shape[1] and len(positions) != len(wanted):
        weights["embeddings.positions"] = resize_positions(positions, model.config.grid)
        adapted.append(f"positions resized from {len(positions) - 1} to {len(wanted) - 1} patches")
    if REGISTERS in own and REGISTERS not in weights:
        weights[REGISTERS] = own[REGISTERS]
        adapted.append("it has no registers: those keep their initial weights")
    if PROJECTION not in weights:
        weights[PROJECTION] = own[PROJECTION]
        adapted.append("it has no projection: that one keeps its initial weights")
    differing = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    differing += [name for name in weights if name not in own]
    if differing:
        raise CheckpointError(
            f"{where} holds another architecture: {len(differing)} tensors differ ({_few(differing)}). Choose the --model "
            "and --image_size that it was trained with."
        )
    model.load_state_dict(weights)
    return adapted


def compare_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Raises CheckpointError where float32 `weights` are not, bit for bit, those in a file of a checkpoint."""
    saved = load_file(file)
    differing = [name for name in weights if name not in saved or not torch.equal(weights[name], saved[name])]
    if differing:
        raise CheckpointError(
            f"what DeepSpeed made of {file.parents[1]} is not what lies in {file}: {len(differing)} tensors "
            f"differ ({_few(differing)}). Resume with the number of ranks that it was written by, and report this."
        )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
