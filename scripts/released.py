"""Read a released MLRA checkpoint folder: which attention it holds, and its tensors under this project's names.

A folder holds `config.json` and either `pytorch_model.bin` or shards listed in `pytorch_model.bin.index.json`. Its
config does not say which attention it is; keys and shapes do. Tensors are mapped from disk and handed out one by one,
so memory stays far below the size of the checkpoint. Nothing but tensors is ever unpickled, and other files of the
folder (`optimizer.pt`, `process_state_*`) are never opened.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from modeling_mlra import MLRAConfig
from scripts.cli import UserError, indexed_files, read_json
from scripts.variants import ATTENTIONS
from tokenization.build import end_of_text_id

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
MAPPED_BYTES = 2**28  # mapped pages count as resident memory until the file is closed: reopen it after this many

CONFIG_FIELDS = {  # released config field: ours
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
}


class ReleasedCheckpoint:
    """The tensors of a released folder, mapped from disk: `shapes` {name: shape} and `read(name)`.

    Raises:
        UserError: for a missing, truncated or foreign file, and for an index that disagrees with its shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, dict[str, Tensor]] = {}
        self._handed_out = 0
        weight_map, files = self._list_files()
        for file in files:
            for name, tensor in self._load(file).items():
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    raise UserError(
                        f"{file}: {name} is not a floating-point tensor, so this is no released checkpoint"
                    )
                if name in self._file_of:
                    raise UserError(f"{name} is stored twice, in {self._file_of[name].name} and in {file.name}")
                self.shapes[name] = tuple(tensor.shape)
                self._file_of[name] = file
        for name, file_name in weight_map.items():
            if name not in self._file_of or self._file_of[name].name != file_name:
                raise UserError(f"{folder / INDEX} places {name} in {file_name}, which does not hold it")

    def _list_files(self) -> tuple[dict[str, str], list[Path]]:
        if not (self.folder / INDEX).is_file():
            if (self.folder / SINGLE).is_file():
                return {}, [self.folder / SINGLE]
            raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}: it is no released checkpoint folder")
        files = [self.folder / name for name in indexed_files(self.folder / INDEX)]
        return read_json(self.folder / INDEX)["weight_map"], files

    def _load(self, file: Path) -> dict[str, Tensor]:
        try:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{file} holds pickled objects other than tensors and was not loaded") from error
        except Exception as error:  # whatever reading a file that is something else ends in
            raise UserError(f"{file} is truncated or no PyTorch checkpoint; download it again") from error
        if not isinstance(state, dict):
            raise UserError(f"{file} holds a {type(state).__name__} instead of a dict of tensors")
        return state

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, a view of its mapped file: copy it, or let go of it soon."""
        if self._handed_out > MAPPED_BYTES:
            self._open.clear()
            self._handed_out = 0
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._load(file)
        tensor = self._open[file][name]
        self._handed_out += tensor.nbytes
        return tensor


def read_released_config(folder: Path) -> dict:
    """`config.json` of a released folder, checked to be one."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no config.json: give the folder of one model (or --subfolder, e.g. main/mlra_4)"
        )
    released = read_json(file)
    if released.get("model_type") == "mlra":
        raise UserError(f"{folder} is already a Transformers folder (model_type mlra): load it as it is")
    missing = [field for field in CONFIG_FIELDS if type(released.get(field)) is not int]
    if missing:
        raise UserError(f"{file} has no whole number for {', '.join(missing)}: it is no released MLRA config")
    if released.get("bias"):
        raise UserError(f"{file} has bias={released['bias']}; no released latent attention model has biases")
    return released


def detect_variant(released: dict, shapes: dict[str, tuple[int, ...]]) -> str:
    """Which of `VARIANTS` a checkpoint is, from the keys and shapes of its first layer."""
    prefix = "transformer.h.0.attn."
    keys = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    suffix = "_gated" if "gated_proj.weight" in keys else ""
    if "kv_b_proj.weight" in keys:
        return "mla" + suffix
    if "kv_b_proj_1.weight" in keys:
        return "gla_2" + suffix
    known = f"known are {', '.join(ATTENTIONS)}, each also gated"
    if "kv_b_proj" not in keys:
        raise UserError(f"unknown attention layout: the keys under {prefix} are {', '.join(keys) or 'none'}; {known}")
    all_heads = 2 * released["qk_nope_head_dim"] * released["n_head"]
    per_latent = {all_heads: "mlra_4", all_heads // 2: "mlra_2", all_heads // 4: "gla_4"}
    shape = keys["kv_b_proj"]
    if len(shape) != 3 or shape[-1] not in per_latent:
        widths = " or ".join(f"{width} ({name})" for width, name in per_latent.items())
        raise UserError(
            f"unknown attention layout: {prefix}kv_b_proj has shape {shape}, its last size must be {widths}"
        )
    return per_latent[shape[-1]] + suffix


def released_config(released: dict, variant: str, latent_scaling: bool) -> MLRAConfig:
    """The configuration of a released checkpoint, given its `config.json` and its variant."""
    latent_heads, branches = ATTENTIONS[variant.removesuffix("_gated")]
    try:
        end_of_text = end_of_text_id(released["vocab_size"])
        return MLRAConfig(
            **{ours: released[theirs] for theirs, ours in CONFIG_FIELDS.items()},
            v_head_dim=released["qk_nope_head_dim"],
            num_latent_heads=latent_heads,
            num_branches=branches,
            attn_output_gate=variant.endswith("_gated"),
            latent_scaling=latent_scaling,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"config.json describes no possible {variant}: {error}") from error


@dataclass(frozen=True)
class Rule:
    """One tensor of ours: `build` of the released tensors named in `sources` ({name: expected shape})."""

    sources: dict[str, tuple[int, ...]]
    build: Callable[..., Tensor]


def same(tensor: Tensor) -> Tensor:
    return tensor


def name_map(config: MLRAConfig) -> dict[str, Rule]:
    """The one table between the two formats: {our name: rule}, in the order of the model."""
    d, vocab = config.hidden_size, config.vocab_size
    rules = {"model.embed_tokens.weight": Rule({"transformer.wte.weight": (vocab, d)}, same)}
    for layer in range(config.num_hidden_layers):
        for ours, rule in layer_map(config).items():
            sources = {f"transformer.h.{layer}.{theirs}": shape for theirs, shape in rule.sources.items()}
            rules[f"model.layers.{layer}.{ours}"] = Rule(sources, rule.build)
    rules["model.norm.weight"] = Rule({"layernorm.weight": (d,)}, same)
    return rules


def layer_map(config: MLRAConfig) -> dict[str, Rule]:
    """The rules of one layer, with names relative to it.

    Released latents come branch by branch (latent l is branch l // G of group l % G); the model keeps them group by
    group, so `order[s]` is the released number of stored latent s.
    """
    d, width = config.hidden_size, config.intermediate_size
    h, n, e, q = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank
    latents, groups, r = config.num_latent_heads, config.num_head_groups, config.latent_head_dim
    order = [branch * groups + group for group in range(groups) for branch in range(config.num_branches)]
    columns = h // groups * 2 * n  # per latent: every head it serves, [k_nope n | v n]

    kv_a = {"attn.kv_a_proj_with_mqa.weight": (latents * r + e, d)}  # rows: latents in released order, then RoPE
    if latents == 1:
        norms, kv_b = ["kv_a_layernorm"], {"attn.kv_b_proj.weight": (columns, r)}
    elif latents == 2:
        norms = ["kv_a_layernorm_1", "kv_a_layernorm_2"]
        kv_b = {"attn.kv_b_proj_1.weight": (columns, r), "attn.kv_b_proj_2.weight": (columns, r)}
    else:
        norms = [f"kv_a_layernorms.{latent}" for latent in range(latents)]
        kv_b = {"attn.kv_b_proj": (latents, r, columns)}  # a bare parameter, in x out

    def latent_rows(weight: Tensor) -> Tensor:
        return weight[: latents * r].unflatten(0, (latents, r))[order].flatten(0, 1)

    def rope_rows(weight: Tensor) -> Tensor:
        return weight[latents * r :]

    def stack_norms(*weights: Tensor) -> Tensor:
        return torch.stack([weights[latent] for latent in order])

    def stack_kv_b(*weights: Tensor) -> Tensor:
        if len(weights) == latents:
            return torch.cat([weights[latent] for latent in order])
        return weights[0][order].transpose(1, 2).flatten(0, 1)

    rules = {
        "input_layernorm.weight": Rule({"input_layernorm.weight": (d,)}, same),
        "self_attn.q_a_proj.weight": Rule({"attn.q_a_proj.weight": (q, d)}, same),
        "self_attn.q_a_layernorm.weight": Rule({"attn.q_a_layernorm.weight": (q,)}, same),
        "self_attn.q_b_proj.weight": Rule({"attn.q_b_proj.weight": (h * (n + e), q)}, same),
        "self_attn.kv_a_proj.weight": Rule(kv_a, latent_rows),
        "self_attn.k_rope_proj.weight": Rule(kv_a, rope_rows),
        "self_attn.kv_a_layernorm.weight": Rule({f"attn.{norm}.weight": (r,) for norm in norms}, stack_norms),
        "self_attn.kv_b_proj.weight": Rule(kv_b, stack_kv_b),
        "self_attn.o_proj.weight": Rule({"attn.c_proj.weight": (d, h * n)}, same),
        "post_attention_layernorm.weight": Rule({"post_attention_layernorm.weight": (d,)}, same),
        "mlp.gate_proj.weight": Rule({"mlp.c_fc1.weight": (width, d)}, same),
        "mlp.up_proj.weight": Rule({"mlp.c_fc2.weight": (width, d)}, same),
        "mlp.down_proj.weight": Rule({"mlp.c_proj.weight": (d, width)}, same),
    }
    if config.attn_output_gate:
        rules["self_attn.g_proj.weight"] = Rule({"attn.gated_proj.weight": (h * n, d)}, same)
    return rules


def check_keys(checkpoint: ReleasedCheckpoint, config: MLRAConfig, variant: str) -> None:
    """Raise UserError unless the checkpoint holds exactly the keys and shapes of `variant`, with tied embeddings."""
    expected = {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    for rule in name_map(config).values():
        expected |= rule.sources
    found = checkpoint.shapes
    layout = f"{variant} with {config.num_hidden_layers} layers"
    for problem, names in (
        ("missing key", [name for name in expected if name not in found]),
        ("unexpected key", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{problem} {names[0]}{more} in {checkpoint.folder}, read as {layout} from keys and shapes"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{name} has shape {found[name]}, expected {shape} by config.json and layout {layout}")
    embeddings = [checkpoint.read(name) for name in ("transformer.wte.weight", "lm_head.weight")]
    if not torch.equal(*embeddings) and not torch.allclose(*embeddings, rtol=0, atol=0, equal_nan=True):
        raise UserError("lm_head.weight differs from transformer.wte.weight; released models tie them")


def convert_tensors(checkpoint: ReleasedCheckpoint, config: MLRAConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under our name, one at a time (views of mapped files where nothing moves)."""
    for ours, rule in name_map(config).items():
        yield ours, rule.build(*(checkpoint.read(name) for name in rule.sources))
