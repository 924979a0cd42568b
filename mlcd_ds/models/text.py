"""The text side: CLIP's causal transformer over tokens (Radford et al. 2021, section 2.4), and both towers as one model.

Shapes: B captions of this rank, T tokens of a caption (the context), W width, E embedding width, V vocabulary.
"""

import difflib
import math

import torch
from pydantic import Field, model_validator
from torch import nn

from mlcd_ds.errors import ConfigError
from mlcd_ds.models.vit import Block, BlockRunner, Dropping, Tower, TransformerConfig, VisionTransformer, Visit

VOCABULARY = 49_408
"""Of CLIP's tokenizer."""

INITIAL_TEMPERATURE = 0.07
MAX_SCALE = 100.0
"""Logits are cosines times a learnt scale, which starts at 1 / 0.07 and is clipped at 100 (CLIP, section 2.5)."""


class TextConfig(TransformerConfig):
    """Shape of one text tower. Every field must be given; `text_preset` and `TEXT_PRESETS` hold the known ones."""

    context: int = Field(ge=3, description="tokens of a caption, with those for its start and end")
    vocabulary: int = Field(ge=3, description="tokens that there are")
    end_token: int = Field(ge=0, description="id of the token that ends a text: the embedding is taken there")

    @model_validator(mode="after")
    def _fits(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the number of heads {self.heads}")
        if self.end_token >= self.vocabulary:
            raise ValueError(f"the end token {self.end_token} is not below the vocabulary's {self.vocabulary}")
        return self


# layers, width, heads, context
TEXT_PRESETS: dict[str, tuple[int, int, int, int]] = {
    "text_b": (12, 512, 8, 77),  # CLIP's for B/32 and B/16
    "text_l": (12, 768, 12, 77),  # CLIP's for L/14
    "text_toy": (4, 128, 4, 32),  # small captions, CPUs and tests
}


def text_preset(
    name: str, embed_dim: int, vocabulary: int = VOCABULARY, end_token: int | None = None, context: int | None = None
) -> TextConfig:
    """The preset `name` for a vocabulary and a joint embedding of `embed_dim`.

    end_token: None for the last one, as in CLIP's vocabulary. context: None for the preset's.
    Raises ConfigError for an unknown name.
    """
    if name not in TEXT_PRESETS:
        near = difflib.get_close_matches(name, TEXT_PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no text preset named {name!r}.{hint} There are: {', '.join(TEXT_PRESETS)}")
    layers, width, heads, tokens = TEXT_PRESETS[name]
    return TextConfig(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=4 * width,
        embed_dim=embed_dim,
        activation="gelu",
        norm_eps=1e-5,
        context=context or tokens,
        vocabulary=vocabulary,
        end_token=vocabulary - 1 if end_token is None else end_token,
    )


class TokenEmbeddings(nn.Module):
    """Token ids to vectors: a table of words, and learned positions."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """int [B, T], T at most the context, to [B, T, W]."""
        if tokens_BT.shape[1] > len(self.positions):
            raise ValueError(f"{tokens_BT.shape[1]} tokens a text; this tower takes {len(self.positions)}")
        return self.tokens(tokens_BT) + self.positions[: tokens_BT.shape[1]]


class TextTransformer(Tower):
    """Token ids to embeddings.

    The initial weights are a function of (config, seed) alone; without a seed torch's default generator draws them. Under
    `torch.device("meta")` nothing is allocated or drawn.
    """

    def __init__(self, config: TextConfig, seed: int | None = None):
        super().__init__(config)
        with torch.device("meta"):
            self.embeddings = TokenEmbeddings(config)
            self.blocks = nn.ModuleList(Block(config, causal=True) for _ in range(config.layers))
            self.norm_post = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.projection = nn.Linear(config.width, config.embed_dim, bias=False)
        self._allocate(seed)

    def _first_weights_and_stds(self) -> list[tuple[nn.Parameter, float]]:
        return [(self.embeddings.tokens.weight, 0.02), (self.embeddings.positions, 0.01)]

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """[B, E], not normalised. tokens_BT: int, each row with an end token; what stands behind it does not count.

        A row without one is embedded at its first token: finite, and of no meaning.
        """
        x_BTW = self.embeddings(tokens_BT)
        for index in range(self.depth):
            x_BTW = self._through(index, x_BTW)
        ends_B = (tokens_BT == self.config.end_token).int().argmax(dim=1)
        x_BW = x_BTW[torch.arange(len(x_BTW), device=x_BTW.device), ends_B]
        return self.projection(self.norm_post(x_BW))


class _ClippedExponential(torch.autograd.Function):
    """min(exp(x), MAX_SCALE). At the bound the gradient is that of the bound, but where it points back below it.

    So a scale that has grown to its bound is held there, and can come down again; with a plain clamp it never could.
    """

    @staticmethod
    def forward(ctx, logarithm):
        scale = logarithm.to(torch.promote_types(logarithm.dtype, torch.float32)).exp().clamp(max=MAX_SCALE)
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        wants_more = (scale >= MAX_SCALE) & (gradient < 0)
        return torch.where(wants_more, torch.zeros_like(gradient), gradient * scale)


class ImageTextModel(nn.Module):
    """Both towers and the temperature, for one engine to train. The weights' names begin with `image.` and `text.`.

    locked: the image tower takes no gradient and stays in evaluation mode (LiT: Zhai et al. 2022).
    """

    def __init__(self, image: VisionTransformer, text: TextTransformer, locked: bool = False):
        super().__init__()
        if image.config.embed_dim != text.config.embed_dim:
            raise ConfigError(
                f"the image tower embeds in {image.config.embed_dim} dimensions, the text tower in {text.config.embed_dim}"
            )
        self.image, self.text, self.locked = image, text, locked
        # One element rather than none: ZeRO divides parameters by their elements.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(INITIAL_TEMPERATURE)]))
        if locked:
            self.image.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ImageTextModel":
        """As every module's, but that a locked image tower stays as it is."""
        super().train(mode)
        if self.locked:
            self.image.eval()
        return self

    @property
    def depth(self) -> int:
        """Blocks of the deeper tower."""
        return max(self.image.depth, self.text.depth)

    @property
    def dropping(self) -> Dropping | None:
        """What the image tower leaves out, nothing where it is locked."""
        return None if self.locked else self.image.dropping

    def set_checkpointing(self, runner: BlockRunner | None, blocks: int | None = None) -> None:
        """Of the first `blocks` blocks of both towers, but not of a locked one, which keeps nothing for a backward pass."""
        self.text.set_checkpointing(runner, blocks)
        if not self.locked:
            self.image.set_checkpointing(runner, blocks)

    def first_weights(self) -> list[nn.Parameter]:
        """The weights that the backward pass comes to last, of each tower that has one."""
        words = [self.text.embeddings.tokens.weight]
        return words if self.locked else [*self.image.first_weights(), *words]

    def forward(
        self, images_B3HH: torch.Tensor, tokens_BT: torch.Tensor, visit: Visit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image embeddings [B, E], text embeddings [B, E], neither normalised; scale of the logits [1]).

        images_B3HH: or the image embeddings [B, E] themselves, where a locked tower has made them before. visit: see
        `VisionTransformer.forward_features`.
        """
        images_BE = images_B3HH
        if images_B3HH.dim() == 4:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked):
                images_BE = self.image(images_B3HH, visit)
        return images_BE, self.text(tokens_BT), _ClippedExponential.apply(self.log_scale)
