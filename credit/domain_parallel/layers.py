"""Layers that give, on shards, the rows the plain layer gives on the whole field.

A layer is made from a plain module and *is* that module: its class derives from both, so it shares parameters,
buffers, hooks and parametrizations, names in checkpoints do not change, and `isinstance(m, nn.Conv2d)` still holds.
Called with a shard it makes it a slab, runs the plain forward, in which every torch function follows its rule, and
gives this rank's rows of the result. With one domain rank or no manager it is the plain layer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.domain_parallel.halo_conv import keeps_rows
from credit.domain_parallel.halo_exchange import HaloExchange
from credit.domain_parallel.hooks import has_hooks_inside, hooks_inside
from credit.domain_parallel.lengths import global_length
from credit.domain_parallel.manager import (
    DomainParallelError,
    DomainParallelManager,
    get_domain_parallel_manager,
)
from credit.domain_parallel.outcome import convolved_strides
from credit.domain_parallel.partition import Partition, TransposedWindow, Window
from credit.domain_parallel.reshard import plain as plainly_cut
from credit.domain_parallel.root import Border
from credit.domain_parallel.rules.convolution import CONV, conv_in_place, fetch, pads_of, per_axis, share_halo
from credit.domain_parallel.slab import Slab, inside_model, is_inside_model
from credit.domain_parallel.torch_private import compiled

logger = logging.getLogger(__name__)


def _combine(layer: type, plain: type) -> type:
    return type(f"DomainParallel{plain.__name__}", (layer, plain), {"_layer": layer, "_plain": plain})


_combined: Callable[[type, type], type] = cache(_combine)


def _rebuild(layer: type, plain: type) -> nn.Module:
    return object.__new__(_combined(layer, plain))


def become(module: nn.Module, layer: type) -> nn.Module:
    """Make `module` a `layer` in place; everything that refers to it sees the change."""
    module.__class__ = _combined(layer, type(module))
    return module


class Became(nn.Module):
    """A module in two classes, see `become`. It is copied and pickled as such."""

    _layer: type
    _plain: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not hasattr(self, "_plain"):
            return super().__reduce_ex__(protocol)
        return _rebuild, (self._layer, self._plain), self.__dict__


class DomainParallelLayer(Became):
    """What the sharded layers share: `Layer(module)` is a second view of `module`, one state, two forwards."""

    shard_dim: int
    kernel_size: tuple[int, ...]

    def __new__(cls, module: Any = None, *args: Any, **kwargs: Any) -> DomainParallelLayer:
        # By its name, which is that of the first parameter of `__init__`: conv=, norm=.
        module = next((given for given in (module, *kwargs.values()) if isinstance(given, nn.Module)), module)
        if not isinstance(module, nn.Module) or hasattr(cls, "_plain"):
            return object.__new__(cls)
        self: DomainParallelLayer = object.__new__(_combined(cls, type(module)))
        object.__setattr__(self, "__dict__", module.__dict__)
        return self

    def __init__(self, module: nn.Module, shard_dim: int = -2) -> None:
        self.shard_dim = shard_dim

    @property
    def _manager(self) -> DomainParallelManager | None:
        """The manager of more than one rank that this layer works for, if there is one."""
        manager = self.__dict__.get("_domain_manager") or get_domain_parallel_manager()
        return manager if manager is not None and manager.domain_world_size > 1 else None

    @property
    def _spatial_axes(self) -> int:
        """Number of spatial axes of the plain layer, 2 for Conv2d."""
        return len(self.kernel_size)

    @property
    def _dim(self) -> int:
        """The sharded axis counted from the end, so that it holds without a batch axis too."""
        return self.shard_dim if self.shard_dim < 0 else self.shard_dim - self._spatial_axes - 2

    @property
    def _axis(self) -> int:
        """The sharded axis among the spatial ones: 0 for latitude in (latitude, longitude)."""
        axis = self._spatial_axes + self._dim
        if axis < 0:
            raise DomainParallelError(f"{type(self).__name__}: shard_dim {self.shard_dim} is no spatial axis of {self}")
        return axis

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        manager = self._manager
        # Inside a converted model a plain tensor is whole: the plain layer is right for it.
        if manager is None or isinstance(x, Slab) or is_inside_model():
            return self.on_slab(x, *args, **kwargs)
        dim = self._dim
        length = global_length(x.shape[dim], manager.group, type(self).__name__)
        partition = Partition(length, manager.domain_world_size)
        with inside_model():
            y = self.on_slab(Slab(x, x.ndim + dim, partition, manager.group), *args, **kwargs)
        if isinstance(y, Slab):
            return plainly_cut(y).local
        raise DomainParallelError(
            f"{type(self).__name__}: {partition.length} rows become {y.shape[dim]} here, and "
            f"{manager.domain_world_size} domain ranks need at least one row each"
        )

    def on_slab(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The plain layer's forward."""
        return super().forward(x, *args, **kwargs)


class _DomainParallelConv(DomainParallelLayer):
    """Convolution of any kernel, stride, dilation, padding and padding mode."""

    # Of the plain layer that this class is combined with.
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: str
    groups: int
    weight: Tensor
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]

    @property
    def conv(self) -> nn.Module:
        """The plain layer: the same state, the forward of one device."""
        plain: nn.Module = object.__new__(self._plain)
        object.__setattr__(plain, "__dict__", self.__dict__)
        return plain

    @property
    def halo_width(self) -> int:
        """Rows wanted from a neighbour at most; what is sent is what each rank's plan needs."""
        axis = self._axis
        window = Window(self.kernel_size[axis], 1, self.dilation[axis])
        before = pads_of(self.padding, self.kernel_size, self.dilation)[0][axis]
        return max(before, window.reach - before - 1)

    @property
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange that covers this layer. The layer itself sends the minimum instead."""
        return HaloExchange(self.halo_width, self._dim)

    def on_slab(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """With another padding mode than zeros, one exchange does the padding and the halo."""
        axes = self._spatial_axes
        axis = x.cut - (x.ndim - axes) if isinstance(x, Slab) else -1
        if not isinstance(x, Slab) or axis < 0 or self.padding_mode == "zeros":
            return super().on_slab(x, *args, **kwargs)
        pads = list(self._reversed_padding_repeated_twice)
        place = 2 * (axes - 1 - axis)
        before, after = pads[place : place + 2]
        if not before + after > 0 or max(before, after) >= x.shape[x.cut]:
            return super().on_slab(x, *args, **kwargs)
        pads[place : place + 2] = [0, 0]
        wide = x.like(F.pad(x.local, pads, mode=self.padding_mode)) if any(pads) else x.alias()
        circular = self.padding_mode == "circular"  # which torch stores contiguously
        wide.strides = None if circular else convolved_strides(tuple(wide.shape), x, self.weight)
        window = Window(
            self.kernel_size[axis], self.stride[axis], self.dilation[axis], before, after, self.padding_mode
        )
        padding = [before if i == axis else 0 for i in range(axes)]
        if keeps_rows(window, x.partition):
            geometry = (list(self.stride), padding, list(self.dilation), self.groups)
            return conv_in_place(wide, self.weight, self.bias, geometry, window)
        found = fetch(wide, window)
        if found is None:
            return super().on_slab(x, *args, **kwargs)
        rows, target = found
        y = CONV[axes](rows, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        made = x.like(y, partition=target)
        made.strides = convolved_strides(tuple(made.shape), wide, self.weight)
        return made


class DomainParallelConv2d(_DomainParallelConv):
    """`nn.Conv2d` on shards of (batch, channel, latitude, longitude). Exact for every geometry.

    Args:
        conv: the plain layer; weight and bias are shared with it.
        shard_dim: the sharded axis.

    Raises:
        DomainParallelError: on every rank, if the field is lower than the number of ranks.
    """

    def __init__(self, conv: nn.Conv2d, shard_dim: int = -2) -> None:
        super().__init__(conv, shard_dim)


class DomainParallelConv3d(_DomainParallelConv):
    """`nn.Conv3d` on shards of (batch, channel, level or time, latitude, longitude). See DomainParallelConv2d."""

    def __init__(self, conv: nn.Conv3d, shard_dim: int = 3) -> None:
        super().__init__(conv, shard_dim)


class _DomainParallelConvTranspose(_DomainParallelConv):
    """Transposed convolution of any kernel, stride, dilation, padding and output padding."""

    @property
    def halo_width(self) -> int:
        axis = self._axis
        padding = per_axis(self.padding, self._spatial_axes)[axis]
        window = TransposedWindow(self.kernel_size[axis], self.stride[axis], self.dilation[axis], padding)
        return max(-(-(window.reach - 1 - padding) // window.stride), padding // window.stride, 0)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None and self._manager is not None and not is_inside_model():
            raise DomainParallelError(
                f"{type(self).__name__}: output_size is not known on shards; set output_padding on the layer instead"
            )
        return super().forward(x, output_size)


class DomainParallelConvTranspose2d(_DomainParallelConvTranspose):
    """`nn.ConvTranspose2d` on shards of (batch, channel, latitude, longitude). Exact for every geometry.

    Args:
        conv: the plain layer; weight and bias are shared with it.
        shard_dim: the sharded axis.
    """

    def __init__(self, conv: nn.ConvTranspose2d, shard_dim: int = -2) -> None:
        super().__init__(conv, shard_dim)


class DomainParallelConvTranspose3d(_DomainParallelConvTranspose):
    """`nn.ConvTranspose3d` on shards of (batch, channel, level, latitude, longitude)."""

    def __init__(self, conv: nn.ConvTranspose3d, shard_dim: int = 3) -> None:
        super().__init__(conv, shard_dim)


class DomainParallelPeriodicConv2d(DomainParallelLayer):
    """A `PeriodicConv2d` on shards: circular in longitude, reflected at the poles and only there (and in the east and
    west, if its `sides` say "reflect").

    One exchange does the reflection and the halo; the plain forward would do one for each.

    Args:
        periodic_conv: has `.conv`, an nn.Conv2d without padding, and `.padding`, rows and columns added.
        shard_dim: the sharded axis; latitude.
    """

    conv: nn.Conv2d
    padding: int

    def __init__(self, periodic_conv: nn.Module, shard_dim: int = -2) -> None:
        super().__init__(periodic_conv, shard_dim)
        if self._dim != -2:
            raise DomainParallelError(f"{type(self).__name__}: only latitude (-2) can be sharded, not {shard_dim}")

    @property
    def _spatial_axes(self) -> int:
        return 2

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    @property
    def _sides(self) -> str:
        return getattr(self, "sides", "circular")

    @property
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange that covers this layer. The layer itself sends the minimum instead."""
        reach = self.conv.dilation[0] * (self.conv.kernel_size[0] - 1)
        return HaloExchange(max(self.padding, reach - self.padding), self._dim)

    def on_slab(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        conv, pad = self.conv, self.padding
        window = Window(conv.kernel_size[0], conv.stride[0], conv.dilation[0], pad, pad, "reflect")
        if not isinstance(x, Slab) or x.cut != x.ndim - 2 or x.shape[-2] <= pad:
            return super().on_slab(x, *args, **kwargs)
        if keeps_rows(window, x.partition) and not (conv._forward_hooks or conv._forward_pre_hooks):
            wide = x.like(F.pad(x.local, (pad, pad, 0, 0), mode=self._sides))
            geometry = (list(conv.stride), [pad, 0], list(conv.dilation), conv.groups)
            return conv_in_place(wide, conv.weight, conv.bias, geometry, window)
        found = fetch(x, window)
        if found is None:
            return super().on_slab(x, *args, **kwargs)
        rows, target = found
        return x.like(conv(F.pad(rows, (pad, pad, 0, 0), mode=self._sides)), partition=target)


class SharedHalo(DomainParallelLayer):
    """A module whose convolutions all read its input, as the parallel kernels of CrossFormer's embedding do.

    One exchange of what the largest reads serves them all. Give the type to `custom_converters`:

        convert_to_domain_parallel(model, manager, custom_converters={CrossEmbedLayer: SharedHalo})
    """

    @property
    def _spatial_axes(self) -> int:
        return -self.shard_dim

    def on_slab(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Slab):
            windows = []
            for conv in self.modules():
                if isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) and conv.padding_mode == "zeros":
                    axis = x.cut - (x.ndim - len(conv.kernel_size))
                    before, after = (pads[axis] for pads in pads_of(conv.padding, conv.kernel_size, conv.dilation))
                    k, s, d = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
                    windows.append(Window(k, s, d, before, after))
            x = x.alias()  # the rows are shared here alone
            share_halo(x, windows)
        return super().on_slab(x, *args, **kwargs)


class DomainParallelGroupNorm(DomainParallelLayer):
    """`nn.GroupNorm` with the mean and variance of the whole field, in float32 at least.

    Args:
        norm: the plain layer; weight and bias are shared with it.
    """

    @property
    def _spatial_axes(self) -> int:
        return -self.shard_dim

    def __init__(self, norm: nn.GroupNorm, shard_dim: int = -2) -> None:
        super().__init__(norm, shard_dim)


class DomainParallelInterpolate(DomainParallelLayer):
    """`F.interpolate` to a global size, on shards: every mode, both `align_corners`.

    Args:
        size: global output size (latitude, longitude).
        mode: as in `F.interpolate`.
        shard_dim: the sharded axis.
    """

    def __init__(self, size: int | tuple[int, ...], mode: str = "bilinear", shard_dim: int = -2) -> None:
        nn.Module.__init__(self)
        self.size = size
        self.mode = mode
        self.shard_dim = shard_dim

    @property
    def _spatial_axes(self) -> int:
        return -self.shard_dim

    @property
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange of the rows one output row may read when the grid is refined."""
        return HaloExchange(2 if self.mode == "bicubic" else 1, self.shard_dim)

    def on_slab(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return F.interpolate(x, self.size, mode=self.mode)


class DomainParallelUpsample(DomainParallelLayer):
    """`nn.Upsample` on shards, to a global size or by a factor."""

    @property
    def _spatial_axes(self) -> int:
        return -self.shard_dim


def _uncompile(root: nn.Module) -> None:
    """Parts that were compiled by themselves run as they are written."""
    for module in root.modules():
        if module is root:
            continue
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
        elif (plain := compiled(module)) is not None and module.forward != plain.__call__:
            module.__dict__["forward"] = plain.__call__
        else:
            continue
        path = next(path for path, one in root.named_modules() if one is module)
        logger.warning("%s was compiled; on fields cut over ranks it runs as it is written", path)


class DomainParallelRoot(Became):
    """The outermost module of a converted model: takes shards, gives shards, and is the plain model inside."""

    _domain_border: Border

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_inside_model() or any(isinstance(leaf, Slab) for leaf in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        run = self._domain_border.run
        if "torch._dynamo" in sys.modules:  # Slabs and exchanges are not for a compiler to trace.
            _uncompile(self)
            run = torch.compiler.disable(run)
        return run(self, self._with_hooks if has_hooks_inside(self) else super().forward, args, kwargs)

    def _with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        with hooks_inside(self):
            return self(*args, **kwargs)
