"""Forks processes that run a script: an interpreter each, but torch and DeepSpeed are imported once for all of them.

processes.py starts it, writes lines of JSON to its input and reads one line each from the descriptor that the argument
names. {"script", "arguments", "environment", "log"}: the answer is the process id of `python SCRIPT ARGUMENTS`, its output
in the file LOG. {"wait": process id}: the answer is its exit code, negative where a signal ended it, or null while it lives.
At the end of the input all that live are killed.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import faiss  # noqa: F401

import mlcd_ds.clustering.two_level  # noqa: F401
from mlcd_ds import soak


def serve() -> dict:
    """Answers until a request starts a process: there, it returns the request."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    soak.import_ahead()
    threads = {
        path.read_text().strip()
        for path in Path("/proc/self/task").glob("*/comm")
        if path.parent.name != str(os.getpid())
    }
    assert threads <= {"jemalloc_bg_thd"}, f"an import has started {threads}: forks would lack them"  # it minds forks
    gc.collect()
    gc.freeze()  # collections in forks would copy it all
    living = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            found, status = os.waitpid(request["wait"], os.WNOHANG)
            if found:
                living.remove(found)
            answer = os.waitstatus_to_exitcode(status) if found else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                return request
            living.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for process in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    os._exit(0)


def become(request: dict) -> None:
    """This process, as `python SCRIPT ARGUMENTS` would begin."""
    for descriptor, path, mode in ((0, os.devnull, os.O_RDONLY), (1, request["log"], os.O_WRONLY | os.O_APPEND)):
        opened = os.open(path, mode)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    for name in os.environ.keys() - request["environment"].keys():
        del os.environ[name]
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)


def run(script: str) -> None:
    """The script to its end, and what an interpreter does then but for taking modules apart, which takes seconds."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    asked = serve()
    become(asked)
    run(asked["script"])
