"""train.py, several times one after the other, each on ranks of its own: the processes of test_world_size.py.

python tests/forked_runs.py FOLDER: FOLDER/runs.json lists the runs, {"name", "world_size", "flags", "stop"}. A run with a
"stop" is killed as it begins that step, on all ranks. What each rank did is written to FOLDER/NAME.RANK.json: exit code,
output, and of each step the keys of its images with their CRC-32. A run with a "tool" instead is that tool with `flags`.
"remove": a folder that is removed before the run.

Ranks are forks of this process, which has imported all that they need.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import sys
import zlib
from pathlib import Path

import fire
import torch
from processes import ROOT, free_port

from mlcd_ds import cli, soak
from mlcd_ds.config import RunConfig
from mlcd_ds.engine import TrainEngine
from mlcd_ds.train import train

KILLED = 9


def start(run: dict, rank: int, port: int, log: Path, steps: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["world_size"], "LOCAL_SIZE": run["world_size"]}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["program", *run["flags"]]
    if "tool" in run:
        runpy.run_path(str(ROOT / "tools" / run["tool"]), run_name="__main__")
        return
    train_step = TrainEngine.train_step

    def recorded(engine, batch, step, **options):
        if step == run.get("stop"):
            sys.stdout.flush()
            os._exit(KILLED)
        sums = [zlib.crc32(image.numpy().tobytes()) for image in batch.images_BCHH]
        with steps.open("a") as file:
            file.write(json.dumps([step, list(zip(batch.keys, sums, strict=True))]) + "\n")
        return train_step(engine, batch, step, **options)

    TrainEngine.train_step = recorded
    cli.run(fire.Fire, train, RunConfig)


def main(folder: Path) -> None:
    soak.import_ahead()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for run in json.loads((folder / "runs.json").read_text()):
        port = free_port()
        if "remove" in run:
            shutil.rmtree(run["remove"])
        files = [
            [folder / f"{run['name']}.{rank}.{kind}" for kind in ("log", "steps")] for rank in range(run["world_size"])
        ]
        ranks = [context.Process(target=start, args=(run, rank, port, *own)) for rank, own in enumerate(files)]
        for rank in ranks:
            rank.start()
        for number, (rank, (log, steps)) in enumerate(zip(ranks, files, strict=True)):
            rank.join()
            done = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
            ended = {"code": rank.exitcode, "output": log.read_text(), "steps": done}
            (folder / f"{run['name']}.{number}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
