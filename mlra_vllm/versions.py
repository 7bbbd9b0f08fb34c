"""What differs between the versions of vLLM that the plugin runs on (0.26 to 0.32); no other file knows.

Code here tells versions apart by what they have, not by their number.
"""

from vllm.config import CompilationConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

try:
    from vllm.v1.kv_cache_layout import KVCacheLayout
except ImportError:  # vllm < 0.28: the cache of a layer is what `get_kv_cache_shape` says
    KVCacheLayout = None

# The decode kernel for Hopper copies tiles of 64 rows or more, each out of one page
KERNEL_BLOCK_SIZE = 64 if current_platform.is_cuda() else 16


class CompactBackend(AttentionBackend):
    """A backend whose rows lie one after another within a layer: its cache can be viewed as `[rows, row]`."""

    accept_output_buffer = True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(KERNEL_BLOCK_SIZE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, block_size, head_size

    @classmethod
    def supported_kv_cache_layouts(cls):
        return tuple(layout for layout in KVCacheLayout if layout.is_layer_compact)

    @staticmethod
    def use_cascade_attention(*args, **kwargs) -> bool:
        return False


def split_graph_at(operator: str) -> None:
    """Let piecewise compilation end a graph before `operator` ("namespace::name"), as at vLLM's own attention."""
    if operator not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operator)


def flash_attention(head_size: int, head_size_v: int):
    """FlashAttention's `flash_attn_varlen_func` for these widths with its version filled in, or None without it."""
    if not current_platform.is_cuda():
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        return None
    version = get_flash_attn_version()
    if version is None or (version < 3 and head_size != head_size_v):
        return None

    def attend(*args, **kwargs):
        return flash_attn_varlen_func(*args, fa_version=version, **kwargs)

    return attend
