"""RowAdamW against torch.optim.AdamW and against a dense oracle that moves just the sampled rows."""

import pytest
import torch
from ranks import run_ranks

from mlcd_ds import optim
from mlcd_ds.optim import GradientSum, RowAdamW, round_stochastically, sharded_norms
from mlcd_ds.sharded_loss import RowGradient

SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def start(rows=12, dim=5, dtype=torch.float64):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_rows_every_step_is_torch_adamw(dtype):
    ours, theirs = start(dtype=dtype), torch.nn.Parameter(start(dtype=dtype))
    row_adamw = RowAdamW(ours, **SETTINGS)
    adamw = torch.optim.AdamW([theirs], lr=1.0, foreach=False, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        gradient = torch.randn(12, 5, generator=generator, dtype=dtype)
        learning_rate = 1e-2 / (step + 1)
        row_adamw.step(RowGradient(torch.arange(12), gradient), learning_rate)
        adamw.param_groups[0]["lr"] = learning_rate
        theirs.grad = gradient
        adamw.step()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


def test_sampled_rows_equal_an_oracle_with_one_adamw_per_row():
    ours = start()
    row_adamw = RowAdamW(ours, **SETTINGS)
    oracle = [torch.nn.Parameter(row.clone()) for row in start()]
    optimizers = [torch.optim.AdamW([row], lr=1e-2, foreach=False, **SETTINGS) for row in oracle]
    generator = torch.Generator().manual_seed(2)
    for _ in range(40):
        rows = torch.randperm(12, generator=generator)[:4].sort().values
        values = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        row_adamw.step(RowGradient(rows, values), 1e-2)
        for row, value in zip(rows.tolist(), values, strict=True):
            oracle[row].grad = value.clone()
            optimizers[row].step()
    torch.testing.assert_close(ours, torch.stack([row.detach() for row in oracle]), rtol=1e-12, atol=1e-12)


def test_rows_not_sampled_stay_bit_for_bit():
    ours = start()
    row_adamw = RowAdamW(ours, **SETTINGS)
    row_adamw.step(RowGradient(torch.tensor([3]), torch.ones(1, 5, dtype=torch.float64)), 1e-2)
    untouched = torch.arange(12) != 3
    assert torch.equal(ours[untouched], start()[untouched])
    assert not row_adamw.exp_avg_cD[untouched].any()
    assert row_adamw.steps_c.tolist() == [0, 0, 0, 1] + [0] * 8


def test_micro_steps_are_summed_row_by_row():
    parts = [
        (torch.tensor([1, 4]), [[1.0], [2.0]]),
        (torch.tensor([0, 4]), [[10.0], [20.0]]),
        (torch.tensor([4]), [[100.0]]),
    ]
    total = GradientSum([rows for rows, _ in parts], torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match="no gradient was added"):
        _ = total.gradient
    for index, (rows, values) in enumerate(parts):
        assert not total.add(index, RowGradient(rows, torch.tensor(values)))
    assert total.gradient.rows_S.tolist() == [0, 1, 4]
    assert total.gradient.values_SD.flatten().tolist() == [10.0, 1.0, 122.0]
    with pytest.raises(ValueError, match="at least one"):
        GradientSum([])


def test_whole_micro_steps_are_summed_in_the_first_ones_memory():
    rows = torch.arange(2)
    total = GradientSum([rows] * 3)
    gradients = [RowGradient(rows, torch.full((2, 1), value), is_whole=True) for value in (1.0, 2.0, 4.0)]
    assert [total.add(index, gradient) for index, gradient in enumerate(gradients)] == [True, False, False]
    assert total.gradient is gradients[0]
    assert total.gradient.is_whole
    assert total.gradient.values_SD.flatten().tolist() == [7.0, 7.0]


def test_norm_is_over_all_shards():
    matrix = start()
    for world_size in (1, 2, 3):

        def norms(topology):
            own = matrix.tensor_split(topology.world_size)[topology.rank]
            norms_H, riders = sharded_norms([own, 3 * own], topology, riders=torch.tensor([1.0, topology.rank]))
            return [*norms_H.tolist(), *riders.tolist()]

        norm = matrix.norm().item()
        for found in run_ranks(world_size, norms):
            assert found == pytest.approx([norm, 3 * norm, world_size, sum(range(world_size))], rel=1e-14)


def test_result_does_not_depend_on_the_blocks(monkeypatch):
    results = []
    for block_bytes in (1, 100, 1 << 20):
        monkeypatch.setitem(optim.BLOCK_BYTES, "cpu", block_bytes)
        for gradient in (
            RowGradient(torch.arange(12), start(), is_whole=True),
            RowGradient(torch.arange(12), start()),
        ):
            centers = start()
            row_adamw = RowAdamW(centers, **SETTINGS)
            row_adamw.step(gradient, 1e-2)
            row_adamw.step(gradient, 1e-2)
            results.append((centers, *row_adamw.state_dict().values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_temporary_has_the_size_of_the_shard():
    """The largest tensor that a step of 64 of 4,096 rows makes has 64 rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = isinstance(result, torch.Tensor) and not any(result is a for a in args) and result._base is None
            if made:
                self.elements = max(self.elements, result.numel())
            return result

    centers = start(rows=4096, dim=8)
    row_adamw = RowAdamW(centers, **SETTINGS)
    with Largest() as largest:
        row_adamw.step(RowGradient(torch.arange(0, 4096, 64), torch.ones(64, 8, dtype=torch.float64)), 1e-2)
    assert largest.elements == 64 * 8


def test_stochastic_rounding_is_right_on_average():
    values = torch.tensor([1.0, 1.001, -3.003, 1e-20, 0.0, 7e37, -1.3e-5, torch.finfo(torch.float32).max])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 1 << 16, (4000, len(values)), generator=generator, dtype=torch.int32)
    draws = torch.stack([round_stochastically(values, each) for each in noise]).double()
    assert torch.isfinite(draws).all()
    step = values.double().abs() * 2.0**-7
    assert ((draws - values.double()).abs() <= step).all()
    assert ((draws.mean(0) - values.double()).abs() <= 6 * step / 4000**0.5)[:-1].all()
    assert (draws[:, 0] == 1).all()
    assert (draws[:, 4] == 0).all()


@pytest.mark.parametrize("whole", [True, False])
def test_bfloat16_moments_are_rounded_alike_whatever_the_shards(whole):
    """The noise of a row is that of its global number; it is uniform, and neither rows, columns nor steps repeat it."""
    rows = torch.arange(1000) if whole else torch.arange(0, 1000, 3)
    gradient = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(4))
    shards = [(0, 1000), (0, 300), (300, 301), (301, 1000)]
    found = []
    for first, stop in shards:
        centers = torch.zeros(stop - first, 8)
        optimizer = RowAdamW(centers, **SETTINGS, moments=torch.bfloat16, seed=7, first_row=first)
        here = (rows >= first) & (rows < stop)
        optimizer.step(RowGradient(rows[here] - first, gradient[here].clone()), 1e-3, step=5)
        found.append((optimizer.exp_avg_cD, optimizer.exp_avg_sq_cD))
    for one, *parts in zip(*found, strict=True):
        assert torch.equal(one, torch.cat(parts))
    noise = optimizer._noise(torch.arange(699), 5)
    assert len(noise.unique()) > 0.999 * noise.numel()
    assert len(torch.cat([noise, optimizer._noise(torch.arange(699), 6)]).unique()) > 0.999 * 2 * noise.numel()
    for half in (noise & 0xFFFF, noise >> 16 & 0xFFFF):
        counts = torch.bincount((half >> 12).flatten(), minlength=16)
        assert ((counts - noise.numel() / 16).abs() < 5 * (noise.numel() / 16) ** 0.5).all()


def test_bfloat16_moments_follow_the_float32_ones_where_plain_rounding_stalls():
    """A second moment that falls by a thousandth a step: stochastic rounding follows, rounding to nearest stands still."""
    single = RowAdamW(start(dtype=torch.float32), **(SETTINGS | {"betas": (0.9, 0.999)}))
    half = RowAdamW(start(dtype=torch.float32), **(SETTINGS | {"betas": (0.9, 0.999)}), moments=torch.bfloat16)
    again = RowAdamW(start(dtype=torch.float32), **(SETTINGS | {"betas": (0.9, 0.999)}), moments=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(12, 5, generator=generator) * (1.0 if step == 0 else 1e-3) for step in range(700)]
    for step, gradient in enumerate(gradients):
        for optimizer in (single, half, again):
            optimizer.step(RowGradient(torch.arange(12), gradient.clone()), 1e-3, step)
    assert half.exp_avg_cD.dtype == half.exp_avg_sq_cD.dtype == torch.bfloat16
    ratio = half.exp_avg_sq_cD.double().sum() / single.exp_avg_sq_cD.double().sum()
    assert ratio.item() == pytest.approx(1, abs=0.05)
    nearest = gradients[0].square() * 1e-3
    for _ in range(700):
        nearest = (nearest.bfloat16().float() * 0.999).bfloat16().float()
    assert nearest.double().sum() / single.exp_avg_sq_cD.double().sum() > 1.5
    assert torch.equal(half.exp_avg_sq_cD, again.exp_avg_sq_cD)
    assert torch.equal(half.centers_cD, again.centers_cD)
    torch.testing.assert_close(half.centers_cD, single.centers_cD, rtol=0, atol=0.03)
