"""tools/bench.py: what it compares is the same computation, and what it writes is complete. No times are judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlcd_ds.benchmarks import head as benchmarks_head
from mlcd_ds.benchmarks.head import HeadStep, MaterialisedStep, Shape, bench_head, parse_shapes, peers_draw
from mlcd_ds.benchmarks.kmeans import bench_kmeans, exact_ids, lloyd_step, one_iteration, random_on_device
from mlcd_ds.config import BenchHeadConfig, BenchKMeansConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.topology import Topology

ROOT = Path(__file__).resolve().parents[1]
TINY = "B8_K2500_D16_r0.1"
CONTENDERS = {"products", "head", "materialised", "sampling", "peers_sampling", "optimizer"}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def numbers(value):
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def test_a_run_writes_finite_numbers_and_no_path(tmp_path):
    output = tmp_path / "head.json"
    flags = ["--shapes", TINY, "--repeats", "2", "--threads", "1", "--memory", "--memory_batches", "8"]
    ended = bench("head", *flags, "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    assert "head/products" in ended.stdout and "head/materialised" in ended.stdout
    text = output.read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    result = json.loads(text)
    assert result["command"].startswith(f"python tools/bench.py head --shapes {TINY}")
    assert {"device", "threads", "ranks", "torch", "workspace_mb", "labels_per_image"} <= set(result)
    assert all(math.isfinite(number) for number in numbers(result))
    (row,) = result["timing"]
    assert (row["shape"], row["B"], row["K"], row["D"], row["r"]) == (TINY, 8, 2500, 16, 0.1)
    assert 210 < row["S"] < 400  # 64 positives at most, and a tenth of the others
    assert set(row["seconds"]) == CONTENDERS
    assert all(len(times["all"]) == 2 and times["min"] <= times["median"] for times in row["seconds"].values())
    assert {"head_per_products", "head_gflops", "sampling_per_head", "peers_per_sampling"} <= set(row)
    assert {"materialised_per_head", "head_rate_share", "optimizer_per_head"} <= set(row)
    (row,) = result["memory"]
    assert {"head_bytes", "materialised_bytes", "head_per_materialised"} <= set(row)
    assert [at["B"] for at in row["batches"]] == [8]


def test_two_ranks_measure_their_own_shards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = bench_head(BenchHeadConfig(shapes=TINY, ranks=2, repeats=1, threads=1))
    (row,) = result["timing"]
    assert result["ranks"] == 2
    assert 90 < row["S"] < 220  # of half the classes
    assert set(row["seconds"]) == CONTENDERS - {"materialised"}


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_materialised_step_is_the_head_in_float64(rate):
    config = BenchHeadConfig(labels_per_image=3, workspace_mb=1)
    step = HeadStep(Shape(6, 2500, 16, rate), config, Topology.single(), dtype=torch.float64)
    loss, gradient = step.run()
    embeddings = step.embeddings_bD.grad
    other = MaterialisedStep(step)
    other_loss, other_gradient = other.run()
    assert torch.equal(other.rows_S, gradient.rows_S)
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_gradient, gradient.values_SD, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.embeddings_bD.grad, embeddings, rtol=1e-9, atol=1e-12)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bfloat16_is_checked_too(on_cpu):
    result = bench_head(BenchHeadConfig(shapes=f"{TINY},{TINY}_bfloat16", repeats=1, threads=1))
    one, other = result["timing"]
    assert (one["dtype"], other["dtype"]) == ("float32", "bfloat16")
    assert one["loss_difference"] <= 1e-4 and other["loss_difference"] <= 1e-2
    assert one["loss"] != other["loss"]


def test_materialised_logits_that_do_not_fit_are_said_and_the_rest_is_measured(on_cpu, monkeypatch, tmp_path, capsys):
    def out_of_memory(step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 70 GiB")

    monkeypatch.setattr(MaterialisedStep, "run", out_of_memory)
    bench_head(BenchHeadConfig(shapes=TINY, repeats=1, threads=1, output=str(tmp_path / "x.json")))
    assert "materialised: CUDA out of memory" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "x.json").read_text())["timing"]
    assert row["peak_bytes"] == {"materialised": None} and "materialised" not in row["seconds"]


def test_every_shape_is_written_before_the_next_is_measured(on_cpu, tmp_path, monkeypatch):
    output = tmp_path / "x.json"
    measured = []

    def time_shape(shape, config, topology):
        measured.append(json.loads(output.read_text())["timing"] if output.exists() else [])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"shape": str(shape)}

    monkeypatch.setattr(benchmarks_head, "_time_shape", time_shape)
    with pytest.raises(KeyboardInterrupt):
        bench_head(BenchHeadConfig(shapes=",".join([TINY] * 3), threads=1, output=str(output)))
    assert [len(before) for before in measured] == [0, 1, 2]


TINY_KMEANS = {"points": 60, "k": 200, "d": 16, "repeats": 2, "threads": 1, "lloyd_points": 600, "lloyd_k": 30}
TINY_KMEANS |= {"levels": True, "levels_points": 2000, "levels_k": 150, "levels_d": 16, "levels_probes": "4,0"}
TINY_KMEANS |= {"lloyd_d": 32, "lloyd_repeats": 1, "iteration_k": 20, "iteration_d": 16, "iteration_points": 300}


def test_kmeans_is_measured_with_every_search_and_against_faiss(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    result = bench_kmeans(BenchKMeansConfig(**TINY_KMEANS, output=str(tmp_path / "k.json")))
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "k.json").read_text()) == json.loads(json.dumps(result))
    assert str(tmp_path) not in result["command"]
    assert all(math.isfinite(number) for number in numbers(result))
    searches = {f"{name} top-{top}" for name in ("faiss", "torch", "ivf") for top in (1, 8)}
    assert set(result["search"]["seconds"]) == searches | {"product"} and set(result["search"]["found"]) == searches
    assert all(share == 1 for name, share in result["search"]["found"].items() if not name.startswith("ivf"))
    assert [row["iterations"] for row in result["lloyd"]] == [1, 5]
    for row in result["lloyd"]:  # the same start and the same iterations: the same centers
        for name in ("faiss", "torch"):
            assert row["objective"][name] == pytest.approx(row["objective"]["faiss.Kmeans"], rel=2e-3)
    assert set(result["iteration"]["extrapolated_hours"]) == {"8", "64"}
    levels = result["levels"]["objective"]
    assert set(levels) == {"flat", "two levels, 4 probes", "two levels, all centers"}
    assert min(levels.values()) > 0.98 * levels["flat"]
    assert 0.8 < result["levels"]["search_check"]["two levels, 4 probes"]["found"] < 1


def test_peak_memory_of_a_search_is_measured():
    result = bench_kmeans(
        BenchKMeansConfig(
            **TINY_KMEANS | {"search": False, "lloyd": False, "levels": False, "memory": True, "tops": "1"},
            backends="torch",
        )
    )
    assert [row["search"] for row in result["memory"]] == ["torch top-1"]


def test_one_iteration_on_a_device_is_lloyds():
    """What a GPU is timed with, on the CPU, against a dense computation; blocks that do not divide the features."""
    features, centers = random_on_device(300, 20, 16, torch.device("cpu"), seed=3)
    new, objective = lloyd_step(features, centers, block=77)
    unit = torch.nn.functional.normalize(features.double())
    cosine = unit @ centers.double().T
    sums = torch.zeros(20, 16, dtype=torch.float64).index_add_(0, cosine.argmax(1), unit)
    torch.testing.assert_close(new.double(), torch.nn.functional.normalize(sums), rtol=0, atol=1e-6)
    assert objective == pytest.approx(float(cosine.max(1)[0].mean()), rel=1e-6)
    assert one_iteration(300, 20, 16, torch.device("cpu"), seed=3, block=77)["objective"] == objective
    ids = exact_ids(features.float().numpy(), centers.numpy(), 3)
    assert (ids[:, 0] == cosine.argmax(1).numpy()).mean() > 0.99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tops": "1,x"}, "whole numbers"),
        ({"backends": "faiss,annoy"}, "expected some of faiss, torch, ivf"),
        ({"tops": "9", "k": 8}, "9 nearest of --k 8"),
        ({"lloyd_k": 601, "lloyd_points": 600}, "more than --lloyd_points"),
        ({"levels_k": 601, "levels_points": 600}, "more than --levels_points"),
        ({"levels_probes": "-1"}, "whole numbers from 0"),
        ({"output": "no/such/folder/x.json"}, "folder does not exist"),
    ],
)
def test_flags_of_kmeans_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        bench_kmeans(BenchKMeansConfig(**flags))


def test_peers_draw_keeps_the_positives():
    labels = torch.tensor([[3, 40], [41, 250]])
    rows = peers_draw(labels, 40, 140, 0.1)
    assert len(rows) == 10 and {0, 1} <= set(rows.tolist()) and rows.tolist() == sorted(set(rows.tolist()))
    assert peers_draw(labels, 40, 140, 0.01).tolist() == [0, 1]  # more positives than asked for


@pytest.mark.parametrize(
    "text", ["", "B8", "8,100,16,0.1", "B8_K100_D16_r0.1,", "B8_K100_D16_r1.5", "B0_K100_D16_r0.1"]
)
def test_a_malformed_shape_names_the_format(text):
    with pytest.raises(ConfigError, match=r"B256_K200000_D512_r0\.1|at least 1, and r above 0"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shapes": "B9_K100_D16_r0.1", "ranks": 2}, "does not divide by --ranks 2"),
        ({"memory": True, "ranks": 2}, "one rank"),
        ({"memory_batches": "8,x"}, "whole numbers"),
        ({"shapes": "B8_K4_D16_r0.1"}, "more than the 4 classes"),
        ({"output": "no/such/folder/x.json"}, "folder does not exist"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        bench_head(BenchHeadConfig(**flags))


@pytest.mark.parametrize("arguments", [[], ["heads"]])
def test_sub_commands_are_listed(arguments):
    ended = bench(*arguments)
    assert ended.returncode == 2
    assert "expected one of head" in ended.stderr and "Traceback" not in ended.stderr
