"""From the command line to a `Settings` object, strictly; from a `UserError` to one message and an exit code.

python-fire alone turns `--flag=false` into a true string, cuts values at `#`, and lets unknown flags vanish into
`**kwargs`. `run` therefore checks every flag against the settings class and quotes every value before fire sees it;
pydantic then gives it its type.
"""

import contextlib
import difflib
import inspect
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from mlcd_ds import errors
from mlcd_ds.config import Settings
from mlcd_ds.errors import ConfigError, PeerError, Preempted, UserError
from mlcd_ds.topology import Topology

LAUNCHER_FLAGS = ("local_rank",)
"""Flags that launchers add in front of ours; accepted and ignored (topology.py reads the environment)."""

PATTERN_FLAGS = ("shards",)
"""Flags whose value may name many files by a pattern; '::' joins several."""

DEEPSPEED_OWNS = {
    "batch": "train_batch_size",
    "batch_size": "train_batch_size",
    "global_batch": "train_batch_size",
    "train_batch_size": "train_batch_size",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "accum_freq": "gradient_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lr": "optimizer.params.lr",
    "learning_rate": "optimizer.params.lr",
    "wd": "optimizer.params.weight_decay",
    "weight_decay": "optimizer.params.weight_decay",
    "betas": "optimizer.params.betas",
    "beta1": "optimizer.params.betas",
    "beta2": "optimizer.params.betas",
    "eps": "optimizer.params.eps",
    "precision": "bf16.enabled",
    "bf16": "bf16.enabled",
    "fp16": "bf16.enabled",
    "grad_clip_norm": "gradient_clipping",
    "gradient_clipping": "gradient_clipping",
    "grad_checkpointing": "activation_checkpointing",
    "activation_checkpointing": "activation_checkpointing",
    "optimizer": "optimizer.type",
    "opt": "optimizer.type",
    "report_to": "tensorboard.enabled",
    "tensorboard": "tensorboard.enabled",
    "wandb": "wandb.enabled",
    "zero_stage": "zero_optimization.stage",
    "scheduler": "scheduler",
    "lr_scheduler": "scheduler",
    "warmup_type": "scheduler.params.warmup_type",
}
"""Names users know from open_clip that belong to the DeepSpeed JSON here."""

_SWITCH_WORDS = ("true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n")

_RENAMED = {"train_data": "shards", "logs": "output_dir", "warmup": "warmup_steps", "num_labels": "num_positives"}


def parse_flags(argv: Sequence[str], settings: type[Settings]) -> dict[str, str]:
    """`--name value`, `--name=value`, `--name` (true) and `--noname` (false) to {name: text}.

    Dashes and underscores are the same. Raises ConfigError for a positional argument, an unknown or repeated flag, or a
    flag whose value is missing or empty.
    """
    fields = settings.model_fields
    flags: dict[str, str] = {}
    items = _rejoined(argv)
    while items:
        item = _long_form(items.pop(0), fields)
        if not item.startswith("--") or item == "--":
            quote = " Put quotes round a pattern, else the shell expands it." if Path(item).exists() else ""
            raise ConfigError(
                f"unexpected argument {item!r}: every setting is a flag, like --{next(iter(fields))} VALUE.{quote}"
            )
        name, equals, value = item[2:].partition("=")
        name = name.replace("-", "_")
        is_switch = name in fields and fields[name].annotation is bool
        if not equals:
            follows = bool(items) and not items[0].startswith("--")
            if is_switch and not (follows and items[0].lower() in _SWITCH_WORDS):
                value = "true"
            elif follows:
                value = items.pop(0)
            elif name.startswith("no") and name[2:] in fields and fields[name[2:]].annotation is bool:
                name, value = name[2:], "false"
            elif name in fields or name in LAUNCHER_FLAGS:
                raise ConfigError(f"--{name} needs a value")
        if name in LAUNCHER_FLAGS:
            continue
        if name not in fields:
            raise ConfigError(_unknown_flag(name, settings, list(fields)))
        if value == "":
            raise ConfigError(f"--{name} has an empty value; an unset shell variable?")
        if name in flags:
            raise ConfigError(f"--{name} is given twice ({flags[name]!r} and {value!r}): give it once")
        flags[name] = value
    return flags


def _rejoined(argv: Sequence[str]) -> list[str]:
    """Joins by '::' what a shell on the way has made of one pattern.

    DeepSpeed's launcher hands the flags to other hosts through pdsh, ssh and a shell there, without the quotes: braces and
    globs arrive expanded, `--shards=a.tar --shards=b.tar` or `--shards a.tar b.tar`. Without a launcher the user's own
    shell has done it, which parse_flags refuses.
    """
    items = list(argv)
    if not any(item.lstrip("-").partition("=")[0].replace("-", "_") in LAUNCHER_FLAGS for item in items):
        return items
    found: dict[str, list[str]] = {}
    others, last = [], None
    for item in items:
        name, equals, value = item[2:].partition("=") if item.startswith("--") else ("", "", "")
        if name in PATTERN_FLAGS:
            last = found.setdefault(name, [])
            last += [value] if equals else []
        elif last is not None and not item.startswith("-"):
            last.append(item)
        else:
            last = None
            others.append(item)
    return others + [f"--{name}={'::'.join(values)}" if values else f"--{name}" for name, values in found.items()]


def _long_form(item: str, fields: Iterable[str]) -> str:
    """-s is --seed where it is the only flag that begins with s: fire's help page shows such letters."""
    if len(item) >= 2 and item[0] == "-" and item[1].isalpha() and item[2:3] in ("", "="):
        names = [name for name in fields if name.startswith(item[1])]
        if len(names) == 1:
            return f"--{names[0]}{item[2:]}"
    return item


def _unknown_flag(name: str, settings: type[Settings], known: list[str]) -> str:
    if name in DEEPSPEED_OWNS and "deepspeed_config" in known:
        key = DEEPSPEED_OWNS[name]
        return f"--{name} is not a flag: it belongs to the DeepSpeed JSON. Set {key!r} in the file --deepspeed_config names."
    near = _RENAMED.get(name) if _RENAMED.get(name) in known else None
    near = near or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)
    hint = f" Did you mean --{near}?" if near else ""
    return f"unknown flag --{name}.{hint} (--help lists all flags)"


def build(settings: type[Settings], flags: dict[str, object]) -> Settings:
    """Types and validates `flags`; raises ConfigError with value, expectation and flag name."""
    values = {name: _plain(value, settings, name) for name, value in flags.items()}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "missing":
                field = settings.model_fields[name]
                lines.append(f"--{name} is required: {field.description or 'see --help'}")
            elif not name:
                lines.append(problem["msg"].removeprefix("Value error, "))
            else:
                lines.append(f"--{name} {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("; ".join(dict.fromkeys(lines))) from None


def _plain(value: object, settings: type[Settings], name: str) -> object:
    """`none` is None where the setting may be None; 1e6 is as good as 1000000 where it is a whole number."""
    annotation = settings.model_fields[name].annotation
    if value in ("none", "None") and type(None) in get_args(annotation):
        return None
    if isinstance(value, str) and annotation in (int, int | None):
        try:
            number = float(value)
        except ValueError:
            return value
        if math.isfinite(number) and number == int(number) and abs(number) < 2**53:
            return value if value.lstrip("+-").isdigit() else int(number)
    return value


def door(function: Callable[[Settings], object], settings: type[Settings]) -> Callable[..., object]:
    """A callable whose signature and docstring fire can show: one keyword per field of `settings`."""

    def call(**flags):
        return function(build(settings, flags))

    parameters = []
    for name, field in settings.model_fields.items():
        default = inspect.Parameter.empty if field.is_required() else field.default
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    call.__signature__ = inspect.Signature(parameters)
    call.__name__ = function.__name__
    about = inspect.cleandoc(function.__doc__ or settings.__doc__ or "")
    rows = [
        f"    {name}: {field.description or name.replace('_', ' ')}" for name, field in settings.model_fields.items()
    ]
    call.__doc__ = about + "\n\nArgs:\n" + "\n".join(rows)
    return call


def run(fire: Callable, function: Callable[[Settings], object], settings: type[Settings]) -> None:
    """What a door does: argv -> `function(settings)`; a UserError ends in one message and its exit code.

    fire: `fire.Fire`, passed in because only doors import it.
    """
    argv = sys.argv[1:]
    component = door(function, settings)
    with ending_in_one_message():
        if argv == ["help"] or any(item in ("--help", "-h") for item in argv):
            fire(component, command=["--", "--help"], name=sys.argv[0])
            return
        flags = parse_flags(argv, settings)
        build(settings, flags)  # a wrong value is reported before fire could print its own usage page
        fire(component, command=[f"--{name}={value!r}" for name, value in flags.items()], serialize=lambda _: None)


def run_one_of(fire: Callable, doors: dict[str, tuple[Callable, type[Settings]]], about: str) -> None:
    """`run` of a tool with sub-commands: the first argument names one, the rest are its flags.

    doors: {name: (what it calls, its settings)}. about: what the tool's own --help says.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("--help", "-h", "help"):
        print(f"{about}\nsub-commands: {', '.join(doors)} (each has --help)")
        return
    if name not in doors:
        what = "no sub-command" if name is None else f"no sub-command {name!r}"
        fail(ConfigError(f"{what}: expected one of {', '.join(doors)}, like python {sys.argv[0]} {next(iter(doors))}"))
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    run(fire, *doors[name])


@contextlib.contextmanager
def ending_in_one_message() -> Iterator[None]:
    """Ends the process where anything is raised within it: by the error's message and its exit code."""
    try:
        yield
    except Preempted as stop:
        stopped(stop)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except Exception:
        # A fault of ours. Out at once, too: the interpreter's own way out would wait for loader processes, and the other
        # ranks for this one.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def _place() -> tuple[int, int]:
    """(rank, number of ranks) of this process; one alone where the environment is what is wrong."""
    try:
        topology = Topology.from_environment()
    except ConfigError:
        return 0, 1
    return topology.rank, topology.world_size


def stopped(stop: Preempted) -> None:
    """Ends a process that stopped because it was asked to. Rank 0 says so; no rank waits for another."""
    if _place()[0] == 0:
        print(f"stopped: {stop}", flush=True)
    sys.stdout.flush()
    os._exit(stop.exit_code)


def fail(error: UserError) -> None:
    """Prints `error` as the last word of this process and ends it, without waiting for other ranks or threads.

    Rank 0 speaks at once, and the launcher then ends the others. One that is still there a moment later has an error of
    its own, and says so. (Were they to leave first, the launcher might end rank 0 before it has spoken.) Where a peer is
    lost, all speak at once, and rank 0 stays a moment: in its store the others look up who has fallen silent.
    """
    rank, world_size = _place()
    if rank > 0 and not isinstance(error, PeerError):  # each rank sees something else of a lost peer
        time.sleep(errors.SECONDS_FOR_RANK_0)
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if rank == 0 and world_size > 1 and isinstance(error, PeerError):
        time.sleep(errors.SECONDS_FOR_RANK_0)
    # os._exit: a rank that leaves through the interpreter's shutdown may wait for peers inside a process group.
    os._exit(error.exit_code)
