"""The Triton kernels against the dense float64 definition and torch: on a GPU where there is one, else interpreted."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from processes import ROOT, run_script

pytest.importorskip("triton", reason="the kernels' tests need triton, which exists for Linux alone")

from mlcd_ds import sharded_loss
from mlcd_ds.batch import NO_LABEL
from mlcd_ds.kernels.epilogue import exponentials
from mlcd_ds.losses import LossSpec, dense_loss
from mlcd_ds.optim import RowAdamW
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.sharded_loss import RowGradient
from mlcd_ds.topology import Topology

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""bfloat16 factors move the logits, of up to 16, by some hundredths."""
OBJECTIVES, MARGINS = ("mlcd", "mlc", "cd"), ("arc", "cos", "none")


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [None, 0.3])
@pytest.mark.parametrize(
    ("n", "t", "first", "S"), [(1, 16, 0, 3), (37, 272, 0, 259), (17, 304, 512, 800), (33, 48, 16, 5)]
)
def test_exponentials_mask_round_and_sum(n, t, first, S, largest, out_dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, t, generator=generator)
    columns = torch.randint(0, S + 1, (n, 3), generator=generator)
    out = torch.full((n, first + t + 16), 7.0).to(out_dtype)
    given, out = logits.to(DEVICE), out.to(DEVICE)
    sums = exponentials(given, out, columns.to(DEVICE), first, S, largest).cpu()
    out = out.cpu()
    expected = logits.double().exp()
    column = first + torch.arange(t)
    drop = (column >= S)[None] | (column[None, :, None] == columns[:, None]).any(2)
    if largest is not None:
        drop |= logits > largest
    expected[drop] = 0
    written = out[:, first : first + t].double()
    assert not written[drop].any()
    # The interpreter cuts off where a GPU rounds to the nearest: bfloat16 is off by a whole unit of its last place.
    torch.testing.assert_close(written, expected, rtol=1e-6 if out_dtype == torch.float32 else 2**-7, atol=0)
    torch.testing.assert_close(sums.double(), expected.sum(1), rtol=1e-5, atol=1e-6)
    assert (out[:, :first] == 7).all() and (out[:, first + t :] == 7).all(), "nothing beside the tile is written"


def case(dim, classes=331, images=37):
    """Odd sizes; rows with 0 to 4 positives, some named twice."""
    generator = torch.Generator().manual_seed(dim)
    embeddings = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    centers = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (images, 4), generator=generator)
    labels[::7, 1] = labels[::7, 0]
    for row in range(images):
        labels[row, row % 5 :] = NO_LABEL
    return embeddings, centers, labels


def run(embeddings, centers, labels, rate, stats=False, **options):
    head = PartialFC(
        len(centers),
        centers.shape[1],
        Topology.single(DEVICE),
        sample_rate=rate,
        init_centers=centers,
        workspace_mb=0.02,
        seed=4,
        **options,
    )
    mine = embeddings.float().to(DEVICE).requires_grad_()
    out = head(mine, labels, step=2, collect_stats=stats)
    out.loss.backward()
    (gradient,) = head.take_gradients()
    return out, mine.grad.cpu(), RowGradient(gradient.rows_S.cpu(), gradient.values_SD.cpu())


def dense(embeddings, centers, labels, rows, objective, margin_type):
    """loss, gradients of the embeddings and of the centers `rows`, in float64 on the CPU."""
    sampled = torch.zeros(len(centers), dtype=torch.bool)
    sampled[rows] = True
    e, c = embeddings.clone().requires_grad_(), centers.clone().requires_grad_()
    loss = dense_loss(e, c, labels, LossSpec(objective, 16.0, 0.3, margin_type, "straight_through", None), sampled)
    loss.backward()
    return loss.item(), e.grad, c.grad[rows]


def assert_near(ours, dense, tolerance):
    assert (ours.double() - dense).norm() <= tolerance * dense.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 512, 768, 1024])
def test_head_with_the_kernels_equals_the_dense_definition(monkeypatch, dim, precision):
    monkeypatch.setattr(sharded_loss, "TILE_BYTES", 4 * 37 * 96)  # several tiles of columns
    embeddings, centers, labels = case(dim)
    tolerance = TOLERANCE[precision]
    for objective, margin_type, rate in itertools.product(OBJECTIVES, MARGINS, (0.3, 1.0)):
        options = {"objective": objective, "margin_type": margin_type, "scale": 16.0}
        out, grad, gradient = run(embeddings, centers, labels, rate, kernels="triton", precision=precision, **options)
        loss, d_embeddings, d_centers = dense(embeddings, centers, labels, gradient.rows_S, objective, margin_type)
        assert out.loss.item() == pytest.approx(loss, rel=tolerance)
        assert_near(grad, d_embeddings, tolerance)
        assert_near(gradient.values_SD, d_centers, tolerance)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="two ranks need two GPUs, and here they share one")
def test_sharded_head_with_the_kernels_equals_the_dense_definition(tmp_path):
    ended = run_script(2, [ROOT / "tests" / "kernels_worker.py", tmp_path])
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.output[-3000:] for rank in ended)
    per_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    embeddings, centers, labels = case(64)
    for precision, tolerance in TOLERANCE.items():
        found = [rank[precision] for rank in per_rank]
        rows = torch.cat([rank["rows"] for rank in found])
        loss, d_embeddings, d_centers = dense(embeddings, centers, labels, rows, "mlcd", "arc")
        assert [rank["loss"] for rank in found] == pytest.approx([loss] * 2, rel=tolerance)
        assert_near(torch.cat([rank["embeddings"] for rank in found]), d_embeddings, tolerance)
        assert_near(torch.cat([rank["centers"] for rank in found]), d_centers, tolerance)


@pytest.mark.parametrize("options", [{}, {"negative_filter": 0.05}, {"margin_gradient": "exact"}, {"scale": 64.0}])
def test_kernels_and_torch_agree_in_loss_gradients_and_statistics(options):
    embeddings, centers, labels = case(64)
    results = [
        run(embeddings, centers, labels, 0.5, True, kernels=kernels, **options) for kernels in ("torch", "triton")
    ]
    (out, grad, gradient), (other_out, other_grad, other_gradient) = results
    torch.testing.assert_close(other_out.loss, out.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(other_grad, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())
    values, other_values = gradient.values_SD, other_gradient.values_SD
    torch.testing.assert_close(other_values, values, rtol=1e-3, atol=1e-5 * values.abs().max().item())
    for name, value in out.stats.items():
        torch.testing.assert_close(other_out.stats[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_sums_that_need_a_maximum_are_left_to_torch():
    embeddings, centers, labels = case(64)
    results = [run(embeddings, centers, labels, 1.0, kernels=kernels, scale=256.0) for kernels in ("torch", "triton")]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dim", [3, 64, 768])
def test_row_adamw_is_torchs(dim):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(29, dim, generator=generator).to(DEVICE)
    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    optimizers = [RowAdamW(start.clone(), **settings, kernels=kernels) for kernels in ("torch", "triton")]
    for step in range(12):
        whole = step % 4 == 0
        rows = torch.arange(29) if whole else torch.randperm(29, generator=generator)[:7].sort().values
        values = torch.randn(len(rows), dim, generator=generator)
        for optimizer in optimizers:
            optimizer.step(RowGradient(rows.to(DEVICE), values.to(DEVICE), is_whole=whole), 1e-2)
    for ours, theirs in zip(optimizers[1].state_dict().values(), optimizers[0].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizers[1].centers_cD, optimizers[0].centers_cD, rtol=1e-5, atol=1e-6)


def test_cpu_without_the_interpreter_is_refused():
    code = "import torch; from mlcd_ds.kernels import check_available; check_available(torch.device('cpu'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "ConfigError: --head_kernels triton needs a GPU, this rank runs on 'cpu'" in done.stderr
