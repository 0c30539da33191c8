"""The picture of the README: a field cut over four ranks, with the rows that each is sent, and the mesh.

python benchmarks/picture.py docs/globe.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from credit.domain_parallel.partition import Partition

matplotlib.use("Agg")

SAMPLE = Path(__file__).parents[1] / "credit/data/sample/era5_1deg.nc"
COLOURS = ["#1b7837", "#762a83", "#2166ac", "#b35806"]
RANKS, HALO = 4, 4


def globe(axis: Axes, field: xr.DataArray) -> None:
    """Seen from a distance, above 15 N 20 E; the slabs moved apart."""
    size, above = 700, np.radians(15)
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(1, -1, size))
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))  # towards the viewer
    latitude = np.degrees(np.arcsin(y * np.cos(above) + z * np.sin(above)))
    longitude = np.degrees(np.arctan2(x, z * np.cos(above) - y * np.sin(above))) + 20
    row, column = np.round(90 - latitude).astype(int), np.round(longitude).astype(int) % 360
    low, high = np.nanquantile(field.values, [0.02, 0.98])
    warmth = np.clip((field.values - low) / (high - low), 0, 1)
    shades = plt.get_cmap("Spectral_r")(warmth**2)[row, column]
    for rank in range(RANKS):
        rows, down = Partition(181, RANKS).range(rank), 0.16 * (rank - 1.5)
        mine = (x**2 + y**2 < 1) & (row >= rows.start) & (row < rows.stop)
        shades[..., 3] = mine
        axis.imshow(shades, extent=(-1, 1, -1 - down, 1 - down))
        height = y[mine].mean() - down
        axis.text(1.12, height, f"rank {rank}", color=COLOURS[rank], fontsize=12, weight="bold", va="center")
    axis.set(xlim=(-1.05, 1.6), ylim=(-1.3, 1.3))
    axis.set_title("one field, four ranks")
    axis.set_axis_off()


def slabs(axis: Axes) -> None:
    """Which rows of 37 each rank holds, and which it is sent for a convolution."""
    part = Partition(37, RANKS)
    for rank in range(RANKS):
        rows, left = part.range(rank), 1.4 * rank
        axis.add_patch(Rectangle((left, -rows.stop), 1, len(rows), color=COLOURS[rank], alpha=0.75, linewidth=0))
        for start, stop, owner in ((rows.start - HALO, rows.start, rank - 1), (rows.stop, rows.stop + HALO, rank + 1)):
            if 0 <= owner < RANKS:
                axis.add_patch(
                    Rectangle(
                        (left, -stop), 1, HALO, facecolor=COLOURS[owner], alpha=0.35, hatch="///", edgecolor="white"
                    )
                )
                arrow = {"arrowstyle": "->", "color": COLOURS[owner], "linewidth": 1.6}
                here = (left if owner < rank else left + 1, -(start + stop) / 2)
                there = (1.4 * owner + (1 if owner < rank else 0), -(start + stop) / 2)
                axis.annotate("", here, there, arrowprops=arrow)
        axis.text(left + 0.5, -(rows.start + rows.stop) / 2, f"rank {rank}\n{len(rows)} rows", ha="center", va="center")
    axis.set(xlim=(-0.15, 5.35), ylim=(-39, 2))
    axis.set_title("each holds its latitudes, and is sent rows of its neighbours")
    axis.set_axis_off()


def main(path: str) -> None:
    figure = plt.figure(figsize=(11, 4.4))
    with xr.open_dataset(SAMPLE) as sample:
        globe(figure.add_axes((0.01, 0.02, 0.47, 0.88)), sample.t2m.isel(time=0).load())
    slabs(figure.add_axes((0.47, 0.04, 0.52, 0.86)))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
