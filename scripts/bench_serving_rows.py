"""Rows made up for prompts, so that `scripts.bench_serving` times decoding behind long ones without running them."""

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class DummyRows(DecodeBenchConnector):
    """vLLM's own connector for that, but for requests that ask for their prefill."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.kv_transfer_params:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
