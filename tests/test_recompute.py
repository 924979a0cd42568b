"""Recomputed and compiled blocks: the same gradients, less memory, at every ZeRO stage."""

import pytest
import torch
from encoder_worker import RUNS
from processes import ROOT, run_script
from test_encoder_options import dropping_model
from test_vit import TINY, TINY_ROPE, images, scrambled
from torch.utils.flop_counter import FlopCounterMode

from mlcd_ds.errors import ConfigError
from mlcd_ds.models.compiled import cache_counts, check_compiler, compile_blocks
from mlcd_ds.models.recompute import Recompute, resolve_recompute, run_selectively
from mlcd_ds.models.vit import VisionTransformer, Visit


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of encoder_worker.py: {"STAGE, KIND": what it found}."""
    folder = tmp_path_factory.mktemp("encoder")
    (ended,) = run_script(1, [ROOT / "tests" / "encoder_worker.py", folder])
    assert ended.code == 0, ended.output[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("stage, kind", [(stage, kind) for stage, kinds in RUNS.items() for kind in kinds[1:]])
def test_gradients_through_the_engine_are_those_of_the_plain_encoder(results, stage, kind):
    """Bit for bit where blocks are recomputed, to rounding where they are compiled; with drop path and patch dropout."""
    ours, plain = results[f"{stage}, {kind}"]["step 1"], results[f"{stage}, plain"]["step 1"]
    tolerance = {"rtol": 2e-4, "atol": 1e-6} if "compile" in kind else {"rtol": 0, "atol": 0}
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert set(ours["encoder"]) == set(plain["encoder"])
    for name, gradient in plain["encoder"].items():
        largest = gradient.abs().max()
        assert largest > 0, name
        torch.testing.assert_close(ours["encoder"][name] / largest, gradient / largest, **tolerance, msg=name)


def test_recompilations_are_none_until_a_shape_changes_and_then_counted_and_told(results):
    for stage, kinds in RUNS.items():
        for kind in kinds:
            assert results[f"{stage}, {kind}"]["recompilations"] == (0 if "compile" in kind else None)
    found = results["1, compile"]
    assert found["recompilations of another shape"] == 2  # the last block has a graph of its own
    assert "2 graphs were compiled anew in step 3" in found["warning"]


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("config", [TINY, TINY_ROPE], ids=["learned", "rope"])
def test_selective_keeps_products_and_recomputes_the_rest(config, rate):
    """The same gradients, bit for bit, and not one product more; a good part of the activations is not kept."""
    config = config.model_copy(update={"layers": 6})
    model, pixels = dropping_model(config, drop_path=rate, patch_dropout=0.1), images(config)
    gradients, counts, kept = [], [], []
    for runner in (None, run_selectively):
        model.zero_grad()
        model.set_checkpointing(runner)
        storages: dict[int, int] = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            loss = model(pixels, Visit(0, 0)).square().sum()
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        counts.append(counter.get_total_flops())
        kept.append(sum(storages.values()))
    assert all(map(torch.equal, *gradients))
    # The class token's query alone is a product without a bias in place (see KEPT).
    assert counts[0] <= counts[1] <= 1.01 * counts[0]
    assert kept[1] < 0.8 * kept[0]


def test_which_blocks_are_recomputed():
    assert resolve_recompute(None, None, 12) == Recompute(0)
    assert resolve_recompute(None, {}, 12) == resolve_recompute("all", None, 12) == Recompute(12)
    assert resolve_recompute(5, {}, 12) == Recompute(5)
    assert resolve_recompute(0, {}, 12) == Recompute(0)
    assert resolve_recompute("selective", {"cpu_checkpointing": False}, 12) == Recompute(12, selective=True)
    with pytest.raises(ConfigError, match="has 12 blocks"):
        resolve_recompute(13, None, 12)
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.cpu_checkpointing"):
        resolve_recompute("selective", {"cpu_checkpointing": True}, 12)


def test_only_the_first_blocks_run_through_the_runner():
    model, seen = scrambled(TINY), []

    def runner(block, *inputs):
        seen.append(block)
        return block(*inputs)

    model.set_checkpointing(runner, 2)
    model(images(TINY))
    assert seen == list(model.blocks[:2])


def test_compile_is_refused_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        check_compiler("cpu")


def test_compiled_code_has_the_same_numbers_and_is_found_again(tmp_path, monkeypatch):
    """By the real compiler: a block, forward and backward, against torch's own kernels; then from the cache on disk."""
    try:
        check_compiler("cpu")
    except ConfigError as error:
        pytest.skip(f"NOT TESTED, torch.compile: {error}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = TINY.model_copy(update={"layers": 1})
    plain, pixels = scrambled(config), images(config)
    expected = plain(pixels)
    expected.square().sum().backward()
    for attempt in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = VisionTransformer(config, seed=1)
        model.load_state_dict(plain.state_dict())
        compile_blocks(model.blocks)
        out = model(pixels)
        out.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            scale = other.grad.abs().max()
            torch.testing.assert_close(p.grad / scale, other.grad / scale, rtol=1e-4, atol=1e-5, msg=name)
        found = cache_counts()
        assert found["graphs"] == 1
        assert (found["from_cache"] > 0) == (attempt == 1) and found["not_cached"] == 1 - attempt
    assert any(tmp_path.rglob("*"))
    torch._dynamo.reset()
