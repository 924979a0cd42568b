"""DeepSpeed's files in a checkpoint: which pickles they may hold, and the form that any number of ranks reads.

DeepSpeed loads its files with pickle and no questions asked, and a pickle can run anything. What honest ones name beside
tensors and plain containers is three classes; `refuse_foreign_pickles` lets nothing else near that load.

DeepSpeed's universal form of a ZeRO checkpoint is one folder per parameter with its float32 weights and moments whole. Its
converter leaves files that only the ZeRO stage they came from can read; `make_uniform` makes them fit stages 1, 2 and 3:

    engine/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    engine/zero/optimizer_state.pt              settings of the parameter groups
    engine/mp_rank_00_model_states.pt           counters and the schedule's position, without weights; stage 3 wants
    engine/zero_pp_rank_0_mp_rank_00_model_states.pt    the same by this name
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlcd_ds.data.storage import UnreadableError, persistently
from mlcd_ds.errors import CheckpointError

ENGINE_TAG = "engine"
"""Name of the engine's folder in a checkpoint."""

UNIVERSAL = "universal"
"""state.json's engine_format where the engine's files are of the universal form; absent: as its ranks wrote them."""

MOMENTS = ("fp32", "exp_avg", "exp_avg_sq")

_DEEPSPEED_CLASSES = frozenset(
    (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    )
)
"""What DeepSpeed's optimizer files hold beside what torch takes for safe: three records without code of their own."""

_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def refuse_foreign_pickles(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Looks through every file under `folder` (or every `parts`-th, from `part` on) that DeepSpeed would unpickle.

    Nothing is unpickled: torch's helper reads the instructions. Raises CheckpointError naming the file, and what it would
    have imported, or that it is no file of torch.save; UnreadableError where one cannot be read for a reason that lies in
    the machine.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[part::parts]:
        try:
            look = partial(torch.serialization.get_unsafe_globals_in_checkpoint, path)
            found = set(persistently(look, str(path))) - _DEEPSPEED_CLASSES
        except UnreadableError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        except Exception as error:  # whatever it is, it is no file of ours
            raise CheckpointError(
                f"{path} is not what torch.save writes ({error}): it is not loaded, for a pickle can run anything. Take a "
                "checkpoint that you know where it comes from."
            ) from None
        if found:
            raise CheckpointError(
                f"{path} would import {', '.join(sorted(found))} when it is loaded, which no checkpoint of ours does: it is "
                "not loaded. Do not trust the place it comes from; start from another checkpoint."
            )


def check_room(checkpoint: Path, folder: Path) -> None:
    """Raises CheckpointError where the disk of `folder` cannot take a conversion of `checkpoint`'s optimizer files."""
    needed = 2 * sum(path.stat().st_size for path in (checkpoint / ENGINE_TAG).iterdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.2f} GB free; to fit {checkpoint.name} to another number of ranks takes "
            f"{needed / 1e9:.2f} GB for a while. Make room."
        )


def make_uniform(folder: Path) -> None:
    """Makes what DeepSpeed's converter wrote (engine/ of a universal checkpoint) fit every ZeRO stage from 1 to 3.

    From stage 3 come flat tensors and no step counts, from 1 and 2 no settings by stage 3's name; all bring a loss scaler
    that nobody reads here, and the weights once more. Raises KeyError where this DeepSpeed writes something else.
    """
    zero = folder / "zero"
    state = _load(zero / "optimizer_state.pt")
    model_states = _load(next(folder / name for name in _MODEL_STATES if (folder / name).is_file()))
    for name in _MODEL_STATES:
        _save(model_states | {"module": None}, folder / name)  # the weights are read from zero/
    nested = state.get("optimizer_state_dict")
    if nested is None:  # of stage 1 or 2
        first = next(path for path in sorted(zero.iterdir()) if (path / "step.pt").is_file())
        step = _load(first / "step.pt")
    else:
        step = nested["state"][0]["step"]
        shapes = {name: shape for group in model_states["param_shapes"] for name, shape in group.items()}
        for name, shape in shapes.items():
            for moment in MOMENTS:
                _make_whole(zero / name / f"{moment}.pt", shape)
            _save(step, zero / name / "step.pt")
    uniform = {
        "param_groups": state["param_groups"],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": state["param_groups"]},
        "ds_version": model_states["ds_version"],
    }
    _save(uniform, zero / "optimizer_state.pt")


def param_groups(folder: Path) -> list[dict[str, Any]]:
    """The settings of the optimizer's parameter groups in a universal engine/ folder, without the parameters."""
    groups = _load(folder / "zero" / "optimizer_state.pt")["param_groups"]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _make_whole(path: Path, shape: torch.Size) -> None:
    """A flat tensor becomes the record that stages 1 and 2 read; stage 3 reads both."""
    _save({"param": _load(path).view(shape), "cat_dim": 0}, path)


def _save(value: Any, path: Path) -> None:
    """By a rename: parts of `value` may be mapped from the very file."""
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    temporary.replace(path)


class _Ignored:
    """Stands for DeepSpeed's classes, whose content is not needed here."""

    def __new__(cls, *_):
        return object.__new__(cls)


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals([(_Ignored, name) for name in _DEEPSPEED_CLASSES]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
