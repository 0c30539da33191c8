"""Which part of a whole tensor a rank holds, wherever on the mesh it is: what checkpoints are written and read by.

A DTensor knows its own part, but for one case: where a column layer fuses several tensors (queries, keys and values),
a rank holds some rows of each, and the DTensor has them in the order of ranks. `Pieces` says where each run of rows
belongs in the plain model's tensor, to torch's distributed checkpoint too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import joined
from credit.domain_parallel.torch_private import (
    compute_local_shape_and_global_offset,
    make_wrapper_subclass,
    no_torch_function,
)
from credit.parallel.domain import get_raw_model
from credit.parallel.tensor_parallel import cut_layers


class Pieces(torch.Tensor):
    """What this rank holds of a DTensor whose rows are in the order of tensor-parallel ranks.

    A tensor by name only, as torch's distributed checkpoint wants it: nothing can be computed with it.

    Args:
        tensor: of which this rank holds some rows.
        partition: of the rows over the tensor-parallel ranks, with `outer` fused tensors.
    """

    tensor: DTensor
    partition: Partition
    __torch_function__ = no_torch_function

    @staticmethod
    def __new__(cls, tensor: DTensor, partition: Partition) -> Pieces:
        self = make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.tensor, self.partition = tensor, partition
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, *unused: Any) -> Any:
        raise TypeError(f"{func} of Pieces: take `whole()`, or the tensor")

    def runs(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(place of the first entry in the plain tensor, view of the values), for each run of rows."""
        shape, offset = compute_local_shape_and_global_offset(
            self.tensor.shape, self.tensor.device_mesh, self.tensor.placements
        )
        if not all(shape):
            return
        local = self.tensor.to_local()
        rows = self.partition.order[offset[0] : offset[0] + shape[0]]
        breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1), len(rows)]
        for start, stop in pairwise(breaks):
            yield (rows[start], *offset[1:]), local[start:stop]

    def whole(self) -> Tensor:
        """The plain tensor. Called by all ranks."""
        return joined(self.tensor.full_tensor(), 0, self.partition)

    def copied(self) -> Pieces:
        """The same values in memory of their own."""
        return Pieces(self.tensor.detach().clone(), self.partition)  # type: ignore[arg-type]

    # What torch's distributed checkpoint asks of a tensor that is in pieces.

    def __create_write_items__(self, fqn: str, unused: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.tensor.to_local())
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offset), view.shape),
                    properties=properties,
                    size=self.tensor.shape,
                ),
            )
            for offset, view in self.runs()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), view.shape) for offset, view in self.runs()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for offset, view in self.runs() if torch.Size(offset) == index.offset)


def in_pieces(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state`, by the plain model's names or names that begin with these, with `Pieces` where tensors are fused."""
    fused = {
        f"{path}.{name}": layer._tp_partition
        for path, layer in cut_layers(get_raw_model(model))
        for name in ("weight", "bias")
        if layer._tp_partition.outer > 1
    }

    def piece(name: str, value: Any) -> Any:
        partition = fused.get(name) or fused.get(name.rpartition(".")[0])
        return Pieces(value, partition) if partition and isinstance(value, DTensor) else value

    return {name: piece(name, value) for name, value in state.items()}


def whole(value: Any) -> Any:
    """The plain tensor of what `in_pieces` gives. Called by all ranks."""
    if isinstance(value, Pieces):
        return value.whole()
    return value.full_tensor() if isinstance(value, DTensor) else value
