"""Equivariance, cache and intensity tables, and plots."""

import json

import pytest
import torch

from evals import cache_tables, equivariance, plots
from evals.common import PUBLISHED
from modeling_mlra import modeling_mlra
from tests.models import tiny_model
from tests.tolerances import MATHEMATICS_ATOL

pytest.importorskip("matplotlib")


# ---- equivariance --------------------------------------------------------------------------------------------------


def test_equivariance_holds_and_its_control_breaks(tmp_path, capsys):
    output = tmp_path / "equivariance.json"
    assert equivariance.main(["--dtype", "float64", "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    shapes = {name: (entry["L"], entry["B"]) for name, entry in results.items()}
    assert shapes == {"MLA": (1, 1), "GLA-2": (2, 1), "GLA-4": (4, 1), "MLRA-2": (4, 2), "MLRA-4": (4, 4)}
    for name, entry in results.items():
        for kind, changes in entry["changes"]["float64"].items():
            for measure, change in changes.items():
                if kind.startswith("control"):
                    assert change > 0.1, (name, kind, measure)
                else:
                    assert change < MATHEMATICS_ATOL, (name, kind, measure)
    table = capsys.readouterr().out
    assert table.count("\n") == 7 and table in (tmp_path / "equivariance.md").read_text()


@pytest.mark.parametrize("part", ["nope", "keys"])
def test_equivariance_notices_absolute_positions(monkeypatch, part):
    """A model that rotates its keys only, or adds positions to its scores' other part, must not pass."""
    model = tiny_model("mlra_2", dtype=torch.float64)
    assert worst(equivariance.measure(model)) < MATHEMATICS_ATOL
    rotate = modeling_mlra.apply_rotary_pos_emb

    def wrong(x, cos, sin):
        if part == "keys":
            return torch.cat([x[:, :, :-1], rotate(x[:, :, -1:], cos, sin)], dim=2)  # the last is the key
        return rotate(x, cos, sin) + 0.1 * cos.unsqueeze(2).to(x.dtype)

    monkeypatch.setattr(modeling_mlra, "apply_rotary_pos_emb", wrong)
    assert worst(equivariance.measure(model)) > 1e-3


def worst(changes: dict) -> float:
    return max(changes[kind][name] for kind in ("shift", "padding") for name in equivariance.MEASURES)


def test_equivariance_of_a_checkpoint(tmp_path, converted, capsys):
    output = tmp_path / "r.json"
    assert equivariance.main(["--model", str(converted("gla_2")), "--dtype", "float32", "--output", str(output)]) == 0
    entry = json.loads(output.read_text())["results"]["gla_2"]
    assert (entry["L"], entry["B"]) == (2, 1)
    assert (
        entry["changes"]["float32"]["padding"]["logits"]
        < 1e-4
        < entry["changes"]["float32"]["control padding"]["logits"]
    )
    capsys.readouterr()
    assert equivariance.main(["--model", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: no folder nowhere")
    assert equivariance.main(["--output", "r.txt"]) == 2


# ---- cache and intensity -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    output = tmp_path_factory.mktemp("tables") / "cache_tables.json"
    assert cache_tables.main(["--output", str(output)]) == 0
    return output


def test_cache_table_is_the_papers(tables):
    content = json.loads(tables.read_text())
    for name, row in PUBLISHED["cache"]["rows"].items():
        numbers = [content["results"][name][str(devices)]["numbers"] for devices in PUBLISHED["cache"]["columns"]]
        assert [count / 128 for count in numbers] == row
    markdown = tables.with_suffix(".md").read_text()
    assert "4.5 (paper 4.5) | 2.5 (paper 2.5) | 1.5 (paper 1.5) | 1.5 (paper 1.5)" in markdown
    assert "27,648 | 15,360 |  9,216 |  9,216" in markdown


@pytest.mark.parametrize(
    ("name", "heads_per_latent", "latents"), [("MLA", 24, 1), ("GLA-2", 12, 2), ("MLRA-2", 12, 4), ("MLRA-4", 24, 4)]
)
def test_intensity_by_hand(tables, name, heads_per_latent, latents):
    """One device: (2r + 2r) operations per latent and head, 2e per head, over 2 bytes of L*r + e numbers."""
    share = json.loads(tables.read_text())["results"][name]["1"]
    flops = latents * heads_per_latent * 4 * (512 // latents) + 24 * 2 * 64
    assert share["flops"] == flops
    assert share["flops_per_byte"] == pytest.approx(flops / (2 * (512 + 64)))


def test_intensity_of_grouped_queries_is_queries_per_key(tables):
    shares = json.loads(tables.read_text())["results"]["GQA"]
    assert all(share["flops_per_byte"] == 24 / 8 for share in shares.values())


def test_tables_notice_a_cache_that_differs(monkeypatch):
    config = cache_tables.AutoConfig.from_pretrained(cache_tables.CONFIGURATIONS / "mlra_4.json")
    assert cache_tables.confirmed_share("MLRA-4", config, 4).numbers == 192
    share = cache_tables.latent_share

    def other(config, devices):
        computed, share_config = share(config, devices)
        return computed._replace(numbers=computed.numbers + 1), share_config

    monkeypatch.setattr(cache_tables, "latent_share", other)
    with pytest.raises(RuntimeError, match="MLRA-4 on 4 devices"):
        cache_tables.confirmed_share("MLRA-4", config, 4)
    monkeypatch.setattr(
        cache_tables, "latent_share", lambda *args: (share(*args)[0]._replace(flops=1), share(*args)[1])
    )
    with pytest.raises(RuntimeError, match="computed"):
        cache_tables.confirmed_share("MLRA-4", config, 2)


# ---- plots ---------------------------------------------------------------------------------------------------------


def test_plots(tables, tmp_path, capsys):
    perplexities = tmp_path / "p.json"
    entries = {name: {"perplexity": 15.0} for name in ("C4", "notes")}
    perplexities.write_text(json.dumps({"settings": {"model": "mine"}, "results": entries}))
    assert plots.main(["--cache", str(tables), "--perplexity", str(perplexities)]) == 0
    for path in (tables, perplexities):
        image = path.with_suffix(".png").read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 5000
    first = tables.with_suffix(".png").read_bytes()
    assert plots.main(["--cache", str(tables)]) == 0
    assert tables.with_suffix(".png").read_bytes() == first


@pytest.mark.parametrize("flags", [[], ["--cache", "nowhere.json"], ["--cache", "other"], ["--perplexity", "other"]])
def test_nothing_to_plot(tmp_path, tables, capsys, flags):
    other = tmp_path / "other.json"
    other.write_text('{"results": {"a": {}}}')
    capsys.readouterr()
    assert plots.main([str(other) if flag == "other" else flag for flag in flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
