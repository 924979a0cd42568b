"""A trained encoder as a Hugging Face folder.

python tools/export_hf.py --run run/ --output_dir hf/
"""

import json
import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import checkpoint, cli
from mlcd_ds.config import ExportConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.models import hf, hf_text
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.topology import Topology


def export(config: ExportConfig) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json and README.md that transformers 4 and 5 read."""
    if not Topology.from_environment().is_main:
        return
    folder = checkpoint.find_encoder(config.run)
    model = checkpoint.load_encoder(folder)
    kind = hf.kind_of(model.config)
    if config.kind in ("auto", "clip") and kind == "clip" and checkpoint.has_text(folder):
        return export_pair(config, folder, model)
    if config.kind not in ("auto", kind, f"{kind}_vision"):
        positions = "rotary" if model.config.rope else "learned"
        raise ConfigError(
            f"--kind {config.kind}: the encoder in {folder} has {positions} positions, which only {hf.ARCHITECTURES[kind]} "
            f"knows: leave the flag out, or say {kind}"
        )
    name = json.loads((folder / "encoder.json").read_text())["model"]
    out = Path(config.output_dir)
    card = hf.model_card(model.config, name, out.name, _facts(folder))
    files = hf.write_folder(out, model.config, model.state_dict(), card, config.dtype, config.force)
    print(f"{folder} -> {out}: {hf.ARCHITECTURES[kind]}, {config.dtype}, read back equal; {', '.join(files)}")


def export_pair(config: ExportConfig, folder: Path, model: VisionTransformer) -> None:
    """Both towers of a run on captions, as a CLIPModel with its tokenizer."""
    text = checkpoint.load_text(folder)
    image_name = json.loads((folder / "encoder.json").read_text())["model"]
    out = Path(config.output_dir)
    names = image_name, text.name
    card = hf_text.pair_card(model.config, text.model.config, text.log_scale, names, out.name, _facts(folder))
    files = hf_text.write_pair(
        out,
        (model.config, model.state_dict()),
        (text.model.config, text.model.state_dict()),
        text.log_scale,
        text.tokenizer.transformers_files(text.model.config.context),
        card,
        config.dtype,
        config.force,
    )
    print(f"{folder.parent} -> {out}: CLIPModel, {config.dtype}, read back equal; {', '.join(files)}")


def _facts(folder: Path) -> dict:
    """What is known of the training: the run's config.json where the encoder lies in a run folder, its step."""
    facts = {}
    state = folder.parent / "state.json"
    if state.is_file():
        facts["step"] = json.loads(state.read_text())["step"]
    run = folder.parents[2] / "config.json" if len(folder.parents) > 2 else folder
    if run.is_file():
        recorded = json.loads(run.read_text())
        settings = recorded["settings"]
        facts |= {name: recorded["facts"][name] for name in ("num_classes", "feature_model", "global_batch")}
        names = ("objective", "sample_rate", "num_positives", "margin")  # a fine-tuned run has none of these
        facts |= {name: settings[name] for name in names if name in settings}
        if settings.get("objective") == "clip":
            facts = {name: facts[name] for name in ("step", "global_batch", "objective") if name in facts}
            facts["image_tower"] = f"locked (LiT), of {settings['init_from']}" if settings["lock_image"] else "trained"
    return facts


if __name__ == "__main__":
    cli.run(fire.Fire, export, ExportConfig)
