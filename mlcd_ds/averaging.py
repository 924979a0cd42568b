"""A moving average of trained weights, split over the ranks as the optimizer's float32 weights are.

Pieces are {name: (start, values)}: of a parameter, flattened, the elements from `start` on that this rank has, float32 [n].
A parameter of which it has none is not among them; no element is on two ranks.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlcd_ds import collectives
from mlcd_ds.errors import CheckpointError
from mlcd_ds.topology import Topology

Pieces = Mapping[str, tuple[int, torch.Tensor]]


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after each step, float32; it begins as the first weights.

    shapes: of every parameter, on every rank. Each rank keeps the average of its pieces alone: 4 bytes for each of their
    elements, where they lie.
    """

    def __init__(self, decay: float, pieces: Pieces, shapes: Mapping[str, torch.Size]):
        self.decay, self.shapes = decay, dict(shapes)
        self._average = get_ema_multi_avg_fn(decay)
        self.restart(pieces)

    def restart(self, pieces: Pieces) -> None:
        """Makes the average these weights."""
        self._pieces = {name: (start, values.detach().clone()) for name, (start, values) in pieces.items()}

    def update(self, pieces: Pieces) -> None:
        """Takes the weights after a step into the average."""
        if self._pieces:
            own = [values for _, values in self._pieces.values()]
            self._average(own, [pieces[name][1].detach() for name in self._pieces], None)

    def whole(self, topology: Topology) -> dict[str, torch.Tensor]:
        """The average of every parameter, float32 on the CPU. Every rank calls it: one all-reduce for each parameter."""
        found = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), device=topology.device)
            if name in self._pieces:
                start, values = self._pieces[name]
                full[start : start + len(values)] = values
            found[name] = collectives.sum_(full, topology).view(shape).cpu()
        return found

    def load(self, files: Mapping[Path, str]) -> None:
        """Takes this rank's pieces out of files of whole parameters. files: {file: what its names lack at their beginning}.

        Whoever wrote them, however many ranks: the same bits. Raises CheckpointError for what is missing or does not fit.
        """
        missing = set(self._pieces)
        for path, prefix in files.items():
            try:
                with safe_open(path, "pt") as file:
                    for name in sorted(missing.intersection(f"{prefix}{key}" for key in file.keys())):
                        start, values = self._pieces[name]
                        saved = file.get_tensor(name.removeprefix(prefix))
                        if saved.shape != self.shapes[name] or saved.dtype != values.dtype:
                            raise CheckpointError(
                                f"{path}: {name} is {saved.dtype} {list(saved.shape)}, this run has {values.dtype} "
                                f"{list(self.shapes[name])}"
                            )
                        values.copy_(saved.view(-1)[start : start + len(values)])
                        missing.discard(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        if missing:
            raise CheckpointError(f"{', '.join(map(str, files))} lack the average of {sorted(missing)[0]}")
