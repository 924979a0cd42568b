"""Parameters and floating-point operations of an encoder's modules, by arithmetic; a test holds them to torch's.

Counted are matrix products (two operations a multiply-add), the patches' convolution among them; norms, activations
and sums are not, as is usual. The backward pass of a product is two more, but for the patches, whose input needs no
gradient.
Recomputed work is never counted: a rate by these numbers is that of useful work.

Letters as in `vit`: N patches, T tokens, W width, h head width, E embedding width.
"""

import time
from dataclasses import dataclass

import torch

from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import Dropping, VitConfig


@dataclass(frozen=True)
class Cost:
    """Of one module: parameters; FLOPs of one image's forward and backward pass."""

    parameters: int = 0
    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.forward + other.forward, self.backward + other.backward)

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def costs(config: VitConfig, dropping: Dropping | None = None) -> dict[str, Cost]:
    """{module's name in the encoder: its cost}, submodules apart: the sum is the whole encoder's.

    "blocks.0.attention" itself has the products of attention (queries with keys, their softmax with values). dropping:
    patches that training leaves out are not counted behind the embeddings; branches that drop path leaves out are: they
    are made all the same.
    """
    W, patches, layers = config.width, config.grid**2, config.layers
    kept = patches if dropping is None else dropping.kept_patches(patches)
    T = 1 + config.registers + kept
    patch_weights = 3 * config.patch_size**2 * W
    loose = W + config.registers * W + (0 if config.rope else (1 + patches) * W)
    found = {
        "embeddings": Cost(loose),
        "embeddings.patch": Cost(patch_weights, 2 * patches * patch_weights, 2 * patches * patch_weights),
    }
    if config.rope:
        found["angles"] = Cost(config.head_width // 2)
    norm = Cost(2 * W)
    found["norm_pre"] = norm
    for layer in range(layers):
        out = 1 if layer == layers - 1 else T  # tokens that leave the block
        found |= {
            f"blocks.{layer}.norm1": norm,
            f"blocks.{layer}.attention": _product(0, 2 * out * T * W),
            f"blocks.{layer}.attention.qkv": _product(3 * W * W + 3 * W, out * W * W + 2 * T * W * W),
            f"blocks.{layer}.attention.out": _product(W * W + W, out * W * W),
            f"blocks.{layer}.norm2": norm,
            f"blocks.{layer}.fc1": _product(W * config.mlp_width + config.mlp_width, out * W * config.mlp_width),
            f"blocks.{layer}.fc2": _product(W * config.mlp_width + W, out * W * config.mlp_width),
        }
    found["norm_post"] = norm
    found["projection"] = _product(W * config.embed_dim, W * config.embed_dim)
    return found


def _product(parameters: int, multiply_adds: int) -> Cost:
    return Cost(parameters, 2 * multiply_adds, 4 * multiply_adds)


def total(config: VitConfig, dropping: Dropping | None = None) -> Cost:
    """Of the whole encoder."""
    return sum(costs(config, dropping).values(), Cost())


def text_total(config: TextConfig) -> Cost:
    """Of a whole text tower. Attention is counted as if a token saw those behind it, too, as torch's counter does."""
    W, T, F = config.width, config.context, config.mlp_width
    norm = Cost(2 * W)
    block = _product(4 * W * W + 4 * W + 2 * W * F + F + W, T * (4 * W * W + 2 * W * F) + 2 * T * T * W) + norm + norm
    words = Cost((config.vocabulary + T) * W)
    return sum([block] * config.layers, words + norm + _product(W * config.embed_dim, W * config.embed_dim))


def measured_matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """FLOP/s of one large square product here and now, the best of `repeats`: 8192 a side on a GPU, 1024 on a CPU.

    On a CPU with this process's threads, and less in other dtypes than float32, which are slow there.
    """
    side = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 256
    own = torch.Generator(device).manual_seed(0)  # the global generators' states are part of a checkpoint
    a = torch.randn(side, side, device=device, generator=own).to(dtype)
    b, out, least = a.clone(), torch.empty_like(a), float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - started)
    return 2 * side**3 / least
