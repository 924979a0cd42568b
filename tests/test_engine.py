"""Through the DeepSpeed engine: gradients equal one float64 process on the whole batch, for every stage and accumulation."""

import pytest
import torch
from engine_worker import (
    BAD,
    BAD_COMBINATIONS,
    CLASSES,
    ENCODER,
    EPS,
    IMAGES,
    SAMPLE_RATE,
    STEPS,
    TWO_HEADS,
    TWO_WEIGHTS,
    batch_of_step,
    global_batch,
)
from processes import ROOT, run_script

from mlcd_ds.batch import NO_IMAGE, head_suffix
from mlcd_ds.losses import LossSpec, dense_loss
from mlcd_ds.models.vit import VisionTransformer, decay_groups
from mlcd_ds.partial_fc import random_rows
from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import ClassSampler

RTOL = 2e-4
ATOL_OF_LARGEST = 2e-5
"""float32 through two layers and a scale of 64; small entries are differences of large ones."""


def assert_close(ours, reference, name):
    atol = ATOL_OF_LARGEST * reference.abs().max().item()
    torch.testing.assert_close(ours.double(), reference, rtol=RTOL, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_moved_alike(ours, reference, learning_rates, name):
    """To a thousandth of what AdamW's steps may move a weight."""
    torch.testing.assert_close(
        ours.double(), reference, rtol=0, atol=1e-3 * sum(learning_rates), msg=lambda m: f"{name}: {m}"
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{world size: [each rank's results]}."""
    folder = tmp_path_factory.mktemp("engine")
    found = {}
    for world_size in (1, 2):
        ended = run_script(world_size, [ROOT / "tests" / "engine_worker.py", folder])
        assert [rank.code for rank in ended] == [0] * world_size, "\n".join(rank.output[-3000:] for rank in ended)
        found[world_size] = [
            torch.load(folder / f"world{world_size}_rank{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
    return found


def reference(missing=(), classes=(CLASSES,), weights=(1.0,)):
    """loss, gradients of encoder and of each head's centers, by autograd in float64 on the images that are there."""
    model = VisionTransformer(ENCODER, seed=1).double()
    heads = [random_rows(0, k, k, 8, seed=1 + i).double().requires_grad_() for i, k in enumerate(classes)]
    batch = global_batch(missing, classes)
    there = batch.labels_BL[:, 0] != NO_IMAGE
    spec = LossSpec("mlcd", 64.0, 0.3, "arc", "straight_through", None)
    embeddings = model(batch.images_BCHH[there])
    loss = 0
    for index, (centers, weight) in enumerate(zip(heads, weights, strict=True)):
        labels = batch.labels_BL[there, 4 * index : 4 * index + 4]
        loss = loss + weight * dense_loss(embeddings, centers, labels, spec)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, [centers.grad for centers in heads]


def assert_matches_reference(per_rank, missing=(), classes=(CLASSES,), weights=(1.0,)):
    loss, encoder, heads = reference(missing, classes, weights)
    for result in per_rank:
        assert result["applied"]
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert set(result["encoder"]) == set(encoder)
        for name, gradient in encoder.items():
            assert_close(result["encoder"][name], gradient, name)
        norm = torch.cat([gradient.flatten() for gradient in encoder.values()]).norm().item()
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for index, centers in enumerate(heads):
            assert result[f"head_norm{head_suffix(index)}"] == pytest.approx(centers.norm().item(), rel=1e-4)
    for index, centers in enumerate(heads):
        name = f"centers{head_suffix(index)}"
        assert_close(torch.cat([result[name] for result in per_rank]), centers, name)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_through_the_engine_are_those_of_one_process(results, world_size, stage, accumulation):
    assert_matches_reference([rank[f"{stage},{accumulation}"] for rank in results[world_size]])


@pytest.mark.parametrize("world_size", [1, 2])
def test_slots_without_an_image_do_not_count(results, world_size):
    assert_matches_reference([rank["missing"] for rank in results[world_size]], missing=(0, 7, 8))


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_count_by_their_images(results, world_size):
    """Missing images make the three micro-batches uneven; the step is still the mean over all images that are there."""
    assert_matches_reference([rank["missing,3"] for rank in results[world_size]], missing=(0, 1, 7))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_heads_of_different_sizes_are_the_weighted_sum_of_one_process(results, world_size, accumulation):
    """Encoder and both heads, with slots without an image, in uneven micro-batches where accumulation is 3."""
    per_rank = [rank[f"two heads,{accumulation}"] for rank in results[world_size]]
    assert_matches_reference(per_rank, missing=(0, 1, 7), classes=TWO_HEADS, weights=TWO_WEIGHTS)
    first = torch.cat([rank["centers_before"] for rank in per_rank])
    second = torch.cat([rank["centers_before_1"] for rank in per_rank])
    assert not torch.equal(first[: len(second)], second)  # seeds of their own


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_head_is_clipped_by_its_own_norm(results, world_size):
    for name in ("centers", "centers_1"):
        plain = torch.cat([rank["two heads,1"][name] for rank in results[world_size]])
        clipped = torch.cat([rank["two heads,clipped"][name] for rank in results[world_size]])
        torch.testing.assert_close(clipped, plain * (0.5 / plain.norm()), rtol=1e-4, atol=1e-6)


def test_engine_leaves_the_shards_alone(results):
    """Neither broadcast at the start, nor averaged or moved by the engine's step; the two shards differ."""
    whole = random_rows(0, CLASSES, CLASSES, 8, seed=1)
    for world_size, per_rank in results.items():
        for key in ("0,1", "1,3", "2,1", "3,3"):
            before = torch.cat([rank[key]["centers_before"] for rank in per_rank])
            assert torch.equal(before, whole), (world_size, key)
            after = torch.cat([rank[key]["centers_after_engine"] for rank in per_rank])
            assert torch.equal(after, whole), (world_size, key)


def test_head_follows_the_engines_learning_rate(results):
    encoder, head = results[2][0]["1,1"]["learning_rates"]
    assert encoder == pytest.approx(1e-3)
    assert head == pytest.approx(2e-3)


def sampled_oracle(world_size, learning_rates, betas):
    """The sampled run in one float64 process: autograd, torch's AdamW for the encoder, plain AdamW for the union of rows."""
    model = VisionTransformer(ENCODER, seed=1).double()
    encoder_optimizer = torch.optim.AdamW(decay_groups(model, 0.1), betas=betas, eps=EPS)
    centers = random_rows(0, CLASSES, CLASSES, 8, seed=1).double().requires_grad_()
    m, v, steps = torch.zeros_like(centers), torch.zeros_like(centers), torch.zeros(CLASSES, dtype=torch.int32)
    sampler = ClassSampler(ClassPartition(CLASSES, 1), 0, SAMPLE_RATE, seed=1)
    spec = LossSpec("mlcd", 64.0, 0.3, "arc", "straight_through", None)
    position = torch.arange(IMAGES).view(world_size, 3, -1)  # rank, micro-batch, its images
    losses, norms = [], []
    for step, learning_rate in enumerate(learning_rates):
        batch, union, loss = batch_of_step(step), torch.zeros(CLASSES, dtype=torch.bool), 0
        images_of_step = (batch.labels_BL[:, 0] != NO_IMAGE).sum()
        for micro in range(3):
            images = position[:, micro].flatten()
            rows = sampler.draw(batch.labels_BL[images], step * 3 + micro)
            images = images[batch.labels_BL[images, 0] != NO_IMAGE]
            labels = torch.searchsorted(rows, batch.labels_BL[images])
            share = len(images) / images_of_step
            loss = loss + share * dense_loss(model(batch.images_BCHH[images]), centers[rows], labels, spec)
            union[rows] = True
        encoder_optimizer.zero_grad()
        centers.grad = None
        loss.backward()
        for group in encoder_optimizer.param_groups:
            group["lr"] = learning_rate
        encoder_optimizer.step()
        with torch.no_grad():
            g, rate = centers.grad[union], 2 * learning_rate
            steps[union] += 1
            m[union] = betas[0] * m[union] + (1 - betas[0]) * g
            v[union] = betas[1] * v[union] + (1 - betas[1]) * g.square()
            count = steps[union].double()[:, None]
            change = m[union] / (1 - betas[0] ** count) / ((v[union] / (1 - betas[1] ** count)).sqrt() + EPS)
            centers[union] = centers[union] * (1 - rate * 0.1) - rate * change
        losses.append(loss.item())
        norms.append(centers.grad.norm().item())
    encoder = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "head_norms": norms, "encoder": encoder, "centers": centers.detach(), "steps": steps}


@pytest.mark.parametrize("world_size", [1, 2])
def test_sampled_steps_with_accumulation_are_those_of_a_dense_oracle(results, world_size):
    per_rank = [rank["sampled"] for rank in results[world_size]]
    expected = sampled_oracle(world_size, per_rank[0]["learning_rates"], per_rank[0]["betas"])
    steps = torch.cat([rank["steps"] for rank in per_rank])
    assert torch.equal(steps, expected["steps"])
    assert 0 < (steps < STEPS).sum() < CLASSES  # some rows missed a step
    for rank in per_rank:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        assert rank["head_norms"] == pytest.approx(expected["head_norms"], rel=2e-4)
        for name, weights in expected["encoder"].items():
            assert_moved_alike(rank["encoder"][name], weights, rank["learning_rates"], name)
    assert_moved_alike(
        torch.cat([rank["centers"] for rank in per_rank]), expected["centers"], per_rank[0]["learning_rates"], "centers"
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_sampling_a_step_ahead_changes_nothing(results, world_size):
    for rank in results[world_size]:
        plain, ahead = rank["sampled"], rank["sampled ahead"]
        assert plain["marked"] == [(0, 0), (1, 1), (2, 2)]  # (step, the step during which it was sampled)
        assert ahead["marked"] == [(0, 0), (1, 0), (2, 1)]
        assert plain["losses"] == ahead["losses"]
        for name in ("centers", "exp_avg", "exp_avg_sq", "steps"):
            assert torch.equal(plain[name], ahead[name]), name
        for name, weights in plain["encoder"].items():
            assert torch.equal(weights, ahead["encoder"][name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_head_gradient_is_clipped_by_the_norm_over_all_shards(results, world_size):
    plain = torch.cat([rank["1,1"]["centers"] for rank in results[world_size]])
    clipped = torch.cat([rank["clipped"]["centers"] for rank in results[world_size]])
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(clipped, plain * (0.5 / plain.norm()), rtol=1e-4, atol=1e-6)


def assert_nothing_moved(found, what, world_size):
    assert not found["applied"]
    assert found["moved"] == []
    assert found["bad"] == ("embeddings" if what == "embeddings" else "gradients", (world_size - 1,))
    assert found["stop_ranks"] == 1
    assert found["finite"] == {"embeddings": (False, False), "gradient": (True, True), "head": (True, False)}[what]


@pytest.mark.parametrize("combination", [(ranks, *each) for ranks in (1, 2) for each in BAD_COMBINATIONS[ranks]])
def test_one_ranks_bad_step_is_skipped_by_encoder_and_head_everywhere(results, combination):
    """A number that is none on the last rank alone; the good steps before and after are those of a run without it."""
    world_size, *rest = combination
    for rank in results[world_size]:
        found = rank[f"bad,{tuple(rest)}"]
        for what in BAD:
            assert_nothing_moved(found[what], what, world_size)
        assert found["counts"] == (3, 3, 5)
        assert found["micro_steps"] == 5 * rest[1]
        assert found["differing"] == []
        assert found["last_moved"]


@pytest.mark.parametrize("combination", [(ranks, *each) for ranks in (1, 2) for each in BAD_COMBINATIONS[ranks]])
def test_moving_average_is_of_the_float32_weights(results, combination):
    """At every ZeRO stage, in bfloat16 too: kept in pieces it is the average of the whole weights."""
    world_size, *rest = combination
    for rank in results[world_size]:
        found = rank[f"bad,{tuple(rest)}"]
        assert found["average_error"] < 1e-3
        assert found["finer"] and found["unlike"] == []  # of the weights themselves: float32, and those that are used


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_gradient_of_the_second_head_alone_moves_nothing(results, world_size):
    for rank in results[world_size]:
        assert_nothing_moved(rank["bad second head"], "head", world_size)
