"""How figures look: colours that colour-blind people can tell apart, and the mark of simulation."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.errors import ConfigError

FORMATS = (".svg", ".png", ".pdf")
# Okabe and Ito's palette without yellow, which is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIMULATED_MARK = "SIMULATED"
_SIZE_INCHES = (6.4, 3.8)
_DPI = 150


def color_of(index: int) -> str:
    """Return the nth colour."""
    return COLORS[index % len(COLORS)]


def marker_of(index: int) -> str:
    """Return the nth marker, so that lines differ without colour, too."""
    return MARKERS[index % len(MARKERS)]


def new_figure(height_inches: float = _SIZE_INCHES[1]) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes."""
    figure = Figure(figsize=(_SIZE_INCHES[0], height_inches), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return figure, axes


def mark_simulated(axes: Axes, *, some: bool, every: bool) -> None:
    """Write across a figure that its data is simulated, all of it or some."""
    if not some:
        return
    axes.text(
        0.5,
        0.5,
        SIMULATED_MARK if every else f"PARTLY {SIMULATED_MARK}",
        transform=axes.transAxes,
        fontsize=30,
        color="0.5",
        alpha=0.3,
        ha="center",
        va="center",
        rotation=20,
        zorder=10,  # above bars; faint enough to read through
        gid="simulated",
    )


def save(figure: Figure, paths: Sequence[Path]) -> None:
    """Write a figure to files, the format by their ending; the same data gives the same bytes.

    Raises:
        ConfigError: An ending is unknown, or a file cannot be written.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise ConfigError(f"{path} must end in {', '.join(FORMATS)}")
    with mpl.rc_context({"svg.hashsalt": "neo", "svg.fonttype": "none"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            if path.suffix == ".pdf":
                metadata = {"CreationDate": None}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=_DPI, metadata=metadata)
            except OSError as error:
                raise ConfigError(f"cannot write {path}: {error.strerror}") from error
