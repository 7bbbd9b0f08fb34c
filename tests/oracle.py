"""An independent, slow implementation of MLRA in float64, written from the specification with explicit loops.

It shares no code with the package: one loop over layers, latents and heads, released latent numbering (latent l
belongs to group l mod G), an explicit causal mask and a complex-number RoPE. Tests compare everything else with it.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class OracleLayer:
    """Weights of one layer, all float64, linear maps as [in, out]."""

    q_a: torch.Tensor
    q_a_norm: torch.Tensor
    q_b: torch.Tensor
    kv_a: list[torch.Tensor]  # L of [d, r]
    kv_a_norm: list[torch.Tensor]  # L of [r]
    k_rope: torch.Tensor
    kv_b: list[torch.Tensor]  # L of [r, heads * (n + v)]
    out: torch.Tensor
    gate: torch.Tensor | None
    mlp: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    norms: tuple[torch.Tensor, torch.Tensor]


@dataclass
class Oracle:
    """A whole model; `forward` gives logits for one sequence of token ids."""

    num_heads: int
    num_groups: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    embedding: torch.Tensor
    final_norm: torch.Tensor
    head: torch.Tensor
    scaled: bool = True
    inv_freq: torch.Tensor | None = None  # [e / 2]; None for theta 10000
    eps: float = 1e-6
    layers: list[OracleLayer] = field(default_factory=list)

    def norm(self, x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def rotate(self, x, positions):
        half = self.rope_dim // 2
        out = torch.empty_like(x)
        for j in range(half):
            frequency = 10000.0 ** (-2.0 * j / self.rope_dim) if self.inv_freq is None else self.inv_freq[j]
            angle = positions.double() * frequency
            turned = torch.complex(x[:, j], x[:, j + half]) * torch.polar(torch.ones_like(angle), angle)
            out[:, j], out[:, j + half] = turned.real, turned.imag
        return out

    def attention(self, layer, x, positions, keep):
        """Head outputs before gate and output projection, [T, h * v], of the normed input x [T, d]."""
        length, width = x.shape
        num_latents = len(layer.kv_a)
        branches = num_latents // self.num_groups
        rank = layer.kv_a[0].shape[1]
        alpha_q = math.sqrt(width / layer.q_a.shape[1]) if self.scaled else 1.0
        alpha_kv = math.sqrt(width / rank) if self.scaled else 1.0
        alpha_attn = 1.0 / math.sqrt(branches) if self.scaled else 1.0
        tau = (self.nope_dim + self.rope_dim) ** -0.5
        per_head = self.nope_dim + self.rope_dim
        q = (self.norm(x @ layer.q_a, layer.q_a_norm) * alpha_q) @ layer.q_b
        k_rope = self.rotate(x @ layer.k_rope, positions)
        heads_per_group = self.num_heads // self.num_groups
        out = torch.zeros(length, self.num_heads * self.v_dim, dtype=torch.float64)
        for latent in range(num_latents):
            group = latent % self.num_groups
            c = self.norm(x @ layer.kv_a[latent], layer.kv_a_norm[latent]) * alpha_kv
            kv = c @ layer.kv_b[latent]
            for local in range(heads_per_group):
                i = group * heads_per_group + local
                q_i = q[:, i * per_head : (i + 1) * per_head]
                q_rope = self.rotate(q_i[:, self.nope_dim :], positions)
                k_v = kv[:, local * (self.nope_dim + self.v_dim) : (local + 1) * (self.nope_dim + self.v_dim)]
                k_nope, v = k_v[:, : self.nope_dim], k_v[:, self.nope_dim :]
                scores = tau * (q_i[:, : self.nope_dim] @ k_nope.T + q_rope @ k_rope.T)
                for t in range(length):
                    visible = [s for s in range(t + 1) if keep[s]]
                    if visible:
                        weights = torch.softmax(scores[t, visible], dim=0)
                        out[t, i * self.v_dim : (i + 1) * self.v_dim] += alpha_attn * (weights @ v[visible])
        return out

    def forward(self, input_ids, keep=None, positions=None):
        """Logits [T, vocab] of one sequence [T]; `keep` [T] False leaves a token out as padding."""
        length = len(input_ids)
        keep = [True] * length if keep is None else [bool(k) for k in keep]
        positions = torch.arange(length) if positions is None else positions
        hidden = self.embedding[input_ids]
        for layer in self.layers:
            x = self.norm(hidden, layer.norms[0])
            attended = self.attention(layer, x, positions, keep)
            if layer.gate is not None:
                attended = attended / (1 + torch.exp(-(x @ layer.gate)))
            hidden = hidden + attended @ layer.out
            x = self.norm(hidden, layer.norms[1])
            gate, up, down = layer.mlp
            activated = x @ gate
            hidden = hidden + (activated / (1 + torch.exp(-activated)) * (x @ up)) @ down
        return self.norm(hidden, self.final_norm) @ self.head.T


def oracle_of_model(model) -> Oracle:
    """The oracle with the weights of a package model, whose latents are stored group-major."""
    config = model.config
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    num_latents, branches = config.num_latent_heads, config.num_branches
    groups = num_latents // branches
    rank = config.kv_lora_rank // num_latents
    stored = [(latent % groups) * branches + latent // groups for latent in range(num_latents)]
    oracle = Oracle(
        num_heads=config.num_attention_heads,
        num_groups=groups,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        embedding=state["model.embed_tokens.weight"],
        final_norm=state["model.norm.weight"],
        head=state["lm_head.weight"],
        scaled=config.latent_scaling,
        inv_freq=model.model.rotary_emb.inv_freq.double(),  # rounded to float32, as the model has them
        eps=config.rms_norm_eps,
    )
    for index in range(config.num_hidden_layers):

        def weight(name, index=index):
            return state[f"model.layers.{index}.{name}.weight"]

        kv_a = weight("self_attn.kv_a_proj").view(num_latents, rank, -1)
        kv_b = weight("self_attn.kv_b_proj").view(num_latents, -1, rank)
        oracle.layers.append(
            OracleLayer(
                q_a=weight("self_attn.q_a_proj").T,
                q_a_norm=weight("self_attn.q_a_layernorm"),
                q_b=weight("self_attn.q_b_proj").T,
                kv_a=[kv_a[s].T for s in stored],
                kv_a_norm=[weight("self_attn.kv_a_layernorm")[s] for s in stored],
                k_rope=weight("self_attn.k_rope_proj").T,
                kv_b=[kv_b[s].T for s in stored],
                out=weight("self_attn.o_proj").T,
                gate=weight("self_attn.g_proj").T if config.attn_output_gate else None,
                mlp=tuple(weight(f"mlp.{part}_proj").T for part in ("gate", "up", "down")),
                norms=(weight("input_layernorm"), weight("post_attention_layernorm")),
            )
        )
    return oracle
