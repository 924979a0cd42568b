"""Many logistic regressions on the same features at once: L-BFGS in float64, batched over classes and lambdas.

Problem p minimises  sum_i log(1 + exp(-y_i (x_i . w + b)))  +  lambda_p / 2 |w|^2  over w and b, y_i = +-1: the form of
scikit-learn's LogisticRegression with C = 1 / lambda, the bias free.

Shapes: n images, d feature width, D = d + 1 coefficients (the bias last), C classes, P problems.
"""

from dataclasses import dataclass

import numpy as np
import torch

HISTORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""
LINE_SEARCH_TRIES = 20
WORKSPACE_NUMBERS = 1 << 25
"""Most float64 numbers in one [n, P] matrix; more problems are solved in turn."""


@dataclass(frozen=True)
class Fit:
    """Solved problems. weights: float64 [P, d]; biases: float64 [P]; iterations: int64 [P]; converged: bool [P]."""

    weights: np.ndarray
    biases: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray

    def scores(self, features_nd: np.ndarray) -> np.ndarray:
        """x . w + b, float64 [n, P]."""
        return features_nd.astype(np.float64) @ self.weights.T + self.biases


class PrincipalInputs:
    """Features [n, d], centred and turned onto their principal axes, with a column of ones for the bias: float64 on
    `device`.

    Only a free bias sees the first, |w| does not see the second. inputs_nD; energy_D: sum of squares of each column;
    penalised_D: 1 for weights, 0 for the bias.
    """

    def __init__(self, features_nd: np.ndarray, device: torch.device | str = "cpu"):
        features = torch.from_numpy(np.ascontiguousarray(features_nd)).to(device).double()
        n = len(features)
        self._mean = features.mean(0)
        centred = features - self._mean
        energy_d, self._axes = torch.linalg.eigh(centred.T @ centred)
        one = torch.ones(n, 1, dtype=torch.float64, device=features.device)
        self.inputs_nD = torch.cat([centred @ self._axes, one], dim=1)
        self.energy_D = torch.cat([energy_d.clamp_min(0), one.sum(0)])
        self.penalised_D = torch.ones_like(self.energy_D)
        self.penalised_D[-1] = 0

    def as_given(self, coefficients_DP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [d, P], biases [P]) on the features as they were given."""
        weights_dP = self._axes @ coefficients_DP[:-1]
        return weights_dP, coefficients_DP[-1] - self._mean @ weights_dP


class LogisticRegressions:
    """Fits problems on one set of features [n, d], on `device`.

    On the features' principal axes (see `PrincipalInputs`) the diagonal 1 / (variance_j n / 4 + lambda) inverts Boehning's
    upper bound of the Hessian (1992, Ann. Inst. Statist. Math. 44), and serves L-BFGS as initial inverse Hessian: tens of
    iterations instead of thousands.
    """

    def __init__(self, features_nd: np.ndarray, device: torch.device | str = "cpu"):
        self._inputs = PrincipalInputs(features_nd, device)
        self._inputs_nD = self._inputs.inputs_nD
        self._bound_D = self._inputs.energy_D / 4
        self._penalised_D = self._inputs.penalised_D

    def fit(
        self,
        is_positive_nC: np.ndarray,
        class_of_p: np.ndarray,
        lambda_of_p: np.ndarray,
        max_iterations: int,
        tolerance: float,
    ) -> Fit:
        """Solves problem p = (class, lambda) for every p.

        Stops a problem when g^T H g <= tolerance^2 n, H the bound's inverse: what is left to gain is then some tolerance^2
        per image. A class without a positive or without a negative has no solution (the bias runs away): it gets zeros.
        """
        n, P, device = len(self._inputs_nD), len(class_of_p), self._inputs_nD.device
        targets = torch.from_numpy(np.ascontiguousarray(is_positive_nC)).to(device).double()
        classes = torch.as_tensor(class_of_p, device=device)
        lambdas = torch.as_tensor(lambda_of_p, dtype=torch.float64, device=device)
        counts = targets.sum(0)[classes]
        solvable = torch.nonzero((counts > 0) & (counts < n)).flatten()
        coefficients_DP = torch.zeros(len(self._bound_D), P, dtype=torch.float64, device=device)
        iterations = torch.zeros(P, dtype=torch.int64, device=device)
        converged = torch.ones(P, dtype=torch.bool, device=device)
        for part in solvable.split(max(1, WORKSPACE_NUMBERS // n)):
            solved = self._solve(targets[:, classes[part]], lambdas[part], max_iterations, tolerance)
            coefficients_DP[:, part], iterations[part], converged[part] = solved
        weights_dP, biases_P = self._inputs.as_given(coefficients_DP)
        found = (weights_dP.T.contiguous(), biases_P, iterations, converged)
        return Fit(*(tensor.cpu().numpy() for tensor in found))

    def _solve(self, targets_nP, lambda_P, max_iterations: int, tolerance: float):
        """(coefficients [D, P], iterations [P], converged [P]); each problem keeps its own history and step length."""
        n, P = targets_nP.shape
        inputs_nD, device = self._inputs_nD, self._inputs_nD.device
        result_DP = torch.zeros(inputs_nD.shape[1], P, dtype=torch.float64, device=device)
        iterations = torch.full((P,), max_iterations, device=device)
        converged = torch.zeros(P, dtype=torch.bool, device=device)
        open_ = torch.arange(P, device=device)  # the problems that the columns below belong to

        penalty_DP = self._penalised_D[:, None] * lambda_P
        inverse_DP = 1 / (self._bound_D[:, None] + penalty_DP).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
        w_DP, z_nP = torch.zeros_like(result_DP), torch.zeros(n, P, dtype=torch.float64, device=device)
        gradient_DP = inputs_nD.T @ (0.5 - targets_nP)
        history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for iteration in range(max_iterations + 1):
            done = (gradient_DP.square() * inverse_DP).sum(0) <= tolerance**2 * n
            if done.any() or iteration == max_iterations:
                result_DP[:, open_] = w_DP
                converged[open_[done]] = True
                iterations[open_[done]] = iteration
                if done.all() or iteration == max_iterations:
                    break
                keep = ~done
                open_, targets_nP, z_nP = open_[keep], targets_nP[:, keep], z_nP[:, keep]
                w_DP, gradient_DP, penalty_DP = w_DP[:, keep], gradient_DP[:, keep], penalty_DP[:, keep]
                inverse_DP = inverse_DP[:, keep]
                history = [(s[:, keep], y[:, keep], rho[keep]) for s, y, rho in history]
            step_DP = -_times_inverse_hessian(gradient_DP, history, inverse_DP)
            change_nP = inputs_nD @ step_DP
            slope_P = (gradient_DP * step_DP).sum(0)
            length_P, residual_nP = _line_search(slope_P, z_nP, change_nP, targets_nP, w_DP, step_DP, penalty_DP)
            step_DP = length_P * step_DP
            w_DP, z_nP = w_DP + step_DP, z_nP + length_P * change_nP
            new_gradient_DP = inputs_nD.T @ residual_nP + penalty_DP * w_DP
            change_of_gradient = new_gradient_DP - gradient_DP
            curvature_P = (step_DP * change_of_gradient).sum(0)
            # At the limit of float64 the product may round to nothing: such a pair is left out, by a weight of zero.
            rho_P = torch.where(curvature_P > 0, 1 / curvature_P.clamp_min(1e-300), 0.0)
            history = [*history[-HISTORY + 1 :], (step_DP, change_of_gradient, rho_P)]
            gradient_DP = new_gradient_DP
        return result_DP, iterations, converged


def _times_inverse_hessian(gradient_DP, history, inverse_DP):
    """L-BFGS's two loops (Nocedal and Wright, algorithm 7.4), one history a column."""
    q, alphas = gradient_DP, []
    for s, y, rho in reversed(history):
        alphas.append(rho * (s * q).sum(0))
        q = q - alphas[-1] * y
    q = inverse_DP * q
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = q + (alpha - rho * (y * q).sum(0)) * s
    return q


def _line_search(slope_P, z_nP, change_nP, targets_nP, w_DP, step_DP, penalty_DP):
    """Step lengths [P] along convex functions of t, and the residuals sigmoid - target [n, P] there.

    No product with the features: scores are linear in t. Newton on the slope, kept between bounds, from t = 1, until the
    slope is at most half of what it was at t = 0, slope_P, and hardly uphill.
    """
    P = z_nP.shape[1]
    linear_P = (penalty_DP * w_DP * step_DP).sum(0)
    quadratic_P = (penalty_DP * step_DP.square()).sum(0)

    def residual_and_slope(t_P):
        residual = torch.sigmoid(z_nP + t_P * change_nP) - targets_nP
        return residual, (residual * change_nP).sum(0) + linear_P + t_P * quadratic_P

    start_P = slope_P.abs()
    t = torch.ones(P, dtype=torch.float64, device=z_nP.device)
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    for _ in range(LINE_SEARCH_TRIES):
        residual, slope = residual_and_slope(t)
        good = (slope >= -0.5 * start_P) & (slope <= 0.1 * start_P)
        if good.all():
            break
        low, high = torch.where(slope < 0, t, low), torch.where(slope > 0, t, high)
        probability = residual + targets_nP
        bend = (probability * (1 - probability) * change_nP.square()).sum(0) + quadratic_P
        newton = t - slope / bend.clamp_min(1e-300)
        between = torch.where(high.isinf(), 4 * low, (low + high) / 2)
        inside = (newton > low) & (newton < torch.where(high.isinf(), 10 * low, high))
        t = torch.where(good, t, torch.where(inside, newton, between))
    else:
        residual = residual_and_slope(t)[0]
    return t, residual
