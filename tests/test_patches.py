"""Pictures of patches: the components, the foreground, the files."""

import numpy as np
import pytest
import torch
from data_factory import picture
from PIL import Image

from mlcd_ds.checkpoint import save_encoder
from mlcd_ds.config import VisualizeConfig
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.patches import CONTACT_SHEET, coloured, patch_features, visualize
from mlcd_ds.models.vit import VisionTransformer, VitConfig

CPU = torch.device("cpu")


def tiny(rope: bool) -> VitConfig:
    shape = {"image_size": 16, "patch_size": 4, "layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "embed_dim": 8}
    return VitConfig(**shape, rope=rope, activation="gelu", norm_eps=1e-5)


def save_run(folder, rope=False):
    config = tiny(rope)
    save_encoder(
        folder / "checkpoints/step_000000001/encoder", "tiny", config, VisionTransformer(config, seed=3).state_dict()
    )
    return f"run:{folder}"


def test_foreground_and_colours_of_features_made_for_it():
    """Images whose background is one vector and whose middle has parts of four others."""
    generator = torch.Generator().manual_seed(0)
    kinds_5W = torch.nn.functional.one_hot(torch.arange(5), 12).float() * 4
    kinds_5W[0] *= -6  # far from the others: the first component
    kind_ngg = torch.zeros(2, 8, 8, dtype=torch.int64)
    kind_ngg[:, 2:6, 2:6] = torch.randint(1, 5, (2, 4, 4), generator=generator)
    features = kinds_5W[kind_ngg].reshape(2, 64, 12) + 0.01 * torch.randn(2, 64, 12, generator=generator)
    colours, share, explained = coloured(features, True, True)
    assert colours.shape == (2, 8, 8, 3) and share == 16 / 64 and explained > 0.99
    front = kind_ngg.numpy() > 0
    assert not colours[~front].any()
    means = {k: colours[kind_ngg.numpy() == k].mean(0) for k in (1, 2, 3, 4)}
    for k in means:
        assert colours[kind_ngg.numpy() == k].astype(float).std(0).max() < 12
        assert all(np.abs(means[k] - means[j]).max() > 100 for j in means if j != k)
    mirrored, *_ = coloured(-features, True, True)  # an axis has no sign; the foreground does
    assert not mirrored[~front].any() and mirrored[front].any()
    everything, share, _ = coloured(features, False, False)
    assert share == 1.0 and everything[~front].any()


def test_equal_patches_make_a_plain_picture():
    colours, share, _ = coloured(torch.ones(1, 16, 8), True, True)
    assert share == 1.0 and (colours == colours[0, 0, 0]).all()


@pytest.mark.parametrize("rope", [False, True])
def test_patch_features_are_the_last_norms_of_all_patches(tmp_path, rope):
    model = VisionTransformer(tiny(rope), seed=3).eval()
    config = VisualizeConfig(model="run:x", images="x", output_dir="x", batch_size=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = patch_features(model, images, config, CPU)
    with torch.inference_mode():
        x = model.norm_pre(model.embeddings(torch.from_numpy(images).permute(0, 3, 1, 2)))
        for block in model.blocks:
            x = block(x, *(() if model.angles is None else (model.angles(),)))
        expected = model.norm_post(x)
    torch.testing.assert_close(found, expected[:, 1:])
    first = patch_features(model, images, config.model_copy(update={"layer": 1}), CPU)
    assert first.shape == found.shape and not torch.allclose(first, found)
    with pytest.raises(ConfigError, match="--layer 3: the encoder has 2 blocks"):
        patch_features(model, images, config.model_copy(update={"layer": 3}), CPU)


@pytest.mark.parametrize("rope", [False, True])
def test_files_and_tars_at_another_resolution(tmp_path, rope):
    (tmp_path / "photo.png").write_bytes(picture(3, 40))
    write_tar(tmp_path / "0.tar", [(f"s{i}", {"png": picture(i, 30), "cls": b"1"}) for i in range(4)])
    settings = {"model": save_run(tmp_path / "run", rope), "output_dir": str(tmp_path / "out"), "tile_size": 48}
    config = VisualizeConfig(images=f"{tmp_path}/*.png::{tmp_path}/0.tar", image_size=24, limit=4, **settings)
    made = visualize(config, CPU)
    assert made.names == ["photo", "0_s0", "0_s1", "0_s2"] and made.colours.shape == (4, 6, 6, 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [CONTACT_SHEET, *(f"{name}.png" for name in made.names)]
    )
    with Image.open(tmp_path / "out/0_s1.png") as image:
        shown = np.asarray(image)
    assert shown.shape == (48, 48, 3)
    np.testing.assert_array_equal(shown[4::8, 4::8], made.colours[2])


def test_what_is_refused(tmp_path):
    run = save_run(tmp_path / "run")
    (tmp_path / "a.png").write_bytes(picture(3, 40))
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.txt").write_text("x")

    def attempt(**changed):
        flags = {"model": run, "images": f"{tmp_path}/a.png", "output_dir": str(tmp_path / "out")}
        visualize(VisualizeConfig(**flags | changed), CPU)

    with pytest.raises(ConfigError, match="--image_size 18 is no multiple .* patches of 4 pixels: the nearest is 16"):
        attempt(image_size=18)
    with pytest.raises(ConfigError, match="has no patches"):
        attempt(model="builtin:x.npz")
    with pytest.raises(DataError, match="no image and no tar matches"):
        attempt(images=f"{tmp_path}/none*")
    with pytest.raises(DataError, match=r"c\.txt is no image"):
        attempt(images=f"{tmp_path}/c.txt")
    with pytest.raises(DataError, match=r"the image b cannot be used"):
        attempt(images=f"{tmp_path}/b.png")
    with pytest.raises(DataError, match="two of the images are named 'a'"):
        attempt(images=f"{tmp_path}/a.png::{tmp_path}/a.png")
