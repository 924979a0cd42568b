"""Runs a command in forked processes that are killed (SIGKILL) at each of its writes in turn, then the same command again.

Arguments: name of the command, its settings as JSON, a folder for all outputs, a JSON file for the report: one entry per
kill, {"write", "place", "signal", "code"}. places: middle (half of the temporary file is on the disk), after (just renamed).
"""

import importlib
import json
import os
import signal
import stat
import sys
import traceback
from pathlib import Path

from mlcd_ds.config import AssignConfig, ClusterConfig, FeaturesConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
COMMANDS = {"extract_features": FeaturesConfig, "cluster": ClusterConfig, "assign_labels": AssignConfig}


def run(name: str, settings: dict, kill: tuple[int, str] | None, counter: Path) -> int:
    """The status that `os.waitpid` gives for a child that runs the command. counter: file that gets a byte per write."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        arm(kill, counter)
        importlib.import_module(name).main(COMMANDS[name](**settings))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def arm(kill: tuple[int, str] | None, counter: Path) -> None:
    """Counts the writes of this process, which `files.write_bytes` syncs and renames, and ends it at the given one."""
    fsync, replace = os.fsync, Path.replace
    done = 0

    def counting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        if kill == (done, "middle") and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def counting_replace(path: Path, target: Path) -> Path:
        nonlocal done
        result = replace(path, target)
        if kill == (done, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        counter.write_text(str(done))
        return result

    os.fsync, Path.replace = counting_fsync, counting_replace


def main(name: str, settings: str, output: str, report: str) -> None:
    given, folder = json.loads(settings), Path(output)
    folder.mkdir(parents=True)
    counter = folder / "writes"
    entries = []
    assert run(name, given | {"output_dir": str(folder / "whole")}, None, counter) == 0
    writes = int(counter.read_text())
    # The middle of a write is also what comes after the one before.
    for write, place in [*((write, "middle") for write in range(writes)), (writes - 1, "after")]:
        own = given | {"output_dir": str(folder / f"{write}_{place}")}
        killed = run(name, own, (write, place), counter)
        again = run(name, own, None, counter)
        entries.append({"write": write, "place": place, "signal": os.WTERMSIG(killed), "code": again})
    Path(report).write_text(json.dumps(entries))


if __name__ == "__main__":
    main(*sys.argv[1:])
