"""Data parallelism, applied from outside the model: FSDP2 or DDP over every rank that averages gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from credit.config.parallelism import Conf, Sharding
from credit.domain_parallel.layers import become
from credit.domain_parallel.slab import show_rows_to_hooks
from credit.domain_parallel.torch_private import allow_recompiles
from credit.parallel.tensor_parallel import TensorParallelError

BLOCKS = ("Transformer", "UpBlock", "UpBlockPS")
"""Classes, by name, whose parameters are gathered one block at a time. A model adds its own as `fsdp_blocks`."""


SHAPES_A_BLOCK = 8
"""That are compiled: of training, validation and their last batches."""


def apply_fsdp2(model: nn.Module, dp_mesh: DeviceMesh | None, conf: Conf) -> nn.Module:
    """Shard parameters, gradients and optimiser states over `dp_mesh`: blocks first, then the rest. In place.

    Args:
        model: the model, already cut by channel and converted for domain parallelism.
        dp_mesh: 1-D; a 2-D mesh would mean hybrid sharding to FSDP2, so flatten dp x domain first
            (`gradient_mesh`). None shards over all ranks.
        conf: the whole config, or `Sharding`. Of `trainer`: `precision: bf16` computes in bfloat16 and reduces in
            float32; `activation_checkpointing` keeps the inputs of blocks alone and runs them again in the backward;
            `reshard_after_forward: false` keeps the gathered parameters for the backward, for less traffic and
            more memory; `prefetch: n` gathers the parameters of the next n blocks while one computes.
    """
    sharding = Sharding.of(conf)
    bf16: dict[str, Any] = {}
    if sharding.precision == "bf16":
        bf16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    blocks = fsdp_blocks(model)
    if sharding.activation_checkpointing:
        recompute_activations(blocks)
    whole, shared = _kept_whole(model), _shared(blocks)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no others
    for block in reversed(blocks):  # those within others first
        fully_shard(
            block,
            mesh=dp_mesh,
            mp_policy=MixedPrecisionPolicy(**bf16),
            reshard_after_forward=sharding.reshard_after_forward,
            ignored_params=whole | shared,
        )
        show_rows_to_hooks(block)
    # Only the whole model answers in float32: a block's output is the next block's bfloat16 input.
    output: dict[str, Any] = {"output_dtype": torch.float32} if bf16 else {}
    fully_shard(model, mesh=dp_mesh, mp_policy=MixedPrecisionPolicy(**bf16, **output), ignored_params=whole)
    for i, block in enumerate(blocks if sharding.prefetch else ()):
        cast(FSDPModule, block).set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + sharding.prefetch])  # type: ignore[arg-type]
    return model


def _kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Parameters without an axis to shard: every rank has them, and `reduce_gradients` averages their gradients."""
    return {parameter for parameter in model.parameters() if parameter.ndim == 0}


def _shared(blocks: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters of several blocks, none within another: sharded with the whole model, whose forward gathers them."""
    users = Counter(parameter for block in _outermost(blocks) for parameter in block.parameters())
    return {parameter for parameter, number in users.items() if number > 1}


def fsdp2_is_applied(model: nn.Module) -> bool:
    """True if parameters of the model, or of a part of it, are sharded by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def fsdp_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of `model`, in its order: of a class named in `BLOCKS`, or that it lists in `fsdp_blocks`."""
    declared = tuple(getattr(model, "fsdp_blocks", ()))
    return [
        module
        for module in model.modules()
        if module is not model and (type(module).__name__ in BLOCKS or isinstance(module, declared))
    ]


def recompute_activations(blocks: Sequence[nn.Module]) -> None:
    """Keep only the inputs of these blocks; what their backward needs is computed again. Names stay."""
    for block in _outermost(blocks):
        become(block, _Recomputed)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of `model`, in place; names stay. Blocks alike are compiled once.

    Each shape has code of its own: what torch makes for any shape, once it has met two, was four times slower than
    eager code. All blocks count as one against its limit of shapes, beyond which it would go on in eager mode unsaid.
    """
    blocks = _outermost(fsdp_blocks(model))
    allow_recompiles(SHAPES_A_BLOCK * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def _outermost(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    inside = {child for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if block not in inside]


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        contexts = (nullcontext(), _Buffers(self))
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)


class _Buffers:
    """Context: the buffers of `module` are copies of what they are now. Some are changed by a forward (spectral norm's
    vectors, running means): a second one then starts from what the first did, and leaves no trace."""

    def __init__(self, module: nn.Module) -> None:
        self.values = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def __enter__(self) -> None:
        self.now = [buffer.data for buffer, _ in self.values]
        for buffer, value in self.values:
            buffer.data = value.clone()

    def __exit__(self, *error: Any) -> None:
        for (buffer, _), value in zip(self.values, self.now, strict=True):
            buffer.data = value


def apply_ddp(model: nn.Module, dp_mesh: DeviceMesh | None, unused: Sequence[str] = ()) -> nn.Module:
    """Replicate the model over `dp_mesh`; rank 0's weights are sent to all, gradients are averaged.

    Args:
        dp_mesh: 1-D; None replicates over all ranks.
        unused: parameters that get no gradient, by name; DDP would wait for them.

    Raises:
        TensorParallelError: if parts of the model are cut by channel, which DDP does not take.
    """
    cut = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if cut:
        raise TensorParallelError(
            f"{cut[0]} is cut over tensor-parallel ranks, and DDP takes no such parameters: use `parallelize`, which "
            f"averages their gradients itself, or fsdp2"
        )
    if not dist.is_initialized():
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, _as_ddp_names_them(model, unused))
    # Buffers are not sent before each forward: rank 0's alone would count in a mean over samples.
    group = dp_mesh.get_group() if dp_mesh is not None else None
    return DistributedDataParallel(model, process_group=group, forward_sync_buffers=False)


def _as_ddp_names_them(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Every name of these parameters: of each module that shares one, and with a dot before the outermost's own."""
    meant = {id(model.get_parameter(name)) for name in names}
    found = (
        (path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in meant
    )
    return [*names, *(f"{path}.{name}" for path, name in found)]


@contextmanager
def synchronize_gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """Around the backward of one of several batches whose gradients add up: only the `last` one's are reduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield
