"""Multinomial logistic regressions on the same features, one per lambda: L-BFGS in float64, batched over the lambdas.

Problem p minimises  -sum_i log softmax(x_i W + b)[y_i]  +  lambda_p / 2 |W|^2  over W [d, C] and b [C]: the form of
scikit-learn's LogisticRegression with C = 1 / lambda and more than two classes, the biases free.

Shapes: n images, d feature width, D = d + 1 coefficients of a class (the bias last), C classes, P problems.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mlcd_ds.evaluation.logistic import HISTORY, WORKSPACE_NUMBERS, PrincipalInputs

LINE_SEARCH_TRIES = 20


@dataclass(frozen=True)
class SoftmaxFit:
    """Solved problems. weights: float64 [P, C, d]; biases: float64 [P, C]; iterations: int64 [P]; converged: bool [P]."""

    weights: np.ndarray
    biases: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray

    def scores(self, features_nd: np.ndarray, problem: int) -> np.ndarray:
        """x W + b of one problem, float64 [n, C]."""
        return features_nd.astype(np.float64) @ self.weights[problem].T + self.biases[problem]


class SoftmaxRegressions:
    """Fits problems on one set of features [n, d], of classes [n] from 0 to C - 1, on `device`.

    As with `LogisticRegressions` the features are centred and turned onto their principal axes, and L-BFGS starts from
    a diagonal inverse Hessian: 1 / (kappa variance_j n + lambda). kappa stands for p (1 - p): 1 / C at W = 0, where
    every class has the probability 1 / C, and then what fits the newest step s and its change of gradient y, s.y = s.H
    s. Memory beside the features: WORKSPACE_NUMBERS float64 numbers for scores, which are made for some images at a
    time and never kept, and 2 HISTORY + 6 times P D C.
    """

    def __init__(self, features_nd: np.ndarray, classes_n: np.ndarray, num_classes: int, device: torch.device | str):
        self._inputs = PrincipalInputs(features_nd, device)
        self._classes_n = torch.as_tensor(classes_n, dtype=torch.int64, device=device)
        self._num_classes = num_classes

    def fit(self, lambda_p: np.ndarray, max_iterations: int, tolerance: float) -> SoftmaxFit:
        """Solves all problems.

        Stops a problem when g^T H g <= tolerance^2 n, H = 1 / (variance_j n / C + lambda): what is left to gain is then
        about tolerance^2 per image; and unconverged where float64 allows no further descent. A class without an image
        gets a bias that falls without end: its probability goes to zero and takes no part.
        """
        inputs_nD, device, P, C = (
            self._inputs.inputs_nD,
            self._inputs.inputs_nD.device,
            len(lambda_p),
            self._num_classes,
        )
        lambda_P = torch.as_tensor(lambda_p, dtype=torch.float64, device=device)
        D = inputs_nD.shape[1]
        result_DPC = torch.zeros(D, P, C, dtype=torch.float64, device=device)
        iterations = torch.full((P,), max_iterations, device=device)
        converged = torch.zeros(P, dtype=torch.bool, device=device)
        open_ = torch.arange(P, device=device)
        penalty_DP = self._inputs.penalised_D[:, None] * lambda_P
        tiny = torch.finfo(torch.float64).tiny ** 0.5
        energy_D1 = self._inputs.energy_D[:, None]
        inverse_DP = 1 / (energy_D1 / C + penalty_DP).clamp_min(tiny)
        w_DPC = torch.zeros_like(result_DPC)
        gradient_DPC = self._gradient(w_DPC, penalty_DP)
        history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        kappa_P = torch.full((P,), 1 / C, dtype=torch.float64, device=device)
        stuck = torch.zeros(P, dtype=torch.bool, device=device)
        for iteration in range(max_iterations + 1):
            good = (gradient_DPC.square().sum(2) * inverse_DP).sum(0) <= tolerance**2 * len(inputs_nD)
            done = good | stuck
            if done.any() or iteration == max_iterations:
                result_DPC[:, open_] = w_DPC
                converged[open_[good]] = True
                iterations[open_[done]] = iteration
                if done.all() or iteration == max_iterations:
                    break
                keep = ~done
                open_, w_DPC, gradient_DPC = open_[keep], w_DPC[:, keep], gradient_DPC[:, keep]
                penalty_DP, inverse_DP, kappa_P = penalty_DP[:, keep], inverse_DP[:, keep], kappa_P[keep]
                history = [(s[:, keep], y[:, keep], rho[keep]) for s, y, rho in history]
            start_DP1 = (1 / (kappa_P * energy_D1 + penalty_DP).clamp_min(tiny))[:, :, None]
            step_DPC = -_times_inverse_hessian(gradient_DPC, history, start_DP1)
            length_P, new_DPC, stuck = self._line_search(w_DPC, step_DPC, gradient_DPC, penalty_DP)
            step_DPC = length_P[:, None] * step_DPC
            w_DPC = w_DPC + step_DPC
            change_DPC = new_DPC - gradient_DPC
            curvature_P = _dot(step_DPC, change_DPC)
            useful_P = curvature_P > 0  # at the limit of float64 it may round to nothing: such a pair counts nothing
            rho_P = torch.where(useful_P, 1 / curvature_P.clamp_min(1e-300), 0.0)
            squares_DP = step_DPC.square().sum(2)
            fitting_P = (curvature_P - (penalty_DP * squares_DP).sum(0)) / (energy_D1 * squares_DP).sum(0).clamp_min(
                1e-300
            )
            kappa_P = torch.where(useful_P & (fitting_P > 0), fitting_P, kappa_P)
            history = [*history[-HISTORY + 1 :], (step_DPC, change_DPC, rho_P)]
            gradient_DPC = new_DPC
        weights_dPC, biases_PC = self._inputs.as_given(result_DPC.reshape(D, P * C))
        weights = weights_dPC.reshape(D - 1, P, C).permute(1, 2, 0)
        return SoftmaxFit(
            weights.contiguous().cpu().numpy(),
            biases_PC.reshape(P, C).cpu().numpy(),
            iterations.cpu().numpy(),
            converged.cpu().numpy(),
        )

    def _gradient(self, w_DPC: torch.Tensor, penalty_DP: torch.Tensor) -> torch.Tensor:
        D, P, C = w_DPC.shape
        gradient_DPC = penalty_DP[:, :, None] * w_DPC
        flat_DX, w_DX = gradient_DPC.view(D, P * C), w_DPC.reshape(D, P * C)
        rows = max(1, WORKSPACE_NUMBERS // (P * C))
        for inputs_rD, classes_r in zip(self._inputs.inputs_nD.split(rows), self._classes_n.split(rows), strict=True):
            residual_rPC = torch.softmax((inputs_rD @ w_DX).view(-1, P, C), dim=2)
            one_r11 = torch.ones(len(classes_r), 1, 1, dtype=torch.float64, device=w_DPC.device)
            residual_rPC.scatter_add_(2, classes_r[:, None, None].expand(-1, P, 1), -one_r11.expand(-1, P, 1))
            flat_DX.addmm_(inputs_rD.T, residual_rPC.view(-1, P * C))
        return gradient_DPC

    def _line_search(self, w_DPC, step_DPC, gradient_DPC, penalty_DP):
        """(lengths [P], gradients there, whether nothing was found [P]).

        Along a convex function the slope rises: a length is good where the slope is at most 0.9 of what it was and hardly
        uphill. The first try, 1, nearly always is. Else the slope's secant, kept between the bounds that are known.
        """
        P, device = w_DPC.shape[1], w_DPC.device
        start_P = _dot(gradient_DPC, step_DPC)
        length_P = torch.ones(P, dtype=torch.float64, device=device)
        low_P, high_P = torch.zeros_like(length_P), torch.full_like(length_P, torch.inf)
        low_slope_P, high_slope_P = start_P.clone(), torch.zeros_like(start_P)
        new_DPC = gradient_DPC.clone()
        open_ = torch.arange(P, device=device)
        for _ in range(LINE_SEARCH_TRIES):
            t = length_P[open_]
            found_DPC = self._gradient(w_DPC[:, open_] + t[:, None] * step_DPC[:, open_], penalty_DP[:, open_])
            new_DPC[:, open_] = found_DPC
            slope = _dot(found_DPC, step_DPC[:, open_])
            good = (slope >= 0.9 * start_P[open_]) & (slope <= -0.1 * start_P[open_])
            downhill = slope < 0
            low_P[open_] = torch.where(downhill, t, low_P[open_])
            low_slope_P[open_] = torch.where(downhill, slope, low_slope_P[open_])
            high_P[open_] = torch.where(downhill, high_P[open_], t)
            high_slope_P[open_] = torch.where(downhill, high_slope_P[open_], slope)
            open_ = open_[~good]
            if len(open_) == 0:
                break
            low, high = low_P[open_], high_P[open_]
            rise = (high_slope_P - low_slope_P)[open_].clamp_min(1e-300)
            width = high - low
            secant = low - low_slope_P[open_] / rise * torch.where(high.isinf(), 1.0, width)
            inside = torch.minimum(torch.maximum(secant, low + 0.1 * width), high - 0.1 * width)
            length_P[open_] = torch.where(high.isinf(), 4 * low, inside)
        none = torch.zeros(P, dtype=torch.bool, device=device)
        none[open_] = True
        length_P[none], new_DPC[:, none] = 0.0, gradient_DPC[:, none]
        return length_P, new_DPC, none


def _dot(a_DPC: torch.Tensor, b_DPC: torch.Tensor) -> torch.Tensor:
    return (a_DPC * b_DPC).sum((0, 2))


def _times_inverse_hessian(gradient_DPC, history, start_DP1):
    """L-BFGS's two loops (Nocedal and Wright, algorithm 7.4), one history a problem."""
    q, alphas = gradient_DPC, []
    for s, y, rho in reversed(history):
        alphas.append(rho * _dot(s, q))
        q = q - alphas[-1][:, None] * y
    q = start_DP1 * q
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = q + (alpha - rho * _dot(y, q))[:, None] * s
    return q
