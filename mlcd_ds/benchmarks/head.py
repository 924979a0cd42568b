"""The class head against what it cannot go below (its three bare products) and what it replaces (the whole logits).

Shapes: B images of all ranks, b = B/ranks of this one, K classes, c of this shard, D embedding, S sampled rows of this
shard, L labels an image.
"""

import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mlcd_ds import collectives
from mlcd_ds.benchmarks.timing import Contender, command_line, in_processes, peak_bytes, table, time_in_turn
from mlcd_ds.config import BenchHeadConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.files import write_json
from mlcd_ds.losses import NORM_FLOOR, LossSpec, loss_from_sums, positive_logits
from mlcd_ds.optim import RowAdamW
from mlcd_ds.partial_fc import INIT_STD, PartialFC
from mlcd_ds.sampling import Marked
from mlcd_ds.sharded_loss import ALIGNMENT
from mlcd_ds.topology import Topology

DEFAULT_SHAPES = {
    "cpu": "B256_K200000_D512_r0.1,B1024_K200000_D512_r0.1",
    "cuda": "B1024_K200000_D512_r0.1,B4096_K1000000_D768_r0.1",
}

DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference between the head's loss and the materialised one."""


@dataclass(frozen=True)
class Shape:
    """What one line of the table measures: B images, K classes, D embedding, r sample rate, factors of the products."""

    B: int
    K: int
    D: int
    r: float
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"B{self.B}_K{self.K}_D{self.D}_r{self.r:g}" + (self.dtype != "float32") * f"_{self.dtype}"


def parse_shapes(text: str, dtype: str = "float32") -> list[Shape]:
    """Shapes from `B256_K200000_D512_r0.1,...`, with `dtype` where one does not end in its own; else ConfigError."""
    shapes = []
    for part in text.split(","):
        found = re.fullmatch(r"B(\d+)_K(\d+)_D(\d+)_r(\d+\.?\d*|\.\d+)(_float32|_bfloat16)?", part.strip())
        if found is None:
            raise ConfigError(
                f"--shapes {part!r}: expected B256_K200000_D512_r0.1 (global batch, classes, embedding, sample rate), "
                "or B256_K200000_D512_r0.1_bfloat16, several joined by commas"
            )
        shape = Shape(int(found[1]), int(found[2]), int(found[3]), float(found[4]), (found[5] or f"_{dtype}")[1:])
        if min(shape.B, shape.K, shape.D) < 1 or not 0 < shape.r <= 1:
            raise ConfigError(f"--shapes {part!r}: B, K and D must be at least 1, and r above 0 and at most 1")
        shapes.append(shape)
    return shapes


def bench_head(config: BenchHeadConfig) -> dict:
    """Measures what `config` asks for, prints tables, returns (and writes to config.output) all numbers."""
    shapes, batches = _checked(config)
    on_gpu = torch.cuda.device_count() >= config.ranks
    device = f"cuda, {torch.cuda.get_device_name()}" if on_gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    result = {
        "command": command_line("head", config),
        "device": device,
        "threads": _threads(config),
        "ranks": config.ranks,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "labels_per_image": config.labels_per_image,
        "workspace_mb": config.workspace_mb,
        "kernels": config.kernels,
    }
    print(
        f"head on {device}: {config.ranks} ranks, {result['threads']} threads each, torch {torch.__version__}, "
        f"workspace {config.workspace_mb or 'auto'} MB"
    )

    def keep(part: str, row: dict) -> None:
        """After each shape: what has been measured outlives what comes."""
        result.setdefault(part, []).append(row)
        if config.output is not None:
            write_json(Path(config.output), result)

    for shape in shapes if config.timing else ():
        if config.ranks == 1:
            torch.set_num_threads(_threads(config))
            keep("timing", _time_shape(shape, config, Topology.single("cuda" if on_gpu else "cpu")))
        else:
            keep("timing", in_processes(config.ranks, _time_on_rank, config, shape))
    if config.timing:
        print(_time_table(result["timing"]))
    for shape in shapes if config.memory else ():
        keep("memory", _memory_of(shape, batches, config))
    if config.memory:
        print(_memory_table(result["memory"]))
    return result


def _checked(config: BenchHeadConfig) -> tuple[list[Shape], list[int]]:
    """Shapes and batches of `config`; ConfigError where they or the other flags do not fit together."""
    device = "cuda" if torch.cuda.device_count() >= config.ranks else "cpu"
    shapes = parse_shapes(config.shapes or DEFAULT_SHAPES[device], config.dtype or DEFAULT_DTYPE[device])
    for shape in shapes:
        if shape.B % config.ranks:
            raise ConfigError(f"--shapes {shape}: the global batch {shape.B} does not divide by --ranks {config.ranks}")
        if config.labels_per_image > shape.K:
            raise ConfigError(
                f"--labels_per_image {config.labels_per_image} is more than the {shape.K} classes of {shape}"
            )
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", config.memory_batches):
        raise ConfigError(f"--memory_batches {config.memory_batches!r}: expected whole numbers, like 1024,2048")
    if config.memory and config.ranks > 1:
        raise ConfigError(f"--memory is measured on one rank: leave --ranks {config.ranks} out")
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {config.output}: its folder does not exist")
    return shapes, [int(batch) for batch in config.memory_batches.split(",")]


def _threads(config: BenchHeadConfig) -> int:
    return config.threads or max(1, torch.get_num_threads() // config.ranks)


def _time_on_rank(rank: int, config: BenchHeadConfig, shape: Shape, folder: Path) -> dict:
    topology = Topology.on_this_machine(rank, config.ranks, folder / "store")
    torch.set_num_threads(_threads(config))
    row = _time_shape(shape, config, topology)
    topology.stop()
    return row


# --- what is measured -----------------------------------------------------------------------------------------------


class HeadStep:
    """A head with random centers, embeddings and labels, and one step of it.

    embeddings_bD: this rank's, with requires_grad; labels_BL: of all ranks, distinct in each row; labels_bL: this rank's.
    """

    def __init__(self, shape: Shape, config: BenchHeadConfig, topology: Topology, dtype: torch.dtype = torch.float32):
        self.shape, self.topology = shape, topology
        b, device = shape.B // topology.world_size, topology.device
        generator = torch.Generator().manual_seed(config.seed)
        # Distinct labels without a permutation of K classes an image: one of each L-th of the classes.
        width = shape.K // config.labels_per_image
        part_L = torch.arange(config.labels_per_image) * width
        self.labels_BL = (part_L + torch.randint(width, (shape.B, len(part_L)), generator=generator)).to(device)
        embeddings_BD = torch.randn(shape.B, shape.D, generator=generator, dtype=dtype)
        own = slice(topology.rank * b, (topology.rank + 1) * b)
        self.labels_bL = self.labels_BL[own]
        self.embeddings_bD = embeddings_BD[own].to(device, copy=True).requires_grad_()
        del embeddings_BD
        shard = shape.K // topology.world_size + (topology.rank < shape.K % topology.world_size)
        centers_cD = torch.empty(shard, shape.D, device=device, dtype=dtype).normal_(0, INIT_STD)
        self.head = PartialFC(
            shape.K,
            shape.D,
            topology,
            sample_rate=shape.r,
            workspace_mb=config.workspace_mb,
            seed=config.seed,
            init_centers=centers_cD,
            dtype=dtype,
            precision=shape.dtype,
            kernels=config.kernels,
        )

        self.sizes = tuple(self.mark().sizes_2.tolist())

    def mark(self) -> Marked:
        """The labels gathered, the classes sampled."""
        return self.head.mark(self.labels_bL, step=0, capacity=len(self.labels_bL))

    def run(self):
        """Sampling, forward, backward, the gradients taken: (loss, RowGradient). Leaves embeddings_bD.grad.

        As in training the host knows the sampled sizes: there they come with the loss of the step before.
        """
        self.embeddings_bD.grad = None
        loss = self.head(self.embeddings_bD, self.head.draw(self.mark(), self.sizes)).loss
        loss.backward()
        return loss.detach(), self.head.take_gradients()[0]

    def run_and_recycle(self) -> None:
        """`run` as in training, where the gradient's memory comes back after the optimizer."""
        self.head.recycle(self.run()[1])

    def draw(self) -> torch.Tensor:
        """The sampled local rows [S] of the step."""
        return self.head.sampler.draw(self.labels_BL, 0)


class MaterialisedStep:
    """The same step with one rank by plain autograd on the whole logits [B, S]."""

    def __init__(self, step: HeadStep):
        self.step, self.dtype = step, step.shape.dtype
        self.rows_S = step.draw()
        self.columns_BL = torch.searchsorted(self.rows_S, step.labels_BL)

    def run(self):
        """Forward and backward: (loss, gradient of the sampled centers [S, D]). Leaves embeddings_bD.grad."""
        self.step.embeddings_bD.grad = None
        centers_SD = self.step.head.centers.detach()[self.rows_S].requires_grad_()
        spec = self.step.head.spec
        loss = materialised_loss(self.step.embeddings_bD, centers_SD, self.columns_BL, spec, self.dtype)
        loss.backward()
        return loss.detach(), centers_SD.grad


def materialised_loss(
    embeddings_BD: torch.Tensor,
    centers_SD: torch.Tensor,
    columns_BL: torch.Tensor,
    spec: LossSpec,
    dtype: str = "float32",
) -> torch.Tensor:
    """Mean loss against all of centers_SD (both normalised here), the logits [B, S] as tensors of autograd.

    columns_BL: int64, the positives' columns, distinct in a row. dtype: "bfloat16" rounds the product's factors.
    """
    e_BD = torch.nn.functional.normalize(embeddings_BD, dim=1, eps=NORM_FLOOR)
    w_SD = torch.nn.functional.normalize(centers_SD, dim=1, eps=NORM_FLOOR)
    if dtype == "bfloat16":
        e_BD, w_SD = e_BD.bfloat16(), w_SD.bfloat16()
        if not e_BD.is_cuda:  # the same numbers, and faster than the CPU's bfloat16 products
            e_BD, w_SD = e_BD.float(), w_SD.float()
    cosine_BS = (e_BD @ w_SD.T).to(embeddings_BD.dtype)
    positive_BL = positive_logits(cosine_BS.gather(1, columns_BL), spec)
    negative_BS = (cosine_BS * spec.scale).scatter(1, columns_BL, -torch.inf)
    two = loss_from_sums(spec.objective, negative_BS.logsumexp(dim=1), (-positive_BL).logsumexp(dim=1))
    return (two.positive_G + two.negative_G).mean()


def bare_products(B: int, S: int, D: int, dtype: str, device: torch.device) -> Contender:
    """The three products of a step, results allocated beforehand. bfloat16 on a GPU; on a CPU float32 in any case.

    With S rounded up to what the head aligns its own rows to: on rows of odd length the first product is a third slower.
    """
    S = -(-S // ALIGNMENT) * ALIGNMENT
    kind = torch.bfloat16 if dtype == "bfloat16" and device.type == "cuda" else torch.float32
    e_BD = torch.nn.functional.normalize(torch.randn(B, D, device=device), dim=1).to(kind)
    w_SD = torch.nn.functional.normalize(torch.randn(S, D, device=device), dim=1).to(kind)
    logits_BS = torch.empty(B, S, device=device, dtype=kind)
    d_e_BD, d_w_SD = torch.empty_like(e_BD), torch.empty_like(w_SD)

    def run() -> None:
        torch.mm(e_BD, w_SD.T, out=logits_BS)
        torch.mm(logits_BS, w_SD, out=d_e_BD)
        torch.mm(logits_BS.T, e_BD, out=d_w_SD)

    return run


def bare_cube(device: torch.device, dtype: torch.dtype, side: int = 8192) -> Contender:
    """One product of `side` cubed: the rate that a GPU reaches at best."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    b, out = torch.randn_like(a), torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def peers_draw(labels_BL: torch.Tensor, start: int, stop: int, sample_rate: float) -> torch.Tensor:
    """Local rows as published partial FC draws them: random scores, the positives' above them, top-k, sort."""
    positive = torch.unique(labels_BL[(labels_BL >= start) & (labels_BL < stop)] - start, sorted=True)
    wanted = int(sample_rate * (stop - start))
    if wanted < len(positive):
        return positive
    scores = torch.rand(stop - start, device=labels_BL.device)
    scores[positive] = 2.0
    return torch.topk(scores, k=wanted)[1].sort()[0]


# --- time -----------------------------------------------------------------------------------------------------------


def _time_shape(shape: Shape, config: BenchHeadConfig, topology: Topology) -> dict:
    """One shape's sizes, seconds of each contender, and the ratios that the table shows."""

    def say(what: str) -> None:
        if topology.is_main:
            print(f"{shape}: {what}", flush=True)

    say("setting up")
    step = HeadStep(shape, config, topology)
    loss, gradient = step.run()
    S = len(gradient.rows_S)
    head = step.head
    optimizer = RowAdamW(head.centers, (0.9, 0.999), 1e-8, 0.0, kernels=config.kernels)
    contenders: dict[str, Contender] = {
        "products": bare_products(shape.B, S, shape.D, shape.dtype, topology.device),
        "head": step.run_and_recycle,
        "sampling": step.draw,
        "peers_sampling": lambda: peers_draw(step.labels_BL, head.start, head.stop, shape.r),
        "optimizer": lambda: optimizer.step(gradient, 1e-9),
    }
    checked, peaks = None, {}
    if topology.device.type == "cuda":
        peaks["head"] = peak_bytes(step.run_and_recycle, topology.device)
    if config.materialised and not topology.is_distributed:
        materialised = MaterialisedStep(step)
        try:
            checked = float((materialised.run()[0] / loss - 1).abs())
            if topology.device.type == "cuda":
                peaks["materialised"] = peak_bytes(materialised.run, topology.device)
            contenders["materialised"] = materialised.run
        except torch.OutOfMemoryError as error:
            say(f"materialised: {str(error).splitlines()[0]}")
            peaks["materialised"] = None
        if checked is not None and not checked <= LOSS_TOLERANCE[shape.dtype]:
            raise RuntimeError(
                f"{shape}: the head's loss differs from the materialised one by {checked:.1e} (relative)"
            )
    if topology.device.type == "cuda":
        contenders["cube"] = bare_cube(topology.device, getattr(torch, shape.dtype))
    seconds = time_in_turn(contenders, config.repeats, topology, say)
    mean_S = collectives.sum_(torch.tensor([float(S)], device=topology.device), topology).item() / topology.world_size
    flops = 6 * shape.B * mean_S * shape.D
    return {
        "shape": str(shape),
        **asdict(shape),
        "S": mean_S,
        "loss": float(loss),
        "loss_difference": checked,
        "peak_bytes": peaks,
        "seconds": seconds,
        **_ratios({name: times["min"] for name, times in seconds.items()}, flops),
    }


def _ratios(least: dict[str, float], flops: float) -> dict[str, float]:
    """least: seconds of each contender; flops: of one rank's three products."""
    ratios = {
        "head_per_products": least["head"] / least["products"],
        "products_gflops": flops / least["products"] / 1e9,
        "head_gflops": flops / least["head"] / 1e9,
        "sampling_per_head": least["sampling"] / least["head"],
        "peers_per_sampling": least["peers_sampling"] / least["sampling"],
        "optimizer_per_head": least["optimizer"] / least["head"],
    }
    if "materialised" in least:
        ratios["materialised_per_head"] = least["materialised"] / least["head"]
    if "cube" in least:
        ratios["cube_gflops"] = 2 * 8192**3 / least["cube"] / 1e9
    ratios["head_rate_share"] = ratios["head_gflops"] / ratios.get("cube_gflops", ratios["products_gflops"])
    return ratios


def _time_table(timing: list[dict]) -> str:
    """Milliseconds (the least of the rounds; of the head their median too) and ratios, a line per shape."""
    lines = []
    for row in timing:
        least = {name: f"{times['min'] * 1e3:.1f}" for name, times in row["seconds"].items()}
        lines.append(
            {
                "shape": row["shape"],
                "S": f"{row['S']:.0f}",
                "products ms": least["products"],
                "head ms": least["head"],
                "(median)": f"{row['seconds']['head']['median'] * 1e3:.1f}",
                "head/products": f"{row['head_per_products']:.2f}",
                "head GFLOP/s": f"{row['head_gflops']:.0f}",
                "of the rate": f"{row['head_rate_share']:.0%}",
                "materialised ms": least.get("materialised", "-"),
                "/head": f"{row['materialised_per_head']:.2f}" if "materialised" in least else "-",
                "sampling ms": least["sampling"],
                "/head ": f"{row['sampling_per_head']:.1%}",
                "peers' ms": least["peers_sampling"],
                "/ours": f"{row['peers_per_sampling']:.2f}",
                "optimizer ms": least["optimizer"],
            }
        )
        for name, peak in row["peak_bytes"].items():  # None: it ran out of memory
            lines[-1][f"{name} GB"] = "out of memory" if peak is None else f"{peak / 1e9:.2f}"
    return table(lines)


# --- memory ---------------------------------------------------------------------------------------------------------


def _memory_of(shape: Shape, batches: list[int], config: BenchHeadConfig) -> dict:
    """Peak bytes of the two contenders at `shape`, and of the head at each of `batches`."""

    def peak(shape: Shape, contender: str) -> int:
        print(f"{shape}: memory of {contender}", flush=True)
        return in_processes(1, _memory_on_rank, config, shape, contender)

    row = {"shape": str(shape), **asdict(shape), "head_bytes": peak(shape, "head")}
    if config.materialised:
        row["materialised_bytes"] = peak(shape, "materialised")
        row["head_per_materialised"] = row["head_bytes"] / row["materialised_bytes"]
    row["batches"] = []
    for B in batches:
        total = row["head_bytes"] if B == shape.B else peak(replace(shape, B=B), "head")
        beyond = total - 2 * B * shape.D * 4  # the gathered embeddings and their gradient
        first = row["batches"][0]["beyond_bytes"] if row["batches"] else beyond
        row["batches"].append({"B": B, "head_bytes": total, "beyond_bytes": beyond, "per_first": beyond / first})
    return row


def _memory_on_rank(rank: int, config: BenchHeadConfig, shape: Shape, contender: str, folder: Path) -> int:
    """In a fresh process: a tiny step that loads libraries and starts threads, then the peak of the real one."""
    torch.set_num_threads(_threads(config))
    topology = Topology.single("cuda" if torch.cuda.is_available() else "cpu")

    def prepared(shape: Shape) -> Contender:
        step = HeadStep(shape, config, topology)
        return step.run if contender == "head" else MaterialisedStep(step).run

    prepared(replace(shape, B=8, K=max(64, config.labels_per_image), D=16))()
    return peak_bytes(prepared(shape), topology.device)


def _memory_table(memory: list[dict]) -> str:
    """Two tables: contenders, and the head at each batch."""
    contenders, flatness = [], []
    for row in memory:
        whole = "materialised_bytes" in row
        contenders.append(
            {
                "shape": row["shape"],
                "head MB": f"{row['head_bytes'] / 2**20:.0f}",
                "materialised MB": f"{row['materialised_bytes'] / 2**20:.0f}" if whole else "-",
                "head/materialised": f"{row['head_per_materialised']:.3f}" if whole else "-",
            }
        )
        for at in row["batches"]:
            flatness.append(
                {
                    "shape": str(Shape(at["B"], row["K"], row["D"], row["r"], row["dtype"])),
                    "head MB": f"{at['head_bytes'] / 2**20:.0f}",
                    "beyond the gathered inputs and outputs MB": f"{at['beyond_bytes'] / 2**20:.0f}",
                    "to the first": f"{at['per_first']:.3f}",
                }
            )
    return f"{table(contenders)}\n{table(flatness)}"
