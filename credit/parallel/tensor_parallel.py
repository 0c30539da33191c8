"""Tensor parallelism, applied from outside: the wide layers of a block are cut by channel over the ranks of *tp*.

A block declares the pair of layers between which its channels may be cut:

    class MLP(nn.Module):
        _tp_col = "expand"     # its output channels are cut
        _tp_row = "project"    # its input channels are cut; the ranks' results are summed, the bias is added once

`_tp_col` may be a tuple of paths (separate queries, keys and values), and `_tp_fused = 3` says that the column layer
makes three tensors side by side (fused queries, keys and values, or 2 for gated units), each of which is cut.
What stands in between is checked while it runs, see `credit.parallel.channels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from credit.domain_parallel.groups import ProcessRanks
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import joined, part
from credit.domain_parallel.slab import refuse, rules_of
from credit.domain_parallel.torch_private import tree_leaves
from credit.errors import CreditError
from credit.parallel.channels import ChannelGroup, Channels
from credit.parallel.collectives import local
from credit.parallel.elsewhere import refused

__getattr__ = refused(__name__)


class TensorParallelError(CreditError):
    """A block cannot be cut by channel as it declares. Names the module, the reason and the remedy."""


def apply_tensor_parallel(model: nn.Module, tp_mesh: DeviceMesh | None) -> nn.Module:
    """Cut the layers of every block that declares `_tp_col` and `_tp_row` over the ranks of `tp_mesh`. In place.

    Before `convert_to_domain_parallel` and `apply_fsdp2`. Names stay; the weights become DTensors on `tp_mesh`
    (column weights and biases Shard(0), row weights Shard(1)). A weight that is computed (spectral_norm, weight_norm)
    or shared with another module stays whole on every rank, which takes its part of it when it is used.

    Args:
        model: with the same weights on all ranks.
        tp_mesh: 1-D; None or one rank leaves the model as it is.

    Returns:
        `model`.

    Raises:
        TensorParallelError: if no block declares a pair, a path does not exist, a layer is neither nn.Linear nor a 1x1
            nn.Conv2d, or its channels do not divide over the ranks. On all ranks alike, before anything is changed.
    """
    if tp_mesh is None or tp_mesh.size() == 1:
        return model
    return cut_channels(model, ChannelGroup(ProcessRanks(tp_mesh.get_group()), tp_mesh))


def cut_channels(model: nn.Module, group: ChannelGroup) -> nn.Module:
    """`apply_tensor_parallel` for the ranks of `group`."""
    ranks = group.size
    blocks = [(path, module) for path, module in model.named_modules() if _declares(module, path)]
    if not blocks:
        raise TensorParallelError(
            f"{type(model).__name__} has no block that declares _tp_col and _tp_row, so there is nothing to cut over "
            f"{ranks} tensor-parallel ranks: use tensor: 1"
        )
    sites = [site for path, block in blocks for site in _sites(path, block, ranks)]
    kinds: dict[nn.Module, type[_CutLayer]] = {}
    for path, layer, kind, _ in sites:
        if kinds.setdefault(layer, kind) is not kind:
            raise TensorParallelError(f"{path} is declared both as a column and as a row layer")
    uses = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    for _, layer, kind, partition in sites:
        if not isinstance(layer, kind):
            _convert(layer, kind, partition, group, uses)
    for path, block in blocks:
        block.register_forward_hook(_Whole(path))
    return model


def cut_layers(model: nn.Module) -> Iterator[tuple[str, _CutLayer]]:
    """The layers of `model` that are cut by channel, with their paths."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, _CutLayer))


def _declares(block: nn.Module, path: str) -> bool:
    declared = [getattr(block, name, None) is not None for name in ("_tp_col", "_tp_row")]
    if any(declared) != all(declared):
        name = path or type(block).__name__
        raise TensorParallelError(f"{name} ({type(block).__name__}) declares one of _tp_col and _tp_row, not both")
    return all(declared)


Site = tuple[str, nn.Module, "type[_CutLayer]", Partition]


def _sites(path: str, block: Any, ranks: int) -> list[Site]:
    columns = (block._tp_col,) if isinstance(block._tp_col, str) else tuple(block._tp_col)
    fused = getattr(block, "_tp_fused", 1)
    sites: list[Site] = []
    declared: list[tuple[type[_CutLayer], str]] = [
        *((ColumnParallel, name) for name in columns),
        (RowParallel, block._tp_row),
    ]
    for kind, name in declared:
        where = f"{path}.{name}" if path else name
        try:
            layer = block.get_submodule(name)
        except AttributeError:
            raise TensorParallelError(f"{type(block).__name__} declares {name!r}, and {where} does not exist") from None
        _check_layer(where, layer)
        outputs = kind is ColumnParallel
        each, rest = divmod(_channels(layer, outputs), fused if outputs else 1)
        if rest or each % ranks:
            what = "input channels"
            if outputs:
                what = f"output channels ({fused} fused tensors)" if fused > 1 else "output channels"
            raise TensorParallelError(
                f"{where}: {_channels(layer, outputs)} {what} do not divide over {ranks} tensor-parallel "
                f"ranks: change the width, or trainer.parallelism.tensor"
            )
        sites.append((where, layer, kind, Partition(each, ranks, fused if outputs else 1)))
    return sites


def _check_layer(path: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        return
    if not isinstance(layer, nn.Conv2d):
        raise TensorParallelError(f"{path} is a {type(layer).__name__}: only nn.Linear and 1x1 nn.Conv2d can be cut")
    if layer.kernel_size != (1, 1) or layer.groups != 1 or any(layer.padding):
        raise TensorParallelError(
            f"{path} is a convolution of kernel {layer.kernel_size}, {layer.groups} groups, padding {layer.padding}: "
            f"only 1x1 convolutions of one group, without padding, can be cut by channel"
        )


def _channels(layer: Any, outputs: bool) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels if outputs else layer.in_channels
    return layer.out_features if outputs else layer.in_features


def _convert(layer: Any, kind: type[_CutLayer], partition: Partition, group: ChannelGroup, uses: Counter[Any]) -> None:
    dim = kind._dim
    layer._tp_cut = set()
    for name in ("weight", "bias") if dim == 0 else ("weight",):
        whole = layer._parameters.get(name)
        if whole is not None and uses[whole] == 1:
            mine = part(whole.detach(), dim, partition, group.rank).clone(memory_format=torch.contiguous_format)
            layer._parameters[name] = nn.Parameter(group.as_parameter(mine, dim), whole.requires_grad)
            layer._tp_cut.add(name)
    named = next(one for one in NAMED if issubclass(one, kind) and isinstance(layer, one.__bases__[1]))
    layer.__class__ = type(type(layer).__name__, (named, type(layer)), {"__module__": type(layer).__module__})
    layer._tp_partition = partition
    layer._tp_group = group


class _CutLayer(nn.Module):
    """What both layers share.

    Attributes:
        _tp_partition: how the channels are cut. Where several tensors are fused, `outer` is their number: the DTensor
            then holds rank 0's channels of each, then rank 1's, and so on (see `credit.parallel.checkpoint`).
        _tp_group: the ranks that share them.
        _tp_cut: the parameters of which this rank stores its part alone.
    """

    _tp_partition: Partition
    _tp_group: ChannelGroup
    _tp_cut: set[str]

    _dim: int
    """The axis of the weight that is cut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TensorParallelError(
            f"{type(self).__name__} is what apply_tensor_parallel makes of a layer, in place: declare the layer in "
            f"_tp_col or _tp_row of its block, and call apply_tensor_parallel(model, mesh['tp'])"
        )

    def _mine(self, name: str) -> Any:
        """This rank's part of a parameter, which is stored, or taken out of the whole; None where there is none."""
        value: Any = getattr(self, name)
        if value is None or name in self._tp_cut:
            return value if value is None else local(value)
        return part(self._tp_group.spread(value), self._dim, self._tp_partition, self._tp_group.rank)

    def whole(self, mine: Tensor) -> Tensor:
        """A parameter, or its gradient, from the ranks' parts of it. Called by all ranks."""
        parts = self._tp_group.ranks.all_gather(mine)
        return joined(torch.cat(parts.unbind(), self._dim), self._dim, self._tp_partition)

    def _apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self, nn.Conv2d):
            return F.conv2d(x, weight, bias, self.stride)
        return F.linear(x, weight, bias)

    def _channel_axis(self, x: Tensor) -> int:
        return x.ndim - 3 if isinstance(self, nn.Conv2d) else x.ndim - 1


class ColumnParallel(_CutLayer):
    """Output channels cut: whole input, this rank's outputs."""

    _dim = 0

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Channels):
            with rules_of(Channels):
                refuse("a column layer", "its input must be whole, and is cut by another column layer before it")
        y = self._apply_to(self._tp_group.spread(x), self._mine("weight"), self._mine("bias"))
        return Channels(y, self._channel_axis(y), self._tp_partition, self._tp_group)


class RowParallel(_CutLayer):
    """Input channels cut: the ranks' results are summed, and the bias is added to the sum."""

    _dim = 1

    def forward(self, x: Tensor) -> Tensor:
        rank, partition = self._tp_group.rank, self._tp_partition
        with rules_of(Channels):
            if not isinstance(x, Channels) or x.cut != self._channel_axis(x):
                refuse("the row layer", "the channels that reach it are not cut as its weight is")
            if list(x.partition.indices(rank)) != list(partition.indices(rank)):
                refuse("the row layer", "the channels that reach it are other ones than its weight's on this rank")
        y = self._tp_group.sum(self._apply_to(x.local, self._mine("weight"), None))
        bias: Any = self.bias
        if bias is None:
            return y
        return y + (bias.view(-1, 1, 1) if isinstance(self, nn.Conv2d) else bias)


class TpColLinear(ColumnParallel, nn.Linear):
    """A linear layer whose outputs are cut: for `isinstance`, not to be made by itself."""


class TpColConv2d(ColumnParallel, nn.Conv2d):
    """A 1x1 convolution whose output channels are cut."""


class TpRowLinear(RowParallel, nn.Linear):
    """A linear layer whose inputs are cut."""


class TpRowConv2d(RowParallel, nn.Conv2d):
    """A 1x1 convolution whose input channels are cut."""


NAMED: tuple[type[_CutLayer], ...] = (TpColLinear, TpColConv2d, TpRowLinear, TpRowConv2d)
"""What a layer becomes, by kind and type."""


class _Whole:
    """Forward hook: what leaves a block must be whole again."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        if any(isinstance(leaf, Channels) for leaf in tree_leaves(output)):
            raise TensorParallelError(
                f"{self.path or type(block).__name__} ({type(block).__name__}) gives channels that are still cut over "
                f"the tensor-parallel ranks: its output must come from {block._tp_row!r}"
            )
