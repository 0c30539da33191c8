"""Several steps of a model from one start, each from what the one before made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def changes(
    model: Callable[[Tensor], Tensor],
    batch: dict[str, Tensor],
    increment_std: Tensor,
    detach: bool,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The change since the start after each step of a batch of `credit.data.dataset.StepDataset`.

    A step gets the state that the steps before have made, the forcings of its own time, and the statics. Everything
    is entry by entry, so a rank's rows are those of the whole.

    Args:
        model: from (batch, input channel, row, longitude) to the change in one step, in units of `increment_std`.
        increment_std: (predicted channel, 1, 1).
        detach: keep gradients out of the state that a step starts from (as in the pushforward trick of
            Brandstetter et al. 2022, with a loss of every step).
        noise: from the number of the step, from 0, to (batch, 1, row, longitude): the last input, if there is one.

    Yields:
        (batch, predicted channel, row, longitude) in units of `increment_std`, in the dtype of `x`; as many as `y` has.
    """
    x, predicted = batch["x"], len(increment_std)
    inputs, change = x, None
    for step in range(batch["y"].shape[1]):
        if change is not None:
            change = change.detach() if detach else change
            forcings = batch["forcings"][:, step - 1]
            statics = x[:, predicted + forcings.shape[1] :]
            inputs = torch.cat([x[:, :predicted] + change * increment_std, forcings, statics], dim=1)
        made = model(inputs if noise is None else torch.cat([inputs, noise(step)], dim=1)).to(x.dtype)
        change = made if change is None else change + made
        yield change
