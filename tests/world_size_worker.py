"""Checkpoints of the engine taken from one number of ranks and ZeRO stage to another: the processes of test_world_size.py.

The ranks of each act are forks of this process, which has imported all that they need.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import torch
from processes import free_port
from safetensors.torch import load_file

from mlcd_ds import collectives
from mlcd_ds.checkpoint import Checkpoint
from mlcd_ds.errors import CheckpointError
from mlcd_ds.files import save_tensors
from mlcd_ds.topology import Topology

CHAIN = (2, 1, 2, 3, 2)
"""Numbers of ranks, one after the other."""
STEPS = 1
"""Steps of each."""
STAGES = {"0": (0, 0, 0), "1": (1,) * 5, "2": (2,) * 5, "3": (3,) * 5, "changing": (1, 3, 2)}
STAGES |= {"0 bf16": (0, 0), "1 bf16": (1, 1, 1), "2 bf16": (2, 2, 2), "3 bf16": (3, 3, 3)}
"""ZeRO stages of the acts of each chain."""
SEED = 5


def state_of(engine) -> dict:
    """Everything that a checkpoint must bring back, whole; every rank calls it."""
    import deepspeed

    module, optimizer = engine.engine.module, engine.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found = {"encoder": {name: weights.clone() for name, weights in engine.encoder_weights().items()}}
    if engine.settings.zero_stage in (1, 2):
        # DeepSpeed links the moments to the parameters after the first group's first step, when the second has none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for moment in ("exp_avg", "exp_avg_sq"):
        if engine.settings.zero_stage:
            whole = {n: deepspeed.utils.safe_get_full_optimizer_state(p, moment) for n, p in module.named_parameters()}
        else:
            parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
            whole = {str(number): inner.state[parameter][moment] for number, parameter in enumerate(parameters)}
        found[moment] = {name: tensor.clone() for name, tensor in whole.items()}
    found["steps"] = sorted(float(state["step"]) for state in inner.state.values())
    found["groups"] = [{n: v for n, v in group.items() if n != "params"} for group in inner.param_groups]
    found["schedule"] = engine.engine.lr_scheduler and engine.engine.lr_scheduler.state_dict()
    found["global_steps"] = engine.engine.global_steps
    rows = {"centers": engine.heads[0].centers.detach(), **engine.head_optimizers[0].state_dict()}
    parts = collectives.gather_objects({n: t.clone() for n, t in rows.items()}, engine.topology)
    found["head"] = {name: torch.cat([part[name] for part in parts]) for name in rows}
    return found


def another_encoder(path: Path) -> None:
    """As if DeepSpeed had made something else of the checkpoint than what it holds."""
    file = path / "encoder" / "encoder.safetensors"
    weights = load_file(file)
    save_tensors(file, {name: tensor + (name == "projection.weight") for name, tensor in weights.items()})


def foreign_pickle(path: Path) -> None:
    """Makes a file when it is loaded."""
    torch.save({"loss_scaler": Attack(path / "mark")}, path / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")


def of_stage_0(path: Path) -> None:
    """What state.json says is enough."""


class Attack:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refusal(engine, topology: Topology, checkpoint: Path, spoil, state: dict) -> str:
    """What loading a spoilt copy of the checkpoint says; every rank calls it."""
    path = checkpoint.with_name(spoil.__name__)
    if topology.is_main:
        shutil.copytree(checkpoint, path)
        spoil(path)
    collectives.barrier(topology)
    try:
        engine.load(Checkpoint(path, 0, state), SEED)
    except CheckpointError as error:
        assert not (path / "mark").exists()
        return str(error)
    return "loaded"


def act(topology: Topology, folder: Path, number: int) -> None:
    """Loads the checkpoint of the act before, in all chains; takes STEPS steps; saves."""
    from engine_worker import batch_of_step, build, own_part

    for name, stages in STAGES.items():
        if number >= len(stages):
            continue
        extra = {"bf16": {"enabled": True}} if "bf16" in name else {}
        engine = build(topology, stages[number], 1, False, {"sample_rate": 1.0}, **extra)
        results = {"losses": [], "initial_seed": None}
        if number:
            before = folder / name / f"step_{number * STEPS:09d}"
            staging = before.with_name(f"{before.name}.universal.tmp")
            if topology.is_main:  # what a process leaves that is killed in the middle of a conversion
                (staging / "engine" / "zero" / "leftover").mkdir(parents=True)
                (staging / "engine" / "zero" / "optimizer_state.pt").write_text("half")
            found = {"world_size": CHAIN[number - 1], "zero_stage": stages[number - 1]}
            engine.load(Checkpoint(before, number * STEPS, found), SEED)
            assert not (topology.is_main and stages[number] and staging.exists())
            results["loaded"] = state_of(engine)
            results["initial_seed"] = torch.initial_seed()
        for step in range(number * STEPS, (number + 1) * STEPS):
            results["losses"].append(engine.train_step(own_part(batch_of_step(step), topology), step).loss)
        results["saved"] = state_of(engine)
        after = folder / name / f"step_{(number + 1) * STEPS:09d}"
        if topology.is_main:
            for part in ("head", "ranks"):
                (after / part).mkdir(parents=True)
        collectives.barrier(topology)
        told = {path for own in collectives.gather_objects(engine.save(after, "tiny"), topology) for path in own}
        lying = {path for path in after.rglob("*") if path.is_file()}
        results["told"] = len(told & lying)
        results["not told"] = sorted(str(path.relative_to(after)) for path in lying ^ told)
        if name == "1" and number == len(stages) - 1:
            for spoil in (another_encoder, foreign_pickle):
                results[spoil.__name__] = refusal(engine, topology, before, spoil, found)
            results["stage 0"] = refusal(engine, topology, before, of_stage_0, found | {"zero_stage": 0})
        torch.save(results, folder / name / f"act{number}_rank{topology.rank}.pt")


def rank_process(rank: int, world_size: int, port: int, folder: Path, number: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    act(topology, folder, number)
    topology.stop()


def main(folder: Path) -> None:
    import engine_worker  # noqa: F401

    from mlcd_ds import soak

    soak.import_ahead()

    context = multiprocessing.get_context("fork")
    for number, world_size in enumerate(CHAIN):
        port = free_port()
        arguments = [(rank, world_size, port, folder, number) for rank in range(world_size)]
        ranks = [context.Process(target=rank_process, args=each) for each in arguments]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert all(rank.exitcode == 0 for rank in ranks), (number, [rank.exitcode for rank in ranks])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
