"""Every tolerance of the tests, in one place. They are limits of arithmetic, not of convenience: never loosen one."""

MATHEMATICS_ATOL = 1e-10
"""float64: the same mathematics in another order (values of order 1)."""

RELEASED_LOGITS_RTOL = 1e-5
"""float32: largest logit difference to the authors' code over the largest logit."""

LOSS_ATOL = 1e-6
"""float32: difference of a mean loss in nats."""

RELEASED_LOSS_RTOL = 1e-6
"""float32: difference of a mean loss to the authors' over theirs (of 16 nats, where one step of float32 is 1.9e-6)."""

CACHE_LOGITS_RATIO = 2e-3
"""float32: RMS of the difference over RMS of the reference, cached against full forwards."""

KERNEL_BF16_RATIO = 5e-3
"""bfloat16 kernel against a float32 reference, RMS ratio."""

QUANTIZED_CACHE_RATIO = 0.2
"""4-bit cache against the exact one, RMS ratio of logits."""

FP8_ROWS_RATIO = 0.1
"""Latents cached in eight bits against exact ones, RMS ratio of a small random model's logits."""

FP8_LOSS_RTOL = 1e-2
"""Latents cached in eight bits against exact ones, mean loss of a small random model, relative."""

FP8_FUSED_RATIO = 0.02
"""float32, latents in eight bits: the fused step against the modules, a few of whose numbers round the other way."""

FUSED_FLOAT32_RATIO = 1e-5
"""float32: the fused decoding step against the modules, RMS ratio."""

FUSED_BFLOAT16_RATIO = 4e-2
"""bfloat16: the fused decoding step, which rounds less, against the modules, RMS ratio of logits."""

FP8_WEIGHTS_RATIO = 3e-2
"""Normally distributed weights as e4m3 (a mantissa of three bits, so up to 1/16 off) against themselves, RMS ratio."""

DEMO_PERPLEXITY_RTOL = 1e-3
DEMO_LAST_WORDS_RTOL = 1e-2  # the perplexity of 60 words in bfloat16, about 10 nats each
"""bfloat16 model on another processor or in other batches than the card's figure, relative."""

PARALLEL_LOGITS_ATOL = 1e-5
"""float32: largest logit difference, several ranks against one process (logits of order 1)."""

PARALLEL_GRADIENT_RTOL = 1e-4
"""float32: norm of a gradient's difference over its norm, several ranks against one process."""
