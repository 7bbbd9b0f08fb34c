"""Times of the calls that everybody makes: `generate()` without options, beams, prompt lookup, first tokens.

`python -m scripts.bench_generate --user-calls` runs it for every model. A time per token is the difference between a
long and a short call over the difference of their lengths; a whole call is timed from call to tokens on the host.
Every call is warmed up by two like it, whose own times are kept as "first" and "second".

"Not captured" is the library's loop (`disable_compile=True`): as it is, with a hook on every layer, and with hooks
that look into every layer, at its MLP. "Assisted" has an assistant of the demo model's shape and kind that agrees half
of the time by construction, since random weights never do: a processor of its logits puts forward the token that the
model itself chose in an earlier greedy call at every position where a fixed draw says so, and another one elsewhere.
It drafts three tokens at a time; `tokens_per_round` says how many the model then wrote, 1 + 1/2 + 1/4 + 1/8 if all
goes as constructed.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import LlamaForCausalLM, LogitsProcessor

from modeling_mlra import MLRAConfig, MLRAForCausalLM
from tests.paths import DEMO

SHORT, LONG, REPEATS = 32, 96, 3


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call, its work on the GPU included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def per_token(call: Callable[[int], object], short: int = SHORT, long: int = LONG) -> dict:
    """Milliseconds per token of `call(new_tokens)`."""
    first = timed(lambda: call(short))
    timed(lambda: call(long))
    times = [(timed(lambda: call(long)) - timed(lambda: call(short))) / (long - short) for _ in range(REPEATS)]
    return {"ms_per_token": statistics.median(times), "spread": max(times) - min(times), "first_call_ms": first}


def whole(call: Callable[[], object]) -> dict:
    """Milliseconds of the first two calls, and of later ones."""
    first, second, *later = [timed(call) for _ in range(2 + REPEATS)]
    return {"ms": statistics.median(later), "first_call_ms": first, "second_call_ms": second}


@contextmanager
def hooked(modules: list[nn.Module]) -> Iterator[None]:
    """Context in which a hook that does nothing looks at each of some modules."""
    hooks = [module.register_forward_hook(lambda *_: None) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class HalfRight(LogitsProcessor):
    """Makes an assistant put forward the token of `sequence` `[S]` at about half of the positions, else another."""

    def __init__(self, sequence: torch.Tensor, vocab_size: int):
        self.sequence, self.vocab_size = sequence, vocab_size
        draws = torch.rand(len(sequence), generator=torch.Generator().manual_seed(0))
        self.is_right = (draws < 0.5).tolist()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = min(input_ids.shape[1], len(self.sequence) - 1)
        token = (self.sequence[position] + (not self.is_right[position])) % self.vocab_size
        return torch.full_like(scores, -torch.inf).index_fill_(1, token.view(1), 0.0)


def demo_sized(model: nn.Module) -> nn.Module:
    """A model of the same kind with the demo model's sizes, the vocabulary of `model` and random weights."""
    config = MLRAConfig.from_pretrained(DEMO)
    sizes = {
        name: getattr(config, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    if isinstance(model, MLRAForCausalLM):
        sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config.update({**sizes, "vocab_size": model.config.vocab_size})
        made: nn.Module = MLRAForCausalLM(config)
    elif isinstance(model, LlamaForCausalLM):
        made = LlamaForCausalLM(
            type(model.config)(**model.config.to_dict() | sizes | {"num_key_value_heads": 4, "head_dim": 32})
        )
    else:
        raise ValueError(f"no assistant for a {type(model).__name__}")
    return made.to(model.lm_head.weight).eval()


def assisted(model: nn.Module, ids: torch.Tensor, generate: Callable, short: int = SHORT, long: int = LONG) -> dict:
    """Milliseconds per token with the assistant that agrees half of the time."""
    assistant, rounds = demo_sized(model), []
    settings = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    assistant.generation_config.update(**settings, assistant_confidence_threshold=0.0)
    rule = HalfRight(generate(ids, long + 1)[0], model.config.vocab_size)
    own = assistant._get_logits_processor

    def with_rule(*args, **kwargs):
        rounds.append(1)
        processors = own(*args, **kwargs)
        processors.append(rule)
        return processors

    assistant._get_logits_processor = with_rule
    result = per_token(lambda new: generate(ids, new, assistant_model=assistant), short, long)
    rounds.clear()
    generate(ids, long, assistant_model=assistant)
    return result | {"tokens_per_round": long / len(rounds)}


def cases(model, vocab_size: int, lengths: list[int]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name of each call, and what measures it."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def prompt(batch: int, length: int) -> torch.Tensor:
        return torch.randint(vocab_size, (batch, length), device="cuda", generator=generator)

    def generate(ids: torch.Tensor, new_tokens: int, **options):
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    static = {"cache_implementation": "static"}
    for batch in (1, 8):
        ids = prompt(batch, 128)
        yield f"default, batch {batch}", lambda ids=ids: per_token(lambda n: generate(ids, n))
        yield f"static, batch {batch}", lambda ids=ids: per_token(lambda n: generate(ids, n, **static))
        layers = list(model.model.layers)
        for name, looked_at in (
            ("", []), (", hooks on layers", layers), (", hooks inside", [layer.mlp for layer in layers])
        ):  # fmt: skip

            def library_loop(ids: torch.Tensor = ids, looked_at: list[nn.Module] = looked_at) -> dict:
                with hooked(looked_at):
                    return per_token(lambda n: generate(ids, n, disable_compile=True), 8, 24)

            yield f"not captured{name}, batch {batch}", library_loop
    one, repeating = prompt(1, 128), prompt(1, 32).repeat(1, 4)
    yield "sampling", lambda: per_token(lambda n: generate(one, n, do_sample=True))
    yield "whole call of 8 tokens", lambda: whole(lambda: generate(one, 8))
    yield "4 beams", lambda: per_token(lambda n: generate(one, n, num_beams=4), 8, 24)
    yield (
        "prompt lookup of 8 tokens, repeating text",
        lambda: per_token(lambda n: generate(repeating, n, prompt_lookup_num_tokens=8)),
    )
    yield "assisted, half agreed", lambda: assisted(model, one, generate)
    for length in lengths:
        ids = prompt(1, length)
        yield f"first token behind {length}", lambda ids=ids: whole(lambda: generate(ids, 1))


def measure(model, vocab_size: int, lengths: list[int], only: str, report: Callable[[dict], None]) -> None:
    """Measure every call whose name the pattern `only` is found in; one that fails leaves the others their figures."""
    for name, run in cases(model, vocab_size, lengths):
        if not re.search(only, name):
            continue
        torch.cuda.reset_peak_memory_stats()
        try:
            case = run()
        except Exception as error:
            case = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        report({"call": name, **case, "peak_GiB": torch.cuda.max_memory_allocated() / 2**30})
