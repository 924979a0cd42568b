"""The sharded contrastive loss equals its dense definition: value and every gradient, whatever the number of ranks."""

import pytest
import torch
from ranks import run_ranks

from mlcd_ds import contrastive
from mlcd_ds.contrastive import contrast
from mlcd_ds.losses import clip_loss

G, E = 12, 7


def global_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(G, E, generator=generator, dtype=dtype)
    texts = images + 1.5 * torch.randn(G, E, generator=generator, dtype=dtype)
    return images, texts * 3, torch.tensor([9.0], dtype=dtype)


def dense(is_pair, dtype=torch.float64):
    images, texts, scale = (x.requires_grad_() for x in global_batch(dtype))
    loss = clip_loss(images, texts, scale, is_pair)
    loss.backward()
    return loss.detach(), images.grad, texts.grad, scale.grad


def sharded(world_size, is_pair, dtype=torch.float64, **options):
    images, texts, scale = global_batch(dtype)

    def one(topology):
        own = slice(topology.rank * G // world_size, (topology.rank + 1) * G // world_size)
        return contrast(images[own], texts[own], scale, is_pair[own], topology, **options)

    return run_ranks(world_size, one)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("missing", [(), (1, 4, 5), tuple(range(4))])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 2 * G * 8])
def test_it_equals_the_definition(world_size, missing, chunk_bytes):
    """chunk_bytes: all rows at once, or two at a time. The last set of missing rows is all that one rank of three has."""
    is_pair = torch.ones(G, dtype=torch.bool)
    is_pair[list(missing)] = False
    loss, d_images, d_texts, d_scale = dense(is_pair)
    found = sharded(world_size, is_pair, chunk_bytes=chunk_bytes)
    for part in found:
        torch.testing.assert_close(part.loss, loss, rtol=1e-10, atol=0)
    # The engine averages over the ranks: what it makes of a rank's own gradient, and of those of what all ranks share.
    torch.testing.assert_close(
        torch.cat([part.d_images_bE for part in found]) / world_size, d_images, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(torch.cat([part.d_texts_bE for part in found]) / world_size, d_texts, rtol=1e-10, atol=0)
    torch.testing.assert_close(sum(part.d_scale for part in found) / world_size, d_scale, rtol=1e-10, atol=1e-15)


def test_float32_is_close_and_stays_in_range_at_the_highest_scale():
    is_pair = torch.ones(G, dtype=torch.bool)
    images, _, _ = global_batch()
    exact = images.double().requires_grad_()
    scale = torch.tensor([100.0], dtype=torch.float64, requires_grad=True)
    loss = clip_loss(exact, exact.flip(0), scale)
    loss.backward()
    found = run_ranks(2, lambda t: contrast(
        images[t.rank * 6 : t.rank * 6 + 6].float(), images.flip(0)[t.rank * 6 : t.rank * 6 + 6].float(),
        scale.detach().float(), is_pair[:6], t,
    ))  # fmt: skip
    torch.testing.assert_close(found[0].loss, loss.detach().float(), rtol=1e-5, atol=0)
    d_scale = sum(part.d_scale for part in found) / 2
    torch.testing.assert_close(d_scale, scale.grad.float(), rtol=1e-4, atol=1e-6)


def test_accuracy_and_cosine_are_those_of_the_whole_batch():
    is_pair = torch.ones(G, dtype=torch.bool)
    is_pair[3] = False
    images, texts, _ = (x[is_pair] if len(x) == G else x for x in global_batch())
    cosine = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    own = torch.arange(len(cosine))
    for part in sharded(3, is_pair):
        assert part.stats["accuracy_image_to_text"] == pytest.approx((cosine.argmax(1) == own).double().mean())
        assert part.stats["accuracy_text_to_image"] == pytest.approx((cosine.argmax(0) == own).double().mean())
        assert part.stats["cosine_positive"] == pytest.approx(cosine.diagonal().mean())
        assert part.stats["logit_scale"] == 9.0


def test_a_batch_without_a_pair_has_no_loss_and_no_gradient():
    for part in sharded(2, torch.zeros(G, dtype=torch.bool)):
        assert part.loss == 0 and part.d_scale == 0
        assert not part.d_images_bE.any() and not part.d_texts_bE.any()


def test_an_embedding_of_length_zero_gives_and_gets_no_gradient_of_its_own():
    images, texts, scale = global_batch()
    images[2] = 0
    found = run_ranks(1, lambda topology: contrast(images, texts, scale, torch.ones(G, dtype=torch.bool), topology))[0]
    assert torch.isfinite(found.loss) and torch.isfinite(found.d_texts_bE).all() and not found.d_images_bE[2].any()


def test_no_matrix_of_all_by_all_is_made_and_collectives_are_counted(monkeypatch):
    """Rows of logits exist for the own pairs, a chunk at a time; two all-gathers and one all-reduce."""
    is_pair, calls, shapes, logits = torch.ones(G, dtype=torch.bool), [], [], contrastive._logits

    def counting(name, function):
        def call(tensor, topology):
            calls.append((topology.rank, name, tuple(tensor.shape)))
            return function(tensor, topology)

        return call

    def noting(s, own, every, pairs):
        shapes.append((len(own), len(every)))
        return logits(s, own, every, pairs)

    for name in ("all_gather", "sum_"):
        monkeypatch.setattr(contrastive.collectives, name, counting(name, getattr(contrastive.collectives, name)))
    monkeypatch.setattr(contrastive, "_logits", noting)
    sharded(3, is_pair, chunk_bytes=2 * G * 8)
    assert set(shapes) == {(2, G)}
    for rank in range(3):
        own = [call[1:] for call in calls if call[0] == rank]
        assert own == [("all_gather", (4, 2 * E + 1)), ("all_gather", (4, 2)), ("sum_", (4,))]
