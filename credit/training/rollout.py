"""Several steps of a model from one start, each from what the one before made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def changes(
    model: Callable[[Tensor], Tensor],
    batch: dict[str, Tensor],
    states: tuple[int, int],
    unit: Tensor,
    detach: bool,
    noise: Callable[[int], Tensor] | None = None,
    edge: Tensor | None = None,
) -> Iterator[Tensor]:
    """The change of the state since the start, and the diagnostics, after each step of a batch of `StepDataset`.

    A step gets the states that the steps before have made, the forcings of its own time, and the statics. Everything
    is entry by entry, so a rank's rows are those of the whole.

    Args:
        model: from (batch, input channel, row, longitude) to the change of the state in one step, and the diagnostics,
            in units of `unit`.
        states: (channels of a state, how many of them the model is given).
        unit: (predicted channel, 1, 1), or (predicted channel, row, longitude) if values are missing, see
            `credit.data.dataset.Fields`.
        detach: keep gradients out of the states that a step starts from (as in the pushforward trick of
            Brandstetter et al. 2022, with a loss of every step).
        edge: true where the state is given after each step, of a region: (row, longitude).
        noise: from the number of the step, from 0, to (batch, 1, row, longitude): the last input, if there is one.

    Yields:
        (batch, predicted channel, row, longitude) in units of `unit`, in the dtype of `x`; as many as `y` has.
    """
    (channels, number), x = states, batch["x"]
    inputs, change = x, None
    history, given = [*x[:, : channels * number].split(channels, dim=1)], x[:, channels * number :]
    start = history[0]
    for step in range(batch["y"].shape[1]):
        if change is not None:
            change = change.detach() if detach else change
            forcings = batch["forcings"][:, step - 1]
            history = [start + change[:, :channels] * unit[:channels], *history[:-1]]
            inputs = torch.cat([*history, forcings, given[:, forcings.shape[1] :]], dim=1)
        made = model(inputs if noise is None else torch.cat([inputs, noise(step)], dim=1)).to(x.dtype)
        if change is None:
            change = made
        elif channels == len(unit):
            change = change + made
        else:
            change = torch.cat([change[:, :channels] + made[:, :channels], made[:, channels:]], dim=1)
        if edge is not None:
            change = torch.cat(
                [torch.where(edge, batch["y"][:, step, :channels], change[:, :channels]), change[:, channels:]], dim=1
            )
        yield change
