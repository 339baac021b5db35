"""The second half of a step: from codes to new weights, as launches of Triton kernels on buffers of fixed sizes."""

from typing import Any

import torch
from torch import Tensor

from train.activations import JumpReLU
from train.kernels import _triton_decode as decode
from train.kernels import _triton_update as update
from train.kernels._terms import auxiliary
from train.kernels._triton_blocks import Blocks, Sizes, column_block, power_of_2
from train.kernels._triton_graph import Phase
from train.kernels._triton_search import Search
from train.kernels._update import adam_state
from train.step import TrainRun


class Rows:
    """The gradient of a weight matrix [d_sae, width] and what is known of its rows."""

    def __init__(self, d_sae: int, width: int, most: int, device: torch.device, *, decoder: bool) -> None:
        self.columns = column_block(width, most)
        self.n_blocks = -(-width // self.columns)
        self.gradient = torch.zeros(d_sae, width, device=device)
        self.lengths = torch.zeros(self.n_blocks, d_sae, device=device)
        """Squared, of the gradient; by blocks of columns, as the next two."""
        self.along = torch.zeros(self.n_blocks, d_sae, device=device) if decoder else self.lengths
        """Products with the weights."""
        self.own = torch.zeros(self.n_blocks, d_sae, device=device) if decoder else self.lengths
        """The weights' own squared lengths."""

    def put(self, latents: Tensor, gradient: Tensor, weights: Tensor | None = None) -> None:
        """Give latents [n] that have no code this gradient [n, width]."""
        self.gradient[latents] = gradient
        self.lengths[:, latents] = 0.0
        self.lengths[0, latents] = gradient.square().sum(1)
        if weights is not None:
            self.along[:, latents] = 0.0
            self.along[0, latents] = (gradient * weights).sum(1)


class Work:
    """One run's buffers and its step in three parts: `search` for codes, `decode` them, `update` the weights."""

    def __init__(self, run: TrainRun, batch: int, sizes: Sizes, blocks: Blocks, device: torch.device) -> None:
        self.run, self.sizes, self._blocks, self._batch = run, sizes, blocks, batch
        self.moments = {name: adam_state(run.optimizer, p) for name, p in run.sae.named_parameters()}
        self.ahead = int(next(iter(self.moments.values()))["step"]) - run.n_done
        """Steps of Adam that are not among the run's, as where its moments were begun anew."""
        self.inputs = Search(run, batch, sizes, blocks, device)
        sae, n_prefixes = run.sae, len(run.sae.prefixes)
        self._in_half = run.config.precision == "bf16"

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._prefixes = torch.tensor(sae.prefixes, dtype=torch.int32, device=device)
        self.reconstruction = empty(batch, sae.d_out)
        self._pulls = empty(batch, n_prefixes, sae.d_out, dtype=torch.bfloat16 if self._in_half else torch.float32)
        self._width = 1 if n_prefixes == 1 else 2  # of decoding: twice the columns and warps where it stores much
        self._columns = column_block(sae.d_out, self._width * blocks.columns)
        n_blocks = -(-sae.d_out // self._columns)
        self.decoder = Rows(sae.d_sae, sae.d_out, blocks.columns, device, decoder=True)
        self.encoder = Rows(sae.d_sae, sae.d_model, blocks.columns, device, decoder=False)
        self._errors, self._dots = empty(n_blocks, batch), empty(n_blocks, sizes.codes)
        self._of_code, self._of_pre = empty(sizes.codes), empty(sizes.codes)
        whole = torch.int32
        self.n_on, self._n_near = empty(sae.d_sae, dtype=whole), empty(sae.d_sae, dtype=whole)
        self.b_enc, self._near_sums = empty(sae.d_sae), empty(sae.d_sae)
        self.has_gradient = empty(sae.d_sae, dtype=whole)
        self.extra_loss = empty(1)
        """What auxk adds."""
        self.loss, self.smallest = empty(), empty()
        half = torch.bfloat16
        self._shadow = empty(sae.d_sae, sae.d_out, dtype=half) if self._in_half else sae.W_dec.detach()
        if self._in_half:
            self.inputs.shadow = empty(sae.d_sae, sae.d_model, dtype=half)
        self._versions: tuple[int, int] | None = None
        self._unit = run.recipe.decoder == "unit"
        beta1, beta2 = run.recipe.betas
        self._adam = (beta1, 1 - beta1, beta2, 1 - beta2, run.optimizer.param_groups[0]["eps"])
        self.search = Phase(self.inputs, device)
        self.decode, self.update = Phase(self._decode, device), Phase(self._update, device)

    def addresses(self) -> tuple[int, ...]:
        """Where the run's tensors are that launches refer to: they may be replaced."""
        tensors = [*self.run.sae.parameters(), *self.run.sae.buffers()]
        for name, parameter in self.run.sae.named_parameters():
            state = self.run.optimizer.state[parameter]
            if not state:  # a dense step has not been done, and ours makes them anew
                return ()
            tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
            assert name in self.moments
        return tuple(tensor.data_ptr() for tensor in tensors)

    def follow(self) -> None:
        """Copy weights in half precision that somebody else has changed."""
        sae = self.run.sae
        versions = (sae.W_enc._version, sae.W_dec._version)
        if self._in_half and versions != self._versions:
            assert self.inputs.shadow is not None
            self.inputs.shadow.copy_(sae.W_enc.t())
            self._shadow.copy_(sae.W_dec)
        self._versions = versions

    def _decode(self) -> None:
        """Reconstruction, losses, and gradients but for auxk's."""
        found, sae, blocks = self.inputs, self.run.sae, self._blocks
        n_prefixes, sizes = len(sae.prefixes), self.sizes
        kernel: Any = decode.decode
        kernel[(self._batch, len(self._errors))](
            self._shadow,
            sae.b_dec,
            found.target,
            found.begins,
            found.n_kept,
            found.code,
            found.latent,
            self._prefixes,
            self.reconstruction,
            self._pulls,
            self._errors,
            self._dots,
            self._batch,
            sae.d_out,
            sizes.codes,
            2.0 / (self._batch * n_prefixes**2),
            PREFIXES=n_prefixes,
            COLUMNS=self._columns,
            CODES=blocks.codes,
            num_warps=self._width * blocks.gather_warps,
        )
        torch.sum(self._dots, 0, out=self._of_code)
        is_jump = isinstance(sae.activation, JumpReLU)
        of_pre = torch.where(found.over > 0, self._of_code, 0.0) if is_jump else self._of_code
        keys = found.latent.to(torch.int16) if sae.d_sae < 2**15 else found.latent  # sorts faster
        ordered, order = keys.sort(stable=True)
        edges = torch.arange(sae.d_sae + 1, dtype=ordered.dtype, device=ordered.device)
        segments = torch.searchsorted(ordered, edges, out_int32=True)
        self._sum_by_latent(order, segments, is_jump)
        self.has_gradient.copy_(segments[1:] > segments[:-1])
        row_of = found.row[order]
        self._sum_rows(self.decoder, found.code[order], row_of, segments, self._pulls, n_prefixes, sae.W_dec)
        self._sum_rows(self.encoder, of_pre[order], row_of, segments, found.rows, 1, None)
        is_on = (found.latent < sae.d_sae) & (found.code > 0)
        torch.amin(torch.where(is_on, found.code, torch.inf), 0, out=self.smallest)
        self.extra_loss.zero_()

    def _sum_by_latent(self, order: Tensor, segments: Tensor, is_jump: bool) -> None:
        found, activation = self.inputs, self.run.sae.activation
        half = activation.bandwidth / 2 if isinstance(activation, JumpReLU) else 0.0
        sums = (self.b_enc, self._near_sums, self._n_near, self.n_on)
        kernel: Any = update.latent_sums
        kernel[(self.run.sae.d_sae,)](
            order, segments, found.code, found.over, self._of_code, *sums, half, JUMP=is_jump, BLOCK=64, num_warps=1
        )

    def _sum_rows(
        self,
        rows: Rows,
        weight: Tensor,
        row_of: Tensor,
        segments: Tensor,
        table: Tensor,
        n_prefixes: int,
        own: Tensor | None,
    ) -> None:
        d_sae, width = rows.gradient.shape
        kernel: Any = update.gradient_rows
        kernel[(d_sae, rows.n_blocks)](
            weight,
            row_of,
            segments,
            table,
            table if own is None else own,
            self._prefixes,
            rows.gradient,
            rows.lengths,
            rows.along,
            rows.own,
            d_sae,
            width,
            DECODER=own is not None,
            PREFIXES=n_prefixes,
            PREFIXES_2=power_of_2(n_prefixes),
            COLUMNS=rows.columns,
            CODES=self._blocks.codes,
            num_warps=self._blocks.gather_warps,
        )

    def add_auxk(self, dead: Tensor) -> None:
        """The penalty auxk on latents [n_dead] that have no code: its part of the loss, and their gradients."""
        coefficient = self.run.coefficients.get("auxk")
        if not coefficient:
            return
        extra = auxiliary(self.run, dead, self.inputs.centred, self.inputs.target - self.reconstruction, coefficient)
        self.extra_loss.copy_(extra.loss)
        self.decoder.put(dead, extra.W_dec, self.run.sae.W_dec[dead])
        self.encoder.put(dead, extra.W_enc)
        self.b_enc[dead] = extra.b_enc
        self.has_gradient[dead] = 1

    def _update(self) -> None:
        """Clip, Adam, unit rows; and what the step tells."""
        run, sae = self.run, self.run.sae
        along, own = self.decoder.along.sum(0), self.decoder.own.sum(0)
        share = along / own
        squares = self.decoder.lengths.sum(0)
        if self._unit:
            squares = (squares - along * share).clamp(min=0.0)  # of what is left when the part along the row is gone
        pulls = self._pulls[:, 0].sum(0, dtype=torch.float32)
        if sae.subtract_b_dec:
            pulls = pulls - sae.W_enc @ self.b_enc
        vectors = {"b_enc": self.b_enc, "b_dec": pulls}
        n_prefixes = len(sae.prefixes)
        loss = self._errors.sum() / (self._batch * n_prefixes**2) + self.extra_loss.squeeze(0)
        if isinstance(sae.activation, JumpReLU):
            penalty, vectors["threshold"] = self._threshold(sae.activation)
            loss = loss + penalty
        # decoder rows that no code used are not in the loss, but one that is no number has to show
        torch.add(loss, 0.0 * own.sum(), out=self.loss)
        parts = [squares.sum(), self.encoder.lengths.sum(), *(each.square().sum() for each in vectors.values())]
        norm = torch.stack(parts).sum().sqrt()
        longest = run.recipe.clip_norm
        clip = torch.ones_like(norm) if longest is None else (longest / (norm + 1e-6)).clamp(max=1.0)
        self._adam_rows(sae.W_dec, "W_dec", self.decoder, share, clip, self._unit, self._shadow)
        shadow = self.inputs.shadow
        self._adam_rows(
            sae.W_enc, "W_enc", self.encoder, share, clip, False, self._shadow if shadow is None else shadow
        )
        for name, gradient in vectors.items():
            self._adam_vector(name, gradient, clip)
        run.sae.keep_threshold()
        torch._foreach_add_([state["step"] for state in self.moments.values()], 1)
        self.inputs.level.copy_(self.inputs.next_level)

    def _threshold(self, activation: JumpReLU) -> tuple[Tensor, Tensor]:
        """The penalty l0 (a scalar), and the thresholds' gradient [d_sae]; see train/penalties/l0.py."""
        threshold = self.run.sae.threshold
        assert threshold is not None
        gradient = -(threshold / activation.bandwidth) * self._near_sums
        scale = self.run.coefficients.get("l0", 0.0) * self.inputs.numbers[3]
        if not self.run.coefficients.get("l0"):
            return torch.zeros_like(scale), gradient
        k, n_rows = self.run.config.k, self._batch
        excess = self.n_on.sum() / (n_rows * k) - 1
        # the window looks at codes, so where it reaches down to 0 all codes that are off are in it
        off = torch.where(threshold < activation.bandwidth / 2, n_rows - self.n_on, 0)
        near = (self._n_near + off) / n_rows
        return scale * excess.square(), gradient - (2.0 * scale * excess / k) * near / activation.bandwidth

    def _adam_rows(
        self, weights: Tensor, name: str, rows: Rows, share: Tensor, clip: Tensor, unit: bool, shadow: Tensor
    ) -> None:
        d_sae, width = rows.gradient.shape
        state = self.moments[name]
        kernel: Any = update.adam_rows
        kernel[(d_sae,)](
            weights,
            state["exp_avg"],
            state["exp_avg_sq"],
            rows.gradient,
            self.has_gradient,
            share,
            clip,
            self.inputs.numbers,
            shadow,
            width,
            *self._adam,
            UNIT=unit,
            SHADOW=self._in_half,
            COLUMNS=column_block(width, self._blocks.wide),
        )

    def _adam_vector(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        vector = dict(self.run.sae.named_parameters())[name]
        state, n = self.moments[name], vector.numel()
        where = (vector, state["exp_avg"], state["exp_avg_sq"], gradient, clip, self.inputs.numbers)
        kernel: Any = update.adam_vector
        kernel[(-(-n // 256),)](*where, n, *self._adam, BLOCK=256)
