"""The text side to and from Hugging Face folders: CLIPTextModelWithProjection's names, and both towers as one CLIPModel.

Shapes: W width, E embedding width.
"""

import json
import math
from pathlib import Path

import torch
from pydantic import ValidationError

from mlcd_ds.errors import CheckpointError, ConfigError
from mlcd_ds.files import write_json, write_text
from mlcd_ds.models import hf
from mlcd_ds.models.text import VOCABULARY, TextConfig
from mlcd_ds.models.vit import VitConfig

PREFIX = "text_model."
PROJECTION = "projection.weight"
PROJECTION_THERE = "text_projection.weight"
SCALE, SCALE_THERE = "log_scale", "logit_scale"

LEGACY_END_TOKEN = 2
"""transformers takes this eos_token_id for a mark of old CLIP folders: the embedding is then taken at the highest id."""


def names_there(config: TextConfig) -> dict[str, tuple[str, ...]]:
    """{our parameter: theirs, without prefix}: three for queries, keys and values, one for any other; no projection."""
    names: dict[str, tuple[str, ...]] = {
        "embeddings.tokens.weight": ("embeddings.token_embedding.weight",),
        "embeddings.positions": ("embeddings.position_embedding.weight",),
    }
    return names | hf.layer_names(config.layers) | hf.both_parts({"norm_post": ("final_layer_norm",)})


def text_config_there(config: TextConfig) -> dict:
    """CLIPTextConfig. Every value that has another default there or in another version is written out."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "bos_token_id": None,
        "pad_token_id": config.end_token,
        "eos_token_id": config.end_token,
    }


def text_config_here(there: dict, embed_dim: int, where: str) -> TextConfig:
    """The text tower of a CLIPModel's text_config. Raises CheckpointError for options that ours has not."""
    # What the files leave out has transformers' defaults.
    defaults = {"vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    defaults |= {"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
    there = defaults | {"layer_norm_eps": 1e-5, "eos_token_id": VOCABULARY - 1} | there
    end = there["eos_token_id"]
    try:
        return TextConfig(
            layers=there["num_hidden_layers"],
            width=there["hidden_size"],
            heads=there["num_attention_heads"],
            mlp_width=there["intermediate_size"],
            embed_dim=embed_dim,
            activation=there["hidden_act"],
            norm_eps=there["layer_norm_eps"],
            context=there["max_position_embeddings"],
            vocabulary=there["vocab_size"],
            end_token=there["vocab_size"] - 1 if end == LEGACY_END_TOKEN else end,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: text_config: {error.errors()[0]['msg']}") from None


def tensors_there(config: TextConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under their names, with the projection."""
    tensors = {PROJECTION_THERE: weights[PROJECTION]}
    for ours, theirs in names_there(config).items():
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            tensors[PREFIX + name] = part
    return tensors


def tensors_here(config: TextConfig, tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Their tensors as our state dict. Raises CheckpointError naming the first that is missing."""
    weights = {}
    wanted = {ours: tuple(PREFIX + name for name in theirs) for ours, theirs in names_there(config).items()}
    for ours, theirs in (wanted | {PROJECTION: (PROJECTION_THERE,)}).items():
        missing = [name for name in theirs if name not in tensors]
        if missing:
            raise CheckpointError(f"{where}: no tensor {missing[0]} among its {len(tensors)}: it has no text side")
        parts = [tensors[name] for name in theirs]
        weights[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return weights


def read_text(path: str | Path) -> tuple[TextConfig, dict[str, torch.Tensor], torch.Tensor]:
    """(config, float32 state dict of the text tower, log of the scale [1]) of a CLIPModel folder.

    Its image side is `hf.read_folder`'s. Raises CheckpointError for what is no such folder.
    """
    folder = Path(path)
    try:
        there = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read ({error}): expected a CLIPModel's") from None
    if there.get("model_type") != "clip":
        raise CheckpointError(
            f"{folder / 'config.json'} is of model_type {there.get('model_type')!r}: texts need a whole CLIPModel, 'clip'"
        )
    config = text_config_here(there.get("text_config") or {}, there.get("projection_dim", 512), str(folder))
    tensors = hf.read_tensors(folder)
    if SCALE_THERE not in tensors:
        raise CheckpointError(f"{folder}: no tensor {SCALE_THERE}: it is no whole CLIPModel")
    weights = tensors_here(config, tensors, str(folder))
    scale = tensors[SCALE_THERE].float().reshape(1)
    return config, {name: tensor.float() for name, tensor in weights.items()}, scale


def write_pair(
    out: Path,
    image: tuple[VitConfig, dict[str, torch.Tensor]],
    text: tuple[TextConfig, dict[str, torch.Tensor]],
    log_scale: torch.Tensor,
    tokenizer_files: dict[str, str],
    card: str,
    dtype: str = "float32",
    force: bool = False,
    max_file_bytes: int = hf.MAX_FILE_BYTES,
) -> list[str]:
    """Writes both towers as a CLIPModel folder, with its tokenizer; returns the names of its files. As `hf.write_folder`.

    log_scale: [1]. tokenizer_files: {name: content}. Raises ConfigError for what CLIPModel cannot hold: rotary positions, an
    end token of id 2.
    """
    image_config, text_config = image[0], text[0]
    if image_config.rope:
        raise ConfigError(
            "the image tower has rotary positions, which CLIPModel does not know: export it alone, by --kind mlcd"
        )
    if text_config.end_token == LEGACY_END_TOKEN:
        raise ConfigError(
            f"the tokenizer's end token has the id {LEGACY_END_TOKEN}, which transformers takes for a mark of old CLIP "
            "folders: such a text tower cannot be exported. Train with CLIP's tokenizer, or one of tools/train_tokenizer.py"
        )
    kind = hf.DTYPES[dtype]
    rounded = [{name: tensor.to(kind) for name, tensor in weights.items()} for _, weights in (image, text)]
    scale = log_scale.reshape(()).to(kind)

    def fill(staging: Path) -> None:
        tensors = hf.tensors_there(image_config, rounded[0]) | tensors_there(text_config, rounded[1])
        hf.write_tensors(staging, tensors | {SCALE_THERE: scale}, max_file_bytes)
        write_json(staging / "config.json", pair_config_there(image_config, text_config, log_scale, dtype))
        write_json(staging / "preprocessor_config.json", hf.preprocessing(image_config))
        for name, content in tokenizer_files.items():
            write_text(staging / name, content)
        write_text(staging / "README.md", card)
        hf.compare(staging, hf.read_folder(staging), (image_config, rounded[0]))
        config, weights, read_scale = read_text(staging)
        written = rounded[1] | {SCALE: scale.reshape(1)}
        hf.compare(staging, (config, weights | {SCALE: read_scale}), (text_config, written))

    return hf.publish(out, fill, force)


def pair_config_there(image: VitConfig, text: TextConfig, log_scale: torch.Tensor, dtype: str) -> dict:
    """config.json of a CLIPModel."""
    vision = hf.config_there(image, dtype)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.embed_dim,
        "logit_scale_init_value": float(log_scale),
        "initializer_factor": 1.0,
        "text_config": text_config_there(text),
        "vision_config": {name: vision[name] for name in vision if name not in ("architectures", "torch_dtype")},
        "torch_dtype": dtype,
    }


def pair_card(image: VitConfig, text: TextConfig, log_scale: torch.Tensor, names: tuple[str, str], title: str, facts):
    """README.md. names: of the two presets; facts: of the training, as they are known."""
    rows = {
        "image preset": f"{names[0]}, {image.image_size} px, patches of {image.patch_size}, {image.layers} x {image.width}",
        "text preset": f"{names[1]}, {text.layers} x {text.width}, {text.heads} heads, {text.context} tokens of "
        f"{text.vocabulary:,}",
        "joint embedding": image.embed_dim,
        "logits": f"cosines x {math.exp(float(log_scale)):.2f}",
        **facts,
    }
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [vision, mlcd]
---

# {title}

An image and a text tower, trained on captions with mlcd_ds.

| | |
|---|---|
{table}

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

processor, tokenizer = AutoImageProcessor.from_pretrained("{title}"), AutoTokenizer.from_pretrained("{title}")
model = CLIPModel.from_pretrained("{title}").eval()
images = processor(images=Image.open("image.jpg"), return_tensors="pt")
texts = tokenizer(["a photo of a cat", "a photo of a dog"], padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**images, input_ids=texts.input_ids, attention_mask=texts.attention_mask).logits_per_image
```
"""
