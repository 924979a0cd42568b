"""The image-text contrastive loss, sharded over the ranks: held to its dense definition, losses.clip_loss.

CLIP (Radford et al. 2021, figure 3), ConVIRT's loss (Zhang et al. 2020, eq. 2-4), equation 1 of the MLCD paper, in both
directions: u_i, v_j unit embeddings of image i and text j, s a learnt scale, n pairs,

    L = 1 / (2n) sum_i [ -s u_i.v_i + log sum_j exp(s u_i.v_j) ]  +  1 / (2n) sum_j [ -s u_j.v_j + log sum_i exp(s u_i.v_j) ]

Shapes: b pairs of this rank, G = W*b pairs of all ranks, E embedding, n rows of one chunk.
"""

from dataclasses import dataclass

import torch

from mlcd_ds import collectives
from mlcd_ds.losses import lengths
from mlcd_ds.topology import Topology

CHUNK_BYTES = 128 << 20
"""Of logits [n, G] that exist at one time."""


@dataclass(frozen=True)
class Contrast:
    """What `contrast` found.

    loss: the mean over the pairs of all ranks, the same on each. d_images_bE, d_texts_bE, d_scale: this rank's gradients, W
    times what the loss's own are (see `contrast`). stats: tensors on the device, of all ranks, for monitoring.
    """

    loss: torch.Tensor
    d_images_bE: torch.Tensor
    d_texts_bE: torch.Tensor
    d_scale: torch.Tensor
    stats: dict[str, torch.Tensor]


@torch.no_grad()
def contrast(
    images_bE: torch.Tensor,
    texts_bE: torch.Tensor,
    scale: torch.Tensor,
    is_pair_b: torch.Tensor,
    topology: Topology,
    chunk_bytes: int = CHUNK_BYTES,
) -> Contrast:
    """Loss and gradients of this rank's part of the global batch; every rank calls it, with the same b.

    images_bE, texts_bE: not normalised, finite. scale: [1]. is_pair_b: bool; rows that are no pair take no part in anything.
    chunk_bytes: of logits that exist at one time.

    A row of logits, one image against all texts or one text against all images, is whole on its own rank. What the gradient
    of u_i needs of the other ranks' rows is a single number each, Z_j = log sum_i exp(s u_i.v_j):

        d/du_i = s / (2n) [ sum_j (exp(s u_i.v_j - Z_i) + exp(s u_i.v_j - Z_j)) v_j  -  2 v_i ]

    and the same with u and v exchanged. So the logits [b, G] of the own rows are made twice, first for Z, then for the
    gradients, in chunks of rows; no [G, G] exists anywhere, and no gradient travels.

    The gradients come times W: the engine takes each rank's loss for a local mean and averages over the ranks, as the
    derivation in `collectives.gather_rows` says. Those of the scale are this rank's share of a sum over the ranks, so
    that the same factor makes them whole.

    Collectives: one all-gather of [b, 2E + 1], one of [b, 2], one all-reduce of a few numbers.
    """
    dtype = torch.promote_types(images_bE.dtype, torch.float32)
    length_b, text_length_b = lengths(images_bE.to(dtype)), lengths(texts_bE.to(dtype))
    u_bE, v_bE = images_bE.to(dtype) / length_b[:, None], texts_bE.to(dtype) / text_length_b[:, None]
    everything = torch.cat([u_bE, v_bE, is_pair_b.to(dtype)[:, None]], dim=1)
    u_GE, v_GE, pair_G1 = collectives.all_gather(everything, topology).split([*2 * (u_bE.shape[1],), 1], dim=1)
    is_pair_G = pair_G1[:, 0] > 0.5
    count = is_pair_G.sum().clamp_min(1).to(dtype)
    s = scale.to(dtype)
    first = topology.rank * len(u_bE)
    rows = _chunks(len(u_bE), len(u_GE) * u_GE.element_size(), chunk_bytes)

    # Each direction: own rows, all rows of the other side.
    sides = ((u_bE, v_GE), (v_bE, u_GE))
    sums, hits = [], []
    for own_bE, all_GE in sides:
        parts = [_log_sums(s, own_bE[a:z], all_GE, is_pair_G, first + a) for a, z in rows]
        sums.append(torch.cat([log_sum_n for log_sum_n, _ in parts]))
        hits.append(torch.cat([is_first_n for _, is_first_n in parts]))
    of_images_G, of_texts_G = collectives.all_gather(torch.stack(sums, dim=1), topology).unbind(dim=1)

    positive_b = (u_bE * v_bE).sum(dim=1)
    loss_b = (sums[0] + sums[1]) / 2 - s * positive_b
    told = torch.stack([loss_b, positive_b, hits[0].to(dtype), hits[1].to(dtype)])
    told = collectives.sum_(told.masked_fill(~is_pair_b, 0).sum(dim=1), topology) / count

    gradients, d_scale = [], torch.zeros_like(s)
    own_sums, all_sums = (sums[0], sums[1]), (of_texts_G, of_images_G)
    for (own_bE, all_GE), own_sum_b, all_sum_G in zip(sides, own_sums, all_sums, strict=True):
        d_bE = torch.empty_like(own_bE)
        for a, z in rows:
            logits_nG = _logits(s, own_bE[a:z], all_GE, is_pair_G)
            softmax_nG = (logits_nG - own_sum_b[a:z, None]).exp_()
            # The derivative by the scale, of the rows of this direction: sum_j p_ij cos_ij - cos_ii.
            expected_n = (softmax_nG * logits_nG.masked_fill_(~is_pair_G, 0)).sum(dim=1) / s
            d_scale += (expected_n - positive_b[a:z]).masked_fill(~is_pair_b[a:z], 0).sum()
            logits_nG -= all_sum_G
            softmax_nG += logits_nG.exp_().masked_fill_(~is_pair_G, 0)
            torch.matmul(softmax_nG, all_GE, out=d_bE[a:z])
        own = all_GE[first : first + len(own_bE)]
        gradients.append((d_bE - 2 * own).masked_fill_(~is_pair_b[:, None], 0) * s)
    factor = topology.world_size / (2 * count)
    return Contrast(
        loss=told[0],
        d_images_bE=_through_length(gradients[0] * factor, u_bE, length_b).to(images_bE.dtype),
        d_texts_bE=_through_length(gradients[1] * factor, v_bE, text_length_b).to(texts_bE.dtype),
        d_scale=(d_scale * factor).to(scale.dtype),
        stats={
            "logit_scale": s.reshape(()),
            "cosine_positive": told[1],
            "accuracy_image_to_text": told[2],
            "accuracy_text_to_image": told[3],
        },
    )


def _chunks(count: int, row_bytes: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """(first, last + 1) of each chunk of rows."""
    size = max(1, chunk_bytes // row_bytes)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(s: torch.Tensor, own_nE: torch.Tensor, all_GE: torch.Tensor, is_pair_G: torch.Tensor) -> torch.Tensor:
    """[n, G], minus infinity in the columns that are no pair."""
    return (own_nE @ all_GE.T).mul_(s).masked_fill_(~is_pair_G, -torch.inf)


def _log_sums(
    s: torch.Tensor, own_nE: torch.Tensor, all_GE: torch.Tensor, is_pair_G: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log of the sum over the other side [n], whether its own partner is the first of the largest [n]).

    first: the column of the first row's partner. The sum is 0 where there is no pair at all.
    """
    logits_nG = _logits(s, own_nE, all_GE, is_pair_G)
    own_n = torch.arange(first, first + len(own_nE), device=own_nE.device)
    is_first_n = logits_nG.argmax(dim=1) == own_n
    return logits_nG.logsumexp(dim=1).nan_to_num_(neginf=0.0), is_first_n


def _through_length(d_unit_bE: torch.Tensor, unit_bE: torch.Tensor, length_b: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to the rows, from that with respect to their directions."""
    along_b = (d_unit_bE * unit_bE).sum(dim=1, keepdim=True)
    return (d_unit_bE - along_b * unit_bE) / length_b[:, None]
