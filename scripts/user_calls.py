"""Times of the calls that everybody makes: `generate()` without options, beams, prompt lookup, first tokens.

`python -m scripts.bench_generate --user-calls` runs it for every model. A time per token is the difference between a
long and a short call over the difference of their lengths; a whole call is timed from call to tokens on the host.
Every call is warmed up by two like it, whose own times are kept as "first" and "second".
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator

import torch

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
        yield (
            f"not captured, batch {batch}",
            lambda ids=ids: per_token(lambda n: generate(ids, n, disable_compile=True), 8, 24),
        )
    one, repeating = prompt(1, 128), prompt(1, 32).repeat(1, 4)
    yield "sampling", lambda: per_token(lambda n: generate(one, n, do_sample=True))
    yield "whole call of 8 tokens", lambda: whole(lambda: generate(one, 8))
    yield "4 beams", lambda: per_token(lambda n: generate(one, n, num_beams=4), 8, 24)
    yield (
        "prompt lookup of 8 tokens, repeating text",
        lambda: per_token(lambda n: generate(repeating, n, prompt_lookup_num_tokens=8)),
    )
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
