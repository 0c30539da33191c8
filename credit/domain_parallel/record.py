"""A model whose forward and backward are recorded; see `credit.domain_parallel.recorded`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from credit.domain_parallel.layers import Became, DomainParallelRoot, become

if TYPE_CHECKING:
    from credit.domain_parallel.recorded import Recorder


class RecordedRoot(Became):
    """The outermost module of a model that is recorded, and not cut over domain ranks: by channel, say."""

    _recorder: Recorder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.run(self, super().forward, args, kwargs)


def record(model: nn.Module, compiled: bool = False) -> nn.Module:
    """Record the forward and backward of `model` at its second call of a kind (shapes, modes), and replay them then.

    The same bits and the same messages, without Python between operators: see `credit.domain_parallel.recorded`. What
    cannot be recorded runs eagerly, and that is logged once, with the reason. In place, after conversion.

    Args:
        model: from `convert_to_domain_parallel`, or any other.
        compiled: by torch's inductor: the same numbers to rounding.

    Returns:
        `model`.
    """
    from credit.domain_parallel.recorded import Recorder  # half a second

    if isinstance(model, DomainParallelRoot):
        border = model.__dict__["_domain_border"]
        model.__dict__["_domain_border"] = replace(border, recorder=Recorder(compiled))
        return model
    if not isinstance(model, RecordedRoot):
        become(model, RecordedRoot)
    model.__dict__["_recorder"] = Recorder(compiled)
    return model
