"""The losses of MLCD: the dense definitions, and the few lines of algebra that the sharded head shares with them.

Notation (MLCD, arXiv 2407.17331, section 3): e and w_c are unit vectors, cos_c = e.w_c, P the image's positives, N' the
sampled negatives, s_j = S cos_j for a negative, s_i = S phi(cos_i) for a positive, phi the margin.

    mlcd (eq. 5)   log(1 + sum_{i in P} exp(-s_i)) + log(1 + sum_{j in N'} exp(s_j))
    mlc  (eq. 4)   log(1 + sum_{j in N'} exp(s_j) * sum_{i in P} exp(-s_i))
    cd   (eq. 3)   softmax cross entropy against the nearest center alone, which is mlc with one positive:
                   -log(e^{s_i} / (e^{s_i} + sum_j e^{s_j})) = log(1 + e^{-s_i} sum_j e^{s_j})

With Q = sum_i exp(-s_i) and N = sum_j exp(s_j), mlcd is log(1+Q) + log(1+N) and mlc is log(1+QN): two sums per image
are all that shards have to exchange.

    clip (eq. 1)   the contrastive loss of images and texts, see `clip_loss`

Shapes: G images, K classes, L labels an image.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.errors import ConfigError

SINE_FLOOR = 1e-3
"""Below this sin(theta) the exact derivative of the margin, which has 1/sin(theta), stops growing: it stays finite at
theta = 0 and theta = pi."""


@dataclass(frozen=True)
class LossSpec:
    """What is computed; `config.HeadConfig` explains the fields."""

    objective: str
    scale: float
    margin: float
    margin_type: str
    margin_gradient: str
    negative_filter: float | None

    def __post_init__(self):
        for name, value, allowed in (
            ("objective", self.objective, ("mlcd", "mlc", "cd")),
            ("margin_type", self.margin_type, ("arc", "cos", "none")),
            ("margin_gradient", self.margin_gradient, ("straight_through", "exact")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def labels_for(objective: str, labels_GL: torch.Tensor) -> torch.Tensor:
    """The labels that are positives under `objective`, each at most once.

    labels_GL: integer [G, L], NO_LABEL (any negative number) where there is none. Returns [G, L], or [G, 1] for cd;
    a class that an image lists twice counts once (its later occurrences become NO_LABEL).
    """
    if objective == "cd":
        return labels_GL[:, :1]
    same_GLL = labels_GL[:, :, None] == labels_GL[:, None, :]
    repeated_GL = torch.tril(same_GLL, diagonal=-1).any(dim=2)
    return labels_GL.masked_fill(repeated_GL, NO_LABEL)


def apply_margin(cosine: torch.Tensor, spec: LossSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(cosine) and its derivative with respect to the cosine, as the optimizer is to see it.

    arc: cos(theta + m); beyond theta + m = pi, where that would rise again, cos(theta) - m sin(m) (ArcFace's fallback).
    cos: cos(theta) - m. none: cos(theta). The derivative is 1 for `straight_through` (what the published PartialFC
    does), the true one for `exact`, with sin(theta) held above SINE_FLOOR.
    """
    one = torch.ones_like(cosine)
    if spec.margin_type == "none" or spec.margin == 0:
        return cosine, one
    if spec.margin_type == "cos":
        return cosine - spec.margin, one
    cosine = cosine.clamp(-1, 1)  # float32 products of unit vectors may leave [-1, 1] by rounding
    sine = (1 - cosine.square()).sqrt()
    falls_back = cosine <= -math.cos(spec.margin)
    value = cosine * math.cos(spec.margin) - sine * math.sin(spec.margin)
    value = torch.where(falls_back, cosine - spec.margin * math.sin(spec.margin), value)
    if spec.margin_gradient == "straight_through":
        return value, one
    slope = math.cos(spec.margin) + cosine / sine.clamp_min(SINE_FLOOR) * math.sin(spec.margin)
    return value, torch.where(falls_back, one, slope)


def positive_logits(cosine: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """S phi(cosine), with autograd seeing the derivative that `apply_margin` states."""
    value, slope = apply_margin(cosine.detach(), spec)
    return spec.scale * (value + slope * (cosine - cosine.detach()))


def _log_one_plus_sum_exp(logits_GK: torch.Tensor, mask_GK: torch.Tensor) -> torch.Tensor:
    """log(1 + sum over the mask of exp(logits)), per row."""
    masked = logits_GK.masked_fill(~mask_GK, -torch.inf)
    return torch.logsumexp(torch.cat([masked.new_zeros(len(masked), 1), masked], dim=1), dim=1)


def mlcd_loss(positive_GK, is_positive_GK, negative_GK, is_negative_GK) -> torch.Tensor:
    """Eq. 5, per image [G]. Logits of the positives and of the negatives [G, K], each with the mask of those that count."""
    return _log_one_plus_sum_exp(-positive_GK, is_positive_GK) + _log_one_plus_sum_exp(negative_GK, is_negative_GK)


def mlc_loss(positive_GK, is_positive_GK, negative_GK, is_negative_GK) -> torch.Tensor:
    """Eq. 4, per image [G]: the sum over all pairs (i, j) of exp(s_j - s_i). Zero for an image without a positive.

    With one positive per image this is eq. 3, cluster discrimination.
    """
    pairs_GKK = negative_GK[:, None, :] - positive_GK[:, :, None]
    mask_GKK = is_positive_GK[:, :, None] & is_negative_GK[:, None, :]
    return _log_one_plus_sum_exp(pairs_GKK.flatten(1), mask_GKK.flatten(1))


def dense_loss(
    embeddings_GD: torch.Tensor,
    centers_KD: torch.Tensor,
    labels_GL: torch.Tensor,
    spec: LossSpec,
    sampled_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition that the sharded head is held to: mean loss of the whole batch against all centers, by autograd.

    embeddings_GD, centers_KD: floating, any length; normalised here. labels_GL: int [G, L], NO_LABEL where there is none.
    sampled_K: bool [K], the classes that take part in this step (must include every positive); None: all.
    Needs memory for [G, K] (mlc: [G, K, K]): a definition for tests, not for training.
    """
    e_GD = embeddings_GD / lengths(embeddings_GD)[:, None]
    w_KD = centers_KD / lengths(centers_KD)[:, None]
    cosine_GK = e_GD @ w_KD.T
    labels_GL = labels_for(spec.objective, labels_GL)
    is_positive_GK = torch.zeros_like(cosine_GK, dtype=torch.bool)
    for row, labels_L in enumerate(labels_GL):
        is_positive_GK[row, labels_L[labels_L >= 0]] = True
    is_negative_GK = ~is_positive_GK
    if sampled_K is not None:
        is_negative_GK = is_negative_GK & sampled_K
    if spec.negative_filter is not None:
        is_negative_GK = is_negative_GK & (cosine_GK <= spec.negative_filter)
    loss = mlcd_loss if spec.objective == "mlcd" else mlc_loss
    loss_G = loss(positive_logits(cosine_GK, spec), is_positive_GK, spec.scale * cosine_GK, is_negative_GK)
    return loss_G.mean()


NORM_FLOOR = 1e-12
"""Vectors that are no longer have no direction: an all-zero embedding stays zero, has cosine 0 to everything, and neither
gets a gradient nor gives one. (Divided by this floor instead, its gradient would be 1e12 times everybody else's.)"""


def lengths(rows_nD: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[n]: what to divide the rows by to make them unit vectors: their lengths; infinity for those without direction."""
    norm_n = torch.linalg.vector_norm(rows_nD, dim=1, out=out)
    is_zero_n = norm_n <= NORM_FLOOR
    return norm_n.masked_fill(is_zero_n, math.inf) if out is None else norm_n.masked_fill_(is_zero_n, math.inf)


def clip_loss(
    images_GE: torch.Tensor, texts_GE: torch.Tensor, scale: torch.Tensor, is_pair_G: torch.Tensor | None = None
) -> torch.Tensor:
    """The contrastive loss in both directions, mean over all pairs, by autograd: the definition of contrastive.py.

    CLIP's (Radford et al. 2021, figure 3), which is ConVIRT's (Zhang et al. 2020, eq. 2-4), and eq. 1 of the MLCD paper:
    softmax cross entropy of each image among all texts, and of each text among all images, halved. images_GE, texts_GE:
    floating [G, E], of any length; normalised here. scale: of the cosines. is_pair_G: bool, the rows that count; None: all.
    Needs memory for [G, G]: a definition for tests, not for training.
    """
    if is_pair_G is not None:
        images_GE, texts_GE = images_GE[is_pair_G], texts_GE[is_pair_G]
    u_GE = images_GE / lengths(images_GE)[:, None]
    v_GE = texts_GE / lengths(texts_GE)[:, None]
    logits_GG = scale * (u_GE @ v_GE.T)
    own_G = torch.arange(len(logits_GG), device=logits_GG.device)
    return (F.cross_entropy(logits_GG, own_G) + F.cross_entropy(logits_GG.T, own_G)) / 2


@dataclass(frozen=True)
class TwoSums:
    """The loss of each image from its two sums, and what its gradient needs.

    positive_G, negative_G: the two summands of the loss (mlc and cd: all in negative_G).
    log_negative_weight_G: d loss / d s_j = exp(s_j + log_negative_weight).
    log_positive_weight_G: d loss / d s_i = -exp(-s_i + log_positive_weight).
    """

    positive_G: torch.Tensor
    negative_G: torch.Tensor
    log_negative_weight_G: torch.Tensor
    log_positive_weight_G: torch.Tensor


def loss_from_sums(objective: str, log_negative_G: torch.Tensor, log_positive_G: torch.Tensor) -> TwoSums:
    """log N and log Q [G] (minus infinity for an empty sum) to loss and gradient weights; nothing here overflows.

    mlcd: d/ds_j = e^{s_j} / (1+N),    d/ds_i = -e^{-s_i} / (1+Q).
    mlc:  d/ds_j = e^{s_j} Q / (1+NQ), d/ds_i = -e^{-s_i} N / (1+NQ).
    """
    zero = torch.zeros_like(log_negative_G)
    if objective == "mlcd":
        negative = torch.logaddexp(log_negative_G, zero)
        positive = torch.logaddexp(log_positive_G, zero)
        return TwoSums(positive, negative, -negative, -positive)
    both = torch.logaddexp(log_negative_G + log_positive_G, zero)
    return TwoSums(zero, both, log_positive_G - both, log_negative_G - both)
