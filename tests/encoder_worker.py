"""One process of test_recompute.py: gradients through the engine with blocks recomputed, compiled, or neither.

Graphs are captured and differentiated ahead of time, but not lowered (backend aot_eager): what a compiler makes of them is
test_recompute.py's own, without an engine. So every ZeRO stage costs seconds, not minutes.
"""

import contextlib
import functools
import io
import sys
from pathlib import Path

import torch
from engine_worker import ENCODER, batch_of_step, build, captured_step

from mlcd_ds import engine as engine_module
from mlcd_ds.batch import ImageLabelBatch
from mlcd_ds.config import EncoderOptions
from mlcd_ds.models.compiled import compile_blocks
from mlcd_ds.models.vit import Dropping, VisionTransformer
from mlcd_ds.topology import Topology

KINDS = {
    "plain": ({}, {}),
    "all": ({"checkpoint_layers": "all"}, {}),
    "section": ({}, {"activation_checkpointing": {}}),
    "first": ({"checkpoint_layers": 1}, {}),
    "off": ({"checkpoint_layers": 0}, {"activation_checkpointing": {}}),
    "host": ({}, {"activation_checkpointing": {"cpu_checkpointing": True, "synchronize_checkpoint_boundary": True}}),
    "selective": ({"checkpoint_layers": "selective"}, {}),
    "compile": ({"compile": True}, {}),
    "compile, all": ({"compile": True, "checkpoint_layers": "all"}, {}),
    "compile, selective": ({"compile": True, "checkpoint_layers": "selective"}, {}),
}
"""{name: (options of the encoder, keys of the JSON)}."""
RUNS = {
    1: list(KINDS),
    2: ["plain", "all", "selective", "compile"],
    3: ["plain", "all", "selective", "compile", "compile, all", "compile, selective"],
}
"""{ZeRO stage: what is run there}."""


def encoder() -> VisionTransformer:
    """Rotary, with registers, all weights random (zero biases would hide a bias that is added twice), and much dropped."""
    config = ENCODER.model_copy(update={"rope": True, "registers": 2, "layers": 3})
    model = VisionTransformer(config, seed=1, dropping=Dropping(seed=3, drop_path=0.4, patch_dropout=0.25))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def main(folder: Path) -> None:
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    engine_module.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
    results = {}
    for stage, kinds in RUNS.items():
        if stage == 3:
            torch._dynamo.reset()  # its parameters are of another class; stages 1 and 2 share their graphs
        for kind in kinds:
            options, json = KINDS[kind]
            engine = build(topology, stage, 1, False, {}, model=encoder(), encoder=EncoderOptions(**options), **json)
            found = {"step 1": captured_step(engine, batch_of_step(0))}
            found["recompilations"] = engine.train_step(batch_of_step(1), 1).recompilations
            if stage == 1 and kind == "compile":
                less = batch_of_step(2)
                less = ImageLabelBatch(less.images_BCHH[:7], less.labels_BL[:7], less.keys[:7])
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    found["recompilations of another shape"] = engine.train_step(less, 2).recompilations
                found["warning"] = output.getvalue()
            results[f"{stage}, {kind}"] = found
    torch.save(results, folder / "results.pt")
    topology.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
