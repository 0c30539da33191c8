"""One device, many slices: memory over time, plain and on slices, and the peaks of the models.

    python -m benchmarks.slices docs/slices_memory.png       # counted on tensors without values; seconds to minutes
    python -m benchmarks.slices --time unet --slices 4       # time over plain, real, alternated

At 361 x 720, 20 channels, batch 1. Bytes are those that live on the device, parameters and input included; a tensor
without values is counted like a real one, and slices take the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from credit.config.models import MODELS
from credit.domain_parallel import slices
from credit.domain_parallel.parking import Live, Nowhere, Parking
from credit.models import DOMAIN_CONVERTERS, load_model_class
from credit.parallel.meters import Meter

GRID, CHANNELS, MB = (361, 720), 20, 1e6
KEYS: dict[str, dict[str, Any]] = {
    "unet": {},
    "wxformer": {},
    "pangu": {"upper": 4, "levels": 4, "window": (2, 6, 6)},
}


class _Traced(Live):
    """Keeps what it counted, each time it changed."""

    def __init__(self, *given: Any) -> None:
        self.trace: list[int] = [0]
        super().__init__(*given)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "now":
            self.trace.append(value)


class TracedMeter(_Traced, Meter): ...


class TracedParking(_Traced, Parking): ...


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return load_model_class(MODELS[name].path)(CHANNELS, CHANNELS, GRID, **KEYS[name]), torch.randn(1, CHANNELS, *GRID)


def run(model: nn.Module, x: Tensor, is_training: bool) -> None:
    with torch.set_grad_enabled(is_training):
        y = model(x)
        if is_training:
            y.square().mean().backward()
    model.zero_grad()


def traced(name: str, number: int, is_training: bool) -> list[float]:
    """MB on the device, each time they change."""
    with torch.device("meta"):
        model, x = made(name)
    kept = sum(t.nbytes for t in (x, *model.parameters()))
    counted: TracedMeter | TracedParking
    if number == 1:
        counted = TracedMeter()
        counted.ignore([*model.parameters(), *model.buffers(), x])
        with counted:
            run(model, x, is_training)
    else:
        counted = TracedParking(Nowhere())
        with slices(model, number, custom_converters=DOMAIN_CONVERTERS, parking=counted):
            run(model, x, is_training)
    return [(kept + now) / MB for now in counted.trace]


def picture(path: str, name: str = "unet") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, is_training in zip(axes, (False, True), strict=True):
        for number, colour in ((1, "#762a83"), (2, "#b35806"), (4, "#2166ac"), (8, "#1b7837")):
            trace = traced(name, number, is_training)
            places = [i / len(trace) for i in range(len(trace))]
            label = "plain" if number == 1 else f"{number} slices"
            axis.plot(places, trace, color=colour, linewidth=0.8 + (number == 1), label=f"{label}, {max(trace):.0f} MB")
        axis.set(xlabel="part of the step's allocations", ylim=(0, None), xlim=(0, 1), ylabel="MB on the device")
        axis.set_title("a step of training" if is_training else "a step of a forecast")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def table() -> None:
    for name in KEYS:
        for is_training in (False, True):
            peaks = {number: max(traced(name, number, is_training)) for number in (1, 2, 4, 8)}
            shares = "  ".join(f"{number}: {peak:8.1f} MB {peak / peaks[1]:.2f}" for number, peak in peaks.items())
            print(f"{name:9s} {'train' if is_training else 'forecast':9s} {shares}", flush=True)


def times(name: str, number: int, repeats: int = 5) -> None:
    """Processor time over that of the plain model, alternated, of a forecast's step; one thread."""
    torch.set_num_threads(1)
    model, x = made(name)
    ratios = []
    for _ in range(repeats):
        plain = seconds(model, x)
        with slices(model, number, custom_converters=DOMAIN_CONVERTERS):
            ratios.append(seconds(model, x) / plain)
    print(f"{name}: {number} slices take {statistics.median(ratios):.2f} of plain's time, {sorted(ratios)}")


def seconds(model: nn.Module, x: Tensor) -> float:
    begin = time.process_time()
    run(model, x, is_training=False)
    return time.process_time() - begin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?")
    parser.add_argument("--time", choices=KEYS)
    parser.add_argument("--slices", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.time:
        times(arguments.time, arguments.slices)
    elif arguments.picture:
        picture(arguments.picture)
    else:
        table()
