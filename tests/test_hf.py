"""To and from Hugging Face folders: transformers computes what we compute, and what was written comes back bit for bit."""

import json
import resource
import shutil
from fnmatch import fnmatch

import pytest
import torch
from processes import ROOT, run_script
from safetensors.torch import load_file
from test_vit import TINY, TINY_ROPE, images, normalised, scrambled
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, MLCDVisionModel

from mlcd_ds import checkpoint
from mlcd_ds.errors import CheckpointError, SaveError
from mlcd_ds.models import hf
from mlcd_ds.models.vit import PRESETS, VisionTransformer, resize_positions

CONFIGS = {"learned": TINY, "rope": TINY_ROPE}


def narrow(name: str):
    """A preset with its own image, patch and kind, but small."""
    return PRESETS[name].model_copy(update={"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "embed_dim": 24})


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_computes_the_same_features_and_the_folder_comes_back_bit_for_bit(name, tmp_path):
    model = scrambled(narrow(name)).eval()
    hf.write_folder(tmp_path / "out", model.config, model.state_dict(), "card")
    pixels = images(model.config, 2)
    given = normalised(pixels).float()
    with torch.no_grad():
        if model.config.rope:
            theirs, loaded = MLCDVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
            features, expected = theirs.eval()(given).pooler_output, model.forward_features(pixels)
        else:
            theirs, loaded = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out", output_loading_info=True)
            features, expected = theirs.eval()(given).image_embeds, model(pixels)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()  # transformers 4 reads no others
    assert all(name.startswith("vision_model.") for name in names if name != "visual_projection.weight")
    config, weights = hf.read_folder(tmp_path / "out")
    assert config == model.config
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_image_side_alone_reads_the_same_folder(tmp_path):
    model = scrambled(TINY).eval()
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card")
    pixels = images(TINY)
    with torch.no_grad():
        pooled = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()(normalised(pixels).float()).pooler_output
        torch.testing.assert_close(pooled, model.forward_features(pixels), rtol=1e-5, atol=1e-5)


def test_preprocessing_makes_what_our_encoder_takes(tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor

    model = scrambled(TINY)
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card")
    pixels = images(TINY, 1)[0]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    made = processor(images=Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made[0].double(), normalised(pixels[None])[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_large_models_are_cut_into_files_with_an_index(config, tmp_path):
    model = scrambled(config)
    files = hf.write_folder(tmp_path / "out", config, model.state_dict(), "card", max_file_bytes=20_000)
    assert sum(name.startswith("model-0") for name in files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in hf.tensors_there(config, model.state_dict()).values()
    )
    kind = MLCDVisionModel if config.rope else CLIPVisionModelWithProjection
    _, loaded = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]


def test_bfloat16_is_written_rounded(tmp_path):
    model = scrambled(TINY)
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card", dtype="bfloat16")
    _, weights = hf.read_folder(tmp_path / "out")
    name = "blocks.0.fc1.weight"
    assert torch.equal(weights[name], model.state_dict()[name].bfloat16().float())


def whole_clip(folder):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)).eval()
    model.save_pretrained(folder)
    return model


def test_published_clip_is_read(tmp_path):
    """As transformers saves it, both towers: the image side's features, by quick_gelu, its default."""
    theirs = whole_clip(tmp_path)
    ours = checkpoint.load_encoder(f"hf:{tmp_path}")
    assert ours.config.activation == "quick_gelu" and ours.config.embed_dim == 20
    pixels = images(ours.config)
    with torch.no_grad():
        found = theirs.get_image_features(normalised(pixels).float())
        found = getattr(found, "pooler_output", found)
        torch.testing.assert_close(ours(pixels), found, rtol=1e-5, atol=1e-5)


def test_published_mlcd_starts_an_encoder_whose_projection_stays_its_own(tmp_path):
    model = scrambled(TINY_ROPE)
    hf.write_folder(tmp_path / "out", TINY_ROPE, model.state_dict(), "card")
    (tmp_path / "out" / hf.PROJECTION_FILE).unlink()  # as published ones are
    fresh = VisionTransformer(TINY_ROPE, seed=5)
    projection = fresh.projection.weight.clone()
    adapted = checkpoint.load_weights(fresh, f"hf:{tmp_path / 'out'}")
    assert adapted == ["it has no projection: that one keeps its initial weights"]
    assert torch.equal(fresh.projection.weight, projection)
    assert torch.equal(fresh.blocks[1].fc1.weight, model.blocks[1].fc1.weight)


def test_positions_are_resized_for_another_resolution(tmp_path):
    model = scrambled(TINY)
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card")
    larger = VisionTransformer(TINY.model_copy(update={"image_size": 48}), seed=5)
    adapted = checkpoint.load_weights(larger, f"hf:{tmp_path / 'out'}")
    assert adapted == ["positions resized from 16 to 36 patches"]
    positions = model.state_dict()["embeddings.positions"]
    assert torch.equal(larger.embeddings.positions[0], positions[0])
    grid = positions[1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)  # as open_clip's resize_pos_embed has it
    resized = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(larger.embeddings.positions[1:], resized.permute(0, 2, 3, 1).reshape(36, 48))
    constant = torch.cat([positions[:1], torch.ones(16, 48)])
    torch.testing.assert_close(resize_positions(constant, 6)[1:], torch.ones(36, 48))
    # A ramp along the columns stays one, rows alike.
    ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, 48)
    resized = resize_positions(torch.cat([positions[:1], ramp]), 8)[1:].view(8, 8, 48)
    torch.testing.assert_close(resized, resized[:1].expand(8, 8, 48))
    assert (resized[0].diff(dim=0) > -0.1).all() and resized[0, -1, 0] > resized[0, 0, 0] + 2


def test_what_does_not_fit_is_named(tmp_path):
    model = scrambled(TINY)
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card")
    with pytest.raises(CheckpointError, match="exists already"):
        hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "card")
    hf.write_folder(tmp_path / "out", TINY, model.state_dict(), "another card", force=True)
    assert (tmp_path / "out" / "README.md").read_text() == "another card"
    with pytest.raises(CheckpointError, match="another architecture"):
        checkpoint.load_weights(VisionTransformer(TINY_ROPE, seed=1), f"hf:{tmp_path / 'out'}")
    with pytest.raises(CheckpointError, match="does not exist"):
        hf.read_folder(tmp_path / "nowhere")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        hf.read_folder(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(described | {"model_type": "vit"}))
    with pytest.raises(CheckpointError, match="model_type 'vit'"):
        hf.read_folder(tmp_path / "out")


def test_the_tool_exports_a_run(tmp_path):
    model = scrambled(TINY)
    checkpoint.save_encoder(tmp_path / "run", "tiny", TINY, model.state_dict())
    flags = ["--run", tmp_path / "run", "--output_dir", tmp_path / "out"]
    (ended,) = run_script(1, [ROOT / "tools/export_hf.py", *flags], fresh=True)
    assert ended.code == 0, ended.output
    assert "CLIPVisionModelWithProjection, float32, read back equal" in ended.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| preset | tiny |" in card and "image_embeds" in card
    again = checkpoint.load_encoder(f"hf:{tmp_path / 'out'}")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    flags = ["--run", tmp_path / "run", "--output_dir", tmp_path / "other", "--kind", "mlcd"]
    (ended,) = run_script(1, [ROOT / "tools/export_hf.py", *flags])
    assert ended.code == 2 and "has learned positions" in ended.output and not (tmp_path / "other").exists()


def test_weights_for_other_pixels_are_refused(tmp_path):
    hf.write_folder(tmp_path / "out", TINY, scrambled(TINY).state_dict(), "card")
    path = tmp_path / "out" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match=r"image_mean is \[0.5, 0.5, 0.5\]"):
        checkpoint.load_encoder(f"hf:{tmp_path / 'out'}")


def test_a_name_on_the_hub_is_checked_as_a_folder_is(tmp_path, monkeypatch):
    """Of a Hub that gives what the patterns ask for: the preprocessing must be among it."""
    import huggingface_hub

    published, given = tmp_path / "published", []
    hf.write_folder(published, TINY, scrambled(TINY).state_dict(), "card")

    def download(name, allow_patterns):
        given.append(tmp_path / f"given{len(given)}")
        copied = [file for file in published.iterdir() if any(fnmatch(file.name, p) for p in allow_patterns)]
        given[-1].mkdir()
        return [shutil.copy(file, given[-1]) for file in copied] and str(given[-1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.encoder_config("hf:openai/clip") == checkpoint.load_encoder("hf:openai/clip").config == TINY
    assert [(folder / "model.safetensors").is_file() for folder in given] == [False, True]
    path = published / "preprocessor_config.json"
    path.write_text(path.read_text().replace(str(hf.PIXEL_MEAN[0]), "0.5"))
    for read in (checkpoint.encoder_config, checkpoint.load_encoder):
        with pytest.raises(CheckpointError, match=r"image_mean is \[0.5, "):
            read("hf:openai/clip")


@pytest.mark.parametrize("limit", [5_000, 100])
def test_a_full_disk_leaves_no_half_folder_and_what_was_there_before(tmp_path, limit):
    """The disk is full by a limit on the size of files: the weights do not fit, nor does the card."""
    weights, before = scrambled(TINY).state_dict(), resource.getrlimit(resource.RLIMIT_FSIZE)
    hf.write_folder(tmp_path / "out", TINY, weights, "old card")
    for name in ("out", "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(SaveError, match=f"{name} could not be written, nothing of it is left: .*Make room"):
                hf.write_folder(tmp_path / name, TINY, weights, "x" * 200, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "old card"
    hf.read_folder(tmp_path / "out")
