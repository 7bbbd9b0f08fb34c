"""A stand-in for the operator of FlashAttention-3 in vLLM's wheel: its schema, and what it computes, plainly.

It refuses what the operator refuses."""

import torch

SCHEMA = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,
float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
"""As the library in vLLM 0.26.0's wheel says it."""
NAMES = [part.split()[-1] for part in SCHEMA[SCHEMA.index("(") + 1 : SCHEMA.rindex(")")].split(",")]
UNUSED = {
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True, "num_splits": 0,
    "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip


def attention(q, k, v, scale, causal, qv=None):
    """One sequence `[T, H, D]`, `[S, K, D]`, `[S, K, V]`, the queries its last; straight from the definition."""
    result = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for t in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + t + 1 if causal else k.shape[0]
        for h in range(q.shape[1]):
            of_head = h // (q.shape[1] // k.shape[1])
            scores = k[:seen, of_head] @ q[t, h] + (0 if qv is None else v[:seen, of_head] @ qv[t, h])
            result[t, h] = (scores * scale).softmax(0) @ v[:seen, of_head]
    return result


def check(holds, message):
    if not holds:
        raise RuntimeError(message)


def check_widths(q, k, v, qv):
    """Of keys and values, as hopper/flash_api.cpp of vLLM's flash-attention takes them."""
    width, value_width = q.shape[-1], v.shape[-1]
    check(width % 8 == value_width % 8 == 0 and width <= 256, "head_size should be a multiple of 8, and at most 256")
    is_published = (128 < width <= 192 and 96 < value_width <= 128) or (width <= 64 and value_width <= 512)
    check(width == value_width or is_published, "If V headdim is different from Q/K dim, ...")
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.shape == (*v.shape[:-1], width), "k and v must have the same rows, and k the width of q")
    if qv is not None:
        check(width <= 64 and value_width >= 256, "q_v is only supported for head_size <= 64, hdim_v >= 256")
        check(qv.stride(-1) == 1, "q_v tensor must have contiguous last dimension")
        check(qv.shape == (*q.shape[:-1], value_width) and qv.dtype == q.dtype, "q_v must have shape and dtype")


def refuse_what_it_refuses(given):
    """The checks of that file's `mha_fwd`, in its words, but those of device and of 16 bits: tests compute exactly."""
    q, k, v = (given[name] for name in "qkv")
    check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    offsets, table, lengths = given["cu_seqlens_q"], given["page_table"], given["seqused_k"]
    batch = len(q) if offsets is None else len(offsets) - 1
    if table is not None:
        check(table.dtype == torch.int32, "page_table must have dtype torch.int32")
        check(table.stride(-1) == 1, "page_table must have contiguous last dimension")
        check(given["cu_seqlens_k"] is None, "If cu_seqlens_k is passed in, then page table is not supported")
    for name, longest in (("cu_seqlens_q", "max_seqlen_q"), ("cu_seqlens_k", "max_seqlen_k")):
        if given[name] is not None:
            check(given[name].is_contiguous(), f"{name} must be contiguous")
            check(given[name].dtype == torch.int32, f"{name} must have dtype torch.int32")
            check(given[longest] is not None, f"{longest} must be provided if {name} is provided")
            check(given[name].shape == (batch + 1,), f"{name} must have shape (batch_size + 1)")
    if given["cu_seqlens_k"] is None:
        check(batch == len(k if table is None else table), "batch_size must be equal to batch_size_k")
    if lengths is not None:
        check(lengths.dtype == torch.int32, "seqused_k must have dtype int32")
        check(lengths.is_contiguous(), "seqused_k must be contiguous")
        check(lengths.shape == (batch,), "seqused_k must have shape (batch_size)")
    check_widths(q, k, v, given["q_v"])


def stand_in(*arguments):
    """The operator, as far as it is used, on one sequence after another."""
    given = dict(zip(NAMES, arguments, strict=True))
    used = {"q", "k", "v", "q_v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k"}
    used |= {"page_table", "softmax_scale", "is_causal"}
    assert {name: given[name] for name in NAMES if name not in used} == dict.fromkeys(set(NAMES) - used) | UNUSED
    q, k, v, qv, scale, causal = (given[n] for n in ("q", "k", "v", "q_v", "softmax_scale", "is_causal"))
    refuse_what_it_refuses(given)
    assert given["seqused_k"] is not None or given["cu_seqlens_q"] is not None  # as vLLM compiles it
    if given["cu_seqlens_q"] is not None:
        ends = zip(*(given[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k")), strict=True)
        (a, b), *ends = ends
        parts = []
        for end_q, end_k in ends:
            assert end_q - a <= given["max_seqlen_q"] and end_k - b <= given["max_seqlen_k"]
            parts.append(attention(q[a:end_q], k[b:end_k], v[b:end_k], scale, causal))
            a, b = end_q, end_k
        return [torch.cat(parts)]
    if given["page_table"] is not None:
        k, v = (x[given["page_table"].clamp(min=0).long()].flatten(1, 2) for x in (k, v))
    results = []
    for b, length in enumerate(given["seqused_k"].tolist()):
        own = None if qv is None else qv[b]
        results.append(attention(q[b], k[b, :length], v[b, :length], scale, causal, own))
    return [torch.stack(results)]
