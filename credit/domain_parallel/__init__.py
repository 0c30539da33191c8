"""Domain parallelism: latitudes over ranks, with the numbers of one device. Needs torch alone.

manager = initialize_domain_parallel(world_size=4, domain_parallel_size=2)
model = convert_to_domain_parallel(model, manager)
y = model(shard_tensor(x))          # this rank's rows of model(x)
whole = gather_tensor(y)
"""

from credit.domain_parallel.convert import convert_to_domain_parallel, validate_sharding_constraints
from credit.domain_parallel.halo_exchange import HaloExchange
from credit.domain_parallel.layers import (
    DomainParallelConv2d,
    DomainParallelConv3d,
    DomainParallelConvTranspose2d,
    DomainParallelConvTranspose3d,
    DomainParallelGroupNorm,
    DomainParallelInterpolate,
    DomainParallelPeriodicConv2d,
    SharedHalo,
)
from credit.domain_parallel.manager import (
    DomainParallelError,
    DomainParallelManager,
    get_domain_parallel_manager,
    initialize_domain_parallel,
)
from credit.domain_parallel.parity import verify_parity
from credit.domain_parallel.parity_report import ParityReport
from credit.domain_parallel.record import record
from credit.domain_parallel.sharding import gather_tensor, reshard_tensor, shard_batch, shard_tensor
from credit.domain_parallel.slices import slices

__all__ = [
    "DomainParallelConv2d",
    "DomainParallelConv3d",
    "DomainParallelConvTranspose2d",
    "DomainParallelConvTranspose3d",
    "DomainParallelError",
    "DomainParallelGroupNorm",
    "DomainParallelInterpolate",
    "DomainParallelManager",
    "DomainParallelPeriodicConv2d",
    "HaloExchange",
    "ParityReport",
    "SharedHalo",
    "convert_to_domain_parallel",
    "gather_tensor",
    "get_domain_parallel_manager",
    "initialize_domain_parallel",
    "record",
    "reshard_tensor",
    "shard_batch",
    "shard_tensor",
    "slices",
    "validate_sharding_constraints",
    "verify_parity",
]
