"""Kills training runs at random moments and compares what becomes of them with runs that were left alone.

A run's ranks are forked from this process, which has imported everything already and started no thread: a start costs a
second instead of an import of torch and DeepSpeed. What is killed is killed by SIGKILL, at a random time, at a random
step or inside a save; then the run is started again, unaided, until it ends.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mlcd_ds import checkpoint, cli, engine
from mlcd_ds.config import KillsConfig, RunConfig
from mlcd_ds.data.labels import LabelsInfo, label_path, write_label_shard
from mlcd_ds.data.tars import write_tar
from mlcd_ds.engine import TrainEngine
from mlcd_ds.files import write_json
from mlcd_ds.topology import Topology
from mlcd_ds.train import train

CLASSES, POSITIVES, IMAGE_SIZE, SAVE_EVERY = 50, 8, 16, 2
CHANGING = ("time", "samples_per_second", "mfu", "data_wait_fraction", "memory_gb")
"""Of a line of metrics.jsonl: what two equal runs need not share."""

SAVE_POINTS = (
    "deepspeed",
    "rows",
    "tensors",
    "encoder",
    "json",
    "sync_file",
    "hash",
    "sync_folder",
    "rename",
    "latest",
)
"""Where a save can be killed: before, in the middle of, and after writing of these."""


IMPORTED_ON_THE_WAY = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
    "pyarrow.dataset",
)
ONLY_ON_RANK_0 = ("deepspeed", "encoder", "json", "sync_folder", "rename", "latest")


class SoakError(Exception):
    """A killed run did not come to its end, or to another one than its undisturbed twin."""


def import_ahead() -> None:
    """Imports what a start of train.py would import on its way: torch's compiler, most of a start's time."""
    for name in IMPORTED_ON_THE_WAY:
        with contextlib.suppress(ImportError):  # of another version of DeepSpeed or torch
            importlib.import_module(name)
    ops = importlib.import_module("deepspeed.ops")
    getattr(ops, "__compatible_ops__", None)  # tried out with a compiler when first asked for, then kept


class ForkedRanks:
    """The ranks of one start of train.py, forked from here.

    arguments: of the command line. logs: a file each, rank0.log ... before: called in each rank with its number before it
    begins. Call it in a process without threads.
    """

    def __init__(
        self, arguments: Sequence[str], world_size: int, logs: Path, before: Callable[[int], object] = lambda rank: None
    ):
        logs.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.logs = [logs / f"rank{rank}.log" for rank in range(world_size)]
        for log in self.logs:
            log.write_bytes(b"")
        self.processes = [self._fork(list(arguments), rank, world_size, port, before) for rank in range(world_size)]
        self.codes: dict[int, int] = {}
        """{rank: exit code, negative where a signal ended it} of those that have ended."""
        self.ended_at: dict[int, float] = {}

    def _fork(self, arguments, rank: int, world_size: int, port: int, before) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        try:
            with self.logs[rank].open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            Topology.enter_rank(rank, world_size, port)
            torch.set_num_threads(1)
            with cli.ending_in_one_message():
                before(rank)
                train(cli.build(RunConfig, cli.parse_flags(arguments, RunConfig)))
            sys.stdout.flush()
            os._exit(0)
        finally:  # whatever happens, this process must not go on as its parent
            os._exit(1)

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.logs[rank].read_text(errors="replace")

    def signal(self, rank: int, number: int) -> None:
        """Sends a rank a signal, if it lives."""
        if rank not in self.codes:
            os.kill(self.processes[rank], number)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.ended_at[rank] = time.monotonic()
        return len(self.codes) == len(self.processes)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all have ended, or `until()` holds. False where neither came within `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if until():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        """Ends all that live, and waits for them."""
        for rank in range(len(self.processes)):
            self.poll()
            self.signal(rank, signal.SIGKILL)
        self.wait(60)


@dataclass(frozen=True)
class Kill:
    """A moment at which a rank is killed.

    how: "time" (after `at` seconds), "step" (of this number; `phase` before, inside, after) or one of SAVE_POINTS (its
    `at`-th call; `phase` before, inside: half a file, after). survivors: what becomes of the other ranks: "killed" at once
    too, as when a machine dies, or "left" to notice by themselves.
    """

    rank: int
    how: str
    at: float
    phase: str
    survivors: str

    @staticmethod
    def draw(generator: random.Random, world_size: int, first_step: int, steps: int, seconds: float) -> "Kill":
        """A random one. first_step: of the attempt. steps, seconds: how long an undisturbed run is."""
        kind = generator.random()
        if kind < 0.25:
            how, at = "time", round(generator.uniform(0, 0.7 * seconds), 3)
        elif kind < 0.5:
            how, at = "step", generator.randrange(first_step, steps)
        else:
            how, at = generator.choice(SAVE_POINTS), generator.randint(1, max(1, (steps - first_step) // SAVE_EVERY))
        survivors = "left" if generator.random() < 0.1 else "killed"
        rank = 0 if how in ONLY_ON_RANK_0 else generator.randrange(world_size)
        return Kill(rank, how, at, generator.choice(("before", "inside", "after")), survivors)

    def arm(self, rank: int) -> None:
        """Prepares this process, where it is the rank to be killed."""
        if rank != self.rank or self.how == "time":
            return
        if self.how == "step":
            self._arm_step()
            return
        owner, name = {
            "deepspeed": (engine.torch, "save"),
            "rows": (checkpoint, "save_rows"),
            "tensors": (engine, "save_tensors"),
            "encoder": (checkpoint, "save_encoder"),
            "json": (checkpoint, "write_json"),
            "sync_file": (checkpoint, "sync_file"),
            "hash": (checkpoint, "sha256"),
            "sync_folder": (checkpoint, "sync_folder"),
            "rename": (Path, "rename"),
            "latest": (checkpoint, "write_text"),
        }[self.how]
        original, calls = getattr(owner, name), 0

        def dying(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls != self.at:
                return original(*arguments, **options)
            if self.phase == "before":
                die()
            original(*arguments, **options)
            if self.phase == "inside":
                _cut_newest_file(arguments)
            die()

        setattr(owner, name, dying)

    def _arm_step(self) -> None:
        train_step, step_head, now = TrainEngine.train_step, TrainEngine._step_head, -1

        def dying_step(engine, batch, step, **options):
            nonlocal now
            now = step
            if step == self.at and self.phase == "before":
                die()
            result = train_step(engine, batch, step, **options)
            if step == self.at:
                die()
            return result

        def dying_head(*arguments):
            if now == self.at and self.phase == "inside":
                die()  # the encoder has moved, the head has not
            return step_head(*arguments)

        TrainEngine.train_step, TrainEngine._step_head = dying_step, dying_head


def die() -> None:
    """Ends this process by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def _cut_newest_file(arguments: tuple) -> None:
    """Halves the file that the call wrote, as an interrupted write would: a staged one, never one published."""
    paths = [Path(argument) for argument in arguments if isinstance(argument, (str, Path))]
    found = [path for path in paths if path.is_file()]
    found += [file for path in paths if path.is_dir() for file in path.rglob("*") if file.is_file()]
    found = [path for path in found if any(part.endswith(".tmp") for part in path.parts)]
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)


@dataclass(frozen=True)
class Case:
    """One kind of run that is killed."""

    zero_stage: int
    workers: int
    accumulation: int

    @property
    def name(self) -> str:
        return f"zero{self.zero_stage}_workers{self.workers}_accumulation{self.accumulation}"

    def arguments(self, folder: Path, run: Path, steps: int, ranks: int) -> list[str]:
        """The command line; writes the JSON beside the data."""
        micro_batch = 4
        path = folder / f"{self.name}.json"
        json_file = {
            "train_batch_size": micro_batch * self.accumulation * ranks,
            "train_micro_batch_size_per_gpu": micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
            },
            "zero_optimization": {
                "stage": self.zero_stage, "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000,
            },
        }  # fmt: skip
        write_json(path, json_file)
        values = {
            "deepspeed_config": path, "shards": folder / "tars" / "{00000..00001}.tar", "labels": folder / "labels",
            "model": "vit_toy", "image_size": IMAGE_SIZE, "output_dir": run, "steps": steps, "workers": self.workers,
            "prefetch": 1, "save_every_steps": SAVE_EVERY, "keep_last": 2, "log_every_steps": 1,
            "histogram_every_steps": 100, "sample_rate": 0.3, "timeout_minutes": 2, "start_timeout_minutes": 2,
            "resume": "auto", "peak_tflops": 1,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items()]


def make_data(folder: Path, images: int = 45) -> None:
    """Two tars of random pictures and their labels; an odd number, so that epochs end inside batches."""
    info = LabelsInfo(CLASSES, POSITIVES, "soak", "random")
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        generator = np.random.default_rng(shard)
        keys = [f"{shard:05d}{row:04d}" for row in range(images + shard)]
        samples = []
        for key in keys:
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            samples.append((key, {"jpg": buffer.getvalue()}))
        write_tar(folder / "tars" / f"{shard:05d}.tar", samples)
        labels = np.stack([generator.permutation(CLASSES)[:POSITIVES] for _ in keys])
        cosines = np.sort(generator.random(labels.shape))[:, ::-1]
        write_label_shard(label_path(folder / "labels", f"{shard:05d}"), keys, labels, cosines, info)


def fingerprint(run: Path) -> dict[str, object]:
    """What a finished run was: each step's line (keys of its images, loss, norms, learning rate), and its last weights.

    Losses are compared bit for bit: JSON holds every digit of a float64.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {
        f"step {line['step']}": {name: value for name, value in line.items() if name not in CHANGING} for line in lines
    }
    last = checkpoint.published(run / "checkpoints")[-1]
    for path in sorted(last.rglob("*.safetensors")):
        tensors = load_file(path)
        digest = {name: sha256_of(tensors[name]) for name in sorted(tensors)}
        found[str(path.relative_to(last))] = digest
    return found


def sha256_of(tensor: torch.Tensor) -> str:
    """Hexadecimal digest of its bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def kills(config: KillsConfig) -> dict[str, object]:
    """Kills runs `config.kills` times; the counts, also printed and written as JSON where asked.

    Raises SoakError when a run did not resume unaided or ended otherwise than its undisturbed twin.
    """
    generator = random.Random(config.seed)
    folder = Path(config.output_dir)
    make_data(folder)
    import_ahead()
    cases = [Case(s, w, a) for s in config.zero_stages for w in config.workers for a in config.accumulations]
    for leftover in folder.glob("whole_*"):
        shutil.rmtree(leftover)  # of another version of this program
    done: Counter = Counter()
    trouble: list[str] = []
    started = time.monotonic()
    while done["kills"] < config.kills and (config.hours is None or time.monotonic() - started < config.hours * 3600):
        for case in cases:
            if done["kills"] < config.kills:
                _kill_case(case, config, generator, folder, done, trouble)
                say = f"{done['kills']}/{config.kills} kills, {done['runs']} runs equal to their undisturbed twins"
                print(f"{say}, {len(trouble)} not ({time.monotonic() - started:.0f} s) | {case.name}", flush=True)
    result = {**done, "trouble": trouble, "seconds": round(time.monotonic() - started), "seed": config.seed}
    if config.output is not None:
        write_json(Path(config.output), result)
    kinds = {name: count for name, count in sorted(done.items()) if name not in ("kills", "runs", "after the end")}
    by_kind = ", ".join(f"{count} {name}" for name, count in kinds.items())
    late = f"; {done['after the end']} more hit a run that was done" if done["after the end"] else ""
    said = f"{done['runs']} runs ended as their undisturbed twins, {len(trouble)} not"
    print(f"{done['kills']} kills ({by_kind}){late}; {said}")
    if trouble:
        raise SoakError("; ".join(trouble[:5]))
    return result


def _kill_case(case: Case, config: KillsConfig, generator, folder: Path, done: Counter, trouble: list[str]) -> None:
    """One run, killed up to config.kills_per_run times and then left to end."""
    whole, run, logs = folder / f"whole_{case.name}", folder / "run", folder / "logs"
    if not (whole / "fingerprint.json").exists():
        started = time.monotonic()
        ranks = ForkedRanks(case.arguments(folder, whole, config.steps, config.ranks), config.ranks, logs)
        if not ranks.wait(600) or set(ranks.codes.values()) != {0}:
            ranks.kill()
            raise SoakError(f"the undisturbed run of {case.name} failed:\n{ranks.output(0)[-2000:]}")
        facts = {"seconds": time.monotonic() - started, "fingerprint": fingerprint(whole)}
        write_json(whole / "fingerprint.json", facts)
    facts = json.loads((whole / "fingerprint.json").read_text())
    shutil.rmtree(run, ignore_errors=True)
    arguments = case.arguments(folder, run, config.steps, config.ranks)
    story, left = [], min(config.kills_per_run, config.kills - done["kills"])
    while True:
        found = checkpoint.published(run / "checkpoints")
        first_step = min(checkpoint.step_of(found[-1]) if found else 0, config.steps - 1)
        kill = Kill.draw(generator, config.ranks, first_step, config.steps, facts["seconds"]) if left else None
        story.append(str(kill))
        ranks = ForkedRanks(arguments, config.ranks, logs, kill.arm if kill else lambda rank: None)
        killed = _disturb(ranks, kill) if kill else ranks.wait(600) and False
        codes = [ranks.codes.get(rank) for rank in range(config.ranks)]
        if killed and _is_done(run):
            done["after the end"] += 1  # rank 0 had published the last step and left: nothing to be lost, not a kill
            ranks.kill()
        elif killed:
            left -= 1
            done["kills"] += 1
            print(f"kill {done['kills']}/{config.kills}: {case.name}, {kill}", flush=True)
            done["at a random time" if kill.how == "time" else f"in a {'step' if kill.how == 'step' else 'save'}"] += 1
            if kill.survivors == "left":
                done["survivors left to themselves"] += 1
                if 0 in codes or None in codes:
                    trouble.append(f"{case.name}: after {kill} the ranks ended with {codes}")
            ranks.kill()
        elif codes != [0] * config.ranks:
            ranks.kill()
            text = "\n".join(ranks.output(rank)[-1500:] for rank in range(config.ranks))
            trouble.append(f"{case.name}: ended with {codes} after {'; '.join(story)}: {text}")
            return
        else:
            break  # it has come to its end, perhaps before the moment that was drawn
    found = fingerprint(run)
    wrong = [
        name for name in facts["fingerprint"].keys() | found.keys() if facts["fingerprint"].get(name) != found.get(name)
    ]
    if wrong:
        trouble.append(f"{case.name}: differs in {sorted(wrong)[:4]} after {'; '.join(story)}")
    else:
        done["runs"] += 1


def _is_done(run: Path) -> bool:
    path = run / "status.json"
    return path.exists() and json.loads(path.read_text())["state"] == "done"


def _disturb(ranks: ForkedRanks, kill: Kill) -> bool:
    """Lets a kill happen; False where the run ended before it came. Ends the other ranks, or lets them notice."""
    if kill.how == "time":
        ranks.wait(kill.at)
        if ranks.poll():
            return False
        ranks.signal(kill.rank, signal.SIGKILL)
    ranks.wait(600, until=lambda: kill.rank in ranks.codes)
    if ranks.codes.get(kill.rank) != -signal.SIGKILL:
        ranks.wait(60)
        return False
    if kill.survivors == "left":
        ranks.wait(180)
    else:
        ranks.kill()
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
