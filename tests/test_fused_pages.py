"""The layers of the fused step over pages against the modules; interpreted where there is no GPU."""

import copy
import threading

import pytest
import torch
from torch import nn

from mlra_vllm.step import PagedStep, PagedTokens
from modeling_mlra import MLRACache
from modeling_mlra.device_mlra import device_facts
from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.tensor_parallel_mlra import SPLIT_DIMENSIONS, VOCABULARY_AND_MLP
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_model
from tests.tolerances import FP8_FUSED_RATIO, FUSED_BFLOAT16_RATIO, FUSED_FLOAT32_RATIO

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, all of them run on the GPU
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LARGE = {"num_attention_heads": 24, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
LARGE |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 1024}


class Sequences:
    """Sequences of so many rows, the newest token still to run, with what the modules make of it; their older rows in
    shuffled pages, beside NaN."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, ends: list[int], page_size: int, padding: int):
        ids = [random_ids(1, end, seed=end).to(model.device) for end in ends]
        caches = [MLRACache(model.config) for _ in ends]
        for sequence, cache in zip(ids, caches, strict=True):
            if sequence.shape[1] > 1:
                model(sequence[:, :-1], cache=cache)
        pages = [-(-end // page_size) for end in ends]
        order = (1 + torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(0))).int()
        table = torch.full((len(ends) + padding, max(pages)), -1, dtype=torch.int32)
        table[len(ends) :] = 0
        for b, own in enumerate(order[: sum(pages)].split(pages)):
            table[b, : len(own)] = own
        self.format = RowFormat.of_config(model.config, dtype=model.dtype)
        places = [
            table[b, torch.arange(end) // page_size].long() * page_size + torch.arange(end) % page_size
            for b, end in enumerate(ends)
        ]
        shape = (sum(pages) + 3) * page_size, self.format.width
        self.pools = [torch.empty(shape, dtype=self.format.element, device=model.device) for _ in model.model.layers]
        for index, pool in enumerate(self.pools):
            pool.view(torch.uint8).fill_(255)  # NaN in every dtype
            for place, cache in zip(places, caches, strict=True):
                if len(place) > 1:
                    pool[place[:-1]] = cache.layers[index].rows[0, 0, : len(place) - 1]
        self.before = [pool.clone() for pool in self.pools]
        self.slots = torch.tensor([place[-1] for place in places])
        newest = torch.cat([sequence[0, -1:] for sequence in ids])
        self.hidden = model.model.embed_tokens(nn.functional.pad(newest, (0, padding), value=3))
        self.tokens = PagedTokens(
            positions=torch.tensor([end - 1 for end in ends] + [9] * padding, device=model.device),
            slots=nn.functional.pad(self.slots, (0, padding), value=-1).to(model.device),
            kv_end=torch.tensor(ends + [0] * padding, dtype=torch.int32, device=model.device),
            block_table=table.to(model.device),
            page_size=page_size,
        )
        self.expected = torch.cat(
            [model.model(s[:, -1:], cache=c).last_hidden_state[0] for s, c in zip(ids, caches, strict=True)]
        )
        self.rows = [torch.stack([c.layers[i].rows[0, 0, e - 1] for c, e in zip(caches, ends, strict=True)])
                     for i in range(len(self.pools))]  # fmt: skip

    def numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents and rotary keys of rows, as float32."""
        kept, k_rope = self.format.split(rows)
        return torch.cat([self.format.read(kept).float(), k_rope.float()], dim=-1)


@torch.no_grad()
def check(model: nn.Module, ends: list[int], page_size: int, padding: int, limit: float) -> None:
    sequences = Sequences(model, ends, page_size, padding)
    step = PagedStep(model, sequences.format, len(ends) + padding)
    hidden = step(sequences.hidden, sequences.pools, sequences.tokens)
    assert hidden.isfinite().all(), "rows of nothing too"
    assert rms_ratio(sequences.expected, model.model.norm(hidden[: len(ends)])) < limit
    for pool, before, rows in zip(sequences.pools, sequences.before, sequences.rows, strict=True):
        assert rms_ratio(sequences.numbers(rows), sequences.numbers(pool[sequences.slots])) < limit
        others = torch.ones(len(pool), dtype=torch.bool)
        others[sequences.slots] = False
        others[0] = padding == 0
        assert torch.equal(pool[others].view(torch.uint8), before[others].view(torch.uint8))


@pytest.mark.parametrize(
    ("variant", "ends", "padding", "settings"),
    [
        *((name, [19, 8], 0, {"attn_output_gate": name == "gla_2"}) for name in VARIANTS),
        ("mlra_4", [33], 0, {"rope_parameters": YARN}),
        ("mlra_4", [17], 1, {}),
        ("mlra_2", [5, 40, 16, 1], 3, {"attn_output_gate": True, "num_hidden_layers": 1}),
        ("mla", [9, 2, 24], 14, {"num_hidden_layers": 1}),
    ],
)
def test_layers_over_pages_equal_the_modules(variant, ends, padding, settings):
    """Ragged sequences, the last ones of nothing; what is written, and that nothing else is."""
    model = tiny_model(variant, num_attention_heads=4, **settings).to(DEVICE)
    check(model, ends, 16, padding, FUSED_FLOAT32_RATIO)


@pytest.mark.parametrize("ends", [[19, 8], [19, 8, 3]])
def test_rows_in_eight_bits(ends):
    model = tiny_model("mlra_4", num_attention_heads=4, cache_row_format="fp8").to(DEVICE)
    check(model, ends, 16, 0, FP8_FUSED_RATIO)


def rank_of(model: nn.Module, rank: int) -> nn.Module:
    """One of two ranks that split the heads of an `mla`, and the MLP."""
    model = copy.deepcopy(model)
    for name, module in model.model.layers.named_modules():
        name = name.rpartition(".")[2]
        dimension = SPLIT_DIMENSIONS[name][2] if name in SPLIT_DIMENSIONS else VOCABULARY_AND_MLP.get(name)
        if dimension is not None:
            module.weight.data = module.weight.chunk(2, dimension)[rank].contiguous()
    return model


@torch.no_grad()
@pytest.mark.parametrize("ends", [[19, 8], [5, 40, 16]])
def test_two_ranks(ends):
    """Each adds its share of the residual. Both run in threads, one at a time (the interpreter has a state)."""
    model = tiny_model("mla", num_attention_heads=4).to(DEVICE)
    ranks = [rank_of(model, rank) for rank in range(2)]
    sequences = [Sequences(model, ends, 16, 0) for _ in ranks]
    turn, meeting = threading.Lock(), threading.Barrier(2, timeout=60)
    given, results = {}, {}

    def run(rank: int) -> None:
        def sum_over_ranks(hidden):
            given[rank] = hidden.clone()
            turn.release()
            meeting.wait()
            total = given[0] + given[1]
            meeting.wait()
            turn.acquire()
            return total

        own = sequences[rank]
        step = PagedStep(ranks[rank], own.format, len(ends), len(ranks), sum_over_ranks)
        with turn, torch.no_grad():
            results[rank] = step(own.hidden, own.pools, own.tokens)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert rms_ratio(sequences[0].expected, model.model.norm(results[rank])) < FUSED_FLOAT32_RATIO
        assert rms_ratio(sequences[0].rows[1], sequences[rank].pools[1][sequences[rank].slots]) < FUSED_FLOAT32_RATIO


def model_of_released_widths(variant: str) -> nn.Module:
    model = tiny_model(variant, dtype=torch.bfloat16, **LARGE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model.to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [[700], [64, 129], [1, 64, 65, 300, 5, 700, 128, 2]])
@pytest.mark.parametrize(
    ("variant", "page_size"), [*((name, 64) for name in VARIANTS), ("mlra_4", 16), ("mlra_4", 128)]
)
def test_gpu_layers_over_pages_of_the_released_widths(variant, page_size, ends):
    """In bfloat16, where rows are read by bulk copies out of pages."""
    assert device_facts(torch.device(DEVICE)).obstacle is None
    check(model_of_released_widths(variant), ends, page_size, len(ends) % 3, FUSED_BFLOAT16_RATIO)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_gpu_graph_of_the_layers_follows_its_buffers(padding):
    """As in serving: between replays change embeddings, positions, slots, lengths, tables and pools."""
    model = model_of_released_widths("mlra_4")
    given = [Sequences(model, ends, 64, padding) for ends in ([100, 129], [65, 192], [128, 130])]
    hidden, pools = given[0].hidden.clone(), [pool.clone() for pool in given[0].pools]
    tokens = PagedTokens(*(x.clone() if isinstance(x, torch.Tensor) else x for x in given[0].tokens))
    step = PagedStep(model, given[0].format, 2 + padding)

    def layers() -> torch.Tensor:
        return model.model.norm(step(hidden.clone(), pools, tokens))

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layers()
    for sequences in given:
        now = [sequences.hidden, *sequences.pools, *sequences.tokens[:-1]]
        for buffer, value in zip([hidden, *pools, *tokens[:-1]], now, strict=True):
            buffer.copy_(value)
        graph.replay()
        assert rms_ratio(sequences.expected, result[:2]) < FUSED_BFLOAT16_RATIO
        for pool, rows in zip(pools, sequences.rows, strict=True):
            assert rms_ratio(sequences.numbers(rows), sequences.numbers(pool[sequences.slots])) < FUSED_BFLOAT16_RATIO
