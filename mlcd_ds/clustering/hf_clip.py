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

    Raises ConfigError when transformers is not installed, DataError when the folder is no CLIP model, or its preprocessing
    is another than resize-shorter-side, crop of that size, normalise.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("hf: models need the transformers library: pip install transformers") from None
    try:
        model = transformers.CLIPModel.from_pretrained(path, torch_dtype=dtype).eval().to(device)
        preprocessing, _ = transformers.CLIPImageProcessor.get_image_processor_dict(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path) if with_texts else None
    except (OSError, ValueError) as error:
        raise DataError(
            f"hf:{path} cannot be loaded as a CLIP model: {str(error).splitlines()[0]}. Expected a folder (or hub name) "
            "with config.json, model.safetensors, preprocessor_config.json" + (" and a tokenizer" if with_texts else "")
        ) from None
    size = _image_size(path, preprocessing)
    mean = torch.tensor(preprocessing["image_mean"], device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing["image_std"], device=device).view(3, 1, 1)

    @torch.inference_mode()
    def embed_images(images: torch.Tensor) -> torch.Tensor:
        pixels = (images.to(device).float() / 255 - mean) / std
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


def _image_size(path: str, preprocessing: dict) -> int:
    size, crop = preprocessing.get("size", {}), preprocessing.get("crop_size", {})
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    cropped = crop.get("height") if isinstance(crop, dict) else crop
    bicubic = preprocessing.get("resample", 3) == 3
    if shorter is None or shorter != cropped or not bicubic:
        raise DataError(
            f"hf:{path}: its preprocessing (size {json.dumps(size)}, crop {json.dumps(crop)}, resample "
            f"{preprocessing.get('resample')}) is not CLIP's: shorter side and square crop of one size, bicubic"
        )
    return shorter


def _weights_hash(model: torch.nn.Module) -> str:
    """12 hexadecimal digits of the weights' names, shapes and some values: cheap, and tells models apart."""
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + some.tobytes())
    return digest.hexdigest()[:12]
