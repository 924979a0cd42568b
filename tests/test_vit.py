"""The encoder: held to transformers' CLIP and MLCD, to itself with and without checkpointing, to known sizes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, MLCDVisionConfig, MLCDVisionModel

from mlcd_ds.errors import ConfigError
from mlcd_ds.models.vit import (
    PIXEL_MEAN,
    PIXEL_STD,
    PRESETS,
    VisionTransformer,
    VitConfig,
    _patch_angles,
    decay_groups,
    preset,
    rotate,
)

TINY = VitConfig(
    image_size=32,
    patch_size=8,
    layers=3,
    width=48,
    heads=4,
    mlp_width=96,
    embed_dim=20,
    rope=False,
    activation="quick_gelu",
    norm_eps=1e-5,
)
TINY_ROPE = TINY.model_copy(update={"rope": True, "activation": "gelu"})


def scrambled(config: VitConfig) -> VisionTransformer:
    """An encoder whose every parameter, biases and norms too, is random."""
    model = VisionTransformer(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def images(config: VitConfig, count: int = 3) -> torch.Tensor:
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (pixels.double() / 255 - mean) / std


def hugging_face_state(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names (without the `vision_model.` prefix)."""
    state, ours = {}, model.state_dict()
    state["embeddings.class_embedding"] = ours["embeddings.class_token"]
    state["embeddings.patch_embedding.weight"] = ours["embeddings.patch.weight"]
    if model.config.rope:
        state["class_pos_emb"] = ours["angles.class_angle"]
    else:
        state["embeddings.position_embedding.weight"] = ours["embeddings.positions"]
    pairs = {"norm_pre": "pre_layrnorm", "norm_post": "post_layernorm"}
    for n in range(model.config.layers):
        there = f"encoder.layers.{n}"
        pairs[f"blocks.{n}.norm1"], pairs[f"blocks.{n}.norm2"] = f"{there}.layer_norm1", f"{there}.layer_norm2"
        pairs[f"blocks.{n}.fc1"], pairs[f"blocks.{n}.fc2"] = f"{there}.mlp.fc1", f"{there}.mlp.fc2"
        pairs[f"blocks.{n}.attention.out"] = f"{there}.self_attn.out_proj"
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", ours[f"blocks.{n}.attention.qkv.{kind}"].chunk(3), strict=True):
                state[f"{there}.self_attn.{letter}_proj.{kind}"] = part
    for mine, theirs in pairs.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = ours[f"{mine}.{kind}"]
    return state


def clip_twin(config: VitConfig) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.embed_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=config.norm_eps,
        )
    ).eval()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_transformers_clip(activation):
    config = TINY.model_copy(update={"activation": activation})
    ours, theirs = scrambled(config), clip_twin(config)
    state = {f"vision_model.{name}": value for name, value in hugging_face_state(ours).items()}
    state["visual_projection.weight"] = ours.projection.weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    pixels = images(config)
    with torch.no_grad():
        expected = theirs(normalised(pixels).float()).image_embeds
        torch.testing.assert_close(ours(pixels), expected, rtol=1e-5, atol=1e-5)


def test_rope_equals_transformers_mlcd():
    ours = scrambled(TINY_ROPE)
    theirs = MLCDVisionModel(
        MLCDVisionConfig(
            hidden_size=TINY_ROPE.width,
            intermediate_size=TINY_ROPE.mlp_width,
            num_hidden_layers=TINY_ROPE.layers,
            num_attention_heads=TINY_ROPE.heads,
            image_size=TINY_ROPE.image_size,
            patch_size=TINY_ROPE.patch_size,
        )
    ).eval()
    names = set(theirs.state_dict())
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    state = {prefix + name: value for name, value in hugging_face_state(ours).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    pixels = images(TINY_ROPE)
    with torch.no_grad():
        expected = theirs(normalised(pixels).float()).pooler_output
        torch.testing.assert_close(ours.forward_features(pixels), expected, rtol=1e-5, atol=1e-5)


def test_rotary_attention_depends_on_relative_places_only():
    """Moving two patches together by one row and two columns leaves q.k as it was (the definition of RoPE)."""
    angles = _patch_angles(6, 16, torch.device("cpu")).double()
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(a: int, b: int) -> torch.Tensor:
        return rotate(q, angles[a]).double() @ rotate(k, angles[b]).double()

    here, moved, other = product(0, 9), product(8, 17), product(0, 10)
    torch.testing.assert_close(here, moved, rtol=1e-5, atol=1e-6)
    assert abs(here - other) > 1e-3


@pytest.mark.parametrize("config", [TINY, TINY_ROPE], ids=["learned", "rope"])
def test_bytes_and_normalised_floats_agree(config):
    model = scrambled(config).double()
    pixels = images(config)
    # 1e-6: the constants of the multiply-add are float32
    torch.testing.assert_close(model(pixels), model(normalised(pixels)), rtol=1e-5, atol=1e-5)
    assert model(pixels).shape == (3, config.embed_dim)
    assert model.forward_features(pixels).shape == (3, config.width)
    assert model(pixels[:0]).shape == (0, config.embed_dim)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [TINY, TINY_ROPE], ids=["learned", "rope"])
def test_gradients_with_and_without_checkpointing_are_equal(config, reentrant):
    model, pixels = scrambled(config), images(config)
    calls = []

    def runner(block, *inputs):
        calls.append(block)
        return checkpoint(block, *inputs, use_reentrant=reentrant)

    gradients = []
    for function in (None, runner):
        model.zero_grad()
        model.set_checkpointing(function)
        model(pixels).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert calls == list(model.blocks)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=0, msg=name)
        assert gradients[0][name].abs().sum() > 0, name


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = VisionTransformer(TINY, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second, third = VisionTransformer(TINY, seed=7), VisionTransformer(TINY, seed=8)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all(), name
    assert not torch.equal(first.projection.weight, third.projection.weight)


@pytest.mark.parametrize("name", PRESETS)
def test_untrained_presets_keep_signals_near_one(name):
    """The pre-norm residual stream of a preset cut to two layers neither dies nor explodes."""
    config = PRESETS[name].model_copy(update={"layers": 2, "image_size": 2 * PRESETS[name].patch_size})
    model = VisionTransformer(config, seed=0)
    with torch.no_grad():
        features = model.forward_features(images(config, 2))
        embeddings = model(images(config, 2))
    assert 0.8 < features.square().mean() < 1.2
    assert 0.5 < embeddings.square().mean() < 2.0


KNOWN_MILLIONS = {  # image towers in OpenCLIP's model table; bigG there has learned positions, MLCD's has angles
    "vit_b32": 87.85,
    "vit_b16": 86.19,
    "vit_l14": 303.97,
    "vit_l14_336": 304.29,
    "vit_h14": 632.08,
    "vit_bigg14": 1844.91 - 257 * 1664 / 1e6,
}


@pytest.mark.parametrize("name", KNOWN_MILLIONS)
def test_presets_have_the_known_number_of_parameters(name):
    with torch.device("meta"):
        model = VisionTransformer(PRESETS[name])
        twin = None if PRESETS[name].rope else clip_twin(PRESETS[name])
    count = sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert count / 1e6 == pytest.approx(KNOWN_MILLIONS[name], abs=0.006)
    if twin is not None:
        assert count == sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize("config", [TINY, TINY_ROPE], ids=["learned", "rope"])
def test_decay_groups_hold_every_parameter_once(config):
    model = VisionTransformer(config, seed=0)
    decayed, spared = decay_groups(model, 0.2)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in (decayed, spared))
    assert sorted(decayed + spared) == sorted(names.values())
    assert {"embeddings.patch.weight", "blocks.0.fc1.weight", "projection.weight"} <= set(decayed)
    place = "angles.class_angle" if config.rope else "embeddings.positions"
    assert {"embeddings.class_token", place, "norm_pre.weight", "blocks.2.fc2.bias"} <= set(spared)
    assert not [name for name in decayed if "norm" in name or name.endswith("bias")]


def test_bfloat16_weights_still_see_exact_pixels_and_angles():
    model = scrambled(TINY_ROPE)
    with torch.no_grad():
        exact, rounded = model(images(TINY_ROPE)), model.bfloat16()(images(TINY_ROPE))
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rounded.float()).min() > 0.999


def test_what_does_not_fit_is_refused_with_the_remedy():
    assert preset("vit_l14").image_size == 224
    assert preset("vit_l14", 336) == PRESETS["vit_l14_336"]
    with pytest.raises(ConfigError, match=r"Did you mean vit_l14"):
        preset("vit_l_14")
    with pytest.raises(ConfigError, match=r"not a multiple of the patch size 14.* 224"):
        preset("vit_l14", 225)
    with pytest.raises(ValueError, match=r"takes \[B, 3, 32, 32\]"):
        VisionTransformer(TINY, seed=0)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divisible by 4"):
        VitConfig(**(TINY_ROPE.model_dump() | {"width": 24, "heads": 4}))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_images_of_one_colour_have_finite_embeddings_and_gradients(value):
    model = VisionTransformer(preset("vit_toy"), seed=0)
    embeddings = model(torch.full((2, 3, 32, 32), value, dtype=torch.uint8))
    assert torch.isfinite(embeddings).all() and embeddings.abs().max() > 0
    embeddings.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
