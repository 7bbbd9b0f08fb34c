"""Inputs of a decode attention, the float64 oracle that its implementations are held against, and how to run one."""

import torch

from modeling_mlra.decode_mlra import latent_attention

FP32_RATIO = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(q_latent, q_rope, latents, k_rope, kv_end, kv_start=None, key_mask=None, *, scaling):
    """One row at a time in float64, straight from the definition."""
    batch, length, num_latents, heads, _ = q_latent.shape
    per_group = num_latents // q_rope.shape[2]
    result = torch.zeros(q_latent.shape, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            first = 0 if kv_start is None else int(kv_start[b])
            rows = [j for j in range(first, int(kv_end[b]) - length + t + 1) if key_mask is None or key_mask[b, j]]
            if not rows:
                continue
            for s in range(num_latents):
                keys = torch.cat([latents[b, rows, s], k_rope[b, rows]], dim=-1).double()
                for h in range(heads):
                    query = torch.cat([q_latent[b, t, s, h], q_rope[b, t, s // per_group, h]]).double()
                    weights = torch.softmax(scaling * (keys @ query), dim=0)
                    result[b, t, s, h] = weights @ latents[b, rows, s].double()
    return result


def inputs(batch, length, num_latents, groups, heads, width, rope, rows, dtype=torch.float32, ends=None, seed=0):
    """Queries and one row tensor [c_0 .. | k_rope] whose unused rows are NaN; returns the arguments and kv_end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ends = [rows] * batch if ends is None else ends
    cache = normal(batch, rows, num_latents * width + rope)
    for b, end in enumerate(ends):
        cache[b, end:] = float("nan")
    latents = cache[..., : num_latents * width].unflatten(-1, (num_latents, width))
    queries = normal(batch, length, num_latents, heads, width), normal(batch, length, groups, heads, rope)
    return (*queries, latents, cache[..., num_latents * width :]), torch.tensor(ends, dtype=torch.int32)


def in_pages(arguments, kv_end, page_size):
    """The same rows in shuffled pages of one pool, NaN wherever no row in use lies: the arguments, and the options
    that say where. The table ends with the longest sequence and holds -1 where a sequence has no page."""
    q_latent, q_rope, latents, k_rope = arguments
    batch, _, num_latents, width = latents.shape
    blocks = -(-int(kv_end.max()) // page_size)
    order = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(2))[: batch * blocks]
    table = order.view(batch, blocks).to(torch.int32)
    cache = torch.cat([latents.flatten(2), k_rope], dim=-1)
    pool = torch.full(((batch * blocks + 3) * page_size, cache.shape[-1]), float("nan"), dtype=cache.dtype)
    for b, end in enumerate(kv_end.tolist()):
        positions = torch.arange(end)
        pool[table[b, positions // page_size].long() * page_size + positions % page_size] = cache[b, :end]
        table[b, -(-end // page_size) :] = -1
    paged = pool[:, : num_latents * width].unflatten(-1, (num_latents, width)), pool[:, num_latents * width :]
    return (q_latent, q_rope, *paged), {"block_table": table, "page_size": page_size}


def ratio(result, reference):
    """RMS of the difference over RMS of the reference; NaN fails every comparison."""
    return ((result.double().cpu() - reference).norm() / reference.norm()).item()


def run(arguments, kv_end, implementation, **options):
    arguments = [x.to(DEVICE) for x in arguments]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return latent_attention(*arguments, kv_end=kv_end.to(DEVICE), implementation=implementation, **options).cpu()
