"""The sharded head equals the dense float64 definition: loss, gradient of embeddings, gradient of centers."""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from mlcd_ds import collectives, sharded_loss
from mlcd_ds.batch import NO_IMAGE, NO_LABEL
from mlcd_ds.errors import ConfigError
from mlcd_ds.losses import LossSpec, apply_margin, dense_loss, loss_from_sums
from mlcd_ds.partial_fc import PartialFC, random_rows
from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import ClassSampler
from mlcd_ds.sharded_loss import ALIGNMENT, HISTOGRAM_BINS
from mlcd_ds.topology import Topology

RTOL = 1e-10
WORLD_SIZES = (1, 2, 3, 8)


@dataclass
class Case:
    """A global batch and how it is dealt to the ranks."""

    num_classes: int = 37
    dim: int = 6
    images: int = 13
    labels_per_image: int = 4
    sample_rate: float = 0.1
    options: dict = field(default_factory=dict)
    label_range: tuple[int, int] | None = None
    sizes: dict | None = None
    stretch: float = 1.0

    def data(self):
        generator = torch.Generator().manual_seed(7)
        embeddings = torch.randn(self.images, self.dim, generator=generator, dtype=torch.float64) * self.stretch
        low, high = self.label_range or (0, self.num_classes)
        labels = torch.randint(low, high, (self.images, self.labels_per_image), generator=generator)
        # Rows with 0 to l positives, and row 3 with a duplicate.
        for row in range(self.images):
            labels[row, self.labels_per_image - row % (self.labels_per_image + 1) :] = NO_LABEL
        if self.labels_per_image > 1 and self.images > 10:
            labels[10, :2] = labels[10, 0].clamp_min(low)
        centers = torch.randn(self.num_classes, self.dim, generator=generator, dtype=torch.float64) * 3
        return embeddings, labels, centers

    def split(self, world_size: int) -> list[int]:
        if self.sizes and world_size in self.sizes:
            return self.sizes[world_size]
        return [self.images // world_size + (rank < self.images % world_size) for rank in range(world_size)]


def run_sharded(case: Case, world_size: int, workspace_mb: float = 1e-3, dtype: torch.dtype = torch.float64):
    """loss of each rank, gradient of the embeddings [G, D], of the centers [K, D], the sampled classes [K] bool."""
    embeddings, labels, centers = case.data()
    sizes = case.split(world_size)

    def one(topology):
        start = sum(sizes[: topology.rank])
        own = slice(start, start + sizes[topology.rank])
        head = PartialFC(
            case.num_classes,
            case.dim,
            topology,
            sample_rate=case.sample_rate,
            dtype=dtype,
            workspace_mb=workspace_mb,
            init_centers=_rows_of(centers, case.num_classes, topology),
            **case.options,
        )
        mine = embeddings[own].to(dtype, copy=True).requires_grad_()
        out = head(mine, labels[own], step=5)
        out.loss.backward()
        (gradient,) = head.take_gradients()
        assert head.take_gradients() == []
        return out.loss.item(), mine.grad, gradient.rows_S + head.start, gradient.values_SD

    results = run_ranks(world_size, one)
    grad_centers = torch.zeros_like(centers)
    sampled = torch.zeros(case.num_classes, dtype=torch.bool)
    for _, _, rows, values in results:
        grad_centers[rows] = values.double()
        sampled[rows] = True
    # The factor W of gather_rows is the engine's average taken back (test_gather_rows_...); here it is divided out.
    grad_embeddings = torch.cat([grad for _, grad, _, _ in results]) / world_size
    return [loss for loss, *_ in results], grad_embeddings, grad_centers, sampled


def _rows_of(centers, num_classes, topology):
    partition = ClassPartition(num_classes, topology.world_size)
    return centers[partition.start(topology.rank) : partition.stop(topology.rank)].clone()


def run_dense(case: Case, sampled):
    embeddings, labels, centers = case.data()
    options = {
        "objective": "mlcd",
        "scale": 64.0,
        "margin": 0.3,
        "margin_type": "arc",
        "margin_gradient": "straight_through",
        "negative_filter": None,
    } | {name: value for name, value in case.options.items() if name != "sample_budget"}
    embeddings.requires_grad_()
    centers.requires_grad_()
    loss = dense_loss(embeddings, centers, labels, LossSpec(**options), sampled)
    loss.backward()
    return loss.item(), embeddings.grad, centers.grad


def assert_equals_dense(case: Case, world_size: int, **options):
    losses, grad_embeddings, grad_centers, sampled = run_sharded(case, world_size, **options)
    loss, dense_embeddings, dense_centers = run_dense(case, sampled)
    assert losses == pytest.approx([loss] * world_size, rel=RTOL)
    for name, sharded, dense in (
        ("embeddings", grad_embeddings, dense_embeddings),
        ("centers", grad_centers, dense_centers),
    ):
        # Relative to the largest entry: an entry may be a difference of nearly equal numbers.
        torch.testing.assert_close(
            sharded,
            dense,
            rtol=RTOL,
            atol=RTOL * dense.abs().max().item(),
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )
    return sampled


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
@pytest.mark.parametrize("margin_type", ["arc", "cos", "none"])
def test_loss_and_gradients_equal_the_dense_definition(world_size, objective, margin_type):
    for sample_rate, margin_gradient in itertools.product((0.1, 1.0), ("straight_through", "exact")):
        options = {"objective": objective, "margin_type": margin_type, "margin_gradient": margin_gradient}
        assert_equals_dense(Case(sample_rate=sample_rate, options=options), world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
def test_scales(world_size, scale):
    for objective in ("mlcd", "mlc", "cd"):
        assert_equals_dense(Case(options={"scale": scale, "objective": objective}), world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sample_rate", [0.1, 1.0])
def test_shard_without_positives(world_size, sample_rate):
    sampled = assert_equals_dense(Case(label_range=(0, 4), sample_rate=sample_rate), world_size)
    assert sampled[:4].any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", ["negatives", "total"])
def test_many_classes_and_few_positives(world_size, budget):
    """The draw does not depend on W."""
    case = Case(num_classes=2500, sample_rate=0.1, options={"sample_budget": budget})
    sampled = assert_equals_dense(case, world_size)
    assert torch.equal(sampled, run_sharded(case, 1)[3])
    positives = len(case.data()[1].unique()) - 1
    expected = 250 if budget == "total" else positives + 0.1 * (2500 - positives)
    assert abs(sampled.sum().item() - expected) < 6 * 15


def test_ranks_with_uneven_and_empty_batches():
    case = Case(sizes={2: [13, 0], 3: [0, 12, 1], 8: [0, 0, 5, 1, 0, 7, 0, 0]})
    for world_size in (2, 3, 8):
        assert_equals_dense(case, world_size)


def test_negative_filter_ignores_likely_false_negatives():
    case = Case(options={"negative_filter": 0.1, "objective": "mlcd"})
    for world_size in WORLD_SIZES:
        assert_equals_dense(case, world_size)
    assert run_dense(case, None)[0] < run_dense(Case(), None)[0]


def test_result_does_not_depend_on_the_workspace():
    case = Case(num_classes=300, images=40)
    tiny = run_sharded(case, 2, workspace_mb=1e-6)  # one image per chunk
    large = run_sharded(case, 2, workspace_mb=64)
    for a, b in zip(tiny[1:], large[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_padding_rows_take_no_part():
    """Capacity beyond the batch, and rows that are no image, leave loss and gradients as they are."""
    embeddings, labels, centers = Case().data()
    labels = torch.cat([labels, torch.full((2, labels.shape[1]), NO_IMAGE)])
    embeddings = torch.cat([embeddings, torch.randn(2, embeddings.shape[1], dtype=torch.float64)])

    def run(rows, capacity):
        head = PartialFC(37, 6, dtype=torch.float64, init_centers=centers)
        mine = embeddings[:rows].clone().requires_grad_()
        out = head(mine, labels[:rows], step=5, capacity=capacity, collect_stats=True)
        out.loss.backward()
        return out, mine.grad, head.take_gradients()[0].values_SD

    plain, padded = run(13, None), run(15, 20)
    assert padded[0].loss.item() == pytest.approx(plain[0].loss.item(), rel=1e-14)
    torch.testing.assert_close(padded[1][:13], plain[1], rtol=1e-12, atol=1e-15)
    assert not padded[1][13:].any()
    torch.testing.assert_close(padded[2], plain[2], rtol=1e-12, atol=1e-15)
    for name, value in plain[0].stats.items():
        torch.testing.assert_close(padded[0].stats[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_gather_rows_multiplies_by_the_world_size_because_the_engine_averages():
    """d(sum of all ranks' rows . weights) arrives at every rank as W times its own weights."""
    weights = torch.arange(12, dtype=torch.float64).view(6, 2)

    def one(topology):
        rows = torch.ones(6 // topology.world_size, 2, dtype=torch.float64, requires_grad=True)
        gathered = collectives.gather_rows(rows, topology)
        # Every rank computes the same mean; its part of the gradient is what its shard contributes: here 1/W of it.
        ((gathered * weights).sum() / topology.world_size).backward()
        return rows.grad

    for world_size in (1, 2, 3):
        torch.testing.assert_close(torch.cat(run_ranks(world_size, one)), weights * world_size)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(("scale", "world_size"), [(64.0, 2), (64.0, 4), (256.0, 2)])
def test_collectives_are_those_the_docstring_counts(monkeypatch, chunks, scale, world_size):
    calls = []

    def counting(function, name, result):
        def wrapper(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            calls.append((name, tensors[result].numel(), tensors[result].dtype))
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(collectives, "_all_gather_single", counting(collectives._all_gather_single, "gather", 0))
    monkeypatch.setattr(
        collectives, "_reduce_scatter_single", counting(collectives._reduce_scatter_single, "scatter", 1)
    )
    monkeypatch.setattr(dist, "all_reduce", counting(dist.all_reduce, "reduce", 0))
    G, D, K, L = 16, 4, 64, 3
    row_bytes = (K // world_size + ALIGNMENT) * 4
    workspace_mb = row_bytes * (G // chunks) / 2**20

    def one(topology):
        head = PartialFC(K, D, topology, sample_rate=1.0, scale=scale, workspace_mb=workspace_mb)
        rows = torch.randn(G // world_size, D, requires_grad=True)
        head(rows, torch.zeros(G // world_size, L, dtype=torch.long), step=0, capacity=G // world_size).loss.backward()

    run_ranks(world_size, one)
    float32 = torch.float32
    per_chunk = ("reduce", 2 * G // chunks, float32)
    shifts = 2 if scale > 80 else 1
    expected = [("gather", G * D, float32), ("gather", G * L, torch.int32), ("scatter", G * D, float32)]
    expected += [per_chunk] * chunks * shifts
    assert sorted(calls, key=str) == sorted(expected * world_size, key=str)


def test_several_heads_gather_and_give_back_the_embeddings_once(monkeypatch):
    """And learn the same as heads that each do it for themselves."""
    calls = []

    def noting(function, name):
        def wrapper(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    for name in ("_all_gather_single", "_reduce_scatter_single"):
        monkeypatch.setattr(collectives, name, noting(getattr(collectives, name), name))
    embeddings, labels, centers = Case(sample_rate=0.5).data()
    partition = ClassPartition(37, 2)

    def one(topology, shared):
        part = slice(topology.rank * 7, min(topology.rank * 7 + 7, len(embeddings)))
        heads = [
            PartialFC(
                37,
                6,
                topology,
                sample_rate=0.5,
                dtype=torch.float64,
                seed=seed,
                init_centers=centers[partition.start(topology.rank) : partition.stop(topology.rank)],
            )
            for seed in (0, 1)
        ]
        mine = embeddings[part].clone().requires_grad_()
        draws = [head.draw(head.mark(labels[part], step=0, capacity=7)) for head in heads]
        given = heads[0].gather(mine, 7) if shared else mine
        loss = sum(head(given, draw).loss * weight for head, draw, weight in zip(heads, draws, (1, 0.5), strict=True))
        loss.backward()
        return [loss.detach(), mine.grad, *[head.take_gradients()[0].values_SD for head in heads]]

    separate = run_ranks(2, lambda topology: one(topology, False))
    assert calls.count("_reduce_scatter_single") == 2 * 2
    calls.clear()
    shared = run_ranks(2, lambda topology: one(topology, True))
    assert calls.count("_all_gather_single") == 2 * 3  # two of labels, one of embeddings
    assert calls.count("_reduce_scatter_single") == 2 * 1
    for ours, theirs in zip(shared, separate, strict=True):
        for one_tensor, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one_tensor, other)


def test_what_was_gathered_for_another_head_must_fit():
    head = PartialFC(37, 6, dtype=torch.float64)
    draw = head.draw(head.mark(torch.zeros(4, 2, dtype=torch.long), step=0))
    with pytest.raises(ConfigError, match="gathered embeddings .* do not fit 4 label rows"):
        head(head.gather(torch.ones(3, 6), 5), draw)


@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_sums_relative_to_a_maximum_equal_float64_on_any_number_of_ranks(world_size, objective):
    """Scale 256 in float32, where every shard keeps its own maxima; with empty batches and a shard without positives."""
    for label_range, negative_filter in itertools.product((None, (0, 4)), (None, -0.2)):
        options = {
            "scale": 256.0,
            "objective": objective,
            "margin_gradient": "exact",
            "negative_filter": negative_filter,
        }
        case = Case(sample_rate=0.3, label_range=label_range, options=options, sizes={3: [0, 12, 1]})
        results = [run_sharded(case, world_size, dtype=dtype) for dtype in (torch.float32, torch.float64)]
        (losses, *gradients, _), (exact_losses, *exact_gradients, _) = results
        assert losses == pytest.approx(exact_losses, rel=1e-4)
        for ours, exact in zip(gradients, exact_gradients, strict=True):
            assert (ours.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("scale", [60.0, 69.0, 74.0, 78.0, 90.0])
@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
def test_gradients_are_finite_where_an_image_has_no_negative_and_the_worst_positives(objective, scale):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(3, 1)
    for negative_filter, classes in ((None, 4), (-0.98, 5000)):
        centers = torch.randn(classes, 16, generator=generator)
        centers[:4] = -1.0
        embeddings = torch.ones(3, 16).requires_grad_()
        options = {"scale": scale, "objective": objective, "negative_filter": negative_filter, "sample_rate": 1.0}
        head = PartialFC(classes, 16, init_centers=centers, margin=0.5, **options)
        out = head(embeddings, labels, step=0)
        out.loss.backward()
        assert out.loss.isfinite()
        assert embeddings.grad.isfinite().all() and head.take_gradients()[0].values_SD.isfinite().all()


@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
@pytest.mark.parametrize("scale", [64.0, 79.0])
def test_centers_gradient_keeps_its_bits_in_bfloat16_where_all_rows_are_alike(monkeypatch, objective, scale):
    """Each image's weight is then exp(-scale) / K, far down in float32's range; against float64 of the same factors."""
    generator = torch.Generator().manual_seed(0)
    K, G, D = 5000, 512, 64
    base = torch.randn(D, generator=generator)
    centers = base + 0.02 * torch.randn(K, D, generator=generator)
    embeddings = base + 0.02 * torch.randn(G, D, generator=generator)
    labels = torch.randint(0, 10, (G, 2), generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        options = {"precision": "bfloat16", "objective": objective, "scale": scale, "sample_rate": 1.0}
        head = PartialFC(K, D, init_centers=centers, dtype=dtype, **options)
        if dtype == torch.float64:  # whose factors are bfloat16 all the same
            monkeypatch.setattr(head, "_needs_shift", lambda *_: True)
        head(embeddings.to(dtype), labels, step=0).loss.backward()
        found.append(head.take_gradients()[0].values_SD[10:].double())  # the negatives
    assert (found[0] - found[1]).norm() <= 0.03 * found[1].norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"sample_budget": "total"}, {"scale": 256.0}, {"sample_rate": 1.0}, {"negative_filter": 0.2}]
    + [{"precision": "bfloat16"}, {"objective": "mlc"}, {"margin_gradient": "exact"}],
)
def test_nothing_in_a_step_asks_the_device_for_a_number(options):
    """Seen from the operations: those that a GPU answers only after all that is queued. Sizes are known by then."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from mlcd_ds.optim import RowAdamW

    asking = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            if any(
                word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
            ):
                asking.append(name)
            return func(*args, **(kwargs or {}))

    head = PartialFC(3000, 16, **{"sample_rate": 0.3, **options})
    optimizer = RowAdamW(head.centers.data, (0.9, 0.99), 1e-8, 0.1, moments=torch.bfloat16)
    embeddings = torch.randn(8, 16, requires_grad=True)
    with Watch():
        marked = head.mark(torch.randint(0, 3000, (8, 4)), step=1, capacity=8)
    sizes = tuple(marked.sizes_2.tolist())
    with Watch():
        draw = head.draw(marked, sizes)
    assert set(asking) <= {"aten.nonzero.default"} and len(asking) <= 2  # positions: nonzero_static on a GPU
    asking.clear()
    with Watch():
        head(embeddings, draw, collect_stats=True).loss.backward()
        (gradient,) = head.take_gradients()
        optimizer.step(gradient, 1e-3, 1)
    assert not asking


def test_initial_centers_do_not_depend_on_the_world_size():
    whole = run_ranks(1, lambda t: PartialFC(2500, 4, t, seed=3).centers.detach())[0]
    for world_size in (2, 3, 8):
        shards = run_ranks(world_size, lambda t: PartialFC(2500, 4, t, seed=3).centers.detach())
        assert torch.equal(torch.cat(shards), whole)
    assert not torch.equal(whole[:1024], whole[1024:2048])
    assert not torch.equal(whole, random_rows(0, 2500, 2500, 4, seed=4))


def test_cd_is_softmax_cross_entropy():
    """Eq. 3 in float64, against torch's own cross entropy."""
    embeddings, _, centers = Case().data()
    target = torch.arange(13) % 37
    head = PartialFC(
        37, 6, objective="cd", sample_rate=1.0, margin_type="none", dtype=torch.float64, init_centers=centers
    )
    loss = head(embeddings, target[:, None], step=0).loss
    cosine = torch.nn.functional.normalize(embeddings, dim=1) @ torch.nn.functional.normalize(centers, dim=1).T
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(64 * cosine, target).item(), rel=1e-12)


@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
@pytest.mark.parametrize("scale", [64.0, 256.0])
def test_float32_stays_finite_and_close_at_extreme_cosines(objective, scale):
    """Embeddings that are centers, or their opposites: cosines -1, 0 and 1."""
    centers = torch.eye(8, dtype=torch.float64).repeat(5, 1)[:37]
    embeddings = torch.cat([centers[:5], -centers[:5], torch.zeros(1, 8, dtype=torch.float64)])
    labels = torch.arange(11)[:, None].repeat(1, 3) + torch.tensor([0, 9, 20])
    results = []
    for dtype in (torch.float32, torch.float64):
        head = PartialFC(
            37,
            8,
            objective=objective,
            scale=scale,
            sample_rate=1.0,
            dtype=dtype,
            init_centers=centers,
            margin_gradient="exact",
        )
        mine = embeddings.clone().requires_grad_()
        out = head(mine, labels, step=0)
        out.loss.backward()
        results.append((out.loss.detach(), mine.grad[:10], head.take_gradients()[0].values_SD))
    for single, double in zip(*results, strict=True):
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-5 * max(1.0, double.abs().max().item()))


def test_statistics_are_those_of_the_whole_head():
    case = Case(num_classes=300, images=24, sample_rate=0.5)
    embeddings, labels, centers = case.data()
    cosine = torch.nn.functional.normalize(embeddings, dim=1) @ torch.nn.functional.normalize(centers, dim=1).T
    positive = torch.zeros_like(cosine, dtype=torch.bool)
    for row, own in enumerate(labels):
        positive[row, own[own >= 0]] = True

    def one(topology):
        sizes = case.split(topology.world_size)
        own = slice(sum(sizes[: topology.rank]), sum(sizes[: topology.rank + 1]))
        head = PartialFC(
            300, 6, topology, sample_rate=0.5, dtype=torch.float64, init_centers=_rows_of(centers, 300, topology)
        )
        rows = head.sampler.draw(labels, 5) + head.start
        return head(embeddings[own], labels[own], step=5, collect_stats=True).stats, rows

    for world_size in (1, 3):
        results = run_ranks(world_size, one)
        sampled = torch.zeros(300, dtype=torch.bool)
        sampled[torch.cat([rows for _, rows in results])] = True
        negative = ~positive & sampled
        for stats, _ in results:
            assert stats["cosine_positive"].item() == pytest.approx(cosine[positive].mean().item())
            assert stats["cosine_negative"].item() == pytest.approx(cosine[negative].mean().item())
            assert stats["sampled_rows"].item() == sampled.sum().item()
            assert stats["positive_rows"].item() == positive.any(dim=0).sum().item()
            for name, mask in (("histogram_positive", positive), ("histogram_negative", negative)):
                expected = torch.histc(cosine[mask], HISTOGRAM_BINS, -1, 1)
                torch.testing.assert_close(stats[name], expected, msg=name)


def test_gradients_stay_as_they_are_until_they_are_given_back():
    """Two micro-steps, then recycled memory: the same numbers as a head that allocates anew."""
    embeddings, labels, centers = Case(sample_rate=0.5).data()

    def new_head():
        return PartialFC(37, 6, sample_rate=0.5, dtype=torch.float64, init_centers=centers)

    def one(head, part, step):
        head(embeddings[part].clone().requires_grad_(), labels[part], step=step).loss.backward()
        return head.take_gradients()[0]

    head = new_head()
    for step in range(4):
        parts = (slice(0, 7), slice(7, 13))
        both = [one(head, part, step) for part in parts]
        assert both[0].values_SD.data_ptr() != both[1].values_SD.data_ptr()
        for gradient, part in zip(both, parts, strict=True):
            fresh = one(new_head(), part, step)
            assert torch.equal(gradient.rows_S, fresh.rows_S)
            assert torch.equal(gradient.values_SD, fresh.values_SD)
        if step % 2:
            for gradient in both:
                head.recycle(gradient)


def test_draw_made_before_the_encoder_gives_the_same_step():
    embeddings, labels, centers = Case(sample_rate=0.5).data()
    results = []
    for early in (False, True):
        head = PartialFC(37, 6, sample_rate=0.5, dtype=torch.float64, init_centers=centers)
        mine = embeddings.clone().requires_grad_()
        out = (
            head(mine, head.draw(head.mark(labels, step=3, capacity=15)))
            if early
            else head(mine, labels, step=3, capacity=15)
        )
        out.loss.backward()
        results.append((out.loss.detach(), mine.grad, head.take_gradients()[0].values_SD))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="do not fit 15 label rows"):
        head(torch.zeros(16, 6, dtype=torch.float64), head.draw(head.mark(labels, step=3, capacity=15)))


def test_centers_learn_under_a_frozen_encoder():
    embeddings, labels, centers = Case().data()
    head = PartialFC(37, 6, dtype=torch.float64, init_centers=centers)
    head(embeddings, labels, step=0).loss.backward()
    assert head.take_gradients()[0].values_SD.abs().max() > 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
def test_bfloat16_products_and_gather_are_close_to_float32(world_size, objective):
    """Factors of 8 bits: the logits, up to 64, are off by some tenths at most; loss and gradients stay near."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(24, 64, generator=generator)
    labels = torch.randint(0, 300, (24, 4), generator=generator)
    centers = torch.randn(300, 64, generator=generator)

    def run(**options):
        def one(topology):
            own = slice(topology.rank * 24 // world_size, (topology.rank + 1) * 24 // world_size)
            head = PartialFC(
                300, 64, topology, objective=objective, sample_rate=1.0, workspace_mb=0.01, scale=16.0,
                init_centers=_rows_of(centers, 300, topology), **options,
            )  # fmt: skip
            mine = embeddings[own].clone().requires_grad_()
            out = head(mine, labels[own], step=0)
            out.loss.backward()
            return out.loss.detach(), mine.grad, head.take_gradients()[0].values_SD

        results = run_ranks(world_size, one)
        return results[0][0], torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results])

    exact = run()
    for options in ({"precision": "bfloat16"}, {"gather_precision": "bfloat16"}):
        rounded = run(**options)
        assert not torch.equal(exact[1], rounded[1])
        for one, other in zip(exact, rounded, strict=True):
            assert (one - other).norm() < 0.03 * one.norm()


def test_bfloat16_gather_halves_its_bytes(monkeypatch):
    sent = []
    original = collectives._all_gather_single

    def counting(gathered, rows, **options):
        sent.append((gathered.numel(), gathered.dtype))
        return original(gathered, rows, **options)

    monkeypatch.setattr(collectives, "_all_gather_single", counting)

    def one(topology):
        head = PartialFC(64, 4, topology, gather_precision="bfloat16")
        head(torch.randn(8, 4, requires_grad=True), torch.zeros(8, 3, dtype=torch.long), step=0, capacity=8)

    run_ranks(2, one)
    assert sent.count((64, torch.bfloat16)) == 2
    assert len(sent) == 4  # and the labels


@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
@pytest.mark.parametrize("scale", [64.0, 256.0])
def test_five_million_classes_in_float32(objective, scale):
    """Rows of few dimensions, many of them near an image: sums of millions of terms, against float64 in blocks."""
    K, D, G = 5_000_000, 4, 6
    generator = torch.Generator().manual_seed(5)
    centers = torch.randn(K, D, generator=generator)
    embeddings = torch.randn(G, D, generator=generator)
    labels = torch.randint(0, K, (G, 8), generator=generator)
    head = PartialFC(K, D, objective=objective, scale=scale, sample_rate=1.0, init_centers=centers)
    mine = embeddings.clone().requires_grad_()
    out = head(mine, labels, step=0)
    out.loss.backward()
    (gradient,) = head.take_gradients()
    assert torch.isfinite(gradient.values_SD).all()

    e = torch.nn.functional.normalize(embeddings.double(), dim=1)
    used = labels[:, :1] if objective == "cd" else labels
    sums, weighted = torch.full((G,), -torch.inf, dtype=torch.float64), torch.zeros(G, D, dtype=torch.float64)
    shift = scale
    for first in range(0, K, 500_000):
        w = torch.nn.functional.normalize(centers[first : first + 500_000].double(), dim=1)
        logits = scale * e @ w.T
        for row in range(G):
            inside = used[row][(used[row] >= first) & (used[row] < first + len(w))] - first
            logits[row, inside] = -torch.inf
        sums = torch.logaddexp(sums, logits.logsumexp(dim=1))
        weighted += (logits - shift).exp() @ w
    positive = (e[:, None] * torch.nn.functional.normalize(centers[used].double(), dim=2)).sum(-1)
    value, _ = apply_margin(positive, head.spec)
    two = loss_from_sums(objective, sums, (-scale * value).logsumexp(dim=1))
    assert out.loss.item() == pytest.approx((two.positive_G + two.negative_G).mean().item(), rel=2e-5)
    weight = (shift + two.log_negative_weight_G).exp()[:, None] * scale / G
    slopes = (-scale * value + two.log_positive_weight_G[:, None]).exp() * -scale / G
    towards = weighted * weight
    towards += (torch.nn.functional.normalize(centers[used].double(), dim=2) * slopes[..., None]).sum(1)
    along = (towards * e).sum(1, keepdim=True)
    expected = (towards - along * e) / embeddings.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("margin_type", ["arc", "cos", "none"])
@pytest.mark.parametrize("objective", ["mlc", "cd"])
def test_one_positive_is_softmax_cross_entropy(objective, margin_type):
    """Loss and both gradients in float64, against torch's own cross entropy on logits with the margin put in."""
    embeddings, _, centers = Case().data()
    target = torch.arange(13) * 2 % 37
    options = {"objective": objective, "margin_type": margin_type, "margin_gradient": "exact"}
    head = PartialFC(37, 6, sample_rate=1.0, dtype=torch.float64, init_centers=centers, **options)
    mine = embeddings.clone().requires_grad_()
    out = head(mine, target[:, None], step=0)
    out.loss.backward()

    e, c = embeddings.clone().requires_grad_(), centers.clone().requires_grad_()
    cosine = torch.nn.functional.normalize(e, dim=1) @ torch.nn.functional.normalize(c, dim=1).T
    own = cosine[torch.arange(13), target]
    with_margin = {"arc": torch.cos(torch.arccos(own) + 0.3), "cos": own - 0.3, "none": own}[margin_type]
    logits = (64 * cosine).scatter(1, target[:, None], 64 * with_margin[:, None])
    loss = torch.nn.functional.cross_entropy(logits, target)
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    torch.testing.assert_close(mine.grad, e.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.take_gradients()[0].values_SD, c.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kept_as", ["cpu", "cuda"])
@pytest.mark.parametrize("sample_rate", [0.4, 1.0])
def test_no_tensor_has_the_size_of_the_logits(monkeypatch, sample_rate, kept_as):
    """The largest tensor of forward and backward: the workspace, the rows or the images, never images x rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    G, D, K, chunk = 512, 8, 4000, 48
    monkeypatch.setattr(sharded_loss._Statistics, "MAX_PAIRS", 8 * K)
    row_bytes = (ClassSampler(ClassPartition(K, 1), 0, sample_rate, 0).likely_rows(G * 4) + ALIGNMENT) * 4
    head = PartialFC(K, D, sample_rate=sample_rate, workspace_mb=chunk * row_bytes / 2**20)
    if kept_as == "cuda":  # where nothing is kept and blocks are large
        head._memory._kept = None
    monkeypatch.setitem(sharded_loss.ROW_BLOCK_BYTES, "cpu", 4096)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = result if isinstance(result, tuple | list) else [result]
            sizes.extend((t.untyped_storage().nbytes(), str(func)) for t in found if isinstance(t, torch.Tensor))
            return result

    embeddings = torch.randn(G, D, requires_grad=True)
    labels = torch.randint(0, K, (G, 4))
    with Watch():
        head(embeddings, labels, step=0, collect_stats=True).loss.backward()
    largest, where = max(sizes)
    assert largest <= 1.07 * chunk * (K + ALIGNMENT) * 4, where
    assert largest < G * K * 4 / 7


def test_evaluation_leaves_no_gradients_and_training_goes_on():
    embeddings, labels, centers = Case(sample_rate=1.0).data()
    head = PartialFC(37, 6, sample_rate=1.0, dtype=torch.float64, init_centers=centers)
    results = []
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context:
            results.append(head(embeddings.clone(), labels, step=0).loss)
    assert results[0].item() == pytest.approx(results[2].item(), rel=1e-14)
    assert results[1].item() == pytest.approx(results[2].item(), rel=1e-14)
    assert head.take_gradients() == []
    results[2].backward()
    assert len(head.take_gradients()) == 1


def test_head_is_a_module_like_any_other():
    head = PartialFC(37, 6)
    assert list(head.state_dict()) == ["centers"]
    assert not head.eval().training
    twin = copy.deepcopy(head.train().double())
    assert twin.centers.dtype == torch.float64
    assert not hasattr(head, "centres")


def test_second_backward_is_refused():
    head = PartialFC(37, 6)
    loss = head(torch.randn(2, 6, requires_grad=True), torch.zeros(2, 1, dtype=torch.long), step=0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


@pytest.mark.parametrize("name", ["sample_budget", "precision", "gather_precision", "kernels"])
def test_misspelt_choices_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}='all': expected one of"):
        PartialFC(10, 4, **{name: "all"})


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="objective='mlx'.*mlcd, mlc, cd"):
        PartialFC(10, 4, objective="mlx")
    with pytest.raises(ConfigError, match="3 classes cannot be split over 4 ranks"):
        PartialFC(3, 4, Topology(0, 4, 0, 4, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"\(10, 5\).*\(10, 4\)"):
        PartialFC(10, 4, init_centers=torch.zeros(10, 5))
    with pytest.raises(ConfigError, match="D=4"):
        PartialFC(10, 4)(torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.long), step=0)


def test_classes_beyond_int32_are_refused():
    with pytest.raises(ConfigError, match="labels travel as int32"):
        PartialFC(1 << 31, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU there is nothing to wait for")
def test_the_host_waits_for_nothing_once_the_sizes_are_known():
    head = PartialFC(1000, 64, Topology.single("cuda"), sample_rate=0.3)
    embeddings = torch.randn(32, 64, device="cuda", requires_grad=True)
    marked = head.mark(torch.randint(0, 1000, (32, 4)).pin_memory(), step=0, capacity=32)
    sizes = tuple(marked.sizes_2.tolist())
    try:
        torch.cuda.set_sync_debug_mode("error")
        head(embeddings, head.draw(marked, sizes)).loss.backward()
        head.mark(torch.randint(0, 1000, (32, 4)).pin_memory(), step=1, capacity=32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
def test_vectors_without_direction_get_no_gradient_and_spoil_nobodys(world_size, objective, monkeypatch):
    """An all-zero embedding and an all-zero center, a positive of some: cosine 0 to everything, as in the definition."""
    data = Case.data

    def with_zeros(case):
        embeddings, labels, centers = data(case)
        embeddings[1] = 0
        centers[5] = 0
        labels[2:5, 0] = 5
        return embeddings, labels, centers

    monkeypatch.setattr(Case, "data", with_zeros)
    case = Case(sample_rate=1.0, options={"objective": objective})
    losses, grad_embeddings, grad_centers, sampled = run_sharded(case, world_size)
    loss, embeddings, centers = run_dense(case, sampled)
    assert losses == pytest.approx([loss] * world_size, rel=1e-10)
    torch.testing.assert_close(grad_embeddings, embeddings, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(grad_centers, centers, rtol=1e-8, atol=1e-12)
    assert torch.isfinite(grad_embeddings).all() and torch.isfinite(grad_centers).all()
    assert not grad_embeddings[1].any() and not grad_centers[5].any()
    assert grad_embeddings[0].any() and grad_embeddings[2].any()
