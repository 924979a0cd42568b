"""What every test gets: loopback only, one thread per process group rank, the tests' folder importable.

Files that take longest begin first: two workers then end together.
"""

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports triton

LONGEST = (
    "test_reliability",
    "test_train",
    "test_world_size",
    "test_multi_node",
    "test_engine",
    "test_contrastive_runs",
    "test_recompute",
    "test_kmeans",
    "test_finetune",
)


def pytest_collection_modifyitems(items) -> None:
    """The order of files, in which `--dist loadfile --no-loadscope-reorder` hands them out."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
