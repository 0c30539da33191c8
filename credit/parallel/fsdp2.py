"""Data parallelism, applied from outside the model: FSDP2 or DDP over every rank that averages gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from credit.domain_parallel.slab import show_rows_to_hooks

BLOCKS = ("Transformer", "UpBlock", "UpBlockPS")
"""Classes, by name, whose parameters are gathered one block at a time. A model adds its own as `fsdp_blocks`."""


def gradient_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The 1-D mesh of the ranks that see different rows or samples: dp x domain, flattened.

    Averaging over it makes every gradient the one of the global mean loss, if each rank's loss is its share of
    the mean times the number of these ranks.
    """
    names = tuple(name for name in ("dp", "domain") if mesh is not None and name in (mesh.mesh_dim_names or ()))
    if mesh is None or not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("dp_domain")


def apply_fsdp2(model: nn.Module, dp_mesh: DeviceMesh | None, conf: dict) -> nn.Module:
    """Shard parameters, gradients and optimiser states over `dp_mesh`: blocks first, then the rest. In place.

    Args:
        model: the model, already converted for domain parallelism.
        dp_mesh: 1-D; a 2-D mesh would mean hybrid sharding to FSDP2, so flatten dp x domain first
            (`gradient_mesh`). None shards over all ranks.
        conf: the whole config; `trainer.amp: bf16` computes in bfloat16 and reduces in float32.
    """
    amp = (conf.get("trainer") or {}).get("amp", "none")
    bf16: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if amp == "bf16" else {}
    declared = tuple(getattr(model, "fsdp_blocks", ()))
    for module in list(model.modules()):
        if module is not model and (type(module).__name__ in BLOCKS or isinstance(module, declared)):
            fully_shard(module, mesh=dp_mesh, mp_policy=MixedPrecisionPolicy(**bf16))
            show_rows_to_hooks(module)
    # Only the whole model answers in float32: a block's output is the next block's bfloat16 input.
    output: dict[str, Any] = {"output_dtype": torch.float32} if bf16 else {}
    fully_shard(model, mesh=dp_mesh, mp_policy=MixedPrecisionPolicy(**bf16, **output))
    return model


def apply_ddp(model: nn.Module, dp_mesh: DeviceMesh) -> nn.Module:
    """Replicate the model over `dp_mesh`; rank 0's weights are sent to all, gradients are averaged."""
    return DistributedDataParallel(model, process_group=dp_mesh.get_group())
