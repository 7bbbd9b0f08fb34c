"""Figures beside results: drawn without a screen, the same bytes for the same numbers; only where matplotlib is."""

from pathlib import Path

try:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

CAN_DRAW = matplotlib is not None


def subplots(*args, **kwargs) -> tuple:
    """A figure and its axes, as pyplot's function of this name."""
    matplotlib.use("Agg")
    return pyplot.subplots(*args, layout="constrained", **kwargs)


def save_figure(figure: "Figure", results: Path) -> Path:
    """Write and close a figure; its file, beside that of the results."""
    file = results.with_suffix(".png")
    figure.savefig(file, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return file
