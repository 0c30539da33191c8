"""An exponential moving average of the weights, sharded as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from credit.domain_parallel.torch_private import foreach_lerp_
from credit.parallel.collectives import local
from credit.parallel.domain import get_raw_model


class EMA:
    """average <- decay * average + (1 - decay) * weights, after every optimiser step.

    The decay of step n, from 1, is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage: the
    average is of the steps that there have been, and does not keep the initial weights.

    Each rank averages what it stores of each parameter: no messages. Buffers are taken as they are.

    Attributes:
        average: by the plain model's names, DTensors where the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._parameters = dict(get_raw_model(model).named_parameters())
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights as they are after step number `step`, from 1, into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours = [local(average) for average in self.average.values()]
        foreach_lerp_(ours, [local(p) for p in self._parameters.values()], 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """While this is open, the model computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered for the last forward is out of date
        for name, parameter in self._parameters.items():
            kept = local(parameter).clone()
            local(parameter).copy_(local(self.average[name]))
            local(self.average[name]).copy_(kept)
