"""The dense definitions against the paper's formulas written out, and the margin against trigonometry."""

import math

import pytest
import torch

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.losses import LossSpec, apply_margin, dense_loss, labels_for, loss_from_sums, positive_logits

PLAIN = LossSpec("mlcd", 64.0, 0.3, "arc", "straight_through", None)


def spec(**changes):
    return LossSpec(**(vars(PLAIN) | changes))


def by_hand(cosine, positives, objective, scale):
    """Equations 4 and 5 with sums over Python numbers."""
    minus = sum(math.exp(-scale * cosine[i]) for i in positives)
    plus = sum(math.exp(scale * c) for j, c in enumerate(cosine) if j not in positives)
    return math.log(1 + minus) + math.log(1 + plus) if objective == "mlcd" else math.log(1 + minus * plus)


@pytest.mark.parametrize("objective", ["mlcd", "mlc"])
@pytest.mark.parametrize("positives", [[2], [0, 3, 4], []])
def test_dense_loss_is_the_papers_formula(objective, positives):
    angles = torch.tensor([0.1, 0.7, 1.3, 2.0, 2.9], dtype=torch.float64)
    centers = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([positives + [NO_LABEL] * (4 - len(positives))])
    loss = dense_loss(
        torch.tensor([[3.0, 0.0]], dtype=torch.float64),
        centers,
        labels,
        spec(objective=objective, scale=5.0, margin=0.0),
    )
    assert loss.item() == pytest.approx(by_hand(angles.cos().tolist(), positives, objective, 5.0), rel=1e-12)


def test_sampled_classes_and_filter_leave_negatives_out():
    generator = torch.Generator().manual_seed(0)
    e, w = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (1, 9))
    cosine = (torch.nn.functional.normalize(e, dim=1) @ torch.nn.functional.normalize(w, dim=1).T)[0]
    sampled = torch.tensor([True, False, True, True, False, True, True, True, True])
    keep = [j for j in range(9) if sampled[j] and (j == 0 or cosine[j] <= 0.2)]
    loss = dense_loss(e, w, torch.tensor([[0]]), spec(scale=3.0, margin=0.0, negative_filter=0.2), sampled)
    assert len(keep) < 7
    assert loss.item() == pytest.approx(by_hand([cosine[j].item() for j in keep], [0], "mlcd", 3.0), rel=1e-12)


def test_arc_margin_is_cos_of_theta_plus_m():
    theta = torch.linspace(0, math.pi - 0.3 - 1e-6, 50, dtype=torch.float64)
    value, slope = apply_margin(theta.cos(), PLAIN)
    torch.testing.assert_close(value, (theta + 0.3).cos())
    assert torch.equal(slope, torch.ones(50, dtype=torch.float64))


def test_arc_margin_never_rises_again():
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    value, _ = apply_margin(theta.cos(), PLAIN)
    assert (value.diff() <= 1e-12).all()


def test_exact_gradient_is_that_of_cos_theta_plus_m():
    cosine = torch.linspace(-0.9, 0.999, 40, dtype=torch.float64, requires_grad=True)
    reference = torch.autograd.grad((torch.acos(cosine) + 0.3).cos().sum(), cosine)[0]
    ours = torch.autograd.grad(positive_logits(cosine, spec(margin_gradient="exact")).sum(), cosine)[0]
    torch.testing.assert_close(ours, 64 * reference, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin_type", ["arc", "cos", "none"])
@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_margin_is_finite_at_zero_and_pi(dtype, margin_type, gradient):
    cosine = torch.tensor([-1.0, -1 - 1e-7, 0.0, 1.0, 1 + 1e-7], dtype=dtype, requires_grad=True)
    logits = positive_logits(cosine, spec(margin_type=margin_type, margin_gradient=gradient))
    (grad,) = torch.autograd.grad(logits.sum(), cosine)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(grad).all()


def test_straight_through_keeps_the_derivative_of_plain_cosine():
    cosine = torch.tensor([0.3, -0.99], dtype=torch.float64, requires_grad=True)
    for margin_type in ("arc", "cos", "none"):
        (grad,) = torch.autograd.grad(positive_logits(cosine, spec(margin_type=margin_type)).sum(), cosine)
        assert grad.tolist() == [64.0, 64.0]


def test_labels_count_once_and_cd_takes_the_nearest():
    labels = torch.tensor([[5, 5, 3], [2, -1, -1], [1, 2, 1], [-1, -1, -1]])
    assert labels_for("mlcd", labels).tolist() == [[5, -1, 3], [2, -1, -1], [1, 2, -1], [-1, -1, -1]]
    assert labels_for("cd", labels).tolist() == [[5], [2], [1], [-1]]


@pytest.mark.parametrize("objective", ["mlcd", "mlc", "cd"])
def test_weights_are_the_derivatives_of_the_loss(objective):
    """d loss / d log N = N exp(log_negative_weight), d loss / d log Q = Q exp(log_positive_weight)."""
    log_n = torch.tensor([-50.0, -1.0, 0.0, 3.0, 70.0], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([2.0, -60.0, 0.0, 30.0, 55.0], dtype=torch.float64, requires_grad=True)
    two = loss_from_sums(objective, log_n, log_q)
    grad_n, grad_q = torch.autograd.grad((two.positive_G + two.negative_G).sum(), [log_n, log_q])
    torch.testing.assert_close(grad_n, (log_n + two.log_negative_weight_G).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_q, (log_q + two.log_positive_weight_G).exp(), rtol=1e-12, atol=0)


def test_empty_sums_are_zero_loss_and_zero_weight_not_nan():
    nothing = torch.tensor([-torch.inf], dtype=torch.float64)
    some = torch.tensor([3.0], dtype=torch.float64)
    assert loss_from_sums("mlcd", nothing, some).negative_G.item() == 0
    assert loss_from_sums("mlcd", some, nothing).positive_G.item() == 0
    for log_n, log_q in ((nothing, some), (some, nothing), (nothing, nothing)):
        two = loss_from_sums("mlc", log_n, log_q)
        assert two.negative_G.item() == 0
        assert not two.log_negative_weight_G.isnan().any()
        assert not two.log_positive_weight_G.isnan().any()
