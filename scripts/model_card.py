"""Render `hub_card.md` for one model, and the numbers that the authors published for theirs."""

import json
from pathlib import Path
from string import Template

import torch

from modeling_mlra import MLRAConfig, MLRAForCausalLM
from modeling_mlra.rows_mlra import RowFormat
from scripts.variants import ATTENTIONS
from tokenization.build import NUM_TOKENS

ROOT = Path(__file__).resolve().parent.parent

REMOTE_CODE_NOTE = """\
`trust_remote_code=True` runs the Python files of this folder; read them first. With the `mlra` package installed,
`import modeling_mlra` registers the same classes and the flag is not needed."""
PACKAGE_NOTE = """\
`python -m scripts.export THIS_FOLDER DST` writes a Hub folder that holds the code and needs no package."""

FP8_NOTE = """, its linear layers as FP8 (e4m3, one scale each; on a GPU the library multiplies by them with the
package `kernels`, without one it widens them as it loads)"""

SHARE_NOTE = """\
In the paper's benchmark (64 heads, batch 1, bfloat16, one H200) attention over the share of one of four devices takes
21 µs at 128K tokens and 188 at 2M, 3.0 to 3.3 times less than the fastest of FlashMLA and FlashAttention-3 on MLA in
the same run.

"""

CORPORA = ("Wikipedia", "C4", "Pile", "RefinedWeb", "Cosmopedia", "FineWeb", "FineWeb-Edu", "average")
PUBLISHED_PERPLEXITY = {  # arXiv 2603.02188; one row per architecture, columns as CORPORA
    "mla": (14.567, 16.345, 12.965, 18.523, 8.966, 15.440, 9.284, 13.727),
    "gla_2": (14.605, 16.323, 13.225, 18.509, 9.118, 15.424, 9.249, 13.779),
    "gla_4": (14.547, 16.436, 13.229, 18.578, 9.076, 15.535, 9.307, 13.815),
    "mlra_2": (14.615, 16.342, 13.236, 18.602, 9.153, 15.439, 9.242, 13.804),
    "mlra_4": (14.407, 16.286, 13.124, 18.398, 8.937, 15.361, 9.193, 13.672),
    "mlra_2_gated": (14.424, 16.252, 13.017, 18.407, 8.924, 15.351, 9.180, 13.651),
    "mlra_4_gated": (14.431, 16.170, 13.073, 18.386, 8.874, 15.266, 9.148, 13.621),
}
TASKS = ("ARC-E", "ARC-C", "OBQA", "BoolQ", "HellaSwag", "Winogrande", "PIQA", "average")
PUBLISHED_ZERO_SHOT = {  # same source, percent; acc for BoolQ and Winogrande, acc_norm for the others
    "mla": (68.22, 39.16, 42.60, 64.10, 61.39, 60.06, 75.68, 58.75),
    "gla_2": (68.01, 40.19, 40.60, 63.94, 61.54, 58.41, 75.41, 58.30),
    "gla_4": (68.77, 41.04, 41.20, 61.96, 61.61, 58.09, 74.65, 58.19),
    "mlra_2": (67.89, 42.24, 42.00, 61.65, 61.49, 59.98, 75.52, 58.68),
    "mlra_4": (67.63, 41.38, 43.00, 61.74, 62.16, 61.48, 74.48, 58.84),
}


def variant_name(config: MLRAConfig) -> str:
    """Released name of a configuration's attention (`mlra_4_gated`), or `latent_LxB` for other combinations."""
    latents, branches = config.num_latent_heads, config.num_branches
    names = {sizes: name for name, sizes in ATTENTIONS.items()}
    name = names.get((latents, branches), f"latent_{latents}x{branches}")
    return name + "_gated" * config.attn_output_gate + "_no_scale" * (not config.latent_scaling)


def published_name(config: MLRAConfig) -> str | None:
    """The name under which the authors published numbers for exactly these sizes, or None."""
    name = variant_name(config)
    file = ROOT / "configuration" / f"{name}.json"
    if name not in PUBLISHED_PERPLEXITY or not file.is_file():
        return None
    released = MLRAConfig(**json.loads(file.read_text(encoding="utf-8")))
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    return name if all(getattr(config, size) == getattr(released, size) for size in sizes) else None


def published_section(name: str) -> str:
    """Markdown section with the authors' numbers for the released model `name`."""
    lines = [
        "## Results published by the authors",
        "",
        "Copied from the paper, not measured with this folder. They come from float32 weights under bfloat16",
        "autocast; weights loaded in bfloat16 differ slightly.",
        "",
        f"| perplexity | {' | '.join(CORPORA)} |",
        "|---" * (len(CORPORA) + 1) + "|",
        "| published | " + " | ".join(f"{value:.3f}" for value in PUBLISHED_PERPLEXITY[name]) + " |",
        "",
    ]
    if name in PUBLISHED_ZERO_SHOT:
        lines += [
            f"| zero-shot, % | {' | '.join(TASKS)} |",
            "|---" * (len(TASKS) + 1) + "|",
            "| published | " + " | ".join(f"{value:.2f}" for value in PUBLISHED_ZERO_SHOT[name]) + " |",
            "",
        ]
    return "\n".join(lines) + "\n"


def render_card(
    config: MLRAConfig,
    dtype: torch.dtype,
    provenance: str,
    *,
    released: bool,
    license_id: str,
    limits: str = "",
    remote_code: bool = True,
    tokens: int | None = None,
    fp8: bool = False,
) -> str:
    """The model card of one exported folder.

    Args:
        config: configuration of the model.
        dtype: what its weights are stored as.
        provenance: a sentence saying where the weights come from.
        released: whether they are the authors'; only then does the card quote published numbers.
        license_id: the Hub's identifier of their licence.
        limits: what the model cannot do, a sentence.
        remote_code: whether the folder holds the model's code.
        tokens: how many the tokenizer has (default: GPT-2's).
        fp8: whether its linear layers are stored as FP8.
    """
    with torch.device("meta"):
        parameters = MLRAForCausalLM(config).num_parameters()
    latents, branches = config.num_latent_heads, config.num_branches
    row, fp8_row = (RowFormat.of_config(config, dtype=torch.bfloat16, row_format=name) for name in ("plain", "fp8"))
    expanded = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    padded = config.vocab_size - (min(config.vocab_size, NUM_TOKENS) if tokens is None else tokens)
    roles = {name: getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if set(map(str, roles.values())) == {str(config.eos_token_id)}:
        token_roles = f"`<|endoftext|>` ({config.eos_token_id}) is bos, eos and padding."
    else:
        token_roles = f"Special tokens: {', '.join(f'{name} {value}' for name, value in roles.items())}."
    name = published_name(config) if released else None
    title = variant_name(config).upper().replace("_NO_SCALE", ", no scaling").replace("_GATED", ", gated")
    return Template((ROOT / "hub_card.md").read_text(encoding="utf-8")).substitute(
        license=license_id,
        title=title.replace("_", "-"),
        provenance=provenance,
        package="" if remote_code else "import modeling_mlra  # of the package mlra: this folder holds no code\n",
        trust=remote_code,
        code_note=REMOTE_CODE_NOTE if remote_code else PACKAGE_NOTE,
        limits=f"- {limits}\n" if limits else "",
        about="It is an architecture of the paper Multi-Head Low-Rank Attention "
        "([arXiv 2603.02188](https://arxiv.org/abs/2603.02188), ICLR 2026), which splits the compressed key-value "
        "state of latent attention into several latents, so that the cache can be divided among devices.",
        parameters=f"{parameters:,}",
        dtype=str(dtype).removeprefix("torch.") + FP8_NOTE * fp8,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        latents=latents,
        branches=branches,
        latent_dim=config.latent_head_dim,
        query_rank=config.q_lora_rank,
        mlp_width=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        branches_words="one latent" if branches == 1 else f"{branches} latents, one per branch",
        scaling_note="" if config.latent_scaling else " This is the ablation without scaling of latents and outputs.",
        gate_note=" Head outputs pass a sigmoid gate." if config.attn_output_gate else "",
        row=row.numbers,
        cache_bytes=f"{config.num_hidden_layers * row.nbytes:,}",
        fp8_bytes=f"{config.num_hidden_layers * fp8_row.nbytes:,}",
        expanded_bytes=f"{config.num_hidden_layers * expanded * row.dtype.itemsize:,}",
        **{
            f"row_tp{devices}": RowFormat.of_config(config, -(-latents // devices)).numbers for devices in (1, 2, 4, 8)
        },
        speed=SHARE_NOTE if RowFormat.of_config(config, -(-latents // 4)).numbers == 128 + 64 else "",
        published=published_section(name) if name else "",
        token_roles=token_roles,
        suppressed=f"{padded} embedding rows have no token; `generation_config.json` keeps them from being chosen."
        if padded
        else "Every embedding row has a token.",
        weights_license="The authors' repository states no licence for code or weights, so no permission to use or "
        "redistribute the weights is known."
        if released
        else f"The weights are under: {license_id}.",
    )
