"""CLIP models of the transformers library as feature extractors; preprocessing without torchvision.

n images or texts, d width of the joint embedding, H image side in pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mlcd_ds.errors import ConfigError, DataError


def load_clip(
    path: str, device: torch.device, dtype: torch.dtype, with_texts: bool
) -> tuple[str, int, int, Callable, Callable | None]:
    """(name, d, H, embed_images, embed_texts or None) of a folder or hub name; see features.FeatureExtractor.

    H is the side that the shorter side is resized to; embed_images crops the centre out where the model wants less.
    Raises ConfigError when transformers is not installed, DataError when the folder is no CLIP model, lacks weights of one,
    or its preprocessing is another than: shorter side resized, bicubic; square centre crop; mean and std.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("hf: models need the transformers library: pip install transformers") from None
    try:
        model, loaded = transformers.CLIPModel.from_pretrained(path, torch_dtype=dtype, output_loading_info=True)
        preprocessing, _ = transformers.CLIPImageProcessor.get_image_processor_dict(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path) if with_texts else None
    except (OSError, ValueError) as error:
        raise DataError(
            f"hf:{path} cannot be loaded as a CLIP model: {str(error).splitlines()[0]}. Expected a folder (or hub name) "
            "with config.json, model.safetensors, preprocessor_config.json" + (" and a tokenizer" if with_texts else "")
        ) from None
    # transformers only logs these, and would go on with random numbers in their place.
    if missing := sorted(loaded["missing_keys"]):
        raise DataError(
            f"hf:{path} lacks {len(missing)} of a CLIP model's weights, e.g. {missing[0]}: it is another architecture, or "
            "one tower alone. Give the folder of a whole CLIPModel."
        )
    model = model.eval().to(device)
    size, cropped = _image_sizes(path, preprocessing)
    margin = round((size - cropped) / 2)
    mean = torch.tensor(preprocessing["image_mean"], device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing["image_std"], device=device).view(3, 1, 1)

    @torch.inference_mode()
    def embed_images(images: torch.Tensor) -> torch.Tensor:
        crops = images[:, :, margin : margin + cropped, margin : margin + cropped]
        pixels = (crops.to(device).float() / 255 - mean) / std
        return _unit(model.get_image_features(pixel_values=pixels.to(dtype)))

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return _unit(model.get_text_features(**inputs))

    name = f"hf:{Path(path).name}:{_weights_hash(model)}"
    return name, model.config.projection_dim, size, embed_images, embed_texts if with_texts else None


def _unit(features) -> torch.Tensor:
    # transformers 4 returns the tensor, 5 an output object around it.
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=1).cpu()


def _image_sizes(path: str, preprocessing: dict) -> tuple[int, int]:
    """(pixels the shorter side is resized to, side of the crop)."""
    size, crop = preprocessing.get("size", {}), preprocessing.get("crop_size", {})
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = {crop.get("height"), crop.get("width")} if isinstance(crop, dict) else {crop}
    cropped = sides.pop() if len(sides) == 1 else None
    off = [
        name
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if not preprocessing.get(name, True)
    ]
    if shorter is None or cropped is None or cropped > shorter or preprocessing.get("resample", 3) != 3 or off:
        raise DataError(
            f"hf:{path}: its preprocessor_config.json (size {json.dumps(size)}, crop_size {json.dumps(crop)}, resample "
            f"{preprocessing.get('resample')}{''.join(f', {name} false' for name in off)}) is not CLIP's: shorter side "
            "resized (resample 3, bicubic), square centre crop not larger than that, rescaled, normalised"
        )
    factor = preprocessing.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise DataError(
            f"hf:{path}: rescale_factor {factor} in its preprocessor_config.json, expected 1/255 as CLIP has"
        )
    return shorter, cropped


def _weights_hash(model: torch.nn.Module) -> str:
    """12 hexadecimal digits of the weights' names, shapes and some values: cheap, and tells models apart."""
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + some.tobytes())
    return digest.hexdigest()[:12]
