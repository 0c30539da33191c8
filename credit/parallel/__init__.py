"""Parallelism over a DeviceMesh (dp, tp, domain), applied to plain models from outside.

mesh, submeshes = build_device_mesh(parse_parallelism_conf(conf))
model = apply_tensor_parallel(model, submeshes.get("tp"))
model = apply_domain_parallel(model, submeshes.get("domain"))
model = apply_fsdp2(model, gradient_mesh(mesh), conf)

or all three, in this order, by `parallelize(model, mesh, conf)`.
"""

from credit.parallel.collectives import clip_grad_norm_, sync_domain_gradients
from credit.parallel.domain import (
    apply_domain_parallel,
    get_domain_manager,
    get_raw_model,
    shard_spatial,
    unpad_shard_interp,
)
from credit.parallel.fsdp2 import apply_ddp, apply_fsdp2
from credit.parallel.mesh import (
    build_device_mesh,
    data_parallel_coords,
    dp_world_size,
    gradient_mesh,
    parse_parallelism_conf,
)
from credit.parallel.parallelize import Gradients, parallelize, reduce_gradients
from credit.parallel.tensor_parallel import TensorParallelError, apply_tensor_parallel

__all__ = [
    "Gradients",
    "TensorParallelError",
    "apply_ddp",
    "apply_domain_parallel",
    "apply_fsdp2",
    "apply_tensor_parallel",
    "build_device_mesh",
    "clip_grad_norm_",
    "data_parallel_coords",
    "dp_world_size",
    "get_domain_manager",
    "get_raw_model",
    "gradient_mesh",
    "parallelize",
    "parse_parallelism_conf",
    "reduce_gradients",
    "shard_spatial",
    "sync_domain_gradients",
    "unpad_shard_interp",
]
