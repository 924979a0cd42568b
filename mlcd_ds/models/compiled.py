"""torch.compile of an encoder, block by block: one graph serves all blocks of one shape, whatever the depth.

A whole block is one graph (`fullgraph`): a break would be an error, not a slow run. Shapes are fixed (`dynamic=False`), as
micro-batches are. Compiled code is kept in the folder TORCHINDUCTOR_CACHE_DIR (`topology.use_compile_cache`), where the
next start finds it.
"""

import shutil
from collections.abc import Iterable

import torch
from torch import nn

from mlcd_ds.errors import ConfigError

CPU_COMPILERS = ("g++", "clang++")


def check_compiler(device_type: str) -> None:
    """Raises ConfigError where torch.compile has no compiler to call."""
    if device_type == "cpu" and not any(map(shutil.which, CPU_COMPILERS)):
        raise ConfigError(
            f"--compile on a CPU needs a C++ compiler, and none of {', '.join(CPU_COMPILERS)} is on the PATH: install one "
            "(Debian: apt install g++), or leave --compile out"
        )
    if device_type == "cuda" and not torch.utils._triton.has_triton():
        raise ConfigError("--compile on a GPU needs Triton: pip install triton, or leave --compile out")


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Replaces each block's forward by a compiled one; its hooks (ZeRO's gathers) stay outside the graph."""
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


class Recompilations:
    """Counts the graphs that are compiled after the first step, where none should be: shapes are fixed."""

    def __init__(self):
        self._expected: int | None = None
        self.count = 0

    def after_step(self) -> int:
        """How many graphs the step just made has compiled; the first step's are no recompilations."""
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        new = 0 if self._expected is None else compiled - self._expected
        self._expected = compiled
        self.count += new
        return new


def cache_counts() -> dict[str, int]:
    """Of this process: graphs compiled, and how many of inductor's compilations came from the cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "from_cache": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "not_cached": counters["aot_autograd"]["autograd_cache_miss"],
    }
