"""Tars and labels, or the captions in them, to batches: `ImageLabelLoader`.

Shapes: B images of this rank and step, u images of one piece of work of a loader process, L labels (or tokens) an image,
H height and width in pixels.
"""

import atexit
import contextlib
import errno
import gc
import math
import os
import re
import signal
import sys
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mlcd_ds.batch import NO_IMAGE, ImageLabelBatch
from mlcd_ds.collectives import gather_objects, sum_
from mlcd_ds.config import RunConfig
from mlcd_ds.data.captions import CAPTION_PROBLEMS, CaptionError
from mlcd_ds.data.decode import IMAGE_PROBLEMS, ImageError
from mlcd_ds.data.labels import draw_positives
from mlcd_ds.data.plan import EpochPlan, augmentation_generator, positives_generator
from mlcd_ds.data.shards import TAR_PROBLEMS, ShardContents, ShardReader, ShardTable, build_shard_table
from mlcd_ds.data.storage import UnreadableError, cure_of, too_many_files
from mlcd_ds.data.tokenizer import CaptionTokenizer
from mlcd_ds.data.transforms import decode_random_resized_crop
from mlcd_ds.errors import ConfigError, DataError, UserError
from mlcd_ds.files import write_json
from mlcd_ds.monitor import never_stopping
from mlcd_ds.topology import Topology

__all__ = ["ImageLabelLoader", "Ledger", "build_shard_table"]

IMAGES_PER_PIECE = 256
"""Images that a loader process decodes in one go: bounds what lies in shared memory, whatever the batch size."""

MIN_SAMPLES_TO_JUDGE = 1000
"""The share of unusable samples is judged from this many on (and at the end)."""

WINDOW_SAMPLES = 100_000
"""The share of unusable images is judged among so many that were read last, too: what rots late has no good start to hide
behind."""

MAX_NAMES = 1000
"""Skipped samples that the ledger of a rank names; all are counted."""

SKIP_REASONS = (*IMAGE_PROBLEMS, "no_label", *CAPTION_PROBLEMS, *TAR_PROBLEMS)
"""Why a sample may be skipped."""

ROT = (*IMAGE_PROBLEMS, *(problem for problem in CAPTION_PROBLEMS if problem != "no_caption"))
"""Reasons that nobody can know at the start, and that come one by one."""


@dataclass
class Ledger:
    """What became of every sample of this rank: decoded + skipped = read, exactly, in all and for each shard.

    decoded_of: per shard (its number in the table). skips: (shard, reason) -> number; reasons are SKIP_REASONS. names: the
    first MAX_NAMES skipped samples, as "shard/key: reason: details", and damaged or missing tars, once each, as "shard:
    reason: details".
    """

    decoded_of: Counter = field(default_factory=Counter)
    skips: Counter = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    _tars: set[tuple[int, str]] = field(default_factory=set)

    @property
    def decoded(self) -> int:
        """Samples that became images."""
        return self.decoded_of.total()

    @property
    def skipped(self) -> Counter:
        """Skipped, by reason."""
        return self._skipped_by(1)

    @property
    def skipped_of(self) -> Counter:
        """Skipped, by shard."""
        return self._skipped_by(0)

    def _skipped_by(self, part: int) -> Counter:
        """Skipped, by one part of (shard, reason)."""
        found: Counter = Counter()
        for key, count in self.skips.items():
            found[key[part]] += count
        return found

    @property
    def num_skipped(self) -> int:
        """Skipped for any reason."""
        return self.skips.total()

    @property
    def read(self) -> int:
        """All samples so far."""
        return self.decoded + self.num_skipped

    def add(self, shards: list[int], skipped: list["Skipped"]) -> list["Skipped"]:
        """Enters a piece of a batch; shards: of all its samples. Returns what of `skipped` has not been named yet."""
        self.decoded_of.update(shards)
        self.decoded_of.subtract(sample.shard for sample in skipped)
        self.skips.update((sample.shard, sample.reason) for sample in skipped)
        fresh = []
        for sample in skipped:
            if sample.reason in TAR_PROBLEMS:
                if (sample.shard, sample.reason) in self._tars:
                    continue
                self._tars.add((sample.shard, sample.reason))
            fresh.append(sample)
        self.names += [sample.name for sample in fresh[: MAX_NAMES - len(self.names)]]
        return fresh


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used. name: "shard/key: reason: details"; without the key where the tar is to blame."""

    shard: int
    reason: str
    name: str


class RecentSkips:
    """Whether too much was skipped of late, of all ranks: all of them feed it the same sums.

    Of the last WINDOW_SAMPLES samples those for ROT; of the epoch under way, and of what was seen of the one before, those
    of damaged and missing tars. Starts anew with a resume, at the sums that it goes on from.
    """

    def __init__(self, of_epoch: int):
        self.of_epoch = of_epoch
        self.start(0, Counter())

    def start(self, read: int, reasons: Counter) -> None:
        """Samples read and skipped before."""
        self._marks = deque([(read, self._rotten(reasons))])
        self._epoch = read, self._lost(reasons)

    def judge(self, read: int, reasons: Counter, allowed: float) -> str | None:
        """What is too much; None: nothing is. read, reasons: sums over the whole run."""
        rotten, lost = self._rotten(reasons), self._lost(reasons)
        self._marks.append((read, rotten))
        while len(self._marks) > 2 and self._marks[1][0] <= read - WINDOW_SAMPLES:
            self._marks.popleft()
        since, before = self._marks[0]
        epoch_since, lost_before = self._epoch
        epochs = (read - 1) // self.of_epoch - epoch_since // self.of_epoch + 1  # of which something was read, since
        if epochs > 1:
            self._epoch = read, lost
        if read - since >= WINDOW_SAMPLES and rotten - before > allowed * (read - since):
            return f"{rotten - before} of the last {read - since} samples"
        if lost - lost_before > allowed * epochs * self.of_epoch:
            return f"{lost - lost_before} images of damaged or missing tars among the last {read - epoch_since} samples"
        return None

    @staticmethod
    def _rotten(reasons: Counter) -> int:
        return sum(reasons[reason] for reason in ROT)

    @staticmethod
    def _lost(reasons: Counter) -> int:
        return sum(reasons[reason] for reason in TAR_PROBLEMS)


class SkippedNames:
    """The file of one rank's skipped samples, `run/skipped/rank_00003.txt`, a line each, written as they come.

    A resumed run appends, the names of steps that it repeats once more. At most MAX_NAMES lines a run and rank: then one
    that says so, and the counts go on.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"rank_{rank:05d}.txt"
        self._append = never_stopping(self._append, str(self.path))
        self._written = len(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else 0

    def write(self, names: Sequence[str]) -> None:
        """Appends names. Where they cannot be written, that is told once, and the counts go on."""
        names = [" ".join(name.split()) for name in names[: max(0, MAX_NAMES + 1 - self._written)]]
        if not names:
            return
        if self._written + len(names) > MAX_NAMES:
            names[-1] = f"... more than {MAX_NAMES}: the rest is counted in metrics.jsonl"
        self._append(names)

    def _append(self, names: Sequence[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{name}\n" for name in names)
        self._written += len(names)


@dataclass(frozen=True)
class _Fate:
    """What became of the samples of a piece: the shards of all, and those that were skipped."""

    shards: list[int]
    skipped: list[Skipped]


@dataclass
class _Piece:
    """A part of a batch, on its way from a loader process."""

    images_uCHH: torch.Tensor
    labels_uL: torch.Tensor
    keys: list[str]
    shards: list[int]
    skipped: list[Skipped]
    error: str | None = None  # an exception would arrive wrapped in a traceback

    def pin_memory(self) -> "_Piece":
        return _Piece(
            self.images_uCHH.pin_memory(), self.labels_uL.pin_memory(), self.keys, self.shards, self.skipped, self.error
        )


def pieces_of(images: int) -> int:
    """Into how many pieces a rank's batch is cut."""
    return math.ceil(images / IMAGES_PER_PIECE)


class _Pieces(Dataset):
    """Work of the loader processes: item step * pieces + i is piece i of that step."""

    def __init__(
        self,
        config: RunConfig,
        table: ShardTable,
        plan: EpochPlan,
        image_size: int,
        start: int,
        stop: int,
        tokenizer: CaptionTokenizer | None,
        context: int,
    ):
        self.tokenizer, self.context = tokenizer, context
        self.config, self.table, self.plan, self.image_size = config, table, plan, image_size
        self.start, self.stop = start, stop
        self.pieces = pieces_of(stop - start)
        self._labels_per_row = context if table.captions else len(table.labels_infos) * config.labels_per_visit
        self._reader: ShardReader | None = None

    def __getitem__(self, item: int) -> _Piece:
        step, piece = divmod(item, self.pieces)
        size = self.stop - self.start
        first, last = (self.start + (piece + i) * size // self.pieces for i in (0, 1))
        try:
            return self._read(step, first, last)
        except UserError as error:
            problem = str(error)
        except MemoryError as error:
            problem = f"no memory to read the images of step {step + 1} ({error}). {cure_of(errno.ENOMEM)}"
        nothing = torch.empty(0)
        return _Piece(nothing, nothing, [], [], [], problem)

    def _read(self, step: int, first: int, last: int) -> _Piece:
        if self._reader is None:  # first use, in the process that will do the reading
            lanes = self.plan.lanes_of(self.start, self.stop)
            in_use = lanes * (self.plan.shuffle_window + 2 * max(self.table.counts))
            self._reader = ShardReader(self.table, memory_samples=in_use)
        size = self.image_size
        images_uCHH = np.zeros((last - first, 3, size, size), np.uint8)
        labels_uL = np.full((last - first, self._labels_per_row), NO_IMAGE, np.int64)
        piece = _Piece(torch.from_numpy(images_uCHH), torch.from_numpy(labels_uL), [""] * (last - first), [], [])
        for row, (epoch, shard, index) in enumerate(self.plan.samples(step, first, last)):
            contents = self._reader.contents(shard)
            piece.shards.append(shard)
            key = contents.key(index)
            try:
                labels = self._labels(contents, epoch, shard, index)
                data = self._reader.image_bytes(contents, index)
                generator = augmentation_generator(self.plan.seed, epoch, shard, index)
                with _naming(f"{self.table.names[shard]}/{key}"):
                    crop = decode_random_resized_crop(
                        data, self.config.max_pixels, size, self.config.crop_scale_min, self.config.flip, generator
                    )
            except (ImageError, CaptionError) as error:
                where = "" if error.reason in TAR_PROBLEMS else f"/{key}"
                name = f"{self.table.names[shard]}{where}: {error.reason}: {error}"
                piece.skipped.append(Skipped(shard, error.reason, name))
                continue
            images_uCHH[row] = crop.transpose(2, 0, 1)
            labels_uL[row] = labels
            piece.keys[row] = key
        return piece

    def _labels(self, contents: ShardContents, epoch: int, shard: int, index: int) -> np.ndarray:
        """What of an image's labels, those of all heads, takes part in this visit; or the tokens of its caption."""
        if self.table.captions:
            return self.tokenizer.encode(self._reader.caption(contents, index), self.context)
        if not contents.labelled[index]:
            raise ImageError("no_label", "a label file lacks its key")
        labels = contents.labels[index]
        if self.config.positives_drawn is None:
            return labels
        generator = positives_generator(self.plan.seed, epoch, shard, index)
        heads = labels.reshape(-1, self.config.num_positives)
        return np.concatenate([draw_positives(own, self.config.positives_drawn, generator) for own in heads])


@contextlib.contextmanager
def _naming(sample: str) -> Iterator[None]:
    """Names the sample at which the machine fails: its image may be what takes the memory."""
    try:
        yield
    except UnreadableError as error:
        raise UnreadableError(f"{sample}: {error}") from None


class _Steps:
    """Sampler over the pieces of a range of steps, which changes between iterations."""

    def __init__(self):
        self.items = range(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _start_worker(_: int) -> None:
    # The main process decides when to stop: a signal to the whole process group must not tear batches out of its hands.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # multiprocessing's own prints it and loses the batch


def _end_unsent(error: Exception, _: object) -> None:
    """Ends a loader process whose batch cannot be handed over, so that the rank does not wait for it in vain."""
    print(
        f"loader process {os.getpid()} cannot hand over what it has read: {type(error).__name__}: {error}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _close_at_exit(loader: "ImageLabelLoader") -> None:
    """Python ends leftover children with SIGTERM and waits for them; ours ignore it, so they must be told to end first.

    atexit for a main process (before torch marks the interpreter as ending), Finalize for a child of multiprocessing.
    """
    reference = weakref.ref(loader)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)
    Finalize(None, close, exitpriority=20)  # before the queues close, at 10


def _listed(reasons: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _as_it_is(piece: _Piece) -> _Piece:
    return piece


class ImageLabelLoader:
    """One rank's batches, the same for every number of ranks and loader processes.

    config: `workers` processes read `prefetch` pieces of at most IMAGES_PER_PIECE images ahead, each; also crop, flip,
    labels a visit, size and skip limits. table: from `build_shard_table`. plan: made of the table's counts; its global
    batch is split evenly over `topology`'s ranks, consecutive slots to each. image_size: H. Batches are in pinned memory
    when `topology.device` is a GPU. tokenizer, context: of a run on captions, whose tokens then stand in the labels' place.
    `ledger` counts what came out of `iterate` and what was skipped; skipped_folder: where the names of the skipped are
    written, see `SkippedNames`, and at the end `by_shard.json`, the sums of every tar.
    Raises ConfigError when the global batch cannot be split.
    """

    def __init__(
        self,
        config: RunConfig,
        table: ShardTable,
        plan: EpochPlan,
        image_size: int,
        topology: Topology,
        skipped_folder: Path | None = None,
        tokenizer: CaptionTokenizer | None = None,
        context: int = 0,
    ) -> None:
        if plan.global_batch % topology.world_size:
            raise ConfigError(
                f"a global batch of {plan.global_batch} cannot be split over {topology.world_size} ranks: change "
                "train_batch_size in the DeepSpeed JSON, or the number of ranks"
            )
        self._topology = topology
        self.images_per_rank = plan.global_batch // topology.world_size
        self.max_skipped_fraction = config.max_skipped_fraction
        self.ledger = Ledger()
        self._recent = RecentSkips(table.num_samples)
        self._quarantined = {shard for shard, _, _ in table.quarantined}
        self._skipped_folder = skipped_folder
        self._names = None if skipped_folder is None else SkippedNames(skipped_folder, topology.rank)
        start = topology.rank * self.images_per_rank
        slots = start, start + self.images_per_rank
        self._dataset = _Pieces(config, table, plan, image_size, *slots, tokenizer, context)
        self._steps = _Steps()
        self._pinned = topology.device.type == "cuda"
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._steps,
            collate_fn=_as_it_is,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            persistent_workers=config.workers > 0,
            pin_memory=self._pinned,
            worker_init_fn=_start_worker,
            # Its own generator: else every iteration would draw a number from torch's global one.
            generator=torch.Generator(),
        )
        if config.workers:
            _close_at_exit(self)

    def iterate(self, start_step: int, stop_step: int, ahead: int = 0) -> Iterator[ImageLabelBatch]:
        """This rank's batches of the steps `start_step`..`stop_step`, one a step, B rows each. Calls no collective.

        ahead: batches that the caller holds before it uses them: the ledger is that of the others, and of all at the end.
        A sample that cannot be used keeps its slot: a zero image, a row of NO_IMAGE, the key "".
        That goes for all samples of a tar that breaks or vanishes, too. Raises DataError when a tar or label file became
        another since the start, a label file broke, or a loader process died.
        """
        pieces = self._dataset.pieces
        self._steps.items = range(start_step * pieces, stop_step * pieces)
        # Garbage is collected here rather than in the loader processes: a process group among it would wait there, without
        # end, for threads that a forked process does not have.
        gc.collect()
        arriving = iter(self._loader)
        held: deque[list[_Fate]] = deque()
        for step in range(start_step, stop_step):
            parts = [self._next(arriving, step) for _ in range(pieces)]
            held.append([_Fate(part.shards, part.skipped) for part in parts])
            if len(held) > ahead:
                self._enter(held.popleft())
            yield self._assemble(parts)
        while held:
            self._enter(held.popleft())

    def _enter(self, fates: Sequence[_Fate]) -> None:
        """Counts and names what became of the samples of a batch; tells of tars that were whole at the start."""
        fresh = [sample for fate in fates for sample in self.ledger.add(fate.shards, fate.skipped)]
        if self._names is not None:
            self._names.write([sample.name for sample in fresh])
        for sample in fresh:
            if sample.reason in TAR_PROBLEMS and sample.shard not in self._quarantined:
                print(f"WARNING: the images of a tar are lost, skipped and counted: {sample.name}", flush=True)

    def check_skipped(self, final: bool) -> tuple[int, int]:
        """(decoded, skipped) of all ranks so far; see `count_skipped`."""
        decoded, skipped = self.count_skipped(final)
        return decoded, skipped.total()

    def count_skipped(self, final: bool) -> tuple[int, Counter]:
        """(decoded, skipped by reason) of all ranks so far. All ranks call it together: one all-reduce of a few numbers.

        When `final`, one all-reduce of the sums per tar more.
        Raises DataError, on every rank, with counts by reason and examples, when more than `max_skipped_fraction` were
        skipped, in all or of late (`RecentSkips`); judged from MIN_SAMPLES_TO_JUDGE samples on, or when `final`. Those of
        damaged and missing tars, which come many in a row, may be that share of every epoch begun.
        """
        own = [self.ledger.decoded, *(self.ledger.skipped[reason] for reason in SKIP_REASONS)]
        if final and self._skipped_folder is not None:
            self._write_shards(self._skipped_folder / "by_shard.json")
        decoded, *numbers = sum_(torch.tensor(own, device=self._topology.device), self._topology).tolist()
        reasons = Counter({reason: count for reason, count in zip(SKIP_REASONS, numbers, strict=True) if count})
        skipped = reasons.total()
        read = decoded + skipped
        of_tars = sum(reasons[reason] for reason in TAR_PROBLEMS)
        too_many = skipped - of_tars > self.max_skipped_fraction * read
        of_epoch = self._dataset.table.num_samples
        too_many |= skipped > self.max_skipped_fraction * math.ceil(read / of_epoch) * of_epoch
        recent = self._recent.judge(read, reasons, self.max_skipped_fraction)
        if (too_many or recent) and (final or read >= MIN_SAMPLES_TO_JUDGE):
            names = [name for own in gather_objects(self.ledger.names[:3], self._topology) for name in own]
            examples = f"E.g. {'; '.join(names[:3])}. " if names else ""  # none since a resume: the counts are older
            late = f", {recent}" if recent and not too_many else ""
            allowed = f"--max_skipped_fraction {self.max_skipped_fraction:g}"
            raise DataError(
                f"{skipped} of {read} samples could not be used{late} ({_listed(reasons)}), more than {allowed} allows. "
                f"{examples}Mend or remove these samples, or raise the fraction."
            )
        return decoded, reasons

    def _write_shards(self, path: Path) -> None:
        """Rank 0 writes, of every tar: its images, and how often one was decoded and skipped, for which reasons."""
        sums = self._summed()
        if not self._topology.is_main:
            return
        table = self._dataset.table
        found = {}
        for name, count, (decoded, *skips) in zip(table.names, table.counts, sums.tolist(), strict=True):
            reasons = {reason: number for reason, number in zip(SKIP_REASONS, skips, strict=True) if number}
            found[name] = {"images": count, "decoded": decoded, "skipped": sum(skips), **reasons}

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)

        never_stopping(write, str(path))()  # the last checkpoint is yet to be saved

    def _summed(self) -> torch.Tensor:
        """int64 [tars, 1 + reasons], of all ranks: decoded, and skipped for each of SKIP_REASONS. One all-reduce."""
        sums = np.zeros((len(self._dataset.table.names), 1 + len(SKIP_REASONS)), np.int64)
        for shard, count in self.ledger.decoded_of.items():
            sums[shard, 0] = count
        for (shard, reason), count in self.ledger.skips.items():
            sums[shard, 1 + SKIP_REASONS.index(reason)] = count
        return sum_(torch.from_numpy(sums).to(self._topology.device), self._topology).cpu()

    def totals(self) -> dict:
        """The ledger of all ranks, for a checkpoint: {"columns", "shards": {name: a number for each column}}. Every rank
        calls it: one all-reduce of a few numbers per tar.
        """
        sums = self._summed()
        used = sums.any(dim=1).nonzero()[:, 0].tolist()
        names = self._dataset.table.names
        return {"columns": ["decoded", *SKIP_REASONS], "shards": {names[i]: sums[i].tolist() for i in used}}

    def go_on_from(self, totals: dict) -> None:
        """Takes over the `totals` of a checkpoint, whatever number of ranks made them; of tars that are listed still."""
        number = {name: i for i, name in enumerate(self._dataset.table.names)}
        before = {
            number[name]: dict(zip(totals["columns"], counts, strict=True))
            for name, counts in totals["shards"].items()
            if name in number
        }
        sums: Counter = Counter()
        for counts in before.values():
            sums.update(counts)
        self._recent.start(sums.total(), sums)
        if not self._topology.is_main:  # all sums are over all ranks
            return
        for shard, counts in before.items():
            for column, count in counts.items():
                if column == "decoded":
                    self.ledger.decoded_of[shard] += count
                elif count:
                    self.ledger.skips[shard, column] += count

    def close(self) -> None:
        """Ends the loader processes; `iterate` would start new ones."""
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
            self._loader._iterator = None

    def _next(self, arriving: Iterator[_Piece], step: int) -> _Piece:
        try:
            piece = next(arriving)
        except RuntimeError as error:
            if "Too many open files" in str(error):  # torch's word for it: batches come as open files
                raise DataError(
                    f"too many open files while step {step + 1} was waited for. {too_many_files()}"
                ) from None
            # torch's words for a death; an exception of a loader process begins with "Caught", and keeps its traceback.
            if not re.match(r"DataLoader worker \(pid.*(exited|killed)", str(error), re.DOTALL):
                raise
            data = self._dataset
            shards = {shard for _, shard, _ in data.plan.samples(step, data.start, data.stop)}
            names = [data.table.names[shard] for shard in sorted(shards)]
            raise DataError(
                f"a loader process died ({str(error).splitlines()[0]}) while step {step + 1} was waited for, whose images "
                f"are in the tars {', '.join(names[:3])}{', ...' if names[3:] else ''}. If it printed nothing above, out "
                "of memory is the usual cause: use fewer --workers or less --prefetch, and see that /dev/shm is large "
                "enough; then --resume auto."
            ) from None
        if piece.error is not None:
            raise DataError(piece.error)
        return piece

    def _assemble(self, parts: list[_Piece]) -> ImageLabelBatch:
        if len(parts) == 1:
            return ImageLabelBatch(parts[0].images_uCHH, parts[0].labels_uL, tuple(parts[0].keys))
        shape = (self.images_per_rank, *parts[0].images_uCHH.shape[1:])
        images_BCHH = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        torch.cat([part.images_uCHH for part in parts], out=images_BCHH)
        labels_BL = torch.empty(
            (self.images_per_rank, parts[0].labels_uL.shape[1]), dtype=torch.int64, pin_memory=self._pinned
        )
        torch.cat([part.labels_uL for part in parts], out=labels_BL)
        return ImageLabelBatch(images_BCHH, labels_BL, tuple(key for part in parts for key in part.keys))
