"""The first half of a step: from rows to codes, as launches of Triton kernels on buffers of fixed sizes."""

from typing import Any

import torch
from torch import Tensor

from train.activations import BatchTopK, JumpReLU, TopK
from train.kernels import _triton_encode as encode
from train.kernels import _triton_select as select
from train.kernels._triton_blocks import Blocks, Sizes
from train.step import TrainRun

_PASSES = ((20, 11), (10, 10), (0, 10))
"""(shift, bits) by which the histogram finds a positive float32, whose sign bit says nothing."""
_WINDOW = 2**-7
"""Of what a product in bfloat16 may be off by, four standard deviations, where many terms share the length evenly."""
_EVERY = 8
"""One latent in so many is looked at for the bound of a row."""


def sampled_ranks(k: int, n_sampled: int) -> tuple[int, int]:
    """Which largest of a row's sampled values is its bound, and which is its bound where too few reach that.

    Of the k largest some k / 8 are in the sample, in two of a hundred rows more than the first rank.
    """
    mean = k / _EVERY
    rank = int(mean + 2 * mean**0.5 + 1.5)
    return min(rank, n_sampled), min(2 * rank + 2, n_sampled)


class Search:
    """The codes of a batch, by latents that rise within each row."""

    def __init__(self, run: TrainRun, batch: int, sizes: Sizes, blocks: Blocks, device: torch.device) -> None:
        self._run, self._sizes, self._blocks = run, sizes, blocks
        sae = run.sae
        self._n_rows, self._n_tiles = batch, -(-sae.d_sae // blocks.latents)
        self._in_half = run.config.precision == "bf16"
        exact = torch.get_float32_matmul_precision() == "highest"
        self._input = "ieee" if exact or self._in_half or device.type != "cuda" else "tf32"
        # A product of rows in bfloat16 adds up in float32, which is near enough to choose by and to train on; but not
        # for a window as narrow as JumpReLU's, nor where a large mean that was not subtracted is rounded with the rest.
        is_jump = isinstance(sae.activation, JumpReLU)
        self._refines = self._input == "tf32" or (self._in_half and (is_jump or not sae.subtract_b_dec))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        whole = torch.int32
        self.x, self.target = empty(batch, sae.d_model), empty(batch, sae.d_out)
        self.centred = empty(batch, sae.d_model) if sae.subtract_b_dec else self.x
        """x - b_dec [batch, d_model], or x"""
        self.rows = empty(batch, sae.d_model, dtype=torch.bfloat16) if self._in_half else self.centred
        """The same in the precision of products."""
        self.numbers = empty(4)
        """Size of a step of Adam, root of its second correction, share of the level, warm-up of sparsity."""
        self.level, self.next_level = empty(1), empty(1)
        """For BatchTopK, the last value kept at the last step and at this one."""
        self._row_bound, self._second_bound, self._latent_bound = empty(batch), empty(batch), empty(sae.d_sae)
        cells = (batch, self._n_tiles, sizes.slots)
        self._values, self._latents = empty(*cells), empty(*cells, dtype=whole)
        self._counts = empty(batch, self._n_tiles, dtype=whole)
        n = sizes.candidates
        self._value, self._latent, self._row = empty(n), empty(n, dtype=whole), empty(n, dtype=whole)
        n = sizes.codes
        self.code, self.over = empty(n), empty(n)
        """[n_codes]: the codes, and for JumpReLU by how much they are over the threshold."""
        self.latent, self.row = empty(n, dtype=whole), empty(n, dtype=whole)
        """[n_codes]: the codes' places; d_sae where there is none."""
        self.begins, self.n_kept = empty(batch, dtype=whole), empty(batch, dtype=whole)
        """[batch]: where each row's codes are."""
        if isinstance(sae.activation, TopK):
            torch.arange(0, batch * sae.activation.k, sae.activation.k, dtype=whole, out=self.begins)
        self._found, self._first = empty(2, dtype=whole), empty(2, dtype=whole)
        self._first[1] = run.config.k * batch
        self._block = 2 * blocks.wide
        self._bins = empty(-(-sizes.candidates // self._block), 2048, dtype=whole)
        self.found = empty(5, dtype=torch.int64)
        """As Found has it."""
        self.shadow: Tensor | None = None
        """W_enc in the precision of products, if that is not its own [d_sae, d_model]."""

    def __call__(self) -> None:
        """Codes of `x`; what there was no room for shows in `found`."""
        sae, activation = self._run.sae, self._run.sae.activation
        if sae.subtract_b_dec:
            torch.sub(self.x, sae.b_dec, out=self.centred)
        if self._in_half:
            self.rows.copy_(self.centred)
        self._set_bounds()
        self._encode()
        n_found = self._counts.sum(1, dtype=torch.int32)
        if isinstance(activation, TopK):
            self._row_bound.copy_(torch.where(n_found < activation.k, self._second_bound, self._row_bound))
            self._encode(n_found < activation.k)
            n_found = self._counts.sum(1, dtype=torch.int32)
        ends = self._list()
        self.latent.fill_(sae.d_sae)
        if isinstance(activation, TopK):
            short = ((n_found < activation.k) & (self._row_bound > 0)).sum()
            self._keep_by_row(activation, ends)
        elif isinstance(activation, BatchTopK):
            short = (n_found.sum() < activation.k * self._n_rows) & (self._row_bound[0] > 0)
            self._find_bound()
            self._keep(ends)
        else:
            short = torch.zeros_like(self.found[0])
            self._keep(ends)
        parts = (n_found.sum(), self._counts.amax(), n_found.amax(), short, self.n_kept.sum())
        torch.stack([part.long() for part in parts], out=self.found)

    def _set_bounds(self) -> None:
        sae, activation = self._run.sae, self._run.sae.activation
        if isinstance(activation, JumpReLU):
            assert sae.threshold is not None
            half = activation.bandwidth / 2
            slack = 1e-6 * (sae.threshold + half)  # of rounding: the window itself is looked at afterwards
            if self._refines:
                size = torch.linalg.vector_norm(sae.W_enc.t(), dim=1)
                length = self.centred.square().sum(1).mean().sqrt()
                slack = slack + _WINDOW * size * length / sae.d_model**0.5
            torch.sub(sae.threshold - half, slack, out=self._latent_bound)
        elif isinstance(activation, TopK):
            weights = self._weights()[::_EVERY]
            sample = (self.rows @ weights.t()).float() + sae.b_enc[::_EVERY]
            first, second = sampled_ranks(activation.k, len(weights))
            largest = sample.topk(second).values
            self._row_bound.copy_(largest[:, first - 1])
            self._second_bound.copy_(largest[:, -1])
        else:
            self._row_bound.copy_((self.level * self.numbers[2]).clamp(min=0.0).expand(self._n_rows))

    def _weights(self) -> Tensor:
        """W_enc in the precision of products [d_sae, d_model]."""
        return self._run.sae.W_enc.t() if self.shadow is None else self.shadow

    def _encode(self, chosen: Tensor | None = None) -> None:
        """Candidates of all rows, or of the chosen ones ([batch] bool) anew."""
        sae, blocks = self._run.sae, self._blocks
        order, n_chosen = self._counts, self._counts
        if chosen is not None:
            order, n_chosen = chosen.to(torch.int8).sort(descending=True, stable=True).indices, chosen.sum()
        n_programs = -(-self._n_rows // blocks.rows) * self._n_tiles
        kernel: Any = encode.candidates_of
        kernel[(n_programs,)](
            self.rows,
            self._weights(),
            sae.b_enc,
            self._row_bound,
            self._latent_bound,
            order,
            n_chosen,
            self._values,
            self._latents,
            self._counts,
            self._n_rows,
            sae.d_model,
            sae.d_sae,
            self._n_tiles,
            AGAIN=chosen is not None,
            BY_LATENT=isinstance(sae.activation, JumpReLU),
            WIDEN=self.x.device.type == "cpu" and self._in_half,
            EVEN=sae.d_model % blocks.depth == 0,
            INPUT=self._input,
            SLOTS=self._sizes.slots,
            ROWS=blocks.rows,
            LATENTS=blocks.latents,
            DEPTH=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def _list(self) -> Tensor:
        """Candidates as a list; ends [batch] of the rows in it. Their values get exact."""
        sae, sizes, capacity = self._run.sae, self._sizes, self._sizes.candidates
        n = self._counts.clamp(max=sizes.slots).sum(1, dtype=torch.int32)
        ends = n.cumsum(0, dtype=torch.int32)
        self._starts, self._total = ends - n, ends[-1:]
        lists = (self._value, self._latent, self._row)
        kernel: Any = encode.list_candidates
        kernel[(self._n_rows,)](
            self._values,
            self._latents,
            self._counts,
            self._starts,
            *lists,
            self._n_tiles,
            capacity,
            SLOTS=sizes.slots,
            TILES=max(1, 512 // sizes.slots),
        )
        if self._refines:
            n_each, rows = self._blocks.codes, (self.centred, sae.W_enc.t(), sae.b_enc)
            width = min(self._blocks.columns, 128)  # in float32 what one warp reads at once
            kernel = encode.refine
            kernel[(-(-capacity // n_each),)](
                *rows, *lists, self._total, sae.d_model, capacity, CANDIDATES=n_each, WIDTH=width, num_warps=1
            )
        return ends.clamp(max=capacity)

    def _keep_by_row(self, activation: TopK, ends: Tensor) -> None:
        kernel: Any = select.row_codes
        kernel[(self._n_rows,)](
            self._value,
            self._latent,
            self._starts,
            ends,
            self.code,
            self.latent,
            self.row,
            self.n_kept,
            activation.k,
            CANDIDATES=self._sizes.row_candidates,
        )

    def _find_bound(self) -> None:
        """The key of the (k * batch)-th largest candidate, into self._found[0]."""
        self._found.copy_(self._first)
        kernel: Any = select.histogram
        find: Any = select.find_bin
        for shift, bits in _PASSES:
            kernel[(len(self._bins),)](
                self._value,
                self._total,
                self._found,
                self._bins,
                self._sizes.candidates,
                SHIFT=shift,
                BITS=bits,
                BLOCK=self._block,
            )
            find[(1,)](self._bins.sum(0, dtype=torch.int32), self._found, BITS=bits, num_warps=8)
        self.next_level.copy_(self._found[:1].view(torch.float32))

    def _keep(self, ends: Tensor) -> None:
        """List the candidates that are codes."""
        sae, activation = self._run.sae, self._run.sae.activation
        jump = isinstance(activation, JumpReLU)
        threshold = sae.threshold if jump else self._latent_bound
        half = activation.bandwidth / 2 if isinstance(activation, JumpReLU) else 0.0
        where = (self._value, self._latent, self._starts, ends, self._found, threshold)
        kernel: Any = select.count_codes
        kernel[(self._n_rows,)](*where, self.n_kept, half, JUMP=jump, BLOCK=128)
        torch.sub(self.n_kept.cumsum(0, dtype=torch.int32), self.n_kept, out=self.begins)
        codes = (self.code, self.over, self.latent, self.row)
        kernel = select.list_codes
        kernel[(self._n_rows,)](*where, self.begins, *codes, self._sizes.codes, half, JUMP=jump, BLOCK=128)
