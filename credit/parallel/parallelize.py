"""A plain model onto a mesh, in one fixed order: channels (tp), latitudes (domain), samples and states (dp)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from credit.config.parallelism import Conf, Sharding
from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.layers import DomainParallelRoot
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.record import record
from credit.domain_parallel.torch_private import BatchNorm
from credit.errors import ConfigError
from credit.parallel.collectives import GradientSums, allreduce_grads_avg
from credit.parallel.fsdp2 import (
    apply_ddp,
    apply_fsdp2,
    compile_blocks,
    fsdp_blocks,
    recompute_activations,
    synchronize_gradients,
)
from credit.parallel.mesh import gradient_axes, gradient_mesh, group_apart
from credit.parallel.tensor_parallel import apply_tensor_parallel


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    conf: Conf,
    manager: DomainParallelManager | None = None,
    custom_converters: Mapping[Any, Converter] | None = None,
) -> nn.Module:
    """Lay `model` out on `mesh` as `trainer` of the config says.

    After each backward call `reduce_gradients(model, mesh, conf)`.

    Args:
        model: plain, with the same weights on all ranks.
        mesh: from `build_device_mesh`; None for one rank.
        conf: the whole config as a dictionary, or its `Sharding`.
        manager: of the mesh's domain group; made from the mesh if None.
        custom_converters: for `convert_to_domain_parallel`.
    """
    return replicate(cut(model, mesh, conf, manager, custom_converters), mesh, conf)


def cut(
    model: nn.Module,
    mesh: DeviceMesh | None,
    conf: Conf,
    manager: DomainParallelManager | None = None,
    custom_converters: Mapping[Any, Converter] | None = None,
) -> nn.Module:
    """The first half of `parallelize`: channels over tp, rows over domain."""
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
        model = apply_tensor_parallel(model, mesh["tp"])
    manager = manager or DomainParallelManager.from_mesh(mesh)
    fallback = Sharding.of(conf).fallback
    model = convert_to_domain_parallel(model, manager, custom_converters=custom_converters, fallback=fallback)
    if mesh is not None and "dp" in (mesh.mesh_dim_names or ()):
        _refuse_batch_norm(model)
    return model


def replicate(model: nn.Module, mesh: DeviceMesh | None, conf: Conf, unused: Sequence[str] = ()) -> nn.Module:
    """The second half of `parallelize`: samples over dp.

    Args:
        unused: parameters that get no gradient, by name; DDP does not wait for them.
    """
    sharding = Sharding.of(conf)
    data = sharding.parallelism.data
    if isinstance(model, DomainParallelRoot) or _is_cut(model):
        if sharding.compile or sharding.record:
            record(model, compiled=sharding.compile)
    elif sharding.compile:
        compile_blocks(model)
    over = _fsdp_mesh(mesh, sharding)
    if data == "fsdp2" and over is not None:
        return apply_fsdp2(model, over, sharding)
    if sharding.activation_checkpointing:
        recompute_activations(fsdp_blocks(model))
    averaged = gradient_mesh(mesh)
    if data == "ddp" and averaged is not None and not _is_cut(model):
        return apply_ddp(model, averaged, unused)
    return model


def _refuse_batch_norm(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            raise ConfigError(
                f"{path} ({type(module).__name__}) has the statistics of one replica's samples, so several replicas "
                f"do not give the numbers of one device: use GroupNorm, or one replica (a larger domain or tensor)"
            )


def reduce_gradients(model: nn.Module, mesh: DeviceMesh | None, conf: Conf) -> None:
    """Average the gradients over those of dp x domain that neither FSDP2 nor DDP has averaged them over.

    That is the domain group where parameters are sharded over dp alone or `data` is none, and all of dp x domain where
    DDP would be used but for tensor parallelism, whose DTensors it does not take. `Gradients` does the same while the
    backward runs.
    """
    _refuse_unused(model)
    averaged = gradient_mesh(mesh)
    if mesh is None or averaged is None:
        return
    for parameters, axes in _not_averaged(model, mesh, Sharding.of(conf)):
        over = averaged if axes == gradient_axes(mesh) else mesh[axes[0]]
        allreduce_grads_avg(parameters, over.get_group())


class Gradients:
    """Of a model on a mesh, averaged as by `reduce_gradients`, most of it while the backward runs.

        for part in parts:
            with gradients.adding_up(last=part is parts[-1]):
                loss(part).backward()
        gradients.reduce()

    Args:
        model, mesh, conf: as `parallelize` was given them. Called by all ranks: messages that may overtake those of
            the model have groups of their own.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None, conf: Conf) -> None:
        self._model, self._mesh, self._sharding = model, mesh, Sharding.of(conf)
        self._orders: dict[tuple[str, ...], list[int]] = {}
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        self._sums = self._new_sums()

    @property
    def started(self) -> int:
        """Buckets of gradients that are under way, or reduced, since the last step."""
        return sum(sums.started for sums in self._sums.values())

    @contextmanager
    def adding_up(self, last: bool) -> Iterator[None]:
        """Around the backward of one of several batches whose gradients add up; those of the `last` are reduced."""
        with synchronize_gradients(self._model, last), ExitStack() as hooks:
            if last:
                self._sums = self._new_sums()
                for sums in self._sums.values():
                    hooks.enter_context(sums.as_they_come())
            yield

    def reduce(self) -> None:
        """Wait for what is under way, and for the rest. Called once a step, after the last backward."""
        _refuse_unused(self._model)
        for axes, sums in self._sums.items():
            sums.finish()
            if axes not in self._orders:  # FSDP2's come by blocks, say: from the second step on, in the order they come
                self._orders[axes] = sums.agreed_order()

    def _new_sums(self) -> dict[tuple[str, ...], GradientSums]:
        mesh = self._mesh
        if mesh is None:
            return {}
        for module in self._model.modules():  # a forward without a backward, in validation, leaves parameters gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        found = {}
        for parameters, axes in _not_averaged(self._model, mesh, self._sharding):
            if axes not in self._groups:
                self._groups[axes] = group_apart(mesh, axes)
            found[axes] = GradientSums(parameters, self._groups[axes], self._orders.get(axes))
        return found


def _not_averaged(
    model: nn.Module, mesh: DeviceMesh, sharding: Sharding
) -> Iterator[tuple[list[nn.Parameter], tuple[str, ...]]]:
    """Parameters, and the axes of the mesh over which nobody else averages their gradients."""
    axes, parameters = gradient_axes(mesh), [*model.parameters()]
    if not axes or isinstance(model, nn.parallel.DistributedDataParallel):
        return
    done = _fsdp_mesh(mesh, sharding) if sharding.parallelism.data == "fsdp2" else None
    if done is None:
        yield parameters, axes
        return
    if sharding.shard_over == "dp" and "domain" in axes:
        yield [p for p in parameters if isinstance(p, DTensor)], ("domain",)
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if whole:
        yield whole, axes


def _refuse_unused(model: nn.Module) -> None:
    """DDP waits for the gradient of every parameter, and says so at the next step only.

    Raises:
        ConfigError: naming the parameters of which this step made no gradient, the same on all ranks.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    named = ((name, p) for name, p in model.module.named_parameters() if name not in model.parameters_to_ignore)
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    if unused:
        raise ConfigError(
            f"{', '.join(unused[:3])}{' and others' if len(unused) > 3 else ''}: this step did not use these "
            f"parameters, as the first look at the model did, and data: ddp waits for their gradients: take data: fsdp2"
        )


def _fsdp_mesh(mesh: DeviceMesh | None, sharding: Sharding) -> DeviceMesh | None:
    """The ranks that FSDP2 shards over: dp x domain, or dp alone; None where there is one of them."""
    if sharding.shard_over == "dp_domain":
        return gradient_mesh(mesh)
    return mesh["dp"] if mesh is not None and "dp" in (mesh.mesh_dim_names or ()) else None


def _is_cut(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
