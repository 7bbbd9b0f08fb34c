"""Steps that only decode, by the package's fused kernels: on vLLM's own parameters, pages and CUDA graphs.

One new token of each of a few requests reads every weight once and computes almost nothing; module by module it takes
twice as long as in the kernels of `modeling_mlra.step_mlra`. vLLM runs such steps as a full CUDA graph, which holds
whatever the model's forward does: so the choice is made there, outside of what is compiled. Everything else, prompts
above all, takes the compiled modules.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from modeling_mlra import MLRAForCausalLM
from modeling_mlra.device_mlra import compiled_ahead
from modeling_mlra.step_maps_mlra import SCALED_DTYPES
from modeling_mlra.step_mlra import MAX_SEQUENCES, obstacle

from .metadata import MLRAMetadata
from .step import PagedStep, PagedTokens

SCALE = "weight_scale"  # of a weight that vLLM quantized online, one for all of it
logger = init_logger(f"vllm.{__name__}")


class FusedDecode:
    """The model's layers as fused steps, where nothing stands in the way.

    Args:
        model: the plugin's decoder stack, before its weights are loaded.
        vllm_config: the engine's settings.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig):
        self.model, self.vllm_config = model, vllm_config
        self.made_as = {name: (x.shape, x.dtype) for name, x in model.layers.named_parameters()}
        self.sizes: Collection[int] | None = None  # numbers of requests that run fused, once it is decided
        self.steps: dict[int, PagedStep] = {}
        self.ran: Counter[int] = Counter()  # how often for so many requests; not counted when a graph replays

    def __call__(self, input_ids, positions, inputs_embeds) -> torch.Tensor | None:
        """Normed hidden states `[M, d]` of a step that runs fused, None of any other; arguments of the model."""
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict) or context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            return None
        attention = [layer.self_attn.attn for layer in self._layers()]
        metadata = context.attn_metadata[attention[0].layer_name]
        number = len(metadata.seq_lens)
        if metadata.packs or not number == len(metadata.slot_mapping) == len(positions):
            return None
        if self.sizes is None:
            self._decide()
            self._compile(metadata.block_table)
        if number not in self.sizes:
            return None
        self.ran[number] += 1
        hidden = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        tokens = PagedTokens(
            positions, metadata.slot_mapping, metadata.seq_lens, metadata.block_table, attention[0].page_size
        )
        hidden = self._step(number)(hidden, [layer.pool for layer in attention], tokens)
        norm = self.model.norm
        return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def _step(self, number: int) -> PagedStep:
        if number not in self.steps:
            ranks = self.vllm_config.parallel_config.tensor_parallel_size
            add_up = tensor_model_parallel_all_reduce if ranks > 1 else None
            row_format = self._layers()[0].self_attn.attn.row_format
            self.steps[number] = PagedStep(self.package, row_format, number, ranks, add_up)
        return self.steps[number]

    def _compile(self, block_table: torch.Tensor) -> None:
        """The kernels of all these steps, and those by which requests decode beside prompts: several at a time, and
        none while requests wait.

        Args:
            block_table: of a step, for its width and strides.
        """
        attention = [layer.self_attn for layer in self._layers()]
        pools, of_first = [layer.attn.pool for layer in attention], attention[0]
        most = self.vllm_config.scheduler_config.max_num_seqs
        with compiled_ahead(block_table.device) as works:
            for number in sorted({*self.sizes, *numbers_with_kernels_of_their_own(most)} if works else ()):
                table = block_table.new_zeros(number, block_table.stride(0))[:, : block_table.shape[1]]
                lengths = table.new_zeros(number)
                nothing = MLRAMetadata(lengths.long(), table, lengths)
                of_first.attn.decode_nothing(of_first.kv_b_proj.weight, nothing)
                if number in self.sizes:
                    page_size = of_first.attn.page_size
                    tokens = PagedTokens(nothing.slot_mapping, nothing.slot_mapping, lengths, table, page_size)
                    hidden = of_first.kv_b_proj.weight.new_zeros(number, self.model.config.hidden_size)
                    self._step(number)(hidden, pools, tokens)

    def _layers(self) -> list[nn.Module]:
        return list(self.model.layers[self.model.start_layer : self.model.end_layer])

    def _decide(self) -> None:
        """Once, when weights are loaded and graphs about to be captured: which steps run fused, and why others not."""
        self.sizes = []
        sizes = graph_sizes(self.vllm_config)
        trouble = self._obstacle() if sizes else "no full CUDA graph of decoding is captured, which would make it fast"
        if trouble is None:
            self.package = package_model(self.model, self.vllm_config)
            trouble = obstacle(self.package, max(sizes))
        if trouble is not None:
            logger.info_once(f"MLRA decodes module by module, not by fused kernels: {trouble}")
            return
        self.sizes = sizes
        logger.info_once(f"MLRA decodes up to {max(sizes)} requests at a time by fused kernels")

    def _obstacle(self) -> str | None:
        """What of vLLM's stands in the way, or None."""
        parallel, dtype = self.vllm_config.parallel_config, self.vllm_config.model_config.dtype
        if parallel.pipeline_parallel_size > 1:
            return f"pipeline_parallel_size={parallel.pipeline_parallel_size} splits the layers"
        if parallel.use_ubatching:
            return "the batch is cut into micro-batches"
        row_format = self._layers()[0].self_attn.attn.row_format
        if row_format.dtype != dtype:
            return f"cached rows are of {row_format.dtype}, weights of {dtype}"
        for name, weight in weights_by_name(self.model.layers):
            made_as = self.made_as.get(name)
            if name.endswith(SCALE):
                known = weight.numel() == 1 and weight.dtype == torch.float32
            elif weight.dtype in SCALED_DTYPES:
                known = made_as is not None and made_as[0] == weight.shape
            else:
                known = made_as == (weight.shape, weight.dtype)
            if not known or not weight.is_contiguous():
                return f"vLLM made {name} another one (quantization, adapters, packing)"
        return None


def numbers_with_kernels_of_their_own(most: int) -> list[int]:
    """Of up to `most` requests: the decode kernels are compiled for so many of them as a power of two covers, and for
    one of two ways to divide the work that these share."""
    powers = [1 << power for power in range((most - 1).bit_length() + 1)]
    return sorted({number for power in powers for number in (power // 2 + 1, min(power, most))})


def graph_sizes(vllm_config: VllmConfig) -> list[int]:
    """Numbers of requests whose decoding vLLM captures as a full graph and the fused step takes. Each is compiled for
    itself, so no other number is worth it."""
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode.decode_mode() != CUDAGraphMode.FULL:
        return []
    return [size for size in compilation.cudagraph_capture_sizes or () if size <= MAX_SEQUENCES]


def package_model(model: nn.Module, vllm_config: VllmConfig) -> MLRAForCausalLM:
    """The package's own model made of the parameters of vLLM's layers, not of copies, for the fused step to read; what
    that does not read has no numbers (meta device)."""
    config = copy.deepcopy(vllm_config.model_config.hf_config)
    with torch.device("meta"):
        result = MLRAForCausalLM(config).to(vllm_config.model_config.dtype)
    result.model.rotary_emb = model.rotary_emb
    for name, weight in weights_by_name(model.layers):
        name = name.replace(SCALE, "weight_scale_inv")
        for part, of_part in gate_and_up(name, weight) if "gate_up_proj" in name else [(name, weight)]:
            holder, _, key = part.rpartition(".")
            parameter = nn.Parameter(of_part, requires_grad=False)
            setattr(result.model.layers.get_submodule(holder), key, parameter)
    result.model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.data, requires_grad=False)
    return result.eval()


def weights_by_name(layers: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of vLLM's layers, weights `[n, K]`: those that it quantized to 8 bits it keeps as `[K, n]`."""
    for name, parameter in layers.named_parameters():
        yield name, parameter.data.t() if parameter.dtype in SCALED_DTYPES else parameter.data


def gate_and_up(name: str, joined: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The halves of a joined weight by their names in the package's model; a scale is that of both."""
    halves = joined.chunk(2) if joined.numel() > 1 else (joined, joined)
    for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
        yield name.replace("gate_up_proj", part), half
