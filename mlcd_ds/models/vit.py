"""The image encoder: CLIP's pre-norm vision transformer (Radford et al. 2021), one table of presets.

With `rope`, positions are two-dimensional rotary angles, as in the published MLCD ViT-bigG, instead of learned vectors.

Shapes: B images, H height = width in pixels, N patches, T = 1 + N tokens (class token first), W width, A attention
heads, h = W / A head width, E embedding width.
"""

import difflib
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn
from torch.nn import functional as F

from mlcd_ds.config import Settings
from mlcd_ds.errors import ConfigError

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of RGB values in [0, 1]."""

ROPE_BASE = 10_000.0

BlockRunner = Callable[..., torch.Tensor]
"""`runner(block, *tensors)` returns `block(*tensors)`: what torch's and DeepSpeed's checkpoint functions do."""


class TransformerConfig(Settings):
    """What an image tower and a text tower have in common."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    embed_dim: int = Field(ge=1, description="width after the projection")
    activation: Literal["gelu", "quick_gelu"] = Field(description="quick_gelu: x sigmoid(1.702 x), OpenAI's weights")
    norm_eps: float = Field(gt=0)


class VitConfig(TransformerConfig):
    """Shape of one encoder. Every field must be given; `preset` and `PRESETS` hold the known ones."""

    image_size: int = Field(ge=1, description="pixels")
    patch_size: int = Field(ge=1, description="pixels")
    rope: bool = Field(description="rotary 2D positions (MLCD bigG); false: learned ones (CLIP)")

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
    def head_width(self) -> int:
        """h."""
        return self.width // self.heads


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
    "vit_ti": _clip_vit(64, 8, 12, 192, 3, 192),
    "vit_s": _clip_vit(64, 8, 12, 384, 6, 384),
}


def preset(name: str, image_size: int | None = None) -> VitConfig:
    """The preset `name`, at another image size (pixels) if one is given.

    Raises ConfigError for an unknown name, or a size that the patch size does not divide.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no encoder preset named {name!r}.{hint} There are: {', '.join(PRESETS)}")
    fields = PRESETS[name].model_dump()
    if image_size is not None:
        fields["image_size"] = image_size
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


def rotate(x_BATh: torch.Tensor, angles_Tr: torch.Tensor) -> torch.Tensor:
    """Rotates the pair (x_i, x_{i + h/2}) of each token by its angle i (r = h/2), in float32; the input's dtype."""
    first, second = x_BATh.float().chunk(2, dim=-1)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BATh.dtype)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Pixels to tokens: patches, the class token, learned positions.

    Class token and positions are parameters of this module, used in its own forward: ZeRO-3 gathers them just there.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.positions = None if config.rope else nn.Parameter(torch.empty(1 + config.grid**2, config.width))

    def forward(self, images_B3HH: torch.Tensor) -> torch.Tensor:
        """uint8 images, or floating ones already normalised, to tokens_BTW in the weights' dtype."""
        if images_B3HH.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images have shape {tuple(images_B3HH.shape)}; this encoder takes "
                f"[B, 3, {self.image_size}, {self.image_size}]"
            )
        pixels = images_B3HH
        if not pixels.is_floating_point():
            shift, scale = _pixel_affine(pixels.device)
            pixels = torch.addcmul(shift, pixels.float(), scale)
        patches_BNW = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        class_B1W = self.class_token.expand(len(patches_BNW), 1, -1)
        tokens_BTW = torch.cat([class_B1W, patches_BNW], dim=1)
        return tokens_BTW if self.positions is None else tokens_BTW + self.positions


class TokenAngles(nn.Module):
    """The rotary angles of all tokens; those of the class token, which has no place in the grid, are learned."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.grid, self.head_width = config.grid, config.head_width
        self.class_angle = nn.Parameter(torch.empty(1, config.head_width // 2))

    def forward(self) -> torch.Tensor:
        """float32 [T, h/2]."""
        patches = _patch_angles(self.grid, self.head_width, self.class_angle.device)
        return torch.cat([self.class_angle.float(), patches])


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    config: has width and heads. causal: a token sees itself and those before it.
    """

    def __init__(self, config: TransformerConfig, causal: bool = False):
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BTW: torch.Tensor, angles_Tr: torch.Tensor | None) -> torch.Tensor:
        """[B, T, W] to [B, T, W]."""
        B, T, W = x_BTW.shape
        q, k, v = self.qkv(x_BTW).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        if angles_Tr is not None:
            q, k = rotate(q, angles_Tr), rotate(k, angles_Tr)
        x_BATh = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x_BATh.transpose(1, 2).reshape(B, T, W))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). config, causal: see `Attention`."""

    def __init__(self, config: TransformerConfig, causal: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, causal)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.activation = nn.GELU() if config.activation == "gelu" else QuickGELU()
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BTW: torch.Tensor, angles_Tr: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, W] to [B, T, W]. angles_Tr: rotary angles, an input so that checkpointing sees their gradient."""
        x_BTW = x_BTW + self.attention(self.norm1(x_BTW), angles_Tr)
        return x_BTW + self.fc2(self.activation(self.fc1(self.norm2(x_BTW))))


class VisionTransformer(nn.Module):
    """Images to embeddings.

    The initial weights are a function of (config, seed) alone, whatever the rank; without a seed torch's default
    generator draws them. Under `torch.device("meta")` nothing is allocated or drawn.
    """

    def __init__(self, config: VitConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's own initial values would be drawn only to be thrown away
            self.embeddings = Embeddings(config)
            self.angles = TokenAngles(config) if config.rope else None
            self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm_post = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.projection = nn.Linear(config.width, config.embed_dim, bias=False)
        self._run_block: BlockRunner | None = None
        self.to_empty(device=device)
        if device.type != "meta":
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int | None) -> None:
        """Draws all weights anew: normal, with OpenCLIP's standard deviations; biases 0, norms the identity."""
        device = self.projection.weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        config = self.config
        narrow = config.width**-0.5
        # Residual branches add up: the last matrix of each is smaller by the root of their number.
        branch = narrow * (2 * config.layers) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

        def normal(parameter: torch.Tensor, std: float) -> None:
            nn.init.normal_(parameter, std=std, generator=generator)

        normal(self.embeddings.patch.weight, (3 * config.patch_size**2) ** -0.5)
        normal(self.embeddings.class_token, narrow)
        if self.embeddings.positions is not None:
            normal(self.embeddings.positions, narrow)
        if self.angles is not None:
            normal(self.angles.class_angle, (config.head_width // 2) ** -0.5)
        for block in self.blocks:
            normal(block.attention.qkv.weight, narrow)
            normal(block.attention.out.weight, branch)
            normal(block.fc1.weight, (2 * config.width) ** -0.5)
            normal(block.fc2.weight, branch)
        normal(self.projection.weight, narrow)

    def set_checkpointing(self, runner: BlockRunner | None) -> None:
        """Runs each block through `runner(block, *tensors)`, which may recompute it in backward; None: plainly.

        The tensors are x_BTW and, with rotary positions, the angles.
        """
        self._run_block = runner

    def first_weights(self) -> list[nn.Parameter]:
        """The weights that the backward pass comes to last."""
        return [self.embeddings.patch.weight]

    def forward_features(self, images_B3HH: torch.Tensor) -> torch.Tensor:
        """The class token after the last norm, [B, W]: what a linear probe reads. Images: see `Embeddings.forward`."""
        x_BTW = self.norm_pre(self.embeddings(images_B3HH))
        inputs = () if self.angles is None else (self.angles(),)
        for block in self.blocks:
            x_BTW = block(x_BTW, *inputs) if self._run_block is None else self._run_block(block, x_BTW, *inputs)
        return self.norm_post(x_BTW[:, 0])

    def forward(self, images_B3HH: torch.Tensor) -> torch.Tensor:
        """[B, E], not normalised. Images: uint8 [B, 3, H, H], or floats already normalised with CLIP's values."""
        return self.projection(self.forward_features(images_B3HH))


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
