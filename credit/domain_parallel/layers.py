"""Layers that give, on shards, the rows the plain layer gives on the whole field.

Each is geometry in, plan, exchange, the plain `torch.nn.functional` call, trim. A layer is made from a plain
module and *is* that module with another forward: it shares the parameters, buffers, hooks and parametrizations
(its class derives from both), so names in checkpoints do not change and `isinstance(m, nn.Conv2d)` still holds.
With one domain rank or no manager it runs the plain forward.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from credit.domain_parallel.halo_exchange import HaloExchange, exchange
from credit.domain_parallel.lengths import Lengths, global_length
from credit.domain_parallel.manager import (
    DomainParallelError,
    DomainParallelManager,
    get_domain_parallel_manager,
)
from credit.domain_parallel.partition import (
    Partition,
    PartitionError,
    Plan,
    RowMap,
    Taps,
    TransposedWindow,
    Window,
    make_plan,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@cache
def _combined(layer: type, plain: type) -> type:
    return type(f"DomainParallel{plain.__name__}", (layer, plain), {"_layer": layer, "_plain": plain})


def _rebuild(layer: type, plain: type) -> nn.Module:
    return object.__new__(_combined(layer, plain))


class DomainParallelLayer(nn.Module):
    """What the sharded layers share: the plain module's state, and the way to its rows.

    `Layer(module)` returns a second view of `module`: one state, two forwards.
    """

    _layer: type
    _plain: type
    shard_dim: int

    def __new__(cls, module: Any = None, *args: Any, **kwargs: Any) -> DomainParallelLayer:
        if not isinstance(module, nn.Module) or hasattr(cls, "_plain"):
            return object.__new__(cls)
        self = object.__new__(_combined(cls, type(module)))
        object.__setattr__(self, "__dict__", module.__dict__)
        return self

    def __init__(self, module: nn.Module, shard_dim: int = -2) -> None:
        self.shard_dim = shard_dim

    def __reduce_ex__(self, protocol: int) -> tuple:
        if not hasattr(self, "_plain"):
            return super().__reduce_ex__(protocol)
        return _rebuild, (self._layer, self._plain), self.__dict__

    def bind(self, manager: DomainParallelManager, lengths: Lengths, path: str) -> None:
        """Tell the layer, once, whose rows it works on and where in the model it is."""
        self.__dict__["_domain"] = (manager, lengths, path)

    @property
    def _manager(self) -> DomainParallelManager | None:
        """The manager of more than one rank that this layer works for, if there is one."""
        domain = self.__dict__.get("_domain")
        manager = domain[0] if domain else get_domain_parallel_manager()
        return manager if manager is not None and manager.domain_world_size > 1 else None

    @property
    def _path(self) -> str:
        domain = self.__dict__.get("_domain")
        return domain[2] if domain else type(self).__name__

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
            raise DomainParallelError(f"{self._path}: shard_dim {self.shard_dim} is no spatial axis of {self}")
        return axis

    def _length(self, x: Tensor, dim: int) -> int:
        domain = self.__dict__.get("_domain")
        if domain:
            return domain[1].of(x.shape[dim], self._path)
        return global_length(x.shape[dim], self._manager, self._path)

    def _plan(self, operator: RowMap, length: int) -> Plan:
        manager = self._manager
        try:
            return make_plan(operator, length, manager.domain_world_size, manager.domain_rank)
        except PartitionError as error:
            raise DomainParallelError(f"{self._path}: {error}") from None


def _one(value: int | tuple, axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _replaced(values: tuple, axis: int, value: int) -> tuple:
    return (*values[:axis], value, *values[axis + 1 :])


class _DomainParallelConv(DomainParallelLayer):
    """Convolution of any kernel, stride, dilation, padding and padding mode."""

    @property
    def conv(self) -> nn.Module:
        """The plain layer: the same state, the forward of one device."""
        plain = object.__new__(self._plain)
        object.__setattr__(plain, "__dict__", self.__dict__)
        return plain

    @property
    def halo_width(self) -> int:
        """Rows wanted from a neighbour at most; what is sent is what each rank's plan needs."""
        window = self._window()
        return max(window.before, window.reach - window.before - 1)

    @property
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange that covers this layer. The layer itself sends the minimum instead."""
        return HaloExchange(self.halo_width, self._dim)

    def _window(self) -> Window:
        axis = self._axis
        # torch keeps (before, after) of every axis, last axis first, for numbers, "same" and "valid" alike.
        before, after = self._reversed_padding_repeated_twice[-2 * axis - 2 :][:2]
        return Window(self.kernel_size[axis], self.stride[axis], self.dilation[axis], before, after, self.padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        manager = self._manager
        if manager is None:
            return super().forward(x)
        plan = self._plan(self._window(), self._length(x, self._dim))
        x = exchange(x, plan, self._dim, manager)
        pads = list(self._reversed_padding_repeated_twice)
        start = len(pads) - 2 * self._axis - 2
        pads[start : start + 2] = [0, 0]
        padding: tuple[int, ...] = tuple(pads[0::2][::-1])
        if any(pads) and (self.padding_mode != "zeros" or pads[0::2] != pads[1::2]):
            x = F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0,) * self._spatial_axes
        convolve = CONV[self._spatial_axes]
        return convolve(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class DomainParallelConv2d(_DomainParallelConv):
    """`nn.Conv2d` on shards of (batch, channel, latitude, longitude). Exact for every geometry.

    Args:
        conv: the plain layer; weight and bias are shared with it.
        shard_dim: the sharded axis.

    Raises:
        DomainParallelError: on every rank, if the field is lower than the number of ranks.
    """


class DomainParallelConv3d(_DomainParallelConv):
    """`nn.Conv3d` on shards of (batch, channel, level or time, latitude, longitude). See DomainParallelConv2d."""

    def __init__(self, conv: nn.Conv3d, shard_dim: int = 3) -> None:
        super().__init__(conv, shard_dim)


class _DomainParallelConvTranspose(_DomainParallelConv):
    """Transposed convolution of any kernel, stride, dilation, padding and output padding."""

    @property
    def halo_width(self) -> int:
        window = self._transposed_window(0)
        return max(-(-(window.reach - 1 - window.padding) // window.stride), window.padding // window.stride, 0)

    def _transposed_window(self, output_padding: int) -> TransposedWindow:
        axis = self._axis
        return TransposedWindow(
            self.kernel_size[axis], self.stride[axis], self.dilation[axis], _one(self.padding, axis), output_padding
        )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        manager = self._manager
        if manager is None:
            return super().forward(x, output_size)
        if output_size is not None:
            raise DomainParallelError(
                f"{self._path}: output_size is not known on shards; set output_padding on the layer instead"
            )
        axis, length = self._axis, self._length(x, self._dim)
        window = self._transposed_window(self.output_padding[axis])
        plan = self._plan(window, length)
        before, after = window.crop(plan.out, length)
        x = exchange(x, plan, self._dim, manager)
        # Rows appended below (none reaches them) hold the bias alone, so it can only be added after them.
        bias_late = self.bias is not None and min(before, after) < 0
        y = CONV_TRANSPOSE[self._spatial_axes](
            x,
            self.weight,
            None if bias_late else self.bias,
            self.stride,
            _replaced(self.padding, axis, 0),
            _replaced(self.output_padding, axis, 0),
            self.groups,
            self.dilation,
        )
        if min(before, after) >= 0:
            return y.narrow(self._dim, before, len(plan.out))
        y = F.pad(y, [0, 0] * (-self._dim - 1) + [-before, -after])
        return y + self.bias.view(-1, *[1] * self._spatial_axes) if bias_late else y


class DomainParallelConvTranspose2d(_DomainParallelConvTranspose):
    """`nn.ConvTranspose2d` on shards of (batch, channel, latitude, longitude). Exact for every geometry.

    Args:
        conv: the plain layer; weight and bias are shared with it.
        shard_dim: the sharded axis.
    """


class DomainParallelConvTranspose3d(_DomainParallelConvTranspose):
    """`nn.ConvTranspose3d` on shards of (batch, channel, level, latitude, longitude)."""

    def __init__(self, conv: nn.ConvTranspose3d, shard_dim: int = 3) -> None:
        super().__init__(conv, shard_dim)


class DomainParallelPeriodicConv2d(DomainParallelLayer):
    """A `PeriodicConv2d` on shards: circular in longitude, reflected at the poles and only there.

    Args:
        periodic_conv: has `.conv`, an nn.Conv2d without padding, and `.padding`, rows and columns added.
        shard_dim: the sharded axis; latitude.
    """

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
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange that covers this layer. The layer itself sends the minimum instead."""
        reach = self.conv.dilation[0] * (self.conv.kernel_size[0] - 1)
        return HaloExchange(max(self.padding, reach - self.padding), self._dim)

    def forward(self, x: Tensor) -> Tensor:
        manager = self._manager
        if manager is None:
            return super().forward(x)
        conv, pad = self.conv, self.padding
        window = Window(conv.kernel_size[0], conv.stride[0], conv.dilation[0], pad, pad, "reflect")
        x = exchange(x, self._plan(window, self._length(x, self._dim)), self._dim, manager)
        return conv(F.pad(x, (pad, pad, 0, 0), mode="circular"))


class _GatherStatistics(torch.autograd.Function):
    """(...) on every rank to (ranks, ...) on every rank; the backward adds what the ranks send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, manager: DomainParallelManager) -> Tensor:
        ctx.manager = manager
        gathered = x.new_empty(manager.domain_world_size, *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=manager.domain_group)
        manager.traffic.collectives += 1
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.manager.domain_group)
        ctx.manager.traffic.collectives += 1
        return total[ctx.manager.domain_rank], None


class DomainParallelGroupNorm(DomainParallelLayer):
    """`nn.GroupNorm` with the mean and variance of the whole field, in float32 at least.

    Local moments are combined by the pairwise formula of Chan, Golub & LeVeque (1983), which does not
    cancel where a sum of squares would; gradients flow through the statistics of all ranks.

    Args:
        norm: the plain layer; weight and bias are shared with it.
    """

    def __init__(self, norm: nn.GroupNorm, shard_dim: int = -2) -> None:
        super().__init__(norm, shard_dim)

    def forward(self, x: Tensor) -> Tensor:
        manager = self._manager
        if manager is None:
            return super().forward(x)
        batch, channels = x.shape[:2]
        dim = self.shard_dim % x.ndim
        rows = Partition(self._length(x, dim), manager.domain_world_size).sizes
        dtype = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.reshape(batch, self.num_groups, -1).to(dtype), dim=-1, correction=0)
        gathered = _GatherStatistics.apply(torch.stack([mean, variance]), manager)
        share = torch.tensor(rows, dtype=dtype, device=x.device).view(-1, 1, 1) / sum(rows)
        means, variances = gathered.unbind(1)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(channels // self.num_groups, 1)
        shift = -mean.repeat_interleave(channels // self.num_groups, 1)
        if self.weight is not None:
            scale = scale * self.weight
        shift = shift * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (batch, channels, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x.to(dtype), scale.view(shape)).to(x.dtype)


class DomainParallelInterpolate(DomainParallelLayer):
    """`F.interpolate` to a global size, on shards: every mode but antialiasing, both `align_corners`.

    The weights of the rows are read off torch's own interpolation of unit vectors, so they follow its
    coordinate conventions exactly.

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
        self.scale_factor = None
        self.align_corners = None
        self.recompute_scale_factor = None

    @classmethod
    def from_upsample(cls, upsample: nn.Upsample, shard_dim: int = -2) -> DomainParallelInterpolate:
        """A second view of an `nn.Upsample`, which keeps the same attributes."""
        self = cls.__new__(cls, upsample)
        self.shard_dim = shard_dim
        return self

    @property
    def halo_exchange(self) -> HaloExchange:
        """A symmetric exchange of the rows one output row may read when the grid is refined."""
        return HaloExchange(2 if self.mode == "bicubic" else 1, self.shard_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, local rows, longitude) to this rank's rows of the global `size`."""
        manager = self._manager
        kwargs = {"align_corners": self.align_corners, "recompute_scale_factor": self.recompute_scale_factor}
        if manager is None:
            return F.interpolate(x, self.size, self.scale_factor, self.mode, **kwargs)
        dim, spatial = self.shard_dim % x.ndim, x.ndim - 2
        size = [self.size] * spatial if isinstance(self.size, int) else self.size
        scale = [self.scale_factor] * spatial if isinstance(self.scale_factor, float) else self.scale_factor
        length = self._length(x, dim)
        taps = _taps(length, size and size[dim - 2], scale and scale[dim - 2], self.mode, spatial, dim - 2, **kwargs)
        plan = self._plan(taps, length)
        x = exchange(x, plan, dim, manager)
        # Interpolation is separable: the other axes by torch (this one at scale 1), then this one by its taps.
        x = F.interpolate(
            x,
            size and _replaced(tuple(size), dim - 2, x.shape[dim]),
            scale and _replaced(tuple(scale), dim - 2, 1.0),
            self.mode,
            **kwargs,
        )
        return _weighted_rows(x, taps, plan.out, dim)


def _weighted_rows(x: Tensor, taps: Taps, out: range, dim: int) -> Tensor:
    """Rows `out` of the operator `taps`, from the rows they need."""
    rows = torch.tensor([taps.rows[o] for o in out], device=x.device)
    rows -= rows.min()
    weights = torch.tensor([taps.weights[o] for o in out], dtype=x.dtype, device=x.device)
    if rows.shape[1] == 1:
        return x.index_select(dim, rows[:, 0])
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    terms = [x.index_select(dim, rows[:, k]) * weights[:, k].view(shape) for k in range(rows.shape[1])]
    return torch.stack(terms).sum(0) if len(terms) > 2 else terms[0] + terms[1]


@lru_cache(maxsize=256)
def _taps(
    length: int,
    size: int | None,
    scale: float | None,
    mode: str,
    spatial: int,
    axis: int,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
) -> Taps:
    """Rows and weights of `F.interpolate` along one axis, measured on unit vectors in float64."""
    ones: tuple[int, ...] = (1,) * spatial
    units = torch.eye(length, dtype=torch.float64).view(1, length, *_replaced(ones, axis, length))
    resized = F.interpolate(
        units,
        None if size is None else _replaced(ones, axis, size),
        None if scale is None else _replaced((1.0,) * spatial, axis, scale),
        mode,
        align_corners=align_corners,
        recompute_scale_factor=recompute_scale_factor,
    )
    columns = resized.view(length, -1).T
    found = [column.nonzero().flatten().tolist() for column in columns]
    width = max(map(len, found))
    padded = [rows + rows[-1:] * (width - len(rows)) for rows in found]
    weights = [[*columns[o][rows].tolist(), *[0.0] * (width - len(rows))] for o, rows in enumerate(found)]
    return Taps(tuple(map(tuple, padded)), tuple(map(tuple, weights)))
