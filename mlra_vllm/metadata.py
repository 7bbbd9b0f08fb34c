"""What one step tells the attention layers: which requests decode, which prefill, and where their rows lie.

Built once per step on the host, so that no layer has to read lengths back from the device. Requests with one new token
come first in the batch (`reorder_batch_threshold`); they decode absorbed. The others prefill expanded, in packs.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .versions import CompactBackend

MAX_PACKED_ROWS = 64 * 2**10  # cached rows that prefill in one pack, unless a single request has more


@dataclass
class Pack:
    """Requests whose prefill runs together: M of them with T new tokens and S cached rows, the new ones included.

    Args:
        tokens: which tokens of the batch, T of them.
        rows: `[S]` int64, where the cached rows lie, request after request; None where all are new tokens'.
        query_lengths, key_lengths: new tokens and cached rows of each request, on the host.
        query_starts, key_starts: `[M + 1]` int32, their running sums, on the device.
    """

    tokens: slice
    rows: torch.Tensor | None
    query_lengths: list[int]
    key_lengths: list[int]
    query_starts: torch.Tensor
    key_starts: torch.Tensor


@dataclass
class MLRAMetadata(AttentionMetadata):
    """One step.

    Args:
        slot_mapping: `[tokens]` int64, the row that each new token is written to; -1 for padding.
        block_table: `[decodes, max_blocks]` int32.
        seq_lens: `[decodes]` int32, rows of each decoding request, its new one included; 0 for padding.
        packs: the prefills.
    """

    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    packs: list[Pack] = field(default_factory=list)


class MLRAMetadataBuilder(AttentionMetadataBuilder[MLRAMetadata]):
    """Builds `MLRAMetadata`. A step of decodes alone keeps to the runner's own buffers, as CUDA graphs need."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> MLRAMetadata:
        common = common_attn_metadata
        decodes, prefills, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        return MLRAMetadata(
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            block_table=common.block_table_tensor[:decodes],
            seq_lens=common.seq_lens[:decodes],
            packs=self._pack(common, decodes, decodes + prefills) if prefills else [],
        )

    def _pack(self, common, first: int, last: int) -> list[Pack]:
        """The requests `first` to `last`, joined while they have at most `MAX_PACKED_ROWS` rows."""
        starts: list[int] = common.query_start_loc_cpu.tolist()
        lengths: list[int] = common.seq_lens_cpu_upper_bound.tolist()  # exact for requests that prefill
        bounds, rows = [first], 0
        for request in range(first, last):
            if rows and rows + lengths[request] > MAX_PACKED_ROWS:
                bounds.append(request)
                rows = 0
            rows += lengths[request]
        bounds.append(last)
        return [
            self._pack_of(common.block_table_tensor[begin:end], starts[begin : end + 1], lengths[begin:end])
            for begin, end in zip(bounds, bounds[1:], strict=False)
        ]

    def _pack_of(self, block_table: torch.Tensor, starts: list[int], lengths: list[int]) -> Pack:
        new = [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
        query_starts = self._starts(new)
        no_older = new == lengths
        return Pack(
            tokens=slice(starts[0], starts[-1]),
            rows=None if no_older else self._rows(block_table, lengths),
            query_lengths=new,
            key_lengths=lengths,
            query_starts=query_starts,
            key_starts=query_starts if no_older else self._starts(lengths),
        )

    def _starts(self, lengths: list[int]) -> torch.Tensor:
        """Running sums from 0 on, int32 on the device."""
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.device, non_blocking=True)

    def _rows(self, block_table: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Where the requests' rows lie in the pool."""
        counts = torch.tensor(lengths)
        requests = torch.repeat_interleave(counts)
        positions = torch.arange(len(requests)) - (counts.cumsum(0) - counts)[requests]
        requests, positions = (x.to(self.device, non_blocking=True) for x in (requests, positions))
        size = self.kv_cache_spec.block_size
        return block_table[requests, positions // size].long() * size + positions % size


class MLRABackend(CompactBackend):
    """What the worker asks the attention layers for."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "MLRA"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("MLRA's attention layer runs itself")

    @staticmethod
    def get_builder_cls() -> type[MLRAMetadataBuilder]:
        return MLRAMetadataBuilder
