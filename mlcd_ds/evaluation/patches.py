"""Pictures of what an encoder tells apart inside an image: principal components of its patches as colours.

As DINOv2 draws it (Oquab et al. 2023, arXiv 2304.07193, section 7.5): the first component over all patches tells foreground
from background; three components over the patches of the foreground become red, green and blue.

Shapes: n images, g patches a side, N = g g, W the encoder's width, p patches of all images that take part.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mlcd_ds import checkpoint
from mlcd_ds.config import VisualizeConfig
from mlcd_ds.data.decode import ImageError, decode_image
from mlcd_ds.data.tars import IMAGE_EXTENSIONS, image_extension, index_tar, read_samples
from mlcd_ds.data.transforms import resize_shorter_and_center_crop
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.features import split_model
from mlcd_ds.files import make_folder, write_bytes
from mlcd_ds.models.vit import VisionTransformer, VitConfig

CONTACT_SHEET = "contact_sheet.png"
GAP = 6
"""Pixels between the pictures of the contact sheet."""
CUT = 2.0
"""Per cent of the patches whose components are cut off at either end: one odd patch would take all the colours."""


@dataclass(frozen=True)
class Pictures:
    """images: uint8 [n, H, H, 3], as the encoder saw them. colours: uint8 [n, g, g, 3]. names: one each.

    foreground: share of the patches that counts as such. explained: share of the variance of the patches with a colour
    that the three components have.
    """

    names: list[str]
    images: np.ndarray
    colours: np.ndarray
    foreground: float
    explained: float


def visualize(config: VisualizeConfig, device: torch.device) -> Pictures:
    """Writes NAME.png per image and the contact sheet.

    Raises ConfigError for a model without patches or a size that its patches do not divide, DataError for images that
    cannot be read.
    """
    model = load_at(config).to(device)
    names, images = [], []
    size = model.config.image_size
    for name, data in _found(config):
        if len(images) == config.limit:
            break
        try:
            image = decode_image(data, config.max_pixels, size)
        except ImageError as error:
            raise DataError(
                f"the image {name} cannot be used ({error.reason}: {error}): leave it out of --images"
            ) from None
        names.append(name)
        images.append(resize_shorter_and_center_crop(image, size))
    if not images:
        raise DataError(f"--images {config.images!r} names no image")
    pixels = np.stack(images)
    features_nNW = patch_features(model, pixels, config, device)
    colours, foreground, explained = coloured(features_nNW, config.foreground, config.together)
    made = Pictures(names, pixels, colours, foreground, explained)
    _write(config, made)
    return made


def load_at(config: VisualizeConfig) -> VisionTransformer:
    """The encoder at --image_size: learned positions resized, rotary ones computed for the grid."""
    kind, value = split_model(config.model)
    if kind not in ("run", "untrained", "hf"):
        raise ConfigError(f"--model {config.model!r} has no patches: expected run:PATH, untrained:PATH or hf:FOLDER")
    path = f"hf:{value}" if kind == "hf" else value
    model = checkpoint.load_encoder(path, untrained=kind == "untrained", seed=config.seed)
    if config.image_size in (None, model.config.image_size):
        return model
    try:
        larger = VitConfig(**model.config.model_dump() | {"image_size": config.image_size})
    except ValueError:
        patch = model.config.patch_size
        near = max(1, round(config.image_size / patch)) * patch
        raise ConfigError(
            f"--image_size {config.image_size} is no multiple of the encoder's patches of {patch} pixels: the "
            f"nearest is {near}"
        ) from None
    resized = VisionTransformer(larger, seed=config.seed)
    checkpoint.fit_weights(resized, model.state_dict(), config.model)
    return resized.eval()


@torch.inference_mode()
def patch_features(
    model: VisionTransformer, images_nHH3: np.ndarray, config: VisualizeConfig, device: torch.device
) -> torch.Tensor:
    """Patch tokens after --layer blocks and the encoder's last norm, float32 [n, N, W] on the CPU."""
    layer = len(model.blocks) if config.layer is None else config.layer
    if layer > len(model.blocks):
        raise ConfigError(f"--layer {layer}: the encoder has {len(model.blocks)} blocks")
    found = []
    for start in range(0, len(images_nHH3), config.batch_size):
        batch = torch.from_numpy(images_nHH3[start : start + config.batch_size]).permute(0, 3, 1, 2)
        found.append(model.patch_features(batch.contiguous().to(device), layer).float().cpu())
    return torch.cat(found)


def coloured(features_nNW: torch.Tensor, foreground: bool, together: bool) -> tuple[np.ndarray, float, float]:
    """(uint8 [n, g, g, 3], share of the patches in the foreground, share of variance of the components shown).

    The foreground is the side of the first component that touches the images' borders less, parted where the variance
    between the two sides is largest (Otsu 1979). Colours go from the 2nd to the 98th percentile of each component.
    """
    g = round(features_nNW.shape[1] ** 0.5)
    groups = [features_nNW] if together else list(features_nNW.split(1))
    parts, shares, explained = [], [], []
    for group_mNW in groups:
        flat_pW = group_mNW.reshape(-1, group_mNW.shape[2]).double()
        front_p = _foreground(flat_pW, g) if foreground else torch.ones(len(flat_pW), dtype=torch.bool)
        components_p3, share = _components(flat_pW[front_p], 3)
        low, high = (torch.quantile(components_p3, q / 100, dim=0) for q in (CUT, 100 - CUT))
        scaled = ((components_p3 - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        colours_p3 = torch.zeros(len(flat_pW), 3, dtype=torch.float64)
        colours_p3[front_p] = scaled
        parts.append((colours_p3 * 255).round().to(torch.uint8).reshape(-1, g, g, 3))
        shares.append(front_p.double().mean().item())
        explained.append(share)
    return torch.cat(parts).numpy(), float(np.mean(shares)), float(np.mean(explained))


def _components(flat_pW: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """(the first principal components [p, count], their share of the variance); zeros where there are fewer."""
    centred = flat_pW - flat_pW.mean(0)
    energy, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -count:].flip(1)
    # An axis has no sign of its own; the same one at every run: its largest entry is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    found = torch.zeros(len(flat_pW), count, dtype=torch.float64)
    found[:, : axes.shape[1]] = centred @ axes
    return found, float(energy[-count:].sum() / energy.sum().clamp_min(1e-300))


def _foreground(flat_pW: torch.Tensor, g: int) -> torch.Tensor:
    """bool [p]."""
    component_p = _components(flat_pW, 1)[0][:, 0]
    above_p = component_p > _otsu(component_p)
    if above_p.all() or not above_p.any():
        return torch.ones_like(above_p)
    images_mgg = above_p.reshape(-1, g, g)
    border_gg = torch.zeros(g, g, dtype=torch.bool)
    border_gg[[0, -1]] = True
    border_gg[:, [0, -1]] = True
    at_border, inside = images_mgg[:, border_gg].double().mean(), images_mgg[:, ~border_gg].double().mean()
    return above_p if border_gg.all() or inside >= at_border else ~above_p


def _otsu(values_p: torch.Tensor) -> float:
    """The value that parts `values_p` so that the variance between the parts is largest."""
    ranked = values_p.sort().values
    p = len(ranked)
    if p < 2:
        return float("-inf")
    left = torch.arange(1, p, dtype=torch.float64)
    sums = ranked.cumsum(0)
    between = left * (p - left) * (sums[:-1] / left - (sums[-1] - sums[:-1]) / (p - left)).square()
    place = int(between.argmax())
    return float((ranked[place] + ranked[place + 1]) / 2)


# ---------------------------------------------------------------------------------------------- files


def _found(config: VisualizeConfig) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of what --images names, in order; names are TAR_KEY for images of tars."""
    import braceexpand

    for part in filter(None, (part.strip() for part in config.images.split("::"))):
        for pattern in braceexpand.braceexpand(part):
            paths = sorted(glob.glob(pattern)) if not Path(pattern).exists() else [pattern]  # noqa: PTH207
            if not paths:
                raise DataError(f"no image and no tar matches {pattern!r} (in --images {config.images!r})")
            for path in map(Path, paths):
                yield from _images_of(path)


def _images_of(path: Path) -> Iterator[tuple[str, bytes]]:
    suffix = path.suffix.lower().removeprefix(".")
    if suffix == "tar":
        index = index_tar(path)
        for key, members in read_samples(path, IMAGE_EXTENSIONS, index):
            yield f"{path.stem}_{key}", members[image_extension(members)]
    elif suffix in IMAGE_EXTENSIONS and path.is_file():
        yield path.stem, path.read_bytes()
    else:
        raise DataError(f"{path} is no image ({', '.join(IMAGE_EXTENSIONS)}) and no tar: take it out of --images")


def _write(config: VisualizeConfig, made: Pictures) -> None:
    folder, tile = make_folder(Path(config.output_dir)), config.tile_size
    twice = {name for name in made.names if made.names.count(name) > 1}
    if twice:
        raise DataError(f"two of the images are named {sorted(twice)[0]!r}: their pictures would be one file")
    pairs = []
    for name, pixels, colours in zip(made.names, made.images, made.colours, strict=True):
        photo = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BICUBIC)
        shown = Image.fromarray(colours).resize((tile, tile), Image.Resampling.NEAREST)
        _save(folder / f"{name}.png", shown)
        pairs.append((photo, shown))
    columns = max(1, round((len(pairs) / 2) ** 0.5))  # pairs are twice as wide as high
    rows = -(-len(pairs) // columns)
    width, height = columns * (2 * tile + 3 * GAP), rows * (tile + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for i, (photo, shown) in enumerate(pairs):
        x, y = (i % columns) * (2 * tile + 3 * GAP) + GAP, (i // columns) * (tile + GAP) + GAP
        sheet.paste(photo, (x, y))
        sheet.paste(shown, (x + tile + GAP // 2, y))
    _save(folder / CONTACT_SHEET, sheet)


def _save(path: Path, image: Image.Image) -> None:
    write_bytes(path, lambda file: image.save(file, format="PNG"))
