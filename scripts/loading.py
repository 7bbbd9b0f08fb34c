"""Load what a model folder holds, checked: the one way in which every command reads a model and its tokenizer.

`from_pretrained` by itself only warns of tensors that are missing or left over, and gives the former random values.
Here whatever does not fit is refused with one line, before anything is computed.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

import modeling_mlra  # noqa: F401  registers the model with the Auto classes, so that no remote code has to be trusted
from modeling_mlra.step_maps_mlra import has_scales
from scripts import cli
from scripts.cli import UserError, blame, check_model_folder, first_line, indexed_files, read_json

DTYPES = {name: getattr(torch, name) for name in cli.DTYPES}
GENERATION_FILE = "generation_config.json"
# Generation settings that are words
GENERATION_TEXTS = ("cache_implementation", "early_stopping", "stop_strings", "transformers_version")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# Any of these holds a vocabulary; the others that belong to a tokenizer go with it
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        UserError: when there is no such folder, or its configuration describes no model that can be made.
    """
    check_model_folder(folder)
    with blame(f"{folder / 'config.json'} cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_config(config)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return config


def check_config(config: PreTrainedConfig) -> None:
    """Refuse values that the library would meet much later, or never name.

    Raises:
        ValueError: naming the field and its value.
    """
    dtype = config.dtype
    if dtype is not None and dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"dtype {str(dtype).removeprefix('torch.')!r} is none of {', '.join(DTYPES)}")
    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise ValueError(f"hidden_act {activation!r} is no activation the library has, such as 'silu'")
    rope = getattr(config, "rope_parameters", None) or {}
    for name, value in rope.items():
        if name in ("rope_type", "type"):
            if value != "default" and value not in ROPE_INIT_FUNCTIONS:
                known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
                raise ValueError(f"{name} {value!r} of rope_parameters is none of {known}")
        elif isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} {value!r} of rope_parameters is no number")
    theta = rope.get("rope_theta", 1)
    if isinstance(theta, (int, float)) and theta <= 0:
        raise ValueError(f"rope_theta {theta!r} must be positive")


def load_model(folder: Path, published: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The causal LM of `folder`, ready to evaluate: in float32 for the published numerics, else as it is stored.

    Args:
        kwargs: of `from_pretrained`, such as `dtype`.

    Raises:
        UserError: as `load_config`, and for weights that do not fit it.
    """
    config = load_config(folder)
    kwargs = {"dtype": torch.float32 if published else "auto", **kwargs}
    load_generation_config(folder)
    check_files(folder, config.tie_word_embeddings)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what does not fit, said here in one line
    try:
        with blame(f"{folder} cannot be loaded"):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **kwargs,
            )
    finally:
        logging.set_verbosity(verbosity)
    refuse_misfit(folder, report)
    stored = getattr(config, "quantization_config", None) or {}
    if isinstance(kwargs["dtype"], torch.dtype) and "fp8" in str(stored) and not any(map(has_scales, model.modules())):
        # transformers before 5.24, where it widens FP8 weights, leaves the others in the dtype they are stored in
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kwargs["dtype"])
    return model.eval()


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights do not fit its configuration, without loading them.

    Raises:
        UserError: as `load_model`.
    """
    load_model(folder, device_map="meta")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads, none in a folder of another format.

    Raises:
        UserError: as `indexed_files`.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in indexed_files(folder / INDEX)] if (folder / INDEX).is_file() else []


def check_files(folder: Path, tied: bool) -> None:
    """Refuse weight files that are damaged or contradict each other.

    Args:
        tied: whether the output embedding is the input embedding.

    Raises:
        UserError: for a file that is truncated, an index that places tensors where they are not, and two embeddings
            that differ though they are tied.
    """
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                file_of |= dict.fromkeys(stored.keys(), file)
        except SafetensorError as error:
            raise UserError(
                f"{folder} cannot be loaded: {file} is truncated or no safetensors file: {error}"
            ) from error
    if file_of and not (folder / WEIGHTS).is_file():
        placed = {name: folder / Path(file).name for name, file in read_json(folder / INDEX)["weight_map"].items()}
        for name, file in placed.items():
            if file_of.get(name) != file:
                raise UserError(f"{folder} cannot be loaded: {INDEX} places {name} in {file.name}, which lacks it")
        for name in file_of:
            if name not in placed:
                raise UserError(f"{folder} cannot be loaded: {INDEX} does not place {name}")
    if tied and file_of.keys() >= set(EMBEDDINGS):
        one, other = (read_tensor(file_of[name], name) for name in EMBEDDINGS)
        if not torch.equal(one, other):
            raise UserError(
                f"{folder} cannot be loaded: {EMBEDDINGS[1]} differs from {EMBEDDINGS[0]}, and config.json ties them: "
                "set tie_word_embeddings to false"
            )


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file."""
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(name)


def refuse_misfit(folder: Path, report: dict) -> None:
    """Raise UserError for what a loading report of `from_pretrained` says does not fit.

    Args:
        report: its `missing_keys`, `unexpected_keys`, `mismatched_keys` and `error_msgs`.
    """
    where = f"{folder} cannot be loaded: the weights do not fit config.json:"

    def more(names: list) -> str:
        return f" ({len(names)} such tensors)" if len(names) > 1 else ""

    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise UserError(f"{where} {name} is {tuple(stored)}, not {tuple(expected)}{more(mismatched)}")
    for key, problem in (("missing_keys", "is missing"), ("unexpected_keys", "has no place in the model")):
        if names := sorted(report[key], key=lambda name: (name == EMBEDDINGS[1], name)):  # tied to what is missing
            raise UserError(f"{where} {names[0]} {problem}{more(names)}")
    if report.get("error_msgs"):
        raise UserError(f"{where} {first_line(ValueError(report['error_msgs'][0]))}")


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation settings of a folder, None where it has none; `from_pretrained` takes a broken file for none.

    Raises:
        UserError: when the file cannot be read, or has token ids that are none.
    """
    file = folder / GENERATION_FILE
    if not file.exists():
        return None
    stored, known = read_json(file), GenerationConfig().to_dict()
    with blame(f"{file} cannot be used"):
        for name, value in stored.items():
            if isinstance(value, str) and name in known and name not in GENERATION_TEXTS:
                raise ValueError(f"{name} {value!r} is text where a number or a list belongs")
        config = GenerationConfig.from_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"):
            value = getattr(config, name, None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
                raise ValueError(f"{name} {value!r} is neither a token id nor a list of them")
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own, or what is left of one."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Args:
        vocab_size: embedding rows of the model it is for.

    Raises:
        UserError: when there is none, it or its chat template cannot be read, or it has more tokens than the model.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder} has no tokenizer.json: give a model folder or one with a tokenizer")
    with blame(f"the tokenizer of {folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokens = len(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template of {folder} cannot be read: {first_line(error)}") from error
        except Exception:  # a template may want other messages than this one
            pass
    if vocab_size is not None and tokens > vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokens} tokens, the model {vocab_size} embedding rows: "
            "resize the model's embeddings (resize_token_embeddings), or give its own tokenizer"
        )
    return tokenizer
