"""Turn a plain model into one that works on latitude slabs, without touching its code or its names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from credit.domain_parallel.functions import answer_functions
from credit.domain_parallel.hooks import answer_hooks, take_inside
from credit.domain_parallel.layers import (
    DomainParallelConv2d,
    DomainParallelConv3d,
    DomainParallelConvTranspose2d,
    DomainParallelConvTranspose3d,
    DomainParallelGroupNorm,
    DomainParallelLayer,
    DomainParallelRoot,
    DomainParallelUpsample,
    become,
)
from credit.domain_parallel.manager import DomainParallelManager, of_several
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.root import Border
from credit.domain_parallel.side_doors import only_inside

logger = logging.getLogger(__name__)

Converter = Callable[[nn.Module], nn.Module]


def _reads_other_rows(conv: Any, axis: int) -> bool:
    if conv.kernel_size[axis] > 1 or conv.stride[axis] > 1:
        return True
    padding = conv.padding if isinstance(conv.padding, str) else conv.padding[axis]
    return padding not in (0, "same", "valid")


def _needs_halo_conv2d(conv: nn.Conv2d) -> bool:
    """True if an output row of `conv` is not made of the input row of the same number alone."""
    return _reads_other_rows(conv, 0)


def _needs_halo_conv3d(conv: nn.Conv3d) -> bool:
    """`_needs_halo_conv2d` for latitude in (level, latitude, longitude)."""
    return _reads_other_rows(conv, 1)


def _needs_halo_conv_transpose2d(conv: nn.ConvTranspose2d) -> bool:
    """True unless output row i is made of input row i alone.

    Kernel = stride is not enough: twice 91 and 90 rows are 182 and 180, but 362 rows are owned 181 and 181.
    """
    return _reads_other_rows(conv, 0) or conv.output_padding[0] > 0


def _needs_halo_conv_transpose3d(conv: nn.ConvTranspose3d) -> bool:
    """`_needs_halo_conv_transpose2d` for latitude in (level, latitude, longitude)."""
    return _reads_other_rows(conv, 1) or conv.output_padding[1] > 0


def _replace_module(parent: nn.Module, name: str, old_module: nn.Module, new_module: nn.Module) -> None:
    """Put `new_module` where `parent` has `old_module`, keeping train or eval mode."""
    new_module.train(old_module.training)
    parent._modules[name] = new_module


# Layers that take and give shards when called by themselves, too; everything else does inside the converted root.
_LAYERS: dict[type[nn.Module], tuple[Callable[[Any], bool], Callable[..., nn.Module]]] = {
    nn.Conv2d: (_needs_halo_conv2d, DomainParallelConv2d),
    nn.Conv3d: (_needs_halo_conv3d, lambda conv, dim: DomainParallelConv3d(conv, dim)),
    nn.ConvTranspose2d: (_needs_halo_conv_transpose2d, DomainParallelConvTranspose2d),
    nn.ConvTranspose3d: (_needs_halo_conv_transpose3d, DomainParallelConvTranspose3d),
    nn.GroupNorm: (lambda norm: True, DomainParallelGroupNorm),
    nn.Upsample: (lambda upsample: True, DomainParallelUpsample),
}


def convert_to_domain_parallel(
    model: nn.Module,
    manager: DomainParallelManager | None,
    shard_dim: int = -2,
    custom_converters: Mapping[Any, Converter] | None = None,
    fallback: Literal["gather", "refuse"] = "gather",
) -> nn.Module:
    """Make `model` compute, on latitude slabs, what it computes on whole fields. In place.

    The converted model takes shards and gives shards. Inside it, every field has the shape of the whole
    (`Slab`), and every torch function that meets one follows its exact rule. One that has none is computed on gathered
    fields, on every rank alike, which is logged with the path of the module and the line of its code; what cannot be
    exact is refused. Names of parameters, shared modules, hooks and
    parametrizations stay; a second conversion changes nothing; with one domain rank or no manager the plain model is
    returned. A field is a tensor with a batch axis, a channel axis and all axes from `shard_dim` on; other
    inputs are whole and the same on every rank, and so are other outputs.

    A type that a cheaper rule exists for is given as a whole:

        convert_to_domain_parallel(model, manager, custom_converters={PeriodicConv2d: DomainParallelPeriodicConv2d})

    Args:
        model: the plain model.
        manager: whose domain group shares the fields.
        shard_dim: the sharded axis, counted from the end: -2 for latitude in (..., latitude, longitude), -1 for
            longitude.
        custom_converters: replacement for modules of these very types; their children are left alone. The
            replacement is given a `Slab`, as every module inside the model is.
        fallback: "refuse" to refuse what would be gathered.

    Returns:
        `model`, or its replacement if a custom converter took the root itself.
    """
    manager = of_several(manager)
    if manager is None or isinstance(model, DomainParallelRoot):
        return model
    if shard_dim >= 0:
        raise ValueError(f"shard_dim counts from the end of a field, -2 for latitude; got {shard_dim}")
    for site in _find_sites(model, shard_dim, custom_converters or {}):
        model = _convert_at(model, *site, manager)
    for part in model.modules():
        if part is not model and not isinstance(part, DomainParallelLayer):
            part.register_forward_pre_hook(only_inside, prepend=True)
    answer_functions()
    answer_hooks()
    become(model, DomainParallelRoot)
    take_inside(model)
    model.__dict__["_domain_border"] = Border(manager, shard_dim, fallback)
    return model


def _convert_at(
    model: nn.Module, path: str, module: nn.Module, convert: Converter, manager: DomainParallelManager
) -> nn.Module:
    """`model` with one of its modules converted; another module if that is itself."""
    layer = convert(module)
    if layer.__dict__ is module.__dict__:
        module.__class__ = type(layer)
        layer = module
    elif path:
        _replace_everywhere(model, module, layer)
    else:
        model = layer
    if isinstance(layer, DomainParallelLayer):
        layer.__dict__["_domain_manager"] = manager
    return model


def _find_sites(
    model: nn.Module, shard_dim: int, custom: Mapping[Any, Converter]
) -> list[tuple[str, nn.Module, Converter]]:
    """Every module to convert, once, with its path."""
    sites: list[tuple[str, nn.Module, Converter]] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str) -> None:
        if module in seen or isinstance(module, DomainParallelLayer):
            return
        seen.add(module)
        if type(module) in custom:
            sites.append((path, module, custom[type(module)]))
            return
        plain = next((kind for kind in _LAYERS if isinstance(module, kind)), None)
        # A subclass with a forward of its own is the model's code like any other.
        if plain is not None and not _overridden(type(module), plain) and _LAYERS[plain][0](module):
            sites.append((path, module, partial(_sharded, _LAYERS[plain][1], shard_dim)))
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return sites


def _sharded(layer: Callable[..., nn.Module], shard_dim: int, module: nn.Module) -> nn.Module:
    return layer(module, shard_dim)


def _overridden(kind: type[nn.Module], plain: type[nn.Module]) -> bool:
    names = ("forward", "_conv_forward")
    return any(getattr(kind, name, None) is not getattr(plain, name, None) for name in names)


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                _replace_module(parent, name, old, new)


def validate_sharding_constraints(
    model: nn.Module, local_h: int | Sequence[int], window_sizes: list[int] | None = None
) -> list[str]:
    """Check that a rank holds whole strides and whole attention windows at every level of an encoder.

    Where it does not, the numbers are right all the same: rows are exchanged so that windows are whole, which
    costs messages. This tells where.

    Args:
        model: looked through, in the order of its modules, for strided convolutions (those side by side in one
            ModuleList, as in a cross-scale embedding, count once) and for modules with a `window_size` or `window`.
            Strides hidden in slices (Swin's patch merging) are not seen: give `window_sizes`.
        local_h: rows of every rank, or the rows of each, where they are uneven.
        window_sizes: rows of the windows, the i-th after i + 1 strides; None takes those found in the model.

    Returns:
        One warning a level that does not fit; empty if all do.
    """
    heights = [local_h] if isinstance(local_h, int) else list(local_h)
    levels = _levels(model)
    if window_sizes is not None:
        strides = [stride for stride, _ in levels]
        levels = [(strides[min(i, len(strides) - 1)], [window]) for i, window in enumerate(window_sizes)]
    warnings = []
    for level, (stride, windows) in enumerate(levels):
        odd = [rows for rows in heights if rows % stride]
        if odd:
            warnings.append(
                f"level {level}: {_listed(odd)} local rows do not divide by the encoder's stride of {stride}"
            )
            continue
        rows_here = Partition(sum(heights) // stride, len(heights)).sizes
        for window in windows:
            odd = sorted({rows for rows in rows_here if rows % window})
            if odd:
                text = f"level {level}: {_listed(odd)} local rows do not divide into windows of {window} rows"
                warnings.append(text)
    return warnings


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, sorted(set(numbers))))


def _levels(model: nn.Module) -> list[tuple[int, list[int]]]:
    """(rows of the input that make one row, heights of the windows) for each level, in the order of the modules."""
    levels: list[tuple[int, list[int]]] = [(1, [])]
    counted: set[nn.Module] = set()
    for module in model.modules():
        window = getattr(module, "window_size", getattr(module, "window", None))
        if isinstance(window, int | list | tuple):
            height = window if isinstance(window, int) else window[0]
            if height not in levels[-1][1]:
                levels[-1][1].append(height)
        if isinstance(module, nn.ModuleList):
            counted.update([child for child in module if _stride(child) > 1][1:])
        if _stride(module) > 1 and module not in counted:
            levels.append((levels[-1][0] * _stride(module), []))
    # What comes before the first stride is a level of its own only if it has windows.
    return levels if levels[0][1] or len(levels) == 1 else levels[1:]


def _stride(module: nn.Module) -> int:
    """Rows of the input to a row of the output of a convolution; 1 for any other module."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1
    return module.stride[max(len(module.stride) - 2, 0)]
