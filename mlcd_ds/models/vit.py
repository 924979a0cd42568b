"""The image encoder: CLIP's pre-norm vision transformer (Radford et al. 2021), one table of presets.

With `rope`, positions are two-dimensional rotary angles, as in the published MLCD ViT-bigG, instead of learned vectors.
Only the class token leaves the encoder, so the last block computes queries, attention and MLP for it alone: the same
numbers and a block less of most work (5 percent of L, 7 of B).

In training, drop path (Huang et al. 2016) and patch dropout (FLIP, Li et al. 2023) may leave out branches and patches. What
is left out follows from a hash of (seed, step, slot in the global batch, layer or patch): torch's generators are not asked,
the number of ranks does not enter, a recomputed or resumed step drops the same.

Shapes: B images, H height = width in pixels, N patches (n of them kept), R registers, T = 1 + R + N tokens (class token,
registers, patches), W width, A attention heads, h = W / A head width, E embedding width.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn
from torch.nn import functional as F

from mlcd_ds.config import Settings
from mlcd_ds.errors import ConfigError
from mlcd_ds.sampling import hash_

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of RGB values in [0, 1]."""

ROPE_BASE = 10_000.0

BlockRunner = Callable[..., torch.Tensor]
"""`runner(block, *inputs)` returns `block(*inputs)`: what torch's and DeepSpeed's checkpoint functions do."""

_DROP_PATH, _PATCH_DROPOUT = 1 << 32, 2 << 32
"""Added to seeds, which lie below: keeps these draws apart from each other and from the heads'."""


class TransformerConfig(Settings):
    """What an image tower and a text tower have in common."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    embed_dim: int = Field(ge=1, description="width after the projection")
    activation: Literal["gelu", "quick_gelu"] = Field(description="quick_gelu: x sigmoid(1.702 x), OpenAI's weights")
    norm_eps: float = Field(gt=0)


SHAPE = ("patch_size", "layers", "width", "heads", "mlp_width", "rope")
FUNCTION = ("activation", "norm_eps")
"""Fields of a VitConfig without which weights are another function. FUNCTION: those that a preset gives up for them."""


class VitConfig(TransformerConfig):
    """Shape of one encoder. Every field must be given; `preset` and `PRESETS` hold the known ones."""

    image_size: int = Field(ge=1, description="pixels")
    patch_size: int = Field(ge=1, description="pixels")
    rope: bool = Field(description="rotary 2D positions (MLCD bigG); false: learned ones (CLIP)")
    registers: int = Field(
        0, ge=0, description="R, register tokens (Darcet et al. 2024); encoders once had none to name"
    )

    @model_validator(mode="after")
    def _fits(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch size {self.patch_size}; "
                f"the nearest that is: {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the number of heads {self.heads}")
        if self.rope and (self.width // self.heads) % 4:
            raise ValueError(f"2D rotary positions need a head width divisible by 4, not {self.width // self.heads}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """T."""
        return 1 + self.registers + self.grid**2

    @property
    def head_width(self) -> int:
        """h."""
        return self.width // self.heads


@dataclass(frozen=True)
class Visit:
    """Which images of a run a forward pass sees: the `first_slot`-th and following ones of the global batch of `step`."""

    step: int
    first_slot: int


@dataclass(frozen=True)
class Dropping:
    """What training leaves out at random.

    drop_path: share of the images that a residual branch of the last block is left out for, falling linearly to none at the
    first block; what is kept is scaled up by as much. patch_dropout: share of an image's patches that are left out, the
    same number of every image.
    """

    seed: int
    drop_path: float = 0.0
    patch_dropout: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is ever left out."""
        return self.drop_path > 0 or self.patch_dropout > 0

    def kept_patches(self, patches: int) -> int:
        """n of N, at least one."""
        return max(1, int(patches * (1 - self.patch_dropout)))

    def patches(self, visit: Visit, images: int, patches: int, device: torch.device) -> torch.Tensor | None:
        """int64 [B, n], the kept patches of each image in raster order; None where all are."""
        kept = self.kept_patches(patches)
        if kept == patches:
            return None
        numbers_BN = _slots(visit, images, device)[:, None] * patches + _numbers(patches, device)
        ranks_BN = hash_(numbers_BN, self.seed + _PATCH_DROPOUT, visit.step)  # all different: no ties
        return ranks_BN.argsort(dim=1)[:, :kept].sort(dim=1)[0]

    def scales(self, visit: Visit, images: int, layers: int, device: torch.device) -> torch.Tensor | None:
        """float32 [layers, 2, B]: what each block's two branches are multiplied by, 0 or 1 / (1 - its rate); or None."""
        if not self.drop_path:
            return None
        numbers_LB = _slots(visit, images, device) * (2 * layers) + _numbers(2 * layers, device)[:, None]
        hashes_LB = hash_(numbers_LB, self.seed + _DROP_PATH, visit.step).bitwise_and_(0x7FFFFFFF)
        thresholds_L1, scales_L1 = _drop_rates(self.drop_path, layers, device)
        return torch.where(hashes_LB < thresholds_L1, 0.0, scales_L1).view(layers, 2, images)


def _slots(visit: Visit, images: int, device: torch.device) -> torch.Tensor:
    return torch.arange(visit.first_slot, visit.first_slot + images, dtype=torch.int32, device=device)


def _numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _clip_vit(
    image_size: int,
    patch_size: int,
    layers: int,
    width: int,
    heads: int,
    embed_dim: int,
    mlp_width: int | None = None,
    rope: bool = False,
) -> VitConfig:
    return VitConfig(
        image_size=image_size,
        patch_size=patch_size,
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=mlp_width or 4 * width,
        embed_dim=embed_dim,
        rope=rope,
        activation="gelu",
        norm_eps=1e-5,
    )


PRESETS: dict[str, VitConfig] = {
    # image, patch, layers, width, heads, embed
    "vit_b32": _clip_vit(224, 32, 12, 768, 12, 512),
    "vit_b16": _clip_vit(224, 16, 12, 768, 12, 512),
    "vit_l14": _clip_vit(224, 14, 24, 1024, 16, 768),
    "vit_l14_336": _clip_vit(336, 14, 24, 1024, 16, 768),
    "vit_h14": _clip_vit(224, 14, 32, 1280, 16, 1024),
    "vit_bigg14": _clip_vit(224, 14, 48, 1664, 16, 1280, mlp_width=8192, rope=True),
    # small images, for CPUs and tests
    "vit_toy": _clip_vit(32, 4, 4, 128, 4, 128),
    "vit_toy64": _clip_vit(64, 8, 4, 128, 4, 128),
    "vit_toy64_p16": _clip_vit(64, 16, 4, 128, 4, 128),
    "vit_ti": _clip_vit(64, 8, 12, 192, 3, 192),
    "vit_s": _clip_vit(64, 8, 12, 384, 6, 384),
}


def preset(name: str, image_size: int | None = None, registers: int = 0) -> VitConfig:
    """The preset `name`, at another image size (pixels) if one is given, with so many register tokens.

    Raises ConfigError for an unknown name, or a size that the patch size does not divide.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no encoder preset named {name!r}.{hint} There are: {', '.join(PRESETS)}")
    fields = PRESETS[name].model_dump()
    if image_size is not None:
        fields["image_size"] = image_size
    fields["registers"] = registers
    try:
        return VitConfig(**fields)
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError(f"encoder {name} at {image_size} pixels: {reasons}") from None


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must also serve training
def _pixel_affine(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale), float32 [3, 1, 1]: a byte v becomes v * scale + shift = (v / 255 - mean) / std.

    Not buffers: an engine that casts the module to bfloat16 would round them.
    """
    mean, std = torch.tensor(PIXEL_MEAN, dtype=torch.float64), torch.tensor(PIXEL_STD, dtype=torch.float64)
    shift, scale = -mean / std, 1.0 / (255.0 * std)
    return shift.float().view(3, 1, 1).to(device), scale.float().view(3, 1, 1).to(device)


def normalised(images_B3HH: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 ones, by CLIP's mean and deviation."""
    shift, scale = _pixel_affine(images_B3HH.device)
    return torch.addcmul(shift, images_B3HH.float(), scale)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _patch_angles(grid: int, head_width: int, device: torch.device) -> torch.Tensor:
    """float32 [N, h/2]: row angles, then column angles, of each patch in raster order."""
    quarter = head_width // 4
    inverse_frequencies = ROPE_BASE ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    angles_along = torch.arange(grid, dtype=torch.float32)[:, None] * inverse_frequencies
    rows = angles_along[:, None, :].expand(grid, grid, quarter)
    columns = angles_along[None, :, :].expand(grid, grid, quarter)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, 2 * quarter).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _drop_rates(rate: float, layers: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 thresholds of 31-bit hashes, float32 scales of what is kept), [2 layers, 1] each: two branches a block."""
    rates = [rate * (layer / (layers - 1) if layers > 1 else 1.0) for layer in range(layers) for _ in range(2)]
    thresholds = torch.tensor([int(r * 2**31) for r in rates], dtype=torch.int32)
    scales = torch.tensor([1 / (1 - r) for r in rates])
    return thresholds[:, None].to(device), scales[:, None].to(device)


def norm_class(kind: str) -> type[nn.Module]:
    """The class of "torch" or "apex" layer norms; weights have the same names. Raises ConfigError where apex is absent."""
    if kind == "torch":
        return nn.LayerNorm
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError as error:
        raise ConfigError(
            f"--norm apex: NVIDIA's apex is not there ({error}). Leave --norm out for torch's layer norm (--compile fuses "
            "that, too), or build apex from https://github.com/NVIDIA/apex with its CUDA extensions; `pip install apex` "
            "fetches an unrelated package"
        ) from None
    return FusedLayerNorm


def rotate(x_BATh: torch.Tensor, angles_Tr: torch.Tensor) -> torch.Tensor:
    """Rotates the pair (x_i, x_{i + h/2}) of each token by its angle i (r = h/2), in float32; the input's dtype.

    The angles may have leading dimensions [B, 1].
    """
    first, second = x_BATh.float().chunk(2, dim=-1)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BATh.dtype)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Pixels to tokens: patches, the class token, registers, learned positions (of all but the registers).

    All are parameters of this module, used in its own forward: ZeRO-3 gathers them just there.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.positions = None if config.rope else nn.Parameter(torch.empty(1 + config.grid**2, config.width))
        self.registers = nn.Parameter(torch.empty(config.registers, config.width)) if config.registers else None

    def forward(self, images_B3HH: torch.Tensor, kept_Bn: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 images, or floating ones already normalised, to tokens_BTW in the weights' dtype.

        kept_Bn: int64, the patches that become tokens; None: all.
        """
        if images_B3HH.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images have shape {tuple(images_B3HH.shape)}; this encoder takes "
                f"[B, 3, {self.image_size}, {self.image_size}]"
            )
        pixels = images_B3HH if images_B3HH.is_floating_point() else normalised(images_B3HH)
        patches_BNW = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        B, class_W = len(patches_BNW), self.class_token
        if self.positions is not None:
            class_W, patches_BNW = class_W + self.positions[0], patches_BNW + self.positions[1:]
        if kept_Bn is not None:
            patches_BNW = patches_BNW.gather(1, kept_Bn[..., None].expand(-1, -1, patches_BNW.shape[-1]))
        before = [class_W.expand(B, 1, -1)]
        if self.registers is not None:
            before.append(self.registers.expand(B, -1, -1))
        return torch.cat([*before, patches_BNW], dim=1)


class TokenAngles(nn.Module):
    """The rotary angles of all tokens.

    Those of the class token, which has no place in the grid, are learned; registers, which have none either, are not turned.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.grid, self.head_width, self.registers = config.grid, config.head_width, config.registers
        self.class_angle = nn.Parameter(torch.empty(1, config.head_width // 2))

    def forward(self, kept_Bn: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [T, h/2]; [B, 1, T, h/2] of the patches kept_Bn alone."""
        patches_Nr = _patch_angles(self.grid, self.head_width, self.class_angle.device)
        before_r = torch.cat([self.class_angle.float(), patches_Nr.new_zeros(self.registers, patches_Nr.shape[1])])
        if kept_Bn is None:
            return torch.cat([before_r, patches_Nr])
        return torch.cat([before_r.expand(len(kept_Bn), -1, -1), patches_Nr[kept_Bn]], dim=1)[:, None]


class QueriesKeysValues(nn.Linear):
    """One matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(self, x_BTW: torch.Tensor, class_only: bool = False) -> tuple[torch.Tensor, ...]:
        """[B, T, W] to queries, keys, values [B, A, T, h] each; class_only: queries of the first token alone."""
        B, T, W = x_BTW.shape
        if not class_only:
            return super().forward(x_BTW).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4).unbind()
        q_BW = F.linear(x_BTW[:, 0], self.weight[:W], self.bias[:W])
        kv_BT2W = F.linear(x_BTW, self.weight[W:], self.bias[W:])
        return (
            q_BW.view(B, self.heads, 1, W // self.heads),
            *kv_BT2W.view(B, T, 2, self.heads, W // self.heads).permute(2, 0, 3, 1, 4).unbind(),
        )


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    config: has width and heads. causal: a token sees itself and those before it.
    """

    def __init__(self, config: TransformerConfig, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.qkv = QueriesKeysValues(config.width, config.heads)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self, x_BTW: torch.Tensor, angles_Tr: torch.Tensor | None = None, class_only: bool = False
    ) -> torch.Tensor:
        """[B, T, W] to [B, T, W]; class_only: to [B, 1, W], what the first token gets."""
        q, k, v = self.qkv(x_BTW, class_only)
        if angles_Tr is not None:
            q, k = rotate(q, angles_Tr[..., : q.shape[2], :]), rotate(k, angles_Tr)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). config, causal: see `Attention`."""

    def __init__(self, config: TransformerConfig, causal: bool = False, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm1 = norm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, causal)
        self.norm2 = norm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.activation = nn.GELU() if config.activation == "gelu" else QuickGELU()
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(
        self,
        x_BTW: torch.Tensor,
        angles_Tr: torch.Tensor | None = None,
        scales_2B: torch.Tensor | None = None,
        class_only: bool = False,
    ) -> torch.Tensor:
        """[B, T, W] to [B, T, W]; class_only: to [B, 1, W], the first token alone.

        angles_Tr: rotary angles, an input so that checkpointing sees their gradient. scales_2B: of the two branches.
        """
        attended_BtW = self.attention(self.norm1(x_BTW), angles_Tr, class_only)
        x_BtW = (x_BTW[:, :1] if class_only else x_BTW) + _scaled(attended_BtW, scales_2B, 0)
        return x_BtW + _scaled(self.fc2(self.activation(self.fc1(self.norm2(x_BtW)))), scales_2B, 1)


def _scaled(branch_BTW: torch.Tensor, scales_2B: torch.Tensor | None, index: int) -> torch.Tensor:
    """A residual branch times its images' factors, 0 where drop path leaves it out."""
    if scales_2B is None:
        return branch_BTW
    return branch_BTW * scales_2B[index, :, None, None].to(branch_BTW.dtype)


class Tower(nn.Module):
    """What both towers have in common. Who derives from it makes, in `torch.device("meta")`, `embeddings`, `blocks`,
    `norm_post` and `projection`, then calls `_allocate`.

    norm: class of the norms.
    """

    def __init__(self, config: TransformerConfig, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.config, self._norm = config, norm
        self._run_block: BlockRunner | None = None
        self._blocks_run = 0

    def _allocate(self, seed: int | None) -> None:
        """Gives the parameters their memory and initial values; under `torch.device("meta")` neither."""
        device = torch.get_default_device()
        self.to_empty(device=device)
        if device.type != "meta":
            self.initialise(seed)

    def _first_weights_and_stds(self) -> list[tuple[nn.Parameter, float]]:
        """What lies before the blocks, with standard deviations, in the order in which they are drawn."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, seed: int | None) -> None:
        """Draws all weights anew: normal, with OpenCLIP's standard deviations; biases 0, norms the identity."""
        generator = None if seed is None else torch.Generator(self.projection.weight.device).manual_seed(seed)
        narrow = self.config.width**-0.5
        # Residual branches add up: the last matrix of each is smaller by the root of their number.
        branch = narrow * (2 * self.config.layers) ** -0.5
        for module in self.modules():
            if isinstance(module, self._norm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        stds = self._first_weights_and_stds()
        for block in self.blocks:
            stds += [(block.attention.qkv.weight, narrow), (block.attention.out.weight, branch)]
            stds += [(block.fc1.weight, (2 * self.config.width) ** -0.5), (block.fc2.weight, branch)]
        for parameter, std in [*stds, (self.projection.weight, narrow)]:
            nn.init.normal_(parameter, std=std, generator=generator)

    def set_checkpointing(self, runner: BlockRunner | None, blocks: int | None = None) -> None:
        """Runs the first `blocks` blocks (None: all) through `runner(block, *inputs)`; runner None: plainly.

        A runner may recompute a block in backward. The inputs are x_BTW and, as far as there are any, angles, scales and
        class_only, see `Block.forward`; tensors that blocks share are another object for each.
        """
        self._run_block = runner
        self._blocks_run = len(self.blocks) if blocks is None else blocks

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def _through(self, index: int, *inputs: torch.Tensor | bool | None) -> torch.Tensor:
        """[B, T, W], what the `index`-th block gives; see `Block.forward`."""
        is_run = self._run_block is not None and index < self._blocks_run
        return self._run_block(self.blocks[index], *inputs) if is_run else self.blocks[index](*inputs)


class VisionTransformer(Tower):
    """Images to embeddings.

    The initial weights are a function of (config, seed) alone, whatever the rank; without a seed torch's default
    generator draws them. Under `torch.device("meta")` nothing is allocated or drawn. norm: "torch" or "apex", see
    `norm_class`. dropping: what a forward pass with a Visit leaves out.
    """

    def __init__(
        self, config: VitConfig, seed: int | None = None, norm: str = "torch", dropping: Dropping | None = None
    ):
        super().__init__(config, norm_class(norm))
        self.dropping = dropping if dropping is not None and dropping.is_on else None
        with torch.device("meta"):  # torch's own initial values would be drawn only to be thrown away
            self.embeddings = Embeddings(config)
            self.angles = TokenAngles(config) if config.rope else None
            self.norm_pre = self._norm(config.width, eps=config.norm_eps)
            self.blocks = nn.ModuleList(Block(config, norm=self._norm) for _ in range(config.layers))
            self.norm_post = self._norm(config.width, eps=config.norm_eps)
            self.projection = nn.Linear(config.width, config.embed_dim, bias=False)
        self._allocate(seed)

    def _first_weights_and_stds(self) -> list[tuple[nn.Parameter, float]]:
        embeddings, narrow = self.embeddings, self.config.width**-0.5
        found = [(embeddings.patch.weight, (3 * self.config.patch_size**2) ** -0.5), (embeddings.class_token, narrow)]
        found += [(given, narrow) for given in (embeddings.positions, embeddings.registers) if given is not None]
        if self.angles is not None:
            found.append((self.angles.class_angle, (self.config.head_width // 2) ** -0.5))
        return found

    def first_weights(self) -> list[nn.Parameter]:
        """The weights that the backward pass comes to last."""
        return [self.embeddings.patch.weight]

    def forward_features(self, images_B3HH: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """The class token after the last norm, [B, W]: what a linear probe reads. Images: see `Embeddings.forward`.

        visit: in training, which images of the run these are; None: nothing is dropped.
        """
        kept_Bn = scales = None
        if self.dropping is not None and visit is not None:
            B, device, config = len(images_B3HH), images_B3HH.device, self.config
            kept_Bn = self.dropping.patches(visit, B, config.grid**2, device)
            scales = self.dropping.scales(visit, B, config.layers, device)
        x_BTW = self.norm_pre(self.embeddings(images_B3HH, kept_Bn))
        angles_Tr = None if self.angles is None else self.angles(kept_Bn)
        for index in range(self.depth):
            # A runner that moves its inputs off the device empties them: each block gets an alias of the angles. So their
            # gradient is summed block by block, with a runner and without.
            own_angles = None if angles_Tr is None else angles_Tr.view_as(angles_Tr)
            own_scales = None if scales is None else scales[index]
            # The class token alone leaves the last block.
            inputs = (x_BTW, own_angles, own_scales, index == len(self.blocks) - 1)
            x_BTW = self._through(index, *inputs)
        return self.norm_post(x_BTW[:, 0])

    def patch_features(self, images_B3HH: torch.Tensor, blocks: int | None = None) -> torch.Tensor:
        """The patch tokens after the first `blocks` blocks (None: all) and the last norm, [B, N, W]. Nothing is dropped.

        Unlike `forward_features` it lets all tokens through the last block.
        """
        x_BTW = self.norm_pre(self.embeddings(images_B3HH))
        angles_Tr = None if self.angles is None else self.angles()
        for block in self.blocks[:blocks]:
            x_BTW = block(x_BTW, angles_Tr)
        return self.norm_post(x_BTW[:, -(self.config.grid**2) :])

    def forward(self, images_B3HH: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """[B, E], not normalised. Images: uint8 [B, 3, H, H], or floats already normalised with CLIP's values.

        visit: see `forward_features`.
        """
        return self.projection(self.forward_features(images_B3HH, visit))


def resize_positions(positions_TW: torch.Tensor, grid: int) -> torch.Tensor:
    """Learned positions [1 + g^2, W] for another number of patches a side: [1 + grid^2, W], float32.

    The class token's is kept, the others are one image of g x g pixels, resized bicubically (antialiased where it
    shrinks), as OpenCLIP does.
    """
    before = round((len(positions_TW) - 1) ** 0.5)
    if before == grid:
        return positions_TW
    class_1W, patches_NW = positions_TW.float().split([1, before * before])
    image_1Wgg = patches_NW.T.reshape(1, -1, before, before)
    resized = F.interpolate(image_1Wgg, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_1W, resized.reshape(-1, grid * grid).T])


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: matrices and word embeddings decay; biases, norms, class token, positions and
    temperature do not.

    Call it before ZeRO-3 takes the parameters apart.
    """
    decaying = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
