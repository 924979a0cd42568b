"""Faults of real runs on two ranks, forked from one process that has imported everything: see test_reliability.py.

Writes what became of each into a JSON. Runs that only wait are looked at together, in the end.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from mlcd_ds import checkpoint, engine, soak, train
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.engine import TrainEngine
from mlcd_ds.files import write_json

RANKS, STEPS, LIMIT_SECONDS = 2, 10_000, 240
SCENES: list = []
CASE = soak.Case(zero_stage=1, workers=1, accumulation=1)


class Scene:
    """One run and what is done to it."""

    def __init__(self, folder: Path, name: str, before=lambda rank: None, steps: int = STEPS, run: str = "", **flags):
        self.name, self.run = name, folder / (run or name)
        SCENES.append(self)
        arguments = CASE.arguments(folder, self.run, steps, RANKS)
        changed = {f"--{flag}": value for flag, value in flags.items()}
        arguments = [item for item in arguments if item.split("=")[0] not in changed]
        arguments += [f"{flag}={value}" for flag, value in changed.items()]
        self.ranks = soak.ForkedRanks(arguments, RANKS, folder / "logs" / name, before)
        self.acted = time.monotonic()

    def wait_for(self, words: str, rank: int = 0) -> "Scene":
        """Until a rank has printed `words`."""
        if not self.ranks.wait(LIMIT_SECONDS, until=lambda: words in self.ranks.output(rank)):
            raise AssertionError(f"{self.name}: {words!r} never came: {self.ranks.output(rank)[-2000:]}")
        return self

    def send(self, number: int, *ranks: int) -> "Scene":
        """A signal to these ranks."""
        for rank in ranks:
            self.ranks.signal(rank, number)
        self.acted = time.monotonic()
        return self

    def end(self) -> dict:
        """What became of it."""
        finished = self.ranks.wait(LIMIT_SECONDS)
        seconds = {rank: at - self.acted for rank, at in self.ranks.ended_at.items()}
        self.ranks.kill()
        folder = self.run / "checkpoints"
        found = checkpoint.published(folder)
        for path in found[-1:]:
            checkpoint.verify(path)
        status = self.run / "status.json"
        skipped = {path.name: path.read_text() for path in sorted((self.run / "skipped").glob("*"))}
        lines = (self.run / "metrics.jsonl").read_text().splitlines() if (self.run / "metrics.jsonl").exists() else []
        return {
            "finished": finished,
            "codes": [self.ranks.codes[rank] for rank in range(RANKS)],
            "seconds": [seconds.get(rank) for rank in range(RANKS)],
            "output": [self.ranks.output(rank)[-6000:] for rank in range(RANKS)],
            "status": json.loads(status.read_text()) if status.exists() else None,
            "checkpoints": [checkpoint.step_of(path) for path in found],
            "leftovers": [path.name for path in folder.glob("*.tmp")],
            "skipped": skipped,
            "metrics": [json.loads(line) for line in lines],
        }


def signal_in_a_save(rank: int) -> None:
    """Rank 1 gets SIGUSR1 while it writes its part of the second checkpoint."""
    save_rows, calls = checkpoint.save_rows, 0

    def slow(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)
        save_rows(*arguments)

    if rank == 1:
        checkpoint.save_rows = slow


def signal_while_starting(rank: int) -> None:
    """Every rank gets SIGTERM before it has built its engine."""
    build_engine = train.build_engine

    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return build_engine(*arguments, **options)

    train.build_engine = signalled


def stuck_step(rank: int) -> None:
    """Step 3 never ends on rank 0: nothing hears a wish to stop."""
    train_step = TrainEngine.train_step

    def stuck(self, batch, step, **options):
        if step == 3 and rank == 0:
            print("stuck", flush=True)
            time.sleep(10_000)
        return train_step(self, batch, step, **options)

    TrainEngine.train_step = stuck


def stuck_reader(rank: int) -> None:
    """The data of the fifth step never come on rank 1."""
    iterate = ImageLabelLoader.iterate

    def stuck(self, *arguments, **options):
        for index, batch in enumerate(iterate(self, *arguments, **options)):
            if index == 4 and rank == 1:
                time.sleep(10_000)
            yield batch

    ImageLabelLoader.iterate = stuck


def failing_disk(rank: int) -> None:
    """Saves 2 and 3 fail, 4 is written; 5, 6 and 7 fail: at each on one rank, in another place.

    Rank 1's disk is full by a limit on the size of files, as torch, DeepSpeed and safetensors meet it.
    """
    torch_save, save_rows, mkdir, now = torch.save, checkpoint.save_rows, Path.mkdir, 0
    write = checkpoint.CheckpointStore.write

    def counted(store, step, function):
        nonlocal now
        now = step // 2
        return write(store, step, function)

    def limited(function, saves):
        def call(*arguments, **options):
            if now not in saves:
                return function(*arguments, **options)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
            try:
                return function(*arguments, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        return call

    def refusing(function, saves):
        def call(*arguments, **options):
            if now in saves:
                raise OSError(30, "Read-only file system")
            return function(*arguments, **options)

        return call

    checkpoint.CheckpointStore.write = counted
    if rank == 1:
        engine.torch.save = limited(torch_save, (2, 6))
        checkpoint.save_rows = limited(save_rows, (3,))
    else:
        Path.mkdir = refusing(mkdir, (5,))
        checkpoint.sync_file = refusing(checkpoint.sync_file, (7,))


def slow_save(rank: int) -> None:
    """Rank 1 takes longer over its first save than --timeout_minutes."""
    save_rows, seconds = checkpoint.save_rows, iter((15.0,))

    def slow(*arguments):
        if rank == 1:
            time.sleep(next(seconds, 0.0))
        save_rows(*arguments)

    checkpoint.save_rows = slow


def tar_is_cut(tar: Path):
    """A tar loses its end in the third step; in the seventh, the job is killed."""

    def before(rank: int) -> None:
        train_step = TrainEngine.train_step

        def cut(self, batch, step, **options):
            if step == 2 and rank == 0:
                os.truncate(tar, 3000)
            if step == 6:
                os._exit(9)
            return train_step(self, batch, step, **options)

        TrainEngine.train_step = cut

    return before


def bad_numbers(rank: int) -> None:
    """Rank 1's embeddings are no numbers in steps 3 and 4, and from step 8 on."""
    train_step = TrainEngine.train_step

    def bad(self, batch, step, **options):
        handle = None
        if rank == 1 and (step + 1 in (3, 4) or step + 1 >= 8):
            patch = self.engine.module.embeddings.patch
            handle = patch.register_forward_hook(lambda module, inputs, output: output * torch.nan)
        try:
            return train_step(self, batch, step, **options)
        finally:
            if handle is not None:
                handle.remove()

    TrainEngine.train_step = bad


def full_log(rank: int) -> None:
    """From step 3 on rank 0 can write no line of metrics."""
    from mlcd_ds.monitor import Monitor

    write_line = Monitor._write_line

    def full(self, line):
        if '"step": 2,' in line:
            raise OSError(28, "No space left on device")
        write_line(self, line)

    Monitor._write_line = full


def main(folder: Path) -> None:
    soak.make_data(folder)
    soak.import_ahead()
    found = {}
    short = {"timeout_minutes": 0.2, "start_timeout_minutes": 1, "warn_data_wait_seconds": 2}
    # Those that wait for a timeout go first, and are looked at last.
    frozen = Scene(folder, "frozen", **short).wait_for("step 3/").send(signal.SIGSTOP, 1)
    reader = Scene(folder, "reader", stuck_reader, **short).wait_for("step 3/")
    slow = Scene(folder, "slow", slow_save, steps=4, timeout_minutes=0.2)
    twice = Scene(folder, "twice", stuck_step).wait_for("stuck").send(signal.SIGTERM, 0)
    twice_at = time.monotonic()
    found["term"] = Scene(folder, "term").wait_for("step 3/").send(signal.SIGTERM, 1).end()
    if time.monotonic() - twice_at < 1.5:
        time.sleep(1.5)
    twice.send(signal.SIGTERM, 0)
    found["int"] = Scene(folder, "int", save_every_steps=1000).wait_for("step 3/").send(signal.SIGINT, 0, 1).end()
    found["usr1"] = Scene(folder, "usr1", signal_in_a_save).end()
    found["starting"] = Scene(folder, "starting", signal_while_starting).end()
    found["killed"] = Scene(folder, "killed").wait_for("step 3/").send(signal.SIGKILL, 0).end()
    found["disk"] = Scene(folder, "disk", failing_disk, steps=40, keep_last=10).end()
    found["numbers"] = Scene(folder, "numbers", bad_numbers, max_bad_steps=3).end()
    found["log"] = Scene(folder, "log", full_log, steps=6, save_every_steps=1, keep_last=1, keep_every=2).end()
    tars = shutil.copytree(folder / "tars", folder / "cut_tars")
    cut = {"shards": f"{tars}/{{00000..00001}}.tar", "steps": 12, "max_skipped_fraction": 1}
    found["cut"] = Scene(folder, "cut", tar_is_cut(tars / "00001.tar"), **cut).end()
    found["cut, resumed"] = Scene(folder, "cut_resumed", run="cut", **cut).end()
    found["twice"], found["reader"], found["slow"] = twice.end(), reader.end(), slow.end()
    frozen.ranks.wait(LIMIT_SECONDS, until=lambda: 0 in frozen.ranks.codes)
    frozen.ranks.signal(1, signal.SIGCONT)
    found["frozen"] = frozen.end()
    write_json(folder / "found.json", found)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    finally:
        for scene in SCENES:
            scene.ranks.kill()
