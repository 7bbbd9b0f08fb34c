"""Rows that come from elsewhere, layer by layer: attention waits for those of its layer."""

from tests.serving.late_rows import LateRows
from tests.serving.models import PREFIX, ask, continuations, saved_model, tokens

CONNECTOR = {"kv_connector": "LateRows", "kv_connector_module_path": LateRows.__module__, "kv_role": "kv_both"}


def test_rows_that_come_late(tmp_path, start):
    expected = continuations(saved_model(tmp_path), [PREFIX])
    engine = start(tmp_path, kv_transfer_config=CONNECTOR, enable_prefix_caching=False)
    assert tokens(ask(engine, [PREFIX], extra_args={"kv_transfer_params": {"prefill": True}})) == expected
    assert len(LateRows.kept) == 2 and all(len(rows) == len(PREFIX) for rows in LateRows.kept.values())
    assert tokens(ask(engine, [PREFIX, PREFIX])) == expected * 2
    LateRows.kept.update({name: -rows for name, rows in LateRows.kept.items()})
    assert tokens(ask(engine, [PREFIX])) != expected, "rows are not those that were brought"
