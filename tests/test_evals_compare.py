"""Intervals between architectures against values computed by hand, simulations, Dunnett's table and scipy."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from evals import compare, intervals
from scripts.cli import UserError

NAMES = ("mla", "mlra_4", "mlra_2", "gqa", "other")


def balanced(others: int, seeds: int) -> np.ndarray:
    """Covariance of the differences from a control, in units of the error's variance."""
    return (np.eye(others) + 1) / seeds


def test_two_by_two_by_hand():
    """Differences 0.3 and 0.1: the residuals are all 0.05, in absolute value."""
    runs = {("mla", 0): 1.0, ("mla", 1): 2.0, ("mlra_4", 0): 1.3, ("mlra_4", 1): 2.1}
    fit = intervals.fit(runs, "mla")
    assert fit.names == ["mlra_4"] and fit.freedom == 1
    assert fit.differences == pytest.approx([0.2]) and fit.errors == pytest.approx([0.1])
    assert fit.deviation == pytest.approx(0.1)
    p = [1 - 2 / math.pi * math.atan(math.sqrt(f)) for f in (4, 81)]  # F with one and one degree of freedom
    assert fit.anova["architecture"] == pytest.approx((0.04, 1, 4, p[0]))
    assert fit.anova["seed"] == pytest.approx((0.81, 1, 81, p[1]))
    assert fit.anova["error"][:2] == pytest.approx((0.01, 1))
    assert intervals.fit(runs, "mlra_4").differences == pytest.approx([-0.2])


def test_missing_runs_are_compared_within_their_seed():
    """A run alone in its architecture is compared with what the others say of the control in that seed."""
    runs = {("mla", 0): 1.0, ("mla", 1): 1.4, ("gqa", 0): 2.0, ("gqa", 1): 2.8, ("mlra_4", 1): 1.3}
    fit = intervals.fit(runs, "mla")
    control_in_second = 1.2 + (2.1 - 1.8)  # its mean, and that of the seed less the mean of both
    assert dict(zip(fit.names, fit.differences, strict=True)) == pytest.approx(
        {"gqa": 1.2, "mlra_4": 1.3 - control_in_second}
    )
    assert fit.freedom == 1
    assert fit.anova["architecture"][1] == 2 and fit.anova["seed"][1] == 1


@pytest.mark.parametrize(
    ("others", "freedom", "published"),  # Dunnett's table, two-sided, 5 %
    [(1, 20, 2.086), (2, 10, 2.57), (5, 20, 2.73), (8, 60, 2.73), (3, 5, 3.29)],
)
def test_critical_values_are_those_of_dunnetts_table(others, freedom, published):
    largest = intervals.largest_t(balanced(others, 3), freedom)
    assert intervals.critical_value(largest) == pytest.approx(published, abs=0.02)


def test_p_values_are_those_of_scipy():
    """Which has no blocks: so one seed for all runs, as many as there are groups times repeats."""
    generator = np.random.default_rng(3)
    groups = [generator.normal(mean, 1, 6) for mean in (0.0, 0.4, 1.5, 2.5)]
    freedom = 4 * 5
    variance = sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom
    t = np.array([(group.mean() - groups[0].mean()) / math.sqrt(variance * 2 / 6) for group in groups[1:]])
    ours = intervals.adjusted_p(t, intervals.largest_t(balanced(3, 6), freedom))
    assert ours == pytest.approx(stats.dunnett(*groups[1:], control=groups[0], rng=0).pvalue, abs=0.004)
    assert 0 < ours[2] < ours[1] < ours[0]


def test_all_intervals_hold_together_in_95_of_100():
    """Whatever the seeds do, and with a run missing."""
    generator = np.random.default_rng(0)
    truth = np.array([0.0, -0.004, 0.006, 0.03, 0.0])
    keys = [(name, seed) for name in NAMES for seed in range(4)][:-1]
    index = np.array([NAMES.index(name) for name, _ in keys])
    seeds = np.array([seed for _, seed in keys])
    held, trials, c = 0, 2000, None
    for _ in range(trials):
        losses = truth[index] + generator.normal(0, 0.05, 4)[seeds] + generator.normal(0, 0.003, len(keys))
        fit = intervals.fit(dict(zip(keys, losses, strict=True)), "mla")
        c = c or intervals.critical_value(intervals.largest_t(fit.covariance, fit.freedom))
        held += np.all(np.abs(fit.differences - truth[1:]) <= c * fit.errors)
    assert held / trials == pytest.approx(intervals.LEVEL, abs=3 * math.sqrt(0.05 * 0.95 / trials))


def test_seeds_that_a_half_width_takes():
    """Nine architectures: 2.88 x 0.003 x sqrt(2 / 4) = 0.0061 with 24 degrees of freedom, 0.0053 with 32."""
    assert intervals.half_width(9, 4, 0.003) == pytest.approx(2.88 * 0.003 * math.sqrt(2 / 4), rel=0.01)
    assert intervals.seeds_needed(9, 0.003, 0.006) == 5
    assert intervals.seeds_needed(9, 0.003, 0.1) == 2
    many = intervals.seeds_needed(9, 0.003, 0.001)
    assert intervals.half_width(9, many, 0.003) <= 0.001 < intervals.half_width(9, many - 1, 0.003)
    assert intervals.seeds_needed(9, 1, 1e-4) is None


def test_documents_drawn_again():
    """A constant shift stays itself; the deviation of a mean over D documents is 1 / sqrt(D) of theirs."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 9, 400)
    nats = generator.normal(3, 1, 400) * tokens
    drawn = intervals.resampled(np.stack([nats, nats + 0.1 * tokens]), tokens, np.array([[-1.0, 1.0]]))
    assert drawn.shape == (intervals.RESAMPLES, 1) and drawn == pytest.approx(0.1)
    alone = intervals.resampled(generator.normal(0, 2, (1, 400)), np.ones(400), np.ones((1, 1)))
    assert alone.std() == pytest.approx(2 / math.sqrt(400), rel=0.12)


# The command


def entry(loss: float, documents: int = 40, last: tuple[float, ...] = (0.01, 0.0, 0.0, 0.0, 0.0)) -> dict:
    """A run whose documents all have the same loss."""
    return {
        "heldout": {"books": {"loss": loss}},
        "heldout_curve": [[1, 9.0]] + [[step, loss + extra] for step, extra in enumerate(last, start=2)],
        "documents": {"books": {"nats": [100 * loss] * documents, "tokens": [100] * documents}},
    }


@pytest.fixture
def results(tmp_path):
    """Three architectures, four seeds: GQA is worse by 0.05 nats, MLRA-4 as good as MLA."""
    noise = np.random.default_rng(0).normal(0, 0.002, (3, 4))
    runs = {
        f"{name}_seed{seed}": entry(3 + shift + 0.02 * seed + noise[row, seed])
        for row, (name, shift) in enumerate({"mla": 0, "mlra_4": 0, "gqa": 0.05}.items())
        for seed in range(4)
    }
    path = tmp_path / "compare.json"
    settings = {"max_steps": 100, "blocks_per_step": 8, "block_size": 64}
    path.write_text(json.dumps({"settings": settings, "results": runs}))
    return path


def test_report(results, tmp_path):
    assert compare.main([str(results)]) == 0
    found = json.loads((tmp_path / "compare_intervals.json").read_text())
    assert list(found["differences"]) == sorted(
        found["differences"], key=lambda n: found["differences"][n]["difference"]
    )
    gqa, mlra = found["differences"]["gqa"], found["differences"]["mlra_4"]
    assert gqa["verdict"] == "worse" and gqa["interval"][0] > 0.04 and mlra["verdict"] == "not told apart"
    assert gqa["p"] < 0.001 < 0.05 < mlra["p"]
    assert gqa["difference"] == pytest.approx(np.mean(gqa["interval"])) == pytest.approx(gqa["last_five"])
    assert gqa["documents_interval"] == pytest.approx([gqa["difference"]] * 2)  # all documents say the same
    assert gqa["half_width"] == pytest.approx(found["critical_value"] * found["deviation"] * math.sqrt(2 / 4))
    assert found["freedom"] == 6 and found["documents"] == 40 and found["tokens"] == 4000
    assert gqa["paper"] == pytest.approx(0.03, abs=0.002)  # "+3.0 %" of perplexity
    table = (tmp_path / "compare_intervals.md").read_text()
    assert "| gqa" in table and "Told apart from mla: gqa worse." in table and "within the 0.006 asked for" in table
    assert (tmp_path / "compare_intervals.png").stat().st_size > 10_000
    assert compare.main([str(results), "--half-width", "0.001"]) == 0
    needed = json.loads((tmp_path / "compare_intervals.json").read_text())["seeds_needed"]
    text = (tmp_path / "compare_intervals.md").read_text()
    assert f"0.001 would take {needed} seeds of each architecture, {3 * (needed - 4)} more runs" in text


def test_refusals(results, tmp_path, capsys):
    content = json.loads(results.read_text())

    def written(**runs: dict) -> str:
        path = tmp_path / f"other_{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"settings": {}, "results": runs}))
        return str(path)

    one = content["results"]["mla_seed0"]
    for arguments, message in (
        ([str(tmp_path / "none.json")], "none.json"),
        ([str(results), "--control", "mha"], "mha and others are to be compared, the runs are of"),
        ([str(results), "--corpus", "web"], "the held-out texts are books"),
        ([str(results), "--output", "x.md"], "must end in .json"),
        ([written(mla_seed0=one, gqa_seed0=one)], "2 runs of 2 architectures give no error"),
        ([written(mla_seed0=one, mla_seed1=one)], "mla and others are to be compared"),
        ([written(mla_seed0={"heldout": {}})], "mla_seed0 is no run with losses by document"),
        ([written(**{f"{n}_seed{s}": entry(3, 5 + s) for n in ("mla", "gqa") for s in (0, 1)})], "different text"),
    ):
        assert compare.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError):
        intervals.fit({("mla", 0): 1.0, ("gqa", 1): 1.0, ("gqa", 2): 1.0, ("gqa", 3): 1.0}, "mla")
