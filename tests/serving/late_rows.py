"""A connector of `test_connectors`, which vLLM imports by name."""

from scripts.bench_serving_rows import DummyRows


class LateRows(DummyRows):
    """Keeps a prompt's rows of every layer, and brings them to the next requests' blocks when the layer waits."""

    kept: dict = {}

    def start_load_kv(self, forward_context, **kwargs) -> None:
        """Nothing is there yet."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        cache = self.connector_worker.kv_caches[layer_name]
        size = cache.shape[-2]
        for (blocks,), number in self._get_connector_metadata().reqs_to_fill.values():
            for index in range(number):
                block, row = blocks[index // size], index % size
                cache.view(-1, cache.shape[-1])[block * size + row] = self.kept[layer_name][index]

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs) -> None:
        if layer_name not in self.kept:
            self.kept[layer_name] = kv_layer.view(-1, kv_layer.shape[-1])[attn_metadata.slot_mapping].clone()
