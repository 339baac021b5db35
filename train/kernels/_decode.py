"""Reconstruction, loss and their gradients from the codes that are on."""

import torch
from torch import Tensor

from train.kernels._entries import Entries, row_starts
from train.kernels._sums import dots, weighted_sums
from train.sae import SparseAutoencoder


class Decoded:
    """A batch's reconstructions by every prefix, and what the loss wants of codes, decoder rows and offset.

    The latents between two prefixes are a group. One decode gives each row's sum of every group; running sums of
    these are the reconstructions, and running sums of the residuals from behind are what a group's codes are pulled by,
    since a code is part of every prefix that reaches it.
    """

    loss: Tensor
    """nested_error of the reconstructions, a scalar."""
    reconstruction: Tensor
    """[batch, d_out], from all latents."""
    residual: Tensor
    """[batch, d_out], from all latents."""
    pulls: Tensor
    """[batch * n_groups, d_out]: sums of residuals, one row for each row of the batch and group."""
    key: Tensor
    """[n]: the row of `pulls` that belongs to each entry."""

    def __init__(self, sae: SparseAutoencoder, entries: Entries, x: Tensor, target: Tensor) -> None:
        self._sae, self._entries = sae, entries
        n_rows, n_groups = len(target), len(sae.prefixes)
        offset = sae.b_dec if sae.W_skip is None else torch.addmm(sae.b_dec, x, sae.W_skip)
        if n_groups == 1:
            self.key = entries.row
            sums = weighted_sums(sae.W_dec, entries.latent, entries.value, entries.starts)
            self.reconstruction = sums.add_(offset)
            self.residual = self.pulls = target - self.reconstruction
        else:
            ends = torch.tensor(sae.prefixes, device=entries.latent.device)
            self.key = entries.row * n_groups + torch.searchsorted(ends, entries.latent, right=True)
            sums = self._group_sums(n_rows * n_groups).view(n_rows, n_groups, -1)
            residuals = _residuals(target - offset, sums)
            self.residual = residuals[:, -1].clone()
            self.reconstruction = target - self.residual
            self.pulls = residuals
        self.loss = self.pulls.square().sum() / (n_rows * n_groups**2)
        if n_groups > 1:
            self.pulls = _from_behind(self.pulls).flatten(0, 1)
        self._slope = -2.0 / (n_rows * n_groups**2)

    def _group_sums(self, n_sums: int) -> Tensor:
        """[n_sums, d_out]: what each group of each row decodes to."""
        key, order = self.key.to(torch.int32).sort(stable=True)
        latent, value = self._entries.latent[order], self._entries.value[order]
        return weighted_sums(self._sae.W_dec, latent, value, row_starts(key, n_sums))

    def code_gradients(self) -> Tensor:
        """[n]: the loss's gradient in each entry's code."""
        return dots(self.pulls, self.key, self._sae.W_dec, self._entries.latent).mul_(self._slope)

    def pull_weights(self) -> Tensor:
        """[n]: how much of its row of `pulls` each entry adds to the gradient of its decoder row."""
        return self._entries.value * self._slope

    def _first_pulls(self) -> Tensor:
        """[batch, d_out]: residuals of all prefixes together."""
        return self.pulls.view(len(self.residual), -1, self.pulls.shape[-1])[:, 0]

    def b_dec_gradient(self) -> Tensor:
        """[d_out], through the reconstruction alone."""
        return self._first_pulls().sum(0).mul_(self._slope)

    def W_skip_gradient(self, x: Tensor) -> Tensor:
        """[d_model, d_out]"""
        return (x.t() @ self._first_pulls()).mul_(self._slope)


def _residuals(target: Tensor, sums: Tensor) -> Tensor:
    """[batch, d_out], [batch, n_groups, d_out] -> what each prefix leaves, in the place of `sums`."""
    for group in range(sums.shape[1]):
        torch.sub(target if group == 0 else sums[:, group - 1], sums[:, group], out=sums[:, group])
    return sums


def _from_behind(residuals: Tensor) -> Tensor:
    """[batch, n_groups, d_out]: to each group's residual those of all later ones are added, in place."""
    for group in range(residuals.shape[1] - 2, -1, -1):
        residuals[:, group] += residuals[:, group + 1]
    return residuals
