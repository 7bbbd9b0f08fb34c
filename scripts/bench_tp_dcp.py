"""Decode context parallelism: ranks share the tokens of what they attend to, and merge what each has found.

Of N ranks each keeps 1/N of the tokens of a sequence, with the latents of all of them, in a row. A step gathers the
absorbed queries of all N, attends with all of them to its own tokens, sends each rank what is of that one's queries,
with its log-sum-exp, and merges what arrives, in the order of ranks. Weights, sums and all other kernels are those of
tensor parallelism without it: a rank of MLA has some heads of the one latent, a rank of MLRA all heads of its own.

Both exchanges go through peer memory as `step_exchange_mlra` describes it: results in bfloat16, two to a word.
"""

import math
from typing import NamedTuple

import torch

from modeling_mlra.decode_arguments_mlra import DecodeInputs
from modeling_mlra.decode_triton_mlra import PartialResults, partial_results
from modeling_mlra.device_mlra import constants, launch, launch_options, tl, triton
from modeling_mlra.peer_memory_mlra import exchange_of
from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.step_exchange_mlra import BLOCK, Exchange
from modeling_mlra.step_mlra import MAX_SEQUENCES, FusedStep
from scripts.bench_tp_peers import MLA_KERNELS

LSE_WORDS = 16  # copies of a log-sum-exp behind the results it belongs to: a store of a whole vector
LOG2E = math.log2(math.e)

if triton is not None:
    from modeling_mlra.decode_deal_mlra import parts_of
    from modeling_mlra.device_triton_mlra import program_release, program_wait, rescale
    from modeling_mlra.step_device_mlra import wait_for_front
    from modeling_mlra.step_exchange_mlra import exchanged, not_of, numbers_of, store_words

    @triton.jit
    def gather_kernel(parts, out, number, split, wide, narrow, inboxes, channels, SHAPE, PDL: tl.constexpr):
        """The parts of all ranks side by side: of the first `split` numbers in vectors of `wide`, of the others
        behind them in vectors of `narrow`."""
        index = tl.program_id(0) * SHAPE.BLOCK + tl.arange(0, SHAPE.BLOCK)
        words = exchanged(parts + index, index < number, inboxes, channels, SHAPE, PDL)
        first = tl.where(index < split, 0, split)
        width = tl.where(index < split, wide, narrow)
        place = first * SHAPE.RANKS + (index - first) // width * (SHAPE.RANKS * width) + (index - first) % width
        for sender in tl.static_range(SHAPE.RANKS):
            tl.store(out + place + sender * width, numbers_of(words[sender]), mask=index < number)

    @triton.jit(do_not_specialize=["B", "P"])
    def collect_kernel(
        part, part_lse, kv_end, B, P, z, lse,
        ROWS: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, DEAL, PDL: tl.constexpr,
    ):  # fmt: skip
        """This rank's partial results of one query row of one sequence as one, with its log2-sum-exp."""
        b, row = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS
        columns = tl.arange(0, R)
        program_release(PDL)
        p_first, p_last = parts_of(b, kv_end, kv_end, B, P, DEAL)
        program_wait(PDL)
        acc = tl.zeros([R], tl.float32)
        top = float("-inf")
        norm = 0.0
        for p in tl.range(p_first, p_last + 1, SPLITS):
            ps = p + tl.arange(0, SPLITS)
            rows = (ps + b).to(tl.int64) * ROWS + row
            own = tl.load(part_lse + rows, mask=ps <= p_last, other=float("-inf"))
            found = tl.load(part + rows[:, None] * R + columns[None, :], mask=(ps <= p_last)[:, None], other=0.0)
            new_top = tl.maximum(top, tl.max(own, 0))
            ref, before = rescale(top, new_top)
            w = tl.exp2(own - ref)
            acc = acc * before + tl.sum(found * w[:, None], 0)
            norm = norm * before + tl.sum(w, 0)
            top = new_top
        tl.store(z + tl.program_id(0) * R + columns, (acc / norm).to(z.dtype.element_ty))
        tl.store(lse + tl.program_id(0), top + tl.log2(norm))

    @triton.jit
    def _words(bits, count):
        return (count.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)

    @triton.jit
    def merge_kernel(z, lse, out, inboxes, channels, SHAPE, OWN: tl.constexpr, PAIRS: tl.constexpr,
                     LSE: tl.constexpr, SCALE: tl.constexpr, RECORDS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
        """out[m, own] = the results of all ranks for one of this rank's query rows, weighted by their sums.

        z int32 [M, RANKS, OWN, PAIRS] of two bfloat16 each, lse float32 [M, RANKS, OWN], times SCALE in log2 units.
        """
        record, index, copies = tl.program_id(0), tl.arange(0, PAIRS), tl.arange(0, LSE)
        m, own = record // OWN, record % OWN
        wait_for_front(PDL)
        count = tl.load(channels.counts + record, cache_modifier=".cg") + 1
        slot = ((count & 1) * RECORDS + record).to(tl.int64) * SHAPE.RANKS
        for step in tl.static_range(1, SHAPE.RANKS):
            row = (m * SHAPE.RANKS + (SHAPE.RANK + step) % SHAPE.RANKS) * OWN + own
            target = inboxes[(SHAPE.RANK + step) % SHAPE.RANKS] + (slot + SHAPE.RANK) * (PAIRS + LSE)
            store_words(target + index, _words(tl.load(z + row * PAIRS + index), count))
            sums = tl.load(lse + row + 0 * copies).to(tl.int32, bitcast=True)
            store_words(target + PAIRS + copies, _words(sums, count))
        top = float("-inf")
        norm = 0.0
        low = tl.zeros([PAIRS], tl.float32)
        high = tl.zeros([PAIRS], tl.float32)
        for sender in tl.static_range(SHAPE.RANKS):
            row = (m * SHAPE.RANKS + sender) * OWN + own
            if sender == SHAPE.RANK:
                bits = tl.load(z + row * PAIRS + index)
                weight = tl.load(lse + row)
            else:
                source = channels.inbox + (slot + sender) * (PAIRS + LSE)
                words = tl.load(source + index, volatile=True)
                sums = tl.load(source + PAIRS + copies, volatile=True)
                while tl.sum(not_of(words, count), 0) + tl.sum(not_of(sums, count), 0) > 0:
                    words = tl.load(source + index, volatile=True)
                    sums = tl.load(source + PAIRS + copies, volatile=True)
                bits = words.to(tl.int32)
                weight = tl.max(numbers_of(sums), 0)
            new_top = tl.maximum(top, weight * SCALE)
            ref, before = rescale(top, new_top)
            w = tl.exp2(weight * SCALE - ref)
            low = low * before + w * (bits << 16).to(tl.float32, bitcast=True)
            high = high * before + w * (bits & -65536).to(tl.float32, bitcast=True)
            norm = norm * before + w
            top = new_top
        target = out + record * (2 * PAIRS) + 2 * index
        tl.store(target, (low / norm).to(out.dtype.element_ty))
        tl.store(target + 1, (high / norm).to(out.dtype.element_ty))
        tl.store(channels.counts + record, count)


class OwnLatents(NamedTuple):
    """The format of rows with the latents of several ranks, seen by the one that has `number` of them from `first`."""

    whole: RowFormat
    first: int
    number: int
    width: int
    scales: int = 0

    @property
    def numbers(self) -> int:
        return self.number * self.width + self.whole.rope

    def views(self, rows: torch.Tensor, _: int):
        latents, k_rope = self.whole.split(rows)
        return latents.unflatten(-1, (-1, self.width))[..., self.first : self.first + self.number, :], k_rope, None


class DCPStep(FusedStep):
    """A tensor-parallel step of one token a sequence whose attention is context parallel over some of the ranks.

    Args:
        cache: rows `[L * R | E]` of this rank's tokens, with the latents of all ranks it shares them with.
        counters: as in `FusedStep`: the row to write and the rows in use are those of this rank's tokens.
        ranks: the mesh of those that share tokens; of MLRA each has its own latents, of MLA heads of the same one.
        kernel: of `MLA_KERNELS`, or None for this package's.
    """

    def __init__(self, model, cache, counters: torch.Tensor, ranks, kernel: str | None = None):
        self.ranks, self.size = ranks, ranks.size()
        self.of_one_latent = model.config.num_latent_heads == 1
        super().__init__(model, cache, counters)
        config, rows = model.config, cache.layers[0].rows
        heads, width, rope = self.heads_per_latent, config.latent_head_dim, config.qk_rope_head_dim
        own, batch = self.latents * heads, self.num_tokens
        gathered = own * (width + (rope if self.of_one_latent else 0))
        self.gathered = self._buffer(self.size * gathered).flatten()
        self.sent = torch.cat([self.queries.latent.flatten(), self.queries.rope.flatten()])
        latent, turned = self.sent.split([batch * own * width, self.queries.rope.numel()])
        self.queries = self.queries._replace(latent=latent.view(batch, -1), rope=turned.view(batch, -1))
        self.sent = self.sent[: batch * gathered]
        self.collected = torch.empty(batch, self.size * own, width, dtype=self.dtype, device=self.device)
        self.sums = torch.empty(batch, self.size * own, dtype=torch.float32, device=self.device)
        self.merged = torch.empty(batch, 1, self.latents, heads, width, dtype=self.dtype, device=self.device)
        self.records = MAX_SEQUENCES * own  # the same room for any number of sequences, which one exchange then serves
        blocks = self.records * -(-(width // 2 + LSE_WORDS) // BLOCK) + 1
        self.gathers = exchange_of(ranks, MAX_SEQUENCES * gathered // 2, self.device)
        self.merges = exchange_of(ranks, blocks * BLOCK, self.device)  # its own: what it holds is laid out otherwise
        if self.gathers is None or self.merges is None:
            raise RuntimeError("context parallelism is timed through peer memory, which cannot be had here")
        self.scaling = model.model.layers[0].self_attn.scaling
        self.peer = None
        if kernel is not None:
            self.peer = MLA_KERNELS[kernel](self.all_queries()[0][:, 0], rows[:, 0], self.kv_end, self.scaling)

    def bind(self, model, row_format, device, num_tokens: int, tokens_each: int = 1) -> None:
        config = model.config
        own = row_format.latents // config.latent_head_dim // (1 if self.of_one_latent else self.size)
        first = 0 if self.of_one_latent else self.ranks.get_local_rank() * own
        super().bind(
            model, OwnLatents(row_format, first, own, config.latent_head_dim), device, num_tokens, tokens_each
        )

    def run_layers(self, rows) -> None:
        if self.peer is not None:
            self.peer.deal()
        super().run_layers(rows)

    def all_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Absorbed queries of all ranks, and the rotary ones, `[B, L, H, R]` and `[B, H, E]`."""
        batch, heads = self.num_tokens, self.heads_per_latent
        number = self.size * self.queries.latent.numel()
        latent = self.gathered[:number].view(batch, self.size * self.latents, heads, -1)
        if not self.of_one_latent:
            return latent, self.queries.rope.view(batch, heads, -1)
        return latent.view(batch, 1, self.size * heads, -1), self.gathered[number:].view(batch, self.size * heads, -1)

    def attend(self, layer, rows: torch.Tensor) -> torch.Tensor:
        self.gather()
        latent, rope = self.all_queries()
        if self.peer is not None:
            self.merge(*self.peer(latent[:, 0], rope, rows[:, 0]), LOG2E)
            return self.merged
        latents, k_rope = self.row_format.whole.split(rows[:, 0])
        inputs = DecodeInputs(
            latent[:, None], rope[:, None, None], latents.unflatten(-1, (latent.shape[1], -1)), k_rope,
            self.kv_end, None, None, None, 0, self.scaling, settled=True,
        )  # fmt: skip
        self.collect(partial_results(inputs, out=None))
        self.merge(self.collected, self.sums, 1.0)
        return self.merged

    def gather(self) -> None:
        """The queries of all ranks, two numbers to a word."""
        parts, out = self.sent.view(torch.float32), self.gathered.view(torch.float32)
        split = self.queries.latent.numel() // 2
        per_token = split // self.num_tokens, max(1, (parts.numel() - split) // self.num_tokens)
        self._exchange(
            gather_kernel, triton.cdiv(parts.numel(), self.gathers.shape.BLOCK), self.gathers,
            parts, out, parts.numel(), split, *per_token,
        )  # fmt: skip

    def collect(self, parts: PartialResults) -> None:
        rows, width = self.collected.shape[1:]
        self._launch(
            collect_kernel, (self.num_tokens * rows,), parts.part, parts.lse, self.kv_end, self.num_tokens,
            parts.programs, self.collected, self.sums,
            ROWS=rows, R=width, SPLITS=max(2, 4096 // width), DEAL=parts.deal, num_warps=4,
        )  # fmt: skip

    def merge(self, z: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """`merged` of the results `[B, rows of all ranks, R]` that this rank has found and their log-sum-exps."""
        records, pairs = self.merged.numel() // z.shape[-1], z.shape[-1] // 2
        self._exchange(
            merge_kernel, records, self.merges, z.contiguous().view(torch.int32), lse.contiguous(), self.merged,
            OWN=records // self.num_tokens, PAIRS=pairs, LSE=LSE_WORDS, SCALE=scale, RECORDS=self.records,
        )  # fmt: skip

    def _exchange(self, kernel, programs: int, exchange: Exchange, *arguments, **options) -> None:
        launch(
            self.device, kernel, (programs,), *arguments, exchange.inboxes, exchange.channels,
            SHAPE=constants(exchange.shape), **options, PDL=self.machine.early, num_warps=4,
            **launch_options(self.machine.early),
        )  # fmt: skip
