"""Names of the released attentions, and of formats of weights; imports nothing, so that a command line can be read at
once."""

ATTENTIONS = {  # released name: (latent heads L, branches B)
    "mla": (1, 1),
    "gla_2": (2, 1),
    "gla_4": (4, 1),
    "mlra_2": (4, 2),
    "mlra_4": (4, 4),
}
VARIANTS = (*ATTENTIONS, *(f"{name}_gated" for name in ATTENTIONS))
WEIGHTS = {"bfloat16": None, "fp8": (128, 128), "fp8-rows": (1, 2**30), "fp8-whole": (2**30, 2**30)}
"""Name of a format of weights -> rows and columns that share a scale."""
