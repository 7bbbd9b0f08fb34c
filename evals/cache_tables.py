"""The paper's cache and intensity tables, computed from configurations and confirmed by real modules.

    python -m evals.cache_tables [--output evals/results/cache_tables.json]

Cache: numbers per token and layer that one device keeps when the attention is split over 1, 2, 4 or 8 devices. A
device keeps the row [its latents | RoPE key]; latents are split over devices, and where there are more devices than
latents, several keep the same one and split its heads. Grouped-query attention splits its key-value heads.

Intensity: floating-point operations per byte of cache that decoding one token in bfloat16 takes, the projections left
out. In the absorbed form a cached token costs a device with L latents of width r, H query heads each in G groups

    2 * L * H * r + 2 * G * H * e   for the scores (the rotary part is the same for all branches of a head), and
    2 * L * H * r                   for the weighted sum of latents.

A kernel that computes each branch by itself repeats the rotary part, 2 * L * H * e; the last column counts that.

Every number is confirmed on the share of one device: an attention layer with that device's latents and heads (for
grouped-query attention, the library's Llama) decodes one token; its real cache is measured, and its operations are
counted at two lengths of the cache, of which the difference belongs to the cached tokens. A difference from what was
computed is an error.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from scripts import cli
from scripts.cli import UserError


def check(args: argparse.Namespace) -> None:
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json (the table is written beside it, as .md)")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.cache_tables", __doc__)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here, and tables beside it")
    args = parser.parse_args(argv)
    return cli.run("evals.cache_tables:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from evals.common import CONFIGURATIONS, PUBLISHED, environment, markdown_table, publish_table, write_json
from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.library_mlra import CACHE
from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.tensor_parallel_mlra import tensor_parallel_layout

TABLE = PUBLISHED["cache"]
DEVICES = TABLE["columns"]
ARCHITECTURES = {name: file for name, file in PUBLISHED["architectures"].items() if "gated" not in name}
KEY_VALUE_HEADS = 8  # of the paper's grouped-query baseline
BYTES = torch.bfloat16.itemsize
# What neither the cache nor its operations depend on, made small.
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTHS = (16, 48)


class Share(NamedTuple):
    """What one device does per cached token and layer.

    Args:
        numbers: numbers of the cache it reads.
        flops: operations, with the rotary scores computed once per head.
        flops_per_branch: operations, with the rotary scores computed for every branch.
        fp8_bytes: bytes it reads where latents are kept in eight bits, or None.
    """

    numbers: int
    flops: int
    flops_per_branch: int
    fp8_bytes: int | None


def latent_share(config: MLRAConfig, devices: int) -> tuple[Share, MLRAConfig]:
    """A device's share of latent attention, computed, and the configuration of an attention that is this share.

    Raises:
        UserError: when the attention cannot be split so.
    """
    layout = tensor_parallel_layout(config, devices)
    if layout is None:
        raise UserError(f"an attention of {config.num_latent_heads} latents cannot be split over {devices} devices")
    groups, branches = config.num_head_groups // layout.groups, config.num_branches // layout.branches
    heads = config.num_attention_heads // config.num_head_groups // layout.heads
    latents, r, e = groups * branches, config.latent_head_dim, config.qk_rope_head_dim
    latent_flops = 2 * latents * heads * r * 2
    share = Share(
        numbers=RowFormat.of_config(config, latents).numbers,
        flops=latent_flops + 2 * groups * heads * e,
        flops_per_branch=latent_flops + 2 * latents * heads * e,
        fp8_bytes=RowFormat.of_config(config, latents, torch.bfloat16, "fp8").nbytes,
    )
    sizes = {
        "num_latent_heads": latents,
        "num_branches": branches,
        "num_attention_heads": groups * heads,
        "kv_lora_rank": latents * r,
        "q_lora_rank": SMALL["hidden_size"],
        "decode_implementation": "torch",  # the one whose operations torch can count
    }
    return share, MLRAConfig(**(config.to_dict() | SMALL | sizes))


def grouped_query_share(config: MLRAConfig, devices: int) -> tuple[Share, LlamaConfig]:
    """The same of grouped-query attention with as many query heads, `KEY_VALUE_HEADS` and the same head width."""
    heads, kv_heads, width = config.num_attention_heads // devices, KEY_VALUE_HEADS // devices, config.v_head_dim
    flops = 2 * heads * width * 2
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}
    return Share(2 * kv_heads * width, flops, flops, None), LlamaConfig(**(SMALL | sizes))


@torch.no_grad()
def measured_share(config: PretrainedConfig) -> Share:
    """The share of a real decoder layer: its cache measured in bfloat16, the operations of its decoding counted."""
    is_latent = isinstance(config, MLRAConfig)
    model_class = MLRAForCausalLM if is_latent else LlamaForCausalLM
    model = model_class(config).to(torch.bfloat16).eval()

    def decode(length: int, **options) -> tuple[int, Cache]:
        cache = MLRACache(config, **options) if is_latent else DynamicCache(config=config)
        model(torch.zeros(1, length - 1, dtype=torch.long), **{CACHE: cache})
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.long), **{CACHE: cache})
        return counter.get_total_flops(), cache

    def flops_per_cached_token(model: PreTrainedModel, attention: str) -> int:
        model.set_attn_implementation(attention)
        short, long = (decode(length)[0] for length in LENGTHS)
        return (long - short) // (LENGTHS[1] - LENGTHS[0])

    per_branch = flops_per_cached_token(model, "eager")  # keys [c | k_rope] of every latent
    shared = flops_per_cached_token(model, "sdpa") if is_latent else per_branch
    cache = decode(LENGTHS[0])[1]
    layer = cache.layers[0]
    used = layer.keys.numel() + layer.values.numel()
    if is_latent and cache.bytes_per_token() * LENGTHS[0] != used * BYTES:
        raise RuntimeError(f"the cache says {cache.bytes_per_token()} bytes per token and keeps {used * BYTES} in all")
    in_eight_bits = None
    if is_latent:
        in_eight_bits = decode(LENGTHS[0], row_format="fp8")[1].layers[0].rows[0, 0, 0].nbytes
    return Share(used // LENGTHS[0], shared, per_branch, in_eight_bits)


def confirmed_share(name: str, config: MLRAConfig, devices: int) -> Share:
    """The share computed from the configuration, after a real layer gave the same.

    Raises:
        RuntimeError: if it did not.
    """
    computed, share_config = (grouped_query_share if name == "GQA" else latent_share)(config, devices)
    measured = measured_share(share_config)
    if measured != computed:
        raise RuntimeError(f"{name} on {devices} devices: computed {computed}, measured {measured}")
    return computed


def evaluate(args: argparse.Namespace) -> None:
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json (the tables are written beside it, as .md)")
    configs = {
        name: AutoConfig.from_pretrained(CONFIGURATIONS / f"{file}.json") for name, file in ARCHITECTURES.items()
    }
    reference = configs["MLRA-4"]
    configs["GQA"] = reference
    shares = {
        name: {devices: confirmed_share(name, config, devices) for devices in DEVICES}
        for name, config in configs.items()
    }
    head, layers = reference.v_head_dim, reference.num_hidden_layers
    columns = [f"TP{devices}" for devices in DEVICES]
    paper = {name: dict(zip(DEVICES, row, strict=True)) for name, row in TABLE["rows"].items()}

    def width(name: str, devices: int) -> str:
        published = f" (paper {paper[name][devices]:g})" if name in paper else ""
        return f"{shares[name][devices].numbers / head:g}{published}"

    def intensity(share: Share, flops: int) -> str:
        return f"{flops / (share.numbers * BYTES):.1f}"

    tables = {
        f"Cache per token, layer and device, in head widths of {head}": markdown_table(
            ["attention", *columns], [[name, *(width(name, devices) for devices in DEVICES)] for name in shares]
        ),
        f"Cache per token and device, {layers} layers in bfloat16, in bytes": markdown_table(
            ["attention", *columns],
            [
                [name, *(f"{share.numbers * BYTES * layers:,}" for share in row.values())]
                for name, row in shares.items()
            ],
        ),
        'The same with latents in eight bits (`cache_row_format="fp8"`), in bytes': markdown_table(
            ["attention", *columns],
            [
                [name, *(f"{share.fp8_bytes * layers:,}" for share in row.values())]
                for name, row in shares.items()
                if row[1].fp8_bytes is not None
            ],
        ),
        f"Operations per byte of cache in decoding, {reference.num_attention_heads} query heads": markdown_table(
            ["attention", *columns, "TP1, each branch alone"],
            [
                [
                    name,
                    *(intensity(share, share.flops) for share in row.values()),
                    intensity(row[1], row[1].flops_per_branch),
                ]
                for name, row in shares.items()
            ],
        ),
    }
    if args.output is not None:
        results = {
            name: {
                devices: share._asdict() | {"flops_per_byte": share.flops / (share.numbers * BYTES)}
                for devices, share in row.items()
            }
            for name, row in shares.items()
        }
        sizes = {"head_width": head, "layers": layers, "bytes_per_number": BYTES}
        write_json(args.output, {"sizes": sizes, "environment": environment(), "results": results})
    publish_table(
        args.output,
        "Cache and intensity",
        "\n".join(f"{title}:\n\n{table}" for title, table in tables.items()),
        f"Computed from the released configurations and confirmed on real layers, caches and counted operations. "
        f"Paper: {PUBLISHED['source']}.",
    )
