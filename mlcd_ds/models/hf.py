"""To and from Hugging Face folders: MLCDVisionModel (rotary presets), CLIPVisionModelWithProjection (the others).

The names, of transformers' MLCD and CLIP models, are written with the prefix `vision_model.`: transformers 4 needs it, 5
reads either. MLCD has no projection there; ours then goes into a file of its own beside the model, so that what was
written can be read back bit for bit.

Shapes: W width, E embedding width, A heads.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlcd_ds.errors import CheckpointError, ConfigError
from mlcd_ds.files import save_tensors, whole_folder, write_json, write_text
from mlcd_ds.models.vit import PIXEL_MEAN, PIXEL_STD, VitConfig

PREFIX = "vision_model."
PROJECTION = "projection.weight"
PROJECTION_THERE = "visual_projection.weight"
PROJECTION_FILE = "mlcd_ds_projection.safetensors"

DESCRIBING = ("config.json", "preprocessor_config.json", PROJECTION_FILE)
"""Files that say what the weights are: shapes and function, the pixels they were trained on, the projection's width."""

MAX_FILE_BYTES = 5_000_000_000
"""Of one model-0000i-of-0000n.safetensors, as transformers cuts them."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ARCHITECTURES = {"mlcd": "MLCDVisionModel", "clip": "CLIPVisionModelWithProjection"}


def kind_of(config: VitConfig) -> str:
    """ "mlcd" for rotary positions, "clip" for learned ones: neither model has the other's."""
    return "mlcd" if config.rope else "clip"


def names_there(config: VitConfig) -> dict[str, tuple[str, ...]]:
    """{our parameter: theirs, without prefix}: three for queries, keys and values, one for any other; no projection."""
    names: dict[str, tuple[str, ...]] = {
        "embeddings.class_token": ("embeddings.class_embedding",),
        "embeddings.patch.weight": ("embeddings.patch_embedding.weight",),
    }
    if config.rope:
        names["angles.class_angle"] = ("class_pos_emb",)
    else:
        names["embeddings.positions"] = ("embeddings.position_embedding.weight",)
    norms = {"norm_pre": ("pre_layrnorm",), "norm_post": ("post_layernorm",)}  # spelt so there
    return names | both_parts(norms) | layer_names(config.layers)


def layer_names(layers: int) -> dict[str, tuple[str, ...]]:
    """`names_there` of the blocks, which are the same in all of CLIP's and MLCD's towers."""
    modules: dict[str, tuple[str, ...]] = {}
    for n in range(layers):
        here, there = f"blocks.{n}", f"encoder.layers.{n}"
        modules[f"{here}.norm1"], modules[f"{here}.norm2"] = (f"{there}.layer_norm1",), (f"{there}.layer_norm2",)
        modules[f"{here}.fc1"], modules[f"{here}.fc2"] = (f"{there}.mlp.fc1",), (f"{there}.mlp.fc2",)
        modules[f"{here}.attention.out"] = (f"{there}.self_attn.out_proj",)
        modules[f"{here}.attention.qkv"] = tuple(f"{there}.self_attn.{part}_proj" for part in "qkv")
    return both_parts(modules)


def both_parts(modules: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of modules to those of their weights and biases."""
    return {
        f"{ours}.{part}": tuple(f"{module}.{part}" for module in theirs)
        for ours, theirs in modules.items()
        for part in ("weight", "bias")
    }


def config_there(config: VitConfig, dtype: str) -> dict:
    """config.json. Every value that has another default there or in another version is written out."""
    there = {
        "architectures": [ARCHITECTURES[kind_of(config)]],
        "model_type": "mlcd_vision_model" if config.rope else "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "torch_dtype": dtype,
    }
    there |= {"num_key_value_groups": 1} if config.rope else {"projection_dim": config.embed_dim}
    return there


def config_here(path: Path) -> VitConfig:
    """The encoder that a folder's config.json describes.

    Of a whole CLIPModel its image side. MLCD's has no projection: its embedding width is that of our file beside it, or W.
    Raises CheckpointError for another model, or one with options that ours has not.
    """
    try:
        there = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'config.json'} cannot be read ({error}): expected a folder of a CLIP or MLCD vision model"
        ) from None
    found = there.get("model_type")
    if found == "clip":
        # CLIPModel's own projection_dim counts, whatever its vision_config says.
        there = there.get("vision_config", {}) | {"projection_dim": there.get("projection_dim", 512)}
    elif found not in ("clip_vision_model", "mlcd_vision_model", "mlcd"):
        raise CheckpointError(
            f"{path / 'config.json'} is of model_type {found!r}: expected clip, clip_vision_model or mlcd_vision_model"
        )
    rope = found in ("mlcd_vision_model", "mlcd")
    # What the files leave out has transformers' defaults.
    defaults = (
        {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14, "hidden_act": "gelu"}
        if rope
        else {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "projection_dim": 512}
    )
    there = defaults | {"layer_norm_eps": 1e-5, "num_channels": 3, "num_key_value_groups": 1} | there
    for name, only in (("num_channels", 3), ("num_key_value_groups", 1)):
        if there[name] != only:
            raise CheckpointError(f"{path / 'config.json'}: {name} is {there[name]}, this encoder knows {only} alone")
    embed_dim = there["hidden_size"] if rope else there["projection_dim"]
    if rope and (path / PROJECTION_FILE).is_file():
        embed_dim = len(_load(path / PROJECTION_FILE)[PROJECTION])
    try:
        return VitConfig(
            image_size=there["image_size"],
            patch_size=there["patch_size"],
            layers=there["num_hidden_layers"],
            width=there["hidden_size"],
            heads=there["num_attention_heads"],
            mlp_width=there["intermediate_size"],
            embed_dim=embed_dim,
            rope=rope,
            activation=there["hidden_act"],
            norm_eps=there["layer_norm_eps"],
        )
    except ValidationError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error.errors()[0]['msg']}") from None


def tensors_there(config: VitConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under their names; with the projection for CLIP."""
    tensors = {}
    for ours, theirs in names_there(config).items():
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            tensors[PREFIX + name] = part
    if not config.rope:
        tensors[PROJECTION_THERE] = weights[PROJECTION]
    return tensors


def tensors_here(config: VitConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors, with or without the prefix, as our state dict, without the projection where they have none.

    Raises CheckpointError naming the first that is missing.
    """
    weights = {}
    for ours, theirs in names_there(config).items():
        parts = [tensors.get(PREFIX + name, tensors.get(name)) for name in theirs]
        if any(part is None for part in parts):
            raise CheckpointError(
                f"no tensor {PREFIX}{theirs[0]} (nor {theirs[0]}) among the {len(tensors)} of the file"
            )
        weights[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if PROJECTION_THERE in tensors:
        weights[PROJECTION] = tensors[PROJECTION_THERE]
    return weights


def read_config(path: str | Path) -> VitConfig:
    """The config of `read_folder`; of a name on the Hub no weights are fetched. Raises what `read_folder` raises."""
    folder = _local(path, DESCRIBING)
    config = config_here(folder)
    _check_preprocessing(folder)
    return config


def read_folder(path: str | Path) -> tuple[VitConfig, dict[str, torch.Tensor]]:
    """(config, float32 state dict) of a folder, or of a name on the Hub, which is fetched by huggingface_hub.

    Without `projection.weight` where the model has none (MLCDVisionModel, CLIPVisionModel).
    Raises CheckpointError for what is no such folder, ConfigError where a name cannot be fetched.
    """
    folder = _local(path, (*DESCRIBING, "*.safetensors", "*.index.json"))
    config = config_here(folder)
    _check_preprocessing(folder)
    weights = tensors_here(config, read_tensors(folder))
    if config.rope and (folder / PROJECTION_FILE).is_file():
        weights[PROJECTION] = _load(folder / PROJECTION_FILE)[PROJECTION]
    return config, {name: tensor.float() for name, tensor in weights.items()}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that its index names. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from None
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise CheckpointError(
            f"{folder} has no model.safetensors: pickled weights (pytorch_model.bin) are not read, as a pickle can run any "
            "program. Convert them with transformers: from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}: expected a file beside it")
        tensors |= _load(folder / name)
    return tensors


def _check_preprocessing(folder: Path) -> None:
    """Refuses weights of images normalised otherwise than ours are."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
        for name, wanted in (("image_mean", PIXEL_MEAN), ("image_std", PIXEL_STD)):
            if any(abs(ours - theirs) > 1e-4 for ours, theirs in zip(wanted, found.get(name, wanted), strict=True)):
                raise CheckpointError(
                    f"{path}: {name} is {found[name]}, this encoder normalises images by {list(wanted)}"
                )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _local(path: str | Path, patterns: tuple[str, ...]) -> Path:
    """The folder `path`, or where huggingface_hub has put the files of that name whose names fit the patterns."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
        raise CheckpointError(f"the folder {path} does not exist")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"{path} is no folder here; to fetch it from the Hub: pip install huggingface_hub, or give a folder"
        ) from None
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{path} is no folder here and cannot be fetched: {str(error).splitlines()[0]}") from None


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def write_folder(
    out: Path,
    config: VitConfig,
    weights: dict[str, torch.Tensor],
    card: str,
    dtype: str = "float32",
    force: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[str]:
    """Writes a folder that transformers reads, and returns the names of its files.

    weights: our float32 state dict. card: README.md. dtype: of the tensors. Written beside `out`, read back and compared
    with `weights`, then renamed: a folder under its name is whole.
    Raises CheckpointError where `out` exists (unless `force`), or what was read back differs; ConfigError for an encoder
    with register tokens.
    """
    refuse_registers(config, ARCHITECTURES[kind_of(config)])
    rounded = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}

    def fill(staging: Path) -> None:
        write_tensors(staging, tensors_there(config, rounded), max_file_bytes)
        if config.rope:
            save_tensors(staging / PROJECTION_FILE, {PROJECTION: rounded[PROJECTION]}, {"format": "pt"})
        write_json(staging / "config.json", config_there(config, dtype))
        write_json(staging / "preprocessor_config.json", preprocessing(config))
        write_text(staging / "README.md", card)
        compare(staging, read_folder(staging), (config, rounded))

    return publish(out, fill, force)


def refuse_registers(config: VitConfig, architecture: str) -> None:
    """Raises ConfigError for an encoder with register tokens."""
    if config.registers:
        raise ConfigError(
            f"the encoder has {config.registers} register tokens, for which {architecture} has no place: it cannot be "
            "exported. Our own tools read it as it is; encoders for export are trained with --register_tokens 0"
        )


def compare(staging: Path, read: tuple, written: tuple) -> None:
    """Raises CheckpointError where a (config, tensors) that was read back is not what was written."""
    differing = [name for name, tensor in written[1].items() if not torch.equal(read[1][name], tensor.float())]
    if read[0] != written[0] or differing:
        raise CheckpointError(
            f"{staging} reads back differently ({', '.join(differing[:3]) or 'its config'}): not published"
        )


def publish(out: Path, fill: Callable[[Path], None], force: bool) -> list[str]:
    """Makes the folder `out` of what `fill(staging)` writes, whole or not at all; returns the names of its files.

    Raises CheckpointError where `out` exists (unless `force`), SaveError where a disk is full or read-only, and what `fill`
    raises; nothing is then left of it, and what was there before stays.
    """
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already: choose another --output_dir, or replace it by --force")
    with whole_folder(out) as staging:
        fill(staging)
        return sorted(path.name for path in staging.iterdir())


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], max_file_bytes: int) -> None:
    """One model.safetensors, or several with an index where they do not fit into max_file_bytes."""
    files: list[dict[str, torch.Tensor]] = [{}]
    room = max_file_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and files[-1]:
            files.append({})
            room = max_file_bytes
        files[-1][name] = tensor
        room -= tensor.nbytes
    if len(files) == 1:
        save_tensors(folder / "model.safetensors", files[0], {"format": "pt"})
        return
    where = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_tensors(folder / file, part, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def preprocessing(config: VitConfig) -> dict:
    """preprocessor_config.json: shorter side to the image size, bicubic, middle cut out, CLIP's mean and deviation."""
    size = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }


def model_card(config: VitConfig, name: str, title: str, facts: dict) -> str:
    """README.md: what it is, how it is used. name: of the preset; facts: of its training, as they are known."""
    use = {
        "mlcd": "from transformers import AutoImageProcessor, MLCDVisionModel as Model",
        "clip": "from transformers import AutoImageProcessor, CLIPVisionModelWithProjection as Model",
    }[kind_of(config)]
    after = "outputs.pooler_output" if config.rope else "outputs.image_embeds"
    what = "the class token after the last norm" if config.rope else "the class token, projected"
    rows = {
        "preset": name,
        "image": f"{config.image_size} px, patches of {config.patch_size}",
        "layers x width": f"{config.layers} x {config.width}, {config.heads} heads",
        "positions": "rotary, two-dimensional" if config.rope else "learned",
        **facts,
    }
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items())
    extra = (
        f"\nThe projection to {config.embed_dim} dimensions that the training used is in `{PROJECTION_FILE}`; the model "
        "class has no place for it.\n"
        if config.rope
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [vision, mlcd]
---

# {title}

A vision transformer trained by Multi-Label Cluster Discrimination (An et al., ECCV 2024) with mlcd_ds.

| | |
|---|---|
{table}

```python
import torch
from PIL import Image
{use}

processor = AutoImageProcessor.from_pretrained("{title}")
model = Model.from_pretrained("{title}").eval()
with torch.no_grad():
    outputs = model(**processor(images=Image.open("image.jpg"), return_tensors="pt"))
features = {after}  # {what}
```
{extra}"""
