"""Whether every number of ranks generates the tokens of one rank, by every way to decode."""

import time

import torch
import transformers

from modeling_mlra import MLRAConfig
from modeling_mlra.generation_mlra import captured_decodes
from scripts.bench_tp_models import build


def measure_tokens(config: MLRAConfig, meshes: dict, new_tokens: int, device: torch.device) -> dict:
    """Greedy tokens of every size compared with one rank's: in float32 by every way to decode, in bfloat16 fused.

    In float32 all tokens are to be the same. In bfloat16 sums are rounded in another order, and tokens differ from
    the first near tie on: the tokens before it are counted, and their logits compared.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (2, 48), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    ways = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "static, captured": {"cache_implementation": "static"},
    }
    reference: dict[str, torch.Tensor] = {}
    result: dict = {}
    for size, mesh in meshes.items():
        config.decode_implementation = "torch"  # the kernels are made for 16-bit numbers
        model = build(config, mesh, torch.float32, device)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        reference.setdefault("logits", logits)
        result[str(size)] = {"logits_difference": (logits - reference["logits"]).abs().max().item(), "same": {}}
        for way, extra in ways.items():
            tokens = model.generate(ids, attention_mask=mask, **options, **extra)
            reference.setdefault("tokens", tokens)
            result[str(size)]["same"][way] = torch.equal(tokens, reference["tokens"])
        del model
        config.decode_implementation = "auto"
        model = build(config, mesh, torch.bfloat16, device)
        before = captured_decodes["fused"]
        output = model.generate(  # one sequence, so that the kernels are those of the decode part
            ids[:1], **options, **ways["static, captured"], output_logits=True, return_dict_in_generate=True
        )
        tokens, logits = output.sequences[0, ids.shape[1] :], torch.cat(output.logits)
        reference.setdefault("tokens16", tokens)
        reference.setdefault("logits16", logits)
        same = int((tokens == reference["tokens16"]).int().cumprod(0).sum())
        compared = slice(min(same + 1, new_tokens))  # the logits behind equal tokens
        difference = (logits - reference["logits16"])[compared].pow(2).mean().sqrt()
        result[str(size)]["bfloat16"] = {
            "step": "fused" if captured_decodes["fused"] > before else "modules",
            "tokens_before_the_first_difference": same,
            "logits_ratio": (difference / reference["logits16"][compared].pow(2).mean().sqrt()).item(),
        }
        del model
    return {
        "layers": config.num_hidden_layers,
        "logits_std": reference["logits"].std().item(),
        "new_tokens": new_tokens,
        "sizes": result,
    }


def measure_compiled(config: MLRAConfig, mesh, new_tokens: int, device: torch.device) -> dict:
    """Greedy tokens with the library's compiled decoding against plain calls, on this rank's share."""
    model = build(config, mesh, torch.float32, device)
    model.config.decode_implementation = "torch"
    ids = torch.arange(1, 25, device=device)[None]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options, disable_compile=True)
    started = time.perf_counter()
    compile_config = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    compile_config._compile_all_devices = True
    try:
        compiled = model.generate(ids, **options, compile_config=compile_config)
    except Exception as error:  # whatever the compiler raises is the result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"same": torch.equal(compiled, expected), "seconds": time.perf_counter() - started}
