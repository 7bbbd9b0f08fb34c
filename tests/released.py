"""Random checkpoints in the authors' released form, of any size, and the oracle that reads them.

Written from the specification of that form and apart from the converter: one list of released keys here, one table of
both formats there.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracle import Oracle, OracleLayer

LATENTS_AND_BRANCHES = {"mla": (1, 1), "gla_2": (2, 1), "gla_4": (4, 1), "mlra_2": (4, 2), "mlra_4": (4, 4)}


@dataclass(frozen=True)
class Released:
    """Sizes of a released model; its attention is `variant`, one of the five names."""

    variant: str = "mlra_2"
    gated: bool = False
    n_layer: int = 2
    n_head: int = 12
    n_embd: int = 40
    intermediate_size: int = 36
    q_lora_rank: int = 14
    kv_lora_rank: int = 48
    qk_nope_head_dim: int = 10
    qk_rope_head_dim: int = 6
    block_size: int = 64
    vocab_size: int = 300

    def config(self) -> dict:
        sizes = {name: value for name, value in vars(self).items() if name not in ("variant", "gated")}
        return {"architectures": ["GPT"], "model_type": "gpt2", "bias": False, "dropout": 0.0, **sizes}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{released key: shape}."""
        latents, branches = LATENTS_AND_BRANCHES[self.variant]
        d, h, n, e, q = self.n_embd, self.n_head, self.qk_nope_head_dim, self.qk_rope_head_dim, self.q_lora_rank
        r, heads_per_latent = self.kv_lora_rank // latents, h * branches // latents
        attention = {
            "q_a_proj.weight": (q, d),
            "q_a_layernorm.weight": (q,),
            "q_b_proj.weight": (h * (n + e), q),
            "kv_a_proj_with_mqa.weight": (self.kv_lora_rank + e, d),
            "c_proj.weight": (d, h * n),
        }
        if self.gated:
            attention["gated_proj.weight"] = (h * n, d)
        if latents == 1:
            attention |= {"kv_a_layernorm.weight": (r,), "kv_b_proj.weight": (h * 2 * n, r)}
        elif latents == 2:
            for number in (1, 2):
                attention[f"kv_a_layernorm_{number}.weight"] = (r,)
                attention[f"kv_b_proj_{number}.weight"] = (h * n, r)
        else:
            attention |= {f"kv_a_layernorms.{latent}.weight": (r,) for latent in range(latents)}
            attention["kv_b_proj"] = (latents, r, heads_per_latent * 2 * n)
        shapes = {"transformer.wte.weight": (self.vocab_size, d)}
        for layer in range(self.n_layer):
            prefix = f"transformer.h.{layer}."
            shapes |= {f"{prefix}attn.{name}": shape for name, shape in attention.items()}
            shapes[prefix + "mlp.c_fc1.weight"] = shapes[prefix + "mlp.c_fc2.weight"] = (self.intermediate_size, d)
            shapes[prefix + "mlp.c_proj.weight"] = (d, self.intermediate_size)
            shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (d,)
        return shapes | {"layernorm.weight": (d,), "lm_head.weight": (self.vocab_size, d)}

    def random_state(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Weights large enough that a wrong path shows in the logits; `lm_head` is the embedding itself."""
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in self.shapes().items()}
        return state | {"lm_head.weight": state["transformer.wte.weight"]}


def write_released(folder: Path, sizes: Released, state: dict, num_shards: int = 1) -> Path:
    """Write `state` into `folder` as the authors do; layers may straddle shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes.config()))
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.bin"
        names = [name for i, name in enumerate(state) if i * num_shards // len(state) == shard]
        torch.save({name: state[name].clone() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def oracle_of_released(sizes: Released, state: dict[str, torch.Tensor], scaled: bool = True) -> Oracle:
    """The oracle with weights in released form: the same numbering of latents, so nothing is reordered."""
    latents, branches = LATENTS_AND_BRANCHES[sizes.variant]
    rank, e = sizes.kv_lora_rank // latents, sizes.qk_rope_head_dim
    state = {name: tensor.double() for name, tensor in state.items()}
    oracle = Oracle(
        num_heads=sizes.n_head,
        num_groups=latents // branches,
        nope_dim=sizes.qk_nope_head_dim,
        rope_dim=e,
        v_dim=sizes.qk_nope_head_dim,
        embedding=state["transformer.wte.weight"],
        final_norm=state["layernorm.weight"],
        head=state["lm_head.weight"],
        scaled=scaled,
        inv_freq=(1.0 / 10000.0 ** (torch.arange(0, e, 2, dtype=torch.float32) / e)).double(),
    )
    for layer in range(sizes.n_layer):
        w = {name.removeprefix(f"transformer.h.{layer}."): tensor for name, tensor in state.items()}
        kv_a = w["attn.kv_a_proj_with_mqa.weight"]
        if latents == 1:
            kv_b, norms = [w["attn.kv_b_proj.weight"].T], [w["attn.kv_a_layernorm.weight"]]
        elif latents == 2:
            kv_b = [w[f"attn.kv_b_proj_{number}.weight"].T for number in (1, 2)]
            norms = [w[f"attn.kv_a_layernorm_{number}.weight"] for number in (1, 2)]
        else:
            kv_b, norms = list(w["attn.kv_b_proj"]), [w[f"attn.kv_a_layernorms.{i}.weight"] for i in range(latents)]
        oracle.layers.append(
            OracleLayer(
                q_a=w["attn.q_a_proj.weight"].T,
                q_a_norm=w["attn.q_a_layernorm.weight"],
                q_b=w["attn.q_b_proj.weight"].T,
                kv_a=[kv_a[latent * rank : (latent + 1) * rank].T for latent in range(latents)],
                kv_a_norm=norms,
                k_rope=kv_a[latents * rank :].T,
                kv_b=kv_b,
                out=w["attn.c_proj.weight"].T,
                gate=w["attn.gated_proj.weight"].T if sizes.gated else None,
                mlp=(w["mlp.c_fc1.weight"].T, w["mlp.c_fc2.weight"].T, w["mlp.c_proj.weight"].T),
                norms=(w["input_layernorm.weight"], w["post_attention_layernorm.weight"]),
            )
        )
    return oracle
