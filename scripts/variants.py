"""Names of the released attentions; imports nothing, so that a command line can be read at once."""

ATTENTIONS = {  # released name: (latent heads L, branches B)
    "mla": (1, 1),
    "gla_2": (2, 1),
    "gla_4": (4, 1),
    "mlra_2": (4, 2),
    "mlra_4": (4, 4),
}
VARIANTS = (*ATTENTIONS, *(f"{name}_gated" for name in ATTENTIONS))
