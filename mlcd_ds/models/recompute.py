"""Which blocks are computed again in the backward pass, and what of them is kept (activation checkpointing).

all, N      DeepSpeed's function round the first N blocks: a block's input is kept, all else is made again. It obeys the
            JSON's section "activation_checkpointing" (cpu_checkpointing, synchronize_checkpoint_boundary, profile).
selective   torch's selective checkpointing round every block: the results of matrix products and of attention are kept,
            norms, activations, rotations and sums are made again, which costs hardly any time.
"""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mlcd_ds.errors import ConfigError
from mlcd_ds.models.vit import Block

_aten = torch.ops.aten
KEPT = frozenset(
    {
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
"""Operations whose results "selective" keeps. All of a block's products have a bias, which addmm adds.

Not mm: where torch, or DeepSpeed's linear at ZeRO 3, makes a product by mm, it adds the bias in place, to what was kept;
the recomputed product would have it twice.
"""


@dataclass(frozen=True)
class Recompute:
    """blocks: how many, from the first on, are computed again; selective: but for their products."""

    blocks: int
    selective: bool = False

    def __str__(self) -> str:
        return "off" if not self.blocks else "selective" if self.selective else f"{self.blocks} blocks"


def resolve_recompute(choice: str | int | None, section: dict | None, layers: int) -> Recompute:
    """What --checkpoint_layers and the JSON's section "activation_checkpointing" (None: absent) come to.

    Without the flag the section alone means all blocks. Raises ConfigError for more blocks than there are, or a section
    whose options "selective" cannot obey.
    """
    if choice is None:
        return Recompute(layers if section is not None else 0)
    if choice == "all":
        return Recompute(layers)
    if choice == "selective":
        options = ("cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")
        given = [name for name in options if (section or {}).get(name)]
        if given:
            raise ConfigError(
                f'--checkpoint_layers selective is torch\'s, which knows nothing of "activation_checkpointing.{given[0]}" '
                "of the DeepSpeed JSON: leave that key out, or say --checkpoint_layers all"
            )
        return Recompute(layers, selective=True)
    if choice > layers:
        raise ConfigError(f"--checkpoint_layers {choice}: the encoder has {layers} blocks")
    return Recompute(choice)


def run_selectively(block: Block, x_BTW: torch.Tensor, *rest) -> torch.Tensor:
    """Runs a block so that its products are kept, a BlockRunner.

    The last product's result is not: nothing in the block's backward pass asks for it, unless drop path scales it.
    """
    is_scaled = any(isinstance(x, torch.Tensor) for x in rest[1:])
    mlp_width = block.fc2.in_features

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        is_last = op is _aten.addmm.default and args[1].shape[1] == mlp_width
        kept = op in KEPT and (is_scaled or not is_last)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        block,
        x_BTW,
        *rest,
        use_reentrant=False,
        preserve_rng_state=False,  # a block draws nothing
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
