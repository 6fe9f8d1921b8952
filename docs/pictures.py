"""Draw the pictures of concepts.md and how-it-works.md: ``python docs/pictures.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import numpy as np
import torch
from numpy.typing import NDArray

import diffmtl_fast as dm
from diffmtl_fast._figures import colours, new_figure
from diffmtl_fast.diffusion.named_schedules import named_log_snr

GREY, BLUE, ORANGE, BLACK = "0.75", "tab:blue", "tab:orange", "0.1"
THIN = {"arrowstyle": "->", "color": "0.3"}
#: Two cluster gradients that conflict, a long one and a short one.
CONFLICTING = np.array([[2.0, 0.2], [-0.5, 0.6]])
AGREEING = np.array([[2.0, 0.2], [0.6, 0.9]])


def draw_clusters() -> Any:
    """The log-SNR of a cosine schedule with its five clusters."""
    snr = named_log_snr("squaredcos_cap_v2", 1000)
    clusters = dm.cluster_snr(snr, k=5)
    figure = new_figure(7.0, 3.0)
    axes = figure.subplots()
    edges = clusters.boundaries.tolist()
    for number, (colour, start, end) in enumerate(zip(colours(5), edges, edges[1:], strict=False)):
        axes.axvspan(start, end, color=colour, alpha=0.45, lw=0)
        axes.text((start + end) / 2, -17, f"cluster {number}", ha="center")
    axes.plot(snr, color=BLACK)
    axes.axhline(0, color=BLACK, lw=0.5)
    axes.text(8, 0.4, "as much noise as signal", fontsize=8)
    axes.set(xlabel="timestep t", ylabel="log-SNR", xlim=(0, len(snr)), ylim=(-20, 11))
    return figure


def draw_conflict() -> Any:
    """Two gradients that agree, two that conflict, and what PCGrad does about it."""
    figure = new_figure(9.0, 1.75)
    panels = figure.subplots(1, 3)
    for axes, gradients, title in zip(
        panels, (AGREEING, CONFLICTING, CONFLICTING), ("no conflict", "conflict", "PCGrad"), strict=True
    ):
        _plane(axes, gradients, title)
    for axes, gradients in zip(panels, (AGREEING, CONFLICTING), strict=False):
        _arrow(axes, gradients.mean(0), BLACK, "mean")
    first, second = CONFLICTING
    for own, other, colour in ((first, second, BLUE), (second, first, ORANGE)):
        projected = own - own @ other / (other @ other) * other
        panels[2].plot(*zip(own, projected, strict=True), ":", color=colour)
        _arrow(panels[2], projected, colour, "", alpha=0.5)
    _arrow(panels[2], _direction(dm.PCGrad()), BLACK, "")
    return figure


def draw_methods() -> Any:
    """The direction of every weighting of gradients for the same two conflicting ones."""
    chosen = [m for m in dm.weighting.METHODS.values() if m.forms_gramian]
    figure = new_figure(9.0, 4.4)
    panels = figure.subplots(3, 4).ravel()
    _plane(panels[0], CONFLICTING, "mean of the losses")
    _arrow(panels[0], CONFLICTING.mean(0), BLACK, "")
    for axes, method in zip(panels[1:], chosen, strict=False):
        direction = _direction(method.build(2, torch.device("cpu"), seed=0))
        _plane(axes, CONFLICTING, f"{method.short}, length {np.linalg.norm(direction):.2f}")
        _arrow(axes, 0.9 * direction / np.linalg.norm(direction), BLACK, "")
    for axes in panels[1 + len(chosen) :]:
        axes.set_axis_off()
    return figure


def draw_one_backward() -> Any:
    """The rows of a batch, and how the sum over them becomes the rows of J."""
    figure = new_figure(8.0, 3.2)
    axes = figure.subplots()
    axes.set(xlim=(0, 16), ylim=(0, 6.4))
    axes.set_axis_off()
    shades, samples = colours(3), 6

    def rows(x: float, width: float, text: str) -> None:
        for row in range(samples):
            box = matplotlib.patches.Rectangle((x, 5 - row * 0.7), width, 0.6, color=shades[row // 2])
            axes.add_patch(box)
        axes.text(x + width / 2, 5.85, text, ha="center")

    rows(0.2, 1.6, "samples,\nby cluster")
    rows(4.2, 1.6, "activations")
    rows(8.2, 1.6, "losses")
    for x, text in ((2.1, "layer"), (6.1, "layer")):
        box = matplotlib.patches.FancyBboxPatch(
            (x, 1.6), 1.8, 4.0, boxstyle="round,pad=0.02", fc="0.93", ec="0.5"
        )
        axes.add_patch(box)
        axes.text(x + 0.9, 3.6, text, ha="center", va="center")
        axes.annotate("", (x + 0.9, 0.75), (x + 0.9, 1.5), arrowprops=THIN)
        axes.text(x + 0.9, 0.15, "weight gradient:\na sum over rows", ha="center", va="bottom", fontsize=8)
    axes.annotate("", (12.0, 3.4), (10.2, 3.4), arrowprops=THIN)
    axes.text(11.1, 3.65, "split by cluster", ha="center", fontsize=8)
    for row, shade in enumerate(shades):
        axes.add_patch(matplotlib.patches.Rectangle((12.3, 4.1 - row * 0.9), 3.4, 0.75, color=shade))
        tone = "white" if row < 2 else BLACK
        axes.text(14.0, 4.475 - row * 0.9, f"gradient $g_{row + 1}$", ha="center", va="center", color=tone)
    axes.text(14.0, 5.85, "Jacobian J", ha="center")
    axes.text(14.0, 1.4, "Gramian J Jᵀ → weights\n→ one direction in .grad", ha="center", va="center")
    return figure


def _direction(weighting: dm.weighting.GramianWeighting) -> NDArray[np.float64]:
    jacobian = torch.from_numpy(CONFLICTING)
    return (weighting(jacobian @ jacobian.T) @ jacobian / 2).numpy()


def _plane(axes: Any, gradients: NDArray[np.float64], title: str) -> None:
    """Draw two gradients, and shade the directions that harm neither cluster."""
    angles = np.linspace(-np.pi, np.pi, 721)
    points = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    harmless = points[(points @ gradients.T >= 0).all(axis=1)]
    axes.fill(*np.concatenate([np.zeros((1, 2)), harmless]).T, color=GREY, alpha=0.35, lw=0)
    for number, (gradient, colour) in enumerate(zip(gradients, (BLUE, ORANGE), strict=True), start=1):
        _arrow(axes, gradient, colour, f"$g_{number}$")
    axes.set(xlim=(-1.1, 2.4), ylim=(-0.3, 1.3), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def _arrow(axes: Any, to: NDArray[np.float64], colour: str, text: str, alpha: float = 1.0) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0, "alpha": alpha}
    axes.annotate("", to, (0, 0), arrowprops=style)
    axes.text(*(to + 0.08), text, color=colour)


PICTURES = {
    "log-snr": draw_clusters,
    "conflict": draw_conflict,
    "methods": draw_methods,
    "one-backward": draw_one_backward,
}


def main(folder: Path) -> None:
    """Write the pictures to a folder."""
    with matplotlib.rc_context({"svg.hashsalt": "diffmtl-fast", "svg.fonttype": "path"}):
        for name, draw in PICTURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
