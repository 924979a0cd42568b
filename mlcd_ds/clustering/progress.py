"""The progress bar of a job that many ranks share, on rank 0: what the others do is seen through the files they finish.

No rank sends anything. A thread of rank 0 lists the output folder now and then, never for more than a fiftieth of the time;
files that an earlier start or another job has finished count as done.
"""

import os
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from mlcd_ds.topology import Topology

PERIOD_SECONDS = 1.0
SHARE_OF_TIME = 0.02


class FolderProgress:
    """A bar in images. Use it as a context; on other ranks than 0 it does nothing.

    folder: where a shard's file appears when it is finished. files: file name to shard, of all shards of the job.
    images_of: how many images a finished shard has. total: images of the whole job; None: estimated from finished shards.
    """

    def __init__(
        self,
        description: str,
        topology: Topology,
        folder: Path,
        files: dict[str, str],
        images_of: Callable[[str], int],
        total: int | None = None,
    ):
        self.topology, self.folder, self.files, self.images_of, self.total = topology, folder, files, images_of, total
        self.finished: set[str] = set()
        self.images = 0  # of finished shards
        self.own = self.own_unfinished = 0  # images of this rank since the start, and those of its unfinished shard
        self._description = description
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> "FolderProgress":
        self.started = time.monotonic()
        if self.topology.is_main:
            self._find_finished()
            self.images_before, self.shards_before = self.images, len(self.finished)
            self._bar = tqdm(
                desc=self._description,
                total=self.total or 0,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:,}/{total:,} images [{elapsed}{postfix}]",
            )
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if self.topology.is_main:
            self._stop.set()
            self._thread.join()
            if kind is None:
                self.look()
            self._bar.close()

    def add(self, images: int) -> None:
        """So many more images of this rank's unfinished shard."""
        with self._lock:
            self.own += images
            self.own_unfinished += images

    def finish(self) -> None:
        """This rank's shard is on the disk."""
        with self._lock:
            self.own_unfinished = 0

    def look(self) -> None:
        """Reads the folder and redraws the bar."""
        self._find_finished()
        rate, total, done = self.rate(), self.estimated_total(), self.images + self.own_unfinished
        self._bar.total, self._bar.n = total, min(done, total)
        left = "" if not rate else f", left {timedelta(seconds=round(max(0, total - done) / rate))}"
        self._bar.set_postfix_str(
            f"{rate:,.0f} images/s on {self.topology.world_size} rank(s), {len(self.finished):,}/{len(self.files):,} "
            f"shards{left}"
        )

    def rate(self) -> float:
        """Images per second of all ranks since the start; that of this rank times the ranks until each can have
        finished a shard."""
        taken = max(time.monotonic() - self.started, 1e-9)
        if len(self.finished) - self.shards_before < self.topology.world_size:
            return self.own * self.topology.world_size / taken
        return (self.images - self.images_before + self.own_unfinished) / taken

    def estimated_total(self) -> int:
        """Images of the whole job."""
        if self.total is not None:
            return self.total
        if len(self.finished) == len(self.files):
            return self.images
        mean = self.images / len(self.finished) if self.finished else self.own_unfinished
        return max(round(mean * len(self.files)), self.images + self.own_unfinished)

    def _watch(self) -> None:
        pause = PERIOD_SECONDS
        while not self._stop.wait(pause):
            started = time.monotonic()
            self.look()
            pause = max(PERIOD_SECONDS, (time.monotonic() - started) / SHARE_OF_TIME)

    def _find_finished(self) -> None:
        for name in _names(self.folder):
            shard = self.files.get(name)
            if shard is not None and shard not in self.finished:
                self.images += self.images_of(shard)
                self.finished.add(shard)


def _names(folder: Path) -> Collection[str]:
    if not folder.is_dir():
        return ()
    with os.scandir(folder) as entries:  # names alone: no object and no stat for each of 40,000 files
        return [entry.name for entry in entries]
