"""What an encoder may have beside CLIP's: registers, drop path, patch dropout, apex's norms, counted FLOPs."""

import sys
import types

import pytest
import torch
from test_vit import TINY, TINY_ROPE, images, scrambled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mlcd_ds.errors import ConfigError
from mlcd_ds.models import flops, hf
from mlcd_ds.models.vit import PRESETS, Dropping, VisionTransformer, Visit, decay_groups, preset

KINDS = pytest.mark.parametrize("config", [TINY, TINY_ROPE], ids=["learned", "rope"])


def with_registers(config, registers=3):
    return config.model_copy(update={"registers": registers})


def dropping_model(config, **rates):
    model = VisionTransformer(config, seed=1, dropping=Dropping(seed=5, **rates))
    model.load_state_dict(scrambled(config).state_dict())
    return model


# --- registers ------------------------------------------------------------------------------------------------------


@KINDS
def test_registers_are_tokens_that_are_learned_and_do_not_decay(config):
    model = scrambled(with_registers(config))
    model(images(config)).square().sum().backward()
    registers = model.embeddings.registers
    assert registers.shape == (3, config.width) and registers.grad.abs().sum() > 0
    assert model.config.tokens == 1 + 3 + 16
    assert any(p is registers for p in decay_groups(model, 0.1)[1]["params"])
    without = VisionTransformer(config)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k != "embeddings.registers"})
    assert not torch.allclose(model(images(config)), without(images(config)), rtol=1e-3)


def test_registers_have_no_place():
    """Their order changes nothing, with rotary angles neither."""
    for config in (with_registers(TINY), with_registers(TINY_ROPE)):
        model = scrambled(config).double()
        with torch.no_grad():
            before = model(images(config))
            model.embeddings.registers.copy_(model.embeddings.registers[[2, 0, 1]])
            torch.testing.assert_close(model(images(config)), before)


def test_registers_are_refused_by_the_hugging_face_export(tmp_path):
    config = with_registers(TINY)
    with pytest.raises(ConfigError, match="3 register tokens"):
        hf.write_folder(tmp_path / "out", config, VisionTransformer(config, seed=1).state_dict(), "card")
    assert not list(tmp_path.iterdir())


# --- what training leaves out ---------------------------------------------------------------------------------------


@KINDS
def test_nothing_is_dropped_without_a_visit_and_the_weights_names_stay(config):
    plain, dropping = scrambled(config), dropping_model(config, drop_path=0.5, patch_dropout=0.5)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    assert torch.equal(plain(images(config)), dropping(images(config)))
    assert not torch.allclose(plain(images(config)), dropping(images(config), Visit(0, 0)))


@KINDS
def test_what_is_dropped_follows_from_seed_step_and_slot_alone(config):
    """The same images in another cut into ranks and micro-batches drop the same; torch's generators are not asked."""
    model, pixels = dropping_model(config, drop_path=0.5, patch_dropout=0.5).double(), images(config, 6)
    torch.manual_seed(0)
    states = torch.get_rng_state()
    whole = model(pixels, Visit(7, 10))
    assert torch.equal(states, torch.get_rng_state())
    parts = torch.cat([model(pixels[:2], Visit(7, 10)), model(pixels[2:], Visit(7, 12))])
    torch.testing.assert_close(whole, parts)
    for other in (Visit(8, 10), Visit(7, 11)):
        assert not torch.allclose(whole, model(pixels, other))
    model.dropping = Dropping(6, 0.5, 0.5)
    assert not torch.allclose(whole, model(pixels, Visit(7, 10)))


def test_drop_path_leaves_out_branches_at_rates_that_rise_linearly():
    layers, slots = 4, 20_000
    scales = Dropping(seed=3, drop_path=0.3).scales(Visit(2, 0), slots, layers, torch.device("cpu"))
    assert scales.shape == (layers, 2, slots)
    for layer in range(layers):
        rate = 0.3 * layer / (layers - 1)
        for branch in scales[layer]:
            assert set(branch.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
            assert (branch == 0).float().mean() == pytest.approx(rate, abs=0.015)
            assert branch.mean() == pytest.approx(1, abs=0.03)
    dropped = (scales[1:] == 0).flatten(0, 1).float()
    correlation = torch.corrcoef(dropped) - torch.eye(len(dropped))
    assert correlation.abs().max() < 0.03  # each branch of each layer on its own


def test_dropped_branches_are_the_block_left_out():
    config = TINY.model_copy(update={"layers": 2})
    model = dropping_model(config, drop_path=0.999_999)  # of the last block; the first keeps all
    pixels = images(config)
    with torch.no_grad():
        x = model.blocks[0](model.norm_pre(model.embeddings(pixels)))
        expected = model.projection(model.norm_post(x[:, 0]))
        torch.testing.assert_close(model(pixels, Visit(0, 0)), expected)


@KINDS
def test_patch_dropout_is_the_encoder_on_the_patches_that_are_kept(config):
    """Every image keeps as many; positions and angles are those of the places they had; each patch has its turn."""
    dropping = Dropping(seed=4, patch_dropout=0.4)
    kept = dropping.patches(Visit(1, 5), 4000, 16, torch.device("cpu"))
    assert kept.shape == (4000, 9) == (4000, dropping.kept_patches(16))
    assert (kept.diff(dim=1) > 0).all() and kept.min() == 0 and kept.max() == 15
    assert (kept.flatten().bincount() / 4000).sub(9 / 16).abs().max() < 0.04
    model, pixels = dropping_model(config, patch_dropout=0.4), images(config)
    own = model.dropping.patches(Visit(1, 5), len(pixels), 16, torch.device("cpu"))
    with torch.no_grad():
        for index, picked in enumerate(own):
            x = model.embeddings(pixels[index : index + 1])
            tokens = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + picked])
            angles = None if model.angles is None else model.angles()[tokens]
            x = model.norm_pre(x[:, tokens])
            for block in model.blocks:
                x = block(x, angles)
            expected = model.projection(model.norm_post(x[:, 0]))
            torch.testing.assert_close(model(pixels, Visit(1, 5))[index : index + 1], expected, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_drop_the_same(config, reentrant):
    config = with_registers(config)
    model, pixels = dropping_model(config, drop_path=0.5, patch_dropout=0.3), images(config)
    gradients = []
    for runner in (None, lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=reentrant)):
        model.zero_grad()
        model.set_checkpointing(runner, 2)
        model(pixels, Visit(3, 1)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


# --- norms ----------------------------------------------------------------------------------------------------------


def test_apex_is_refused_with_the_cure_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # as of `pip install apex`: another package
    monkeypatch.delitem(sys.modules, "apex.normalization", raising=False)
    with pytest.raises(ConfigError, match="github.com/NVIDIA/apex"):
        VisionTransformer(TINY, norm="apex")


def test_apex_norms_have_the_same_weights(monkeypatch):
    """With a stand-in of apex's interface: FusedLayerNorm is no subclass of torch's."""

    class FusedLayerNorm(torch.nn.Module):
        def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
            super().__init__()
            self.eps = eps
            self.weight = torch.nn.Parameter(torch.empty(normalized_shape))
            self.bias = torch.nn.Parameter(torch.empty(normalized_shape))

        def reset_parameters(self):
            torch.nn.init.ones_(self.weight)
            torch.nn.init.zeros_(self.bias)

        def forward(self, x):
            return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    normalization = types.ModuleType("apex.normalization")
    normalization.FusedLayerNorm = FusedLayerNorm
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", normalization)
    ours, theirs = VisionTransformer(TINY, seed=1), VisionTransformer(TINY, seed=1, norm="apex")
    assert sum(isinstance(module, FusedLayerNorm) for module in theirs.modules()) == 2 * TINY.layers + 2
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(images(TINY)), theirs(images(TINY)))
    assert [len(g["params"]) for g in decay_groups(ours, 0.1)] == [len(g["params"]) for g in decay_groups(theirs, 0.1)]


# --- costs ----------------------------------------------------------------------------------------------------------


def assert_costs_are_torchs(config, dropping=None):
    with torch.device("meta"):
        model = VisionTransformer(config, dropping=dropping)
        pixels = torch.empty(2, 3, config.image_size, config.image_size)
    # The fused kernels compute the scores once more in backward, which is no work of the model.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(pixels, None if dropping is None else Visit(0, 0))
        forward = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        out.sum().backward()
    costs, whole = flops.costs(config, dropping), flops.total(config, dropping)
    own = {name: module for name, module in model.named_modules() if name in costs}
    assert set(own) == set(costs)
    assert sum(p.numel() for p in model.parameters()) == whole.parameters
    for name, module in own.items():
        inside = [cost for other, cost in costs.items() if other == name or other.startswith(f"{name}.")]
        assert sum(p.numel() for p in module.parameters()) == sum(cost.parameters for cost in inside), name
        counted = forward.get(f"VisionTransformer.{name}", 0)
        assert counted == 2 * sum(cost.forward for cost in inside), name
    assert forward["Global"] == 2 * whole.forward
    assert counter.get_total_flops() == 2 * whole.flops


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_and_flops_of_each_module_are_those_torch_counts(name):
    """Forward by module, forward and backward as a whole, of two images; three layers, the last of which differs."""
    assert_costs_are_torchs(PRESETS[name].model_copy(update={"layers": 3}))


def test_parameters_and_flops_of_a_whole_encoder_are_those_torch_counts():
    assert_costs_are_torchs(PRESETS["vit_b16"])
    assert flops.total(PRESETS["vit_l14"]).forward == 156_387_344_384  # 3.5% below the 162.0e9 of a whole last block


@KINDS
def test_flops_follow_registers_and_dropped_patches(config):
    assert_costs_are_torchs(with_registers(config), Dropping(seed=1, drop_path=0.1, patch_dropout=0.4))


def test_preset_takes_registers():
    assert preset("vit_l14", registers=7).tokens == 264
