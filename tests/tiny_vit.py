"""The smallest encoder that the tests of evaluation probe."""

from mlcd_ds.models.vit import VitConfig

TINY = VitConfig(
    image_size=16,
    patch_size=8,
    layers=1,
    width=16,
    heads=2,
    mlp_width=32,
    embed_dim=8,
    rope=False,
    activation="gelu",
    norm_eps=1e-5,
)
