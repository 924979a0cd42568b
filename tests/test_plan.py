"""The plan of a clustering: its FLOPs and bytes are those of a real one, its memory what a real one takes."""

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, run_script
from test_kmeans import mixture, write_features

from mlcd_ds.benchmarks.timing import in_processes, peak_bytes
from mlcd_ds.clustering import kmeans as kmeans_module
from mlcd_ds.clustering import plan
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import SphericalKMeans
from mlcd_ds.config import ClusterConfig
from mlcd_ds.topology import Topology

LAION = plan.Job(400_000_000, 768, 1_000_000, 64, 20, 400, "faiss", 16, "cuda")


def test_laion_by_hand():
    start, iteration = plan.passes(LAION)
    assert iteration.flops == pytest.approx(2 * 4e8 * 1e6 * 768) and iteration.times == 20
    assert iteration.read == pytest.approx(4e8 * 1536 / 64)
    assert iteration.sent == pytest.approx(2 * 63 / 64 * 3.072e9)
    assert start.flops == 0 and start.sent == iteration.sent
    rates = plan.Rates(300e12, 2e9, 5e9, 20e9, dict.fromkeys(("search", "prepare", "disk", "link"), "given"))
    parts = plan.seconds(iteration, LAION, rates)
    assert parts == pytest.approx(
        {"search": 32.0, "preparing": 4.8, "disk": 1.92, "network": 0.3024, "keeping": 2 * 3.072 / 5}
    )
    assert plan.whole_seconds(parts, "cuda") == pytest.approx(32.0 + 0.3024 + 2 * 3.072 / 5)
    assert plan.whole_seconds(parts | {"search": 1.0}, "cuda") == pytest.approx(4.8 + 1.92 + 0.3024 + 2 * 3.072 / 5)
    assert plan.whole_seconds(parts, "cpu") == pytest.approx(4.8 + 1.92 + 32.0 + 0.3024 + 2 * 3.072 / 5)
    total = sum(
        plan.whole_seconds(plan.seconds(one, LAION, rates), LAION.device) * one.times for one in plan.passes(LAION)
    )
    (row,) = [line for line in plan.card(LAION, rates, "cpu").splitlines() if line.startswith("total")]
    assert float(row.split()[1]) == pytest.approx(total / 3600, rel=1e-3)


def test_two_levels_take_a_fraction():
    two = plan.Job(**(LAION.__dict__ | {"coarse": 1000, "refinements": 2, "probes": 0}))
    flops = {one.name: one.flops * one.times for one in plan.passes(two)}
    whole = sum(one.flops * one.times for one in plan.passes(LAION))
    assert flops["iterations over all centers"] == pytest.approx(whole / 20 * 2)
    inside = whole / 20 / 1000 * plan.UNEVEN
    assert flops["iterations inside them"] == pytest.approx(4 * inside)
    assert flops["inside 4 of them"] == pytest.approx(4 * 4 * inside)
    assert flops["features to coarse clusters"] == pytest.approx(2 * 4e8 * 1000 * 768)
    assert flops["coarse iterations"] == pytest.approx(10 * 2 * 1024_000 * 1000 * 768)
    assert sum(flops.values()) < 0.11 * whole
    probed = plan.passes(plan.Job(**(two.__dict__ | {"probes": 16})))
    assert probed[-1].flops == pytest.approx(2 * 4e8 * 1000 * 768 + 16 * inside)
    assert sum(one.flops * one.times for one in probed) < 0.004 * whole


@pytest.mark.parametrize("limit", [10**6, 20])
def test_what_is_planned_is_what_is_done(tmp_path, monkeypatch, limit):
    """Products, rows that are read, and bytes that are reduced and gathered, counted in a real clustering."""
    features = write_features(tmp_path / "f", np.array_split(mixture(n=2000), 3))
    counted = {"flops": 0, "rows": 0}
    index_of = kmeans_module.index_of

    class Counting:
        def __init__(self, centers_kd, *others):
            self.inner, self.shape = index_of(centers_kd, *others), centers_kd.shape

        def search(self, block_bd, top):
            counted["flops"] += 2 * len(block_bd) * self.shape[0] * self.shape[1]
            counted["rows"] += len(block_bd)
            return self.inner.search(block_bd, top)

    monkeypatch.setattr(kmeans_module, "index_of", Counting)
    SphericalKMeans(30, 4, limit, 0).fit(features, lambda _: None)
    job = plan.Job(2000, 24, 30, 1, 4, limit, "faiss", 16, "cpu")
    _, iteration = plan.passes(job)
    assert counted["flops"] == iteration.times * iteration.flops
    assert counted["rows"] == iteration.times * iteration.rows == 4 * min(2000, 30 * limit)
    assert iteration.sent == 0


def test_reading_a_sample_touches_whole_pages():
    assert plan.read_bytes(1000, 1000, 768) == 1000 * 1536
    assert 0.5 * 1000 * 1536 < plan.read_bytes(1000, 500, 768) < 1000 * 1536
    assert plan.read_bytes(10**6, 10, 768) == pytest.approx(10 * (1536 + 4096), rel=1e-3)


def test_flops_of_an_inverted_file_are_those_of_its_lists():
    lists = round(4 * math.sqrt(1e6))
    assert plan.search_flops(1, 10**6, 768, "ivf", 16) == pytest.approx(2 * 768 * (lists + 16 * 1e6 / lists))
    assert plan.search_flops(1, 10**6, 768, "ivf", 10**6) == pytest.approx(2 * 768 * (lists + 1e6))


BLOCK, K, D, N = 300, 2000, 4096, 2400


def _peak(rank: int, world_size: int, backend: str, features: str, folder: Path) -> float:
    import faiss

    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # arrays above 1 MB are given back when freed, as those of real sizes are
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    kmeans_module.BLOCK_ROWS = BLOCK
    alone = world_size == 1
    topology = Topology.single() if alone else Topology.on_this_machine(rank, world_size, folder / "store")
    opened = FeatureFolder(features)
    SphericalKMeans(20, 2, 10**6, 0, topology, backend=backend).fit(opened, lambda _: None)  # libraries wake up
    kmeans = SphericalKMeans(K, 2, 10**6, 0, topology, backend=backend)
    peak = peak_bytes(lambda: kmeans.fit(opened, lambda _: None), topology.device)
    topology.stop()
    return peak


@pytest.mark.parametrize(("world_size", "backend"), [(1, "faiss"), (2, "faiss")])
def test_memory_is_what_a_real_clustering_takes(tmp_path, world_size, backend):
    """33 MB of centers, each process fresh. The file that is mapped counts as resident, so it is added to the plan's sum."""
    rows = np.random.default_rng(0).standard_normal((N, D), np.float32)
    write_features(tmp_path / "f", np.array_split(rows, 4))
    job = plan.Job(N, D, K, world_size, 2, 10**6, backend, 16, "cpu")
    device, host = plan.kmeans_memory(job, BLOCK)
    assert device == {} and host["centers"] == 4 * K * D
    expected = sum(host.values()) + 2 * N * D / 4
    measured = in_processes(world_size, _peak, world_size, backend, str(tmp_path / "f"))
    print(f"measured {measured / 1e6:.0f} MB, planned {expected / 1e6:.0f} MB")
    assert 0.85 < measured / expected < 1.15


def cluster(*flags: str, world_size: int = 1):
    return run_script(world_size, [ROOT / "tools" / "cluster.py", "--dry_run", *flags])


def test_tool_plans_without_features(tmp_path):
    given = ["--tflops=300", "--link_gb_per_s=20", "--disk_gb_per_s=5", "--prepare_gb_per_s=2"]
    size = ["--num_features=4e8", "--dim=768", "--k=1e6", "--gpus=64", "--max_points_per_center=400"]
    (ended,) = cluster(*size, *given)
    assert ended.code == 0, ended.output
    assert ended.output.count("(given)") == 4 and "measured" not in ended.output
    (bare,) = run_script(1, [ROOT / "tools" / "cluster.py", "--features=f"])
    assert bare.code == 2 and "error: --output_dir must be given, but for a --dry_run" in bare.output
    (row,) = [line for line in ended.output.splitlines() if line.startswith("iterations over all centers")]
    assert [float(word) for word in row.split()[4:]] == pytest.approx(
        [20, 6.14e17, 9.6, 6.048, 33.53, 0.1863], rel=1e-3
    )


def test_tool_measures_what_is_not_given(tmp_path):
    """Between two ranks, on features that are there."""
    write_features(tmp_path / "f", [mixture(n=500)])
    ended, other = cluster(f"--features={tmp_path / 'f'}", "--k=20", "--tflops=0.01", world_size=2)
    assert (ended.code, other.code) == (0, 0), ended.output + other.output
    for words in (
        "measured: between the 2 ranks",
        "of the files of",
        "0.01 TFLOP/s a rank (given)",
        "500 features of 24",
    ):
        assert words in ended.output
    assert other.output == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"features": "f", "output_dir": "c", "gpus": 8}, "--gpus only plan"),
        ({"dry_run": True}, "--dry_run needs --features, or --num_features and --dim"),
        ({"dry_run": True, "features": "f", "dim": 3}, "are for a --dry_run without --features"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        ClusterConfig(**flags)
