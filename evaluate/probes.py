"""Logistic probes, many at a time, and the scores they get.

All probes of one attribute are one batched Newton iteration; scikit-learn's LogisticRegression with
class_weight="balanced" is the reference it is tested against.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional

MAX_NEWTON_STEPS = 50
MAX_HALVINGS = 12
MAX_BATCH = 2**20  # numbers in the features of one batch of probes
CONVERGED = 1e-3  # a smaller relative step of the objective is the last; Newton's error is then about its square


@dataclass(frozen=True, kw_only=True, eq=False)
class Standard:
    """Shift and scale of every feature, measured on the rows a probe is fitted on."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Standard":
        """Measure on [n, d]; a constant feature gets scale 1, so it stays constant."""
        std = features.std(dim=0, correction=0)
        return cls(mean=features.mean(dim=0), std=torch.where(std > 1e-8, std, torch.ones_like(std)))

    def apply(self, features: Tensor) -> Tensor:
        """[n, d] -> [n, d] with mean 0 and standard deviation 1 on the rows it was measured on."""
        return (features - self.mean) / self.std


def fit_logistic(features: Tensor, labels: Tensor, penalty: float = 1.0) -> Tensor:
    """Fit one class-balanced ridge-logistic probe per batch entry: [batch, n, k], bool [batch, n] -> [batch, k + 1].

    The last weight is the intercept, which is not penalised. The objective is scikit-learn's with C = 1 / penalty:
    penalty / 2 |w|^2 + sum_i s_i log(1 + exp(-y_i z_i)), s_i = n / (2 n_class(i)). Newton steps are halved per probe
    until the objective falls, so separable classes are safe.
    """
    x = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1).double()
    problem = _Problem.of(labels, penalty, x.shape[-1])
    single, ridge = x.float(), torch.diag(problem.ridge).float()  # enough for the Hessian, which only sets the path
    turned = single.transpose(1, 2).contiguous()
    weights = torch.zeros(x.shape[0], x.shape[-1], dtype=torch.float64, device=x.device)
    z = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)  # x @ weights
    value = problem.objective(z, weights)
    for _ in range(MAX_NEWTON_STEPS):
        chance = torch.sigmoid(z)
        pull = problem.sample * (chance - problem.on)
        gradient = (pull.unsqueeze(1) @ x).squeeze(1) + problem.ridge * weights
        curvature = (problem.sample * chance * (1 - chance)).unsqueeze(-1)
        hessian = turned @ (curvature.float() * single) + ridge
        step = _solve(hessian.double(), gradient)
        before = value
        weights, z, value = problem.shortened(weights, z, step, (x @ step.unsqueeze(-1)).squeeze(-1), value)
        if bool(((before - value) <= CONVERGED * before.abs()).all()):
            break
    return weights


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of positive definite systems [batch, k + 1, k + 1], [batch, k + 1] -> [batch, k + 1].

    The last unknown, the intercept, is eliminated, which leaves systems of k = 128 where that is the most: above 128,
    MKL on several threads takes ten times longer for Cholesky, and its LU has failed (docs/log.md).
    """
    lower = torch.linalg.cholesky(matrix[:, :-1, :-1])
    sides = torch.stack([right[:, :-1], matrix[:, :-1, -1]], dim=2)
    solved, coupled = torch.cholesky_solve(sides, lower).unbind(2)
    rest = matrix[:, -1, -1] - (matrix[:, -1, :-1] * coupled).sum(1)
    last = (right[:, -1] - (matrix[:, -1, :-1] * solved).sum(1)) / rest
    return torch.cat([solved - last.unsqueeze(1) * coupled, last.unsqueeze(1)], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """What is minimised, per batch entry: on [batch, n] is 1 for the class, sample [batch, n] weighs the rows."""

    on: Tensor
    sample: Tensor
    ridge: Tensor  # [k + 1]

    @classmethod
    def of(cls, labels: Tensor, penalty: float, n_weights: int) -> "_Problem":
        n, n_on = labels.shape[1], labels.sum(1, keepdim=True).double()
        sample = torch.where(labels, n / (2 * n_on.clamp(min=1)), n / (2 * (n - n_on).clamp(min=1)))
        ridge = torch.full((n_weights,), penalty, dtype=torch.float64, device=labels.device)
        ridge[-1] = 1e-8  # only keeps the system solvable
        return cls(on=labels.double(), sample=sample, ridge=ridge)

    def objective(self, z: Tensor, weights: Tensor) -> Tensor:
        """The value at weights [batch, k + 1] with logits z [batch, n]: [batch]."""
        loss = functional.softplus(z) - self.on * z
        return (self.sample * loss).sum(1) + 0.5 * (self.ridge * weights.square()).sum(1)

    def shortened(
        self, weights: Tensor, z: Tensor, step: Tensor, z_step: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each probe's step, halved until it lowers its objective; a probe that cannot improve stays where it is."""
        length = torch.ones_like(value)
        for halving in range(MAX_HALVINGS + 1):
            new_weights, new_z = weights - length.unsqueeze(1) * step, z - length.unsqueeze(1) * z_step
            new_value = self.objective(new_z, new_weights)
            worse = new_value > value
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2 if halving < MAX_HALVINGS - 1 else torch.zeros_like(length), length)
        return new_weights, new_z, new_value


def fit_dense(features: Tensor, labels: Tensor, penalty: float = 1.0) -> Tensor:
    """One probe per row of `labels` on the same features: [n, d], bool [classes, n] -> [classes, d + 1].

    Features are standardised by the caller; so many classes are fitted together as MAX_BATCH has room for. With more
    features than rows the probe lies in the span of the rows, and is looked for there.
    """
    basis = None
    if features.shape[1] > features.shape[0]:
        basis, rows = torch.linalg.qr(features.double().T)  # features = rows.T @ basis.T
        features = rows.T
    n_together = max(1, MAX_BATCH // features.numel())
    weights = torch.cat(
        [fit_logistic(features.expand(len(part), -1, -1), part, penalty) for part in labels.split(n_together)]
    )
    return weights if basis is None else torch.cat([weights[:, :-1] @ basis.T, weights[:, -1:]], dim=1)


def logits(features: Tensor, weights: Tensor) -> Tensor:
    """[batch, n, k] or [n, k] features and [batch, k + 1] weights -> [batch, n]."""
    if features.dim() == 2:
        return weights[:, :-1] @ features.double().T + weights[:, -1:]
    return torch.einsum("bnk,bk->bn", features.double(), weights[:, :-1]) + weights[:, -1:]


def auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per batch entry, ties counted half: [batch, n], bool [batch, n] -> [batch].

    The Mann-Whitney form: (rank sum of the positives - n_on (n_on + 1) / 2) / (n_on n_off). NaN without both classes.
    """
    ranks = rankdata(scores, axis=1)
    n_on = labels.sum(1)
    n_off = labels.shape[1] - n_on
    pairs = np.where((n_on > 0) & (n_off > 0), n_on * n_off, np.nan)
    return ((ranks * labels).sum(1) - n_on * (n_on + 1) / 2) / pairs


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the recall of both classes per batch entry: bool [batch, n] twice -> [batch]."""
    recall_on = (predicted & labels).sum(1) / np.maximum(labels.sum(1), 1)
    recall_off = (~predicted & ~labels).sum(1) / np.maximum((~labels).sum(1), 1)
    return (recall_on + recall_off) / 2


def f1_score(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """2 TP / (predicted + actual) per batch entry: bool [batch, n] twice -> [batch]; 0 when nothing is predicted."""
    hits = (predicted & labels).sum(1)
    return 2 * hits / np.maximum(predicted.sum(1) + labels.sum(1), 1)


def mean_difference(latents: Tensor, labels: Tensor) -> Tensor:
    """Standardised mean difference of each latent for each class: [n, d_sae], bool [classes, n] -> [classes, d_sae].

    (mean over the class - mean over the rest) / standard deviation over all rows; 0 for a latent that never changes.
    """
    on = labels.to(latents.dtype)
    n_on = on.sum(1, keepdim=True)
    total = latents.sum(0, keepdim=True)
    sums = on @ latents
    difference = sums / n_on.clamp(min=1) - (total - sums) / (len(latents) - n_on).clamp(min=1)
    mean = latents.mean(0)
    std = (latents.square().mean(0) - mean.square()).clamp(min=0).sqrt()  # latents are sparse: nothing cancels here
    return torch.where(std > 1e-6 * mean.abs() + 1e-12, difference / std.clamp(min=1e-12), torch.zeros_like(difference))


def scores_of(score: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of logits [..., classes, n] against bool [classes, n]: "auc" | "accuracy" -> [..., classes].

    The accuracy is the balanced one, of the sign.
    """
    batch = score.shape[:-1]
    flat, actual = score.reshape(-1, score.shape[-1]), np.broadcast_to(labels, score.shape).reshape(-1, score.shape[-1])
    return {
        "auc": auc(flat, actual).reshape(batch),
        "accuracy": balanced_accuracy(flat > 0, actual).reshape(batch),
    }


def one_hot(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """[n] values, [classes] -> bool [classes, n]."""
    return values[None, :] == classes[:, None]
