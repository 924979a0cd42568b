"""The run folder: who may write into it, what the run is, how it ended.

run/config.json     every resolved value        run/status.json   running, done, preempted or failed; step, reason
run/metrics.jsonl   one line per logged step    run/tensorboard/  run/checkpoints/
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlcd_ds import errors
from mlcd_ds.config import EncoderOptions
from mlcd_ds.errors import CheckpointError, PeerError, Preempted, SaveError, UserError
from mlcd_ds.files import write_json

FREE_TO_CHANGE = frozenset(
    "resume workers prefetch save_every_steps keep_last keep_every log_every_steps histogram_every_steps "
    "timeout_minutes start_timeout_minutes shard_cache warn_data_wait_seconds max_bad_steps max_failed_saves "
    "max_skipped_fraction allow_pipe allow_missing_shards expect_world_size workspace_mb output_dir deepspeed_config "
    "init_from centers shards labels world_size zero_stage allow_changed tokenizer test_shards dataset_name "
    "checkpoint_layers compile_cache profile_steps peak_tflops".split()
)
"""Settings and facts that a resumed run may change: they do not enter the mathematics (init_from, centers: only the first
start; workspace_mb: only the order of sums; shards, labels, tokenizer: where they lie, whose fingerprints are facts;
world_size, zero_stage: the checkpoint is fitted to them; checkpoint_layers: recomputed numbers are the same)."""

NEVER_CHANGED = frozenset(
    "model image_size register_tokens num_classes precision global_batch text_model tokenizer_hash lock_image".split()
)
"""What --allow_changed cannot allow: weights, rows, moments would not fit, or a step would be another share of the data."""

IN_PARTS = ("data", "order")
"""Facts of several digests with "-" between, of which earlier versions wrote the first alone, as does a start with damaged
tars of whose keys nothing tells the order: compared is what both have."""

JSON_FREE_TO_CHANGE = frozenset(
    "tensorboard csv_monitor wandb comet steps_per_print wall_clock_breakdown dump_state memory_breakdown flops_profiler "
    "comms_logger checkpoint train_micro_batch_size_per_gpu gradient_accumulation_steps reduce_bucket_size "
    "allgather_bucket_size overlap_comm contiguous_gradients stage3_prefetch_bucket_size stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_param_persistence_threshold sub_group_size pin_memory buffer_count "
    "activation_checkpointing log_level disable_python_gc timers round_robin_gradients reduce_scatter stage".split()
)
"""Keys of the DeepSpeed JSON, at any depth, that a resumed run may change: monitors, logs, and how the same step is cut
into buffers and micro-batches (another cut draws other negatives; the global batch is compared)."""


class RunFolder:
    """One run's folder; rank 0 alone writes it. Holds a lock that ends with the process, however it ends."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.step = 0
        """Steps finished so far, for the status of a run that fails."""
        self.saved = 0
        """Step of the newest checkpoint that this run has published, kept in status.json: 0 while there is none."""
        self.is_ours = False
        """Whether this run has taken the folder: set on every rank once `write_config` has passed."""
        self._lock = None

    def open(self, resume: bool) -> None:
        """Takes the folder. Raises CheckpointError when another process has it, it holds a run and resume is off, or a run
        whose checkpoints are gone; SaveError when the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(
                f"--output_dir {self.path} cannot be written ({error.strerror}): choose another folder, or mend its "
                "permissions"
            ) from None
        try:
            # POSIX locks belong to the process: loader workers do not inherit them, and a kill -9 releases them.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"--output_dir {self.path}: its file system cannot lock files ({error.strerror}), so two runs could not "
                    "be kept apart. Choose a folder elsewhere, or have locks switched on."
                ) from None
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise CheckpointError(
                f"--output_dir {self.path} is in use by {holder}. Wait for it, stop it, or choose another folder."
            ) from None
        with writing_the_run(self.path / ".lock"):
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
        checkpoints = self.path / "checkpoints"
        self.saved = self._saved_before()
        set_aside = sorted(path.name for path in checkpoints.glob("damaged_step_*"))
        left = [*checkpoints.glob("step_*"), *self.path.glob("metrics.jsonl"), *set_aside]
        if not left and not self.saved:
            with writing_the_run(self.path / "config.json"):
                (self.path / "config.json").unlink(missing_ok=True)  # of a run that never began
        elif not resume:
            self._lock.close()
            raise CheckpointError(
                f"--output_dir {self.path} already holds a run. Go on with it by --resume auto, or choose another folder."
            )
        elif (self.saved or set_aside) and not any(re.fullmatch(r"step_\d{9}", p.name) for p in checkpoints.glob("*")):
            self._lock.close()
            known = f"step {self.saved} was saved (status.json)" if self.saved else f"it holds {set_aside[-1]}"
            raise CheckpointError(
                f"--resume auto: {checkpoints} holds no checkpoint, though {known}: starting anew would throw that run "
                "away. Is the disk there that they lie on, or were they moved? Put them back, or take another --output_dir."
            )

    def _saved_before(self) -> int:
        """The step that the folder's last run had saved, by its status.json; 0 where that does not tell."""
        try:
            status = json.loads((self.path / "status.json").read_text())
            if "saved" in status:
                return int(status["saved"])
            # Of an earlier version: "running" was written by saves; a run that failed had saved less, or nothing.
            known = status["state"] in ("running", "done") or "; saved as " in status["reason"]
            return int(status["step"]) if known else 0
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / 'status.json'} cannot be read ({error}): look at checkpoints/ beside it; remove it to go on "
                "from the newest there, or to begin where there is none."
            ) from None

    def write_config(self, config: dict[str, Any], allow_changed: str | None = None) -> None:
        """Compares `config` with that of the run that is being resumed, if any, and writes it.

        config: {"settings": flags, "facts": what follows from data and JSON, ...}. Raises CheckpointError naming each
        setting, fact or key of the DeepSpeed JSON that differs and may not; what allow_changed names (commas between) may,
        and is printed.
        """
        path = self.path / "config.json"
        before = self.config()
        if before is not None:
            changed = _changes(before, json.loads(json.dumps(config)))
            allowed = _allowed(allow_changed)
            refused = {name: text for name, text in changed.items() if name not in allowed - NEVER_CHANGED}
            if refused:
                free = sorted(name for name in refused if name not in NEVER_CHANGED)
                hint = (
                    f" If you mean to change it: --allow_changed {','.join(free)}." if len(free) == len(refused) else ""
                )
                raise CheckpointError(
                    f"--resume: {self.path} holds a different run ({'; '.join(refused.values())}). Give the settings it was "
                    f"started with, or another --output_dir.{hint}"
                )
            for text in changed.values():
                print(f"--allow_changed: {text}", flush=True)
            config = config | {"facts": config["facts"] | _longer_parts(before["facts"], config["facts"])}
        with writing_the_run(path):
            write_json(path, config)
            self.status("running", self.step)

    def global_batch(self) -> int | None:
        """Images of a step of the run that is being resumed, None where there is none. Raises as `config`."""
        before = self.config()
        return None if before is None else before["facts"].get("global_batch")

    def config(self) -> dict[str, Any] | None:
        """What config.json holds; None where there is none. Raises CheckpointError where it is damaged."""
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            before = json.loads(path.read_text())
            before["settings"], before["facts"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}): put back a copy, or choose another --output_dir. The checkpoints beside "
                "it can still be used by --init_from."
            ) from None
        return before

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json: the launcher may hide exit codes, this file does not."""
        status = {"state": state, "step": step, "saved": self.saved, "reason": reason}
        write_json(self.path / "status.json", status)

    def fail(self, error: BaseException, rank: int) -> None:
        """Notes what ends the run; not what kept it from starting, which may be about another's run.

        The first word stays: an error makes the other ranks fail, too. Rank 0 may speak at once, the others wait as long
        as with their message (errors.SECONDS_FOR_RANK_0).
        """
        if not self.is_ours:
            return
        try:
            self._note(error, rank)
        except (OSError, ValueError, KeyError) as trouble:
            # The disk may be what failed. The error itself, which is about to be raised, matters more.
            print(f"status.json of {self.path} could not be written: {trouble}", flush=True)

    def _note(self, error: BaseException, rank: int) -> None:
        reason = str(error) if isinstance(error, UserError | Preempted) else f"{type(error).__name__}: {error}"
        if rank > 0:
            if not isinstance(error, PeerError):  # which took its time already
                time.sleep(errors.SECONDS_FOR_RANK_0)
            reason = f"rank {rank}: {reason}"
        before = json.loads((self.path / "status.json").read_text())
        if before["state"] == "running":
            self.saved = max(self.saved, before.get("saved", 0))  # rank 0 knows it before the others do
            self.status("preempted" if isinstance(error, Preempted) else "failed", self.step, reason)

    def ended_at_once(self, reason: str) -> None:
        """Notes, on rank 0, that the process is about to be ended in the middle of something."""
        if self._lock is not None and self.is_ours:
            self.fail(RuntimeError(reason), rank=0)


@contextlib.contextmanager
def writing_the_run(what: Path | str) -> Iterator[None]:
    """Makes a SaveError, with the cure, of an OSError: of what must be written for a run to begin, and to be done."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{what} could not be written: {error.strerror or error}. Make room on the disk, or mend it, then --resume auto."
        ) from error


def _same(name: str, then: Any, now: Any) -> bool:
    if name in IN_PARTS and isinstance(then, str) and isinstance(now, str):
        return all(a == b for a, b in zip(then.split("-"), now.split("-"), strict=False))
    return then == now


def _longer_parts(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Facts in parts that now lack some, as they were: the next start can compare them. Says what could not be compared."""
    kept = {}
    for name in IN_PARTS:
        then, own = before.get(name), now.get(name)
        if not (isinstance(then, str) and isinstance(own, str) and _same(name, then, own)):
            continue
        if then.count("-") != own.count("-"):
            what = "the keys of the images" if name == "data" else "the order of the images within each tar"
            whose = "config.json of an earlier version or of damaged tars" if own.count("-") else "damaged tars"
            print(
                f"--resume: {what} could not be compared with those of before: nothing tells them ({whose})", flush=True
            )
        if then.count("-") > own.count("-"):
            kept[name] = then
    return kept


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """{name: what it was and is} of all that enters the mathematics and differs."""
    off = {name: field.default for name, field in EncoderOptions.model_fields.items()} | {"ema_decay": 0.0}
    changed = {
        name: f"{name}: {then!r} then, {value!r} now"
        for part in ("settings", "facts")
        for name, value in now[part].items()
        # A setting that the run was written without did not exist yet: it was off.
        if not _same(name, then := before[part].get(name, off.get(name)), value) and name not in FREE_TO_CHANGE
    }
    then, now = _leaves(before.get("deepspeed", {})), _leaves(now.get("deepspeed", {}))
    return changed | {
        name: f"{name} of the DeepSpeed JSON: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def _allowed(names: str | None) -> set[str]:
    """The names in --allow_changed; who allows other data or another seed allows the order that follows from them."""
    found = {name.strip() for name in names.split(",")} if names else set()
    return found | ({"order"} if found & {"data", "seed", "shuffle_window"} else set())


def _leaves(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{dotted name: value} of a JSON object, without what a resumed run may change."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        if name in JSON_FREE_TO_CHANGE:
            continue
        found |= _leaves(value, f"{path}{name}.") if isinstance(value, dict) and value else {path + name: value}
    return found
