"""Fields between the globe and its shards: each rank has its own latitudes, whatever padding the model uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from credit.domain_parallel import convert_to_domain_parallel, shard_tensor
from credit.parallel import get_domain_manager, get_raw_model, shard_spatial, unpad_shard_interp
from tests.domain_parallel.parity import manager, relative


class Padding:
    """As a model may do it: reflected rows at the poles, circular columns."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def pad(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.columns, self.columns, 0, 0), mode="circular")
        return F.pad(x, (0, 0, self.rows, self.rows), mode="reflect")

    def unpad(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        return x[..., self.rows : rows - self.rows, self.columns : columns - self.columns]


def unpadded(height: int, width: int, rows: int, columns: int, by_object: bool, stretch: int) -> list[float]:
    """Errors of the rows and of the gradient against the same on the whole field."""
    torch.manual_seed(0)
    padding = Padding(rows, columns)
    padded = torch.randn(2, 3, stretch * height + 2 * rows, stretch * width + 2 * columns, dtype=torch.float64)
    option = padding if by_object else {"pad_lat": rows, "pad_lon": (columns, columns)}
    whole = padded.clone().requires_grad_()
    expected = unpad_shard_interp(whole, option, None, height, width)
    assert stretch > 1 or torch.equal(expected, padding.unpad(whole))
    mine = shard_tensor(padded, -2, manager()).clone().requires_grad_()
    found = unpad_shard_interp(mine, option, manager(), height, width)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    found.backward(shard_tensor(cotangent, -2, manager()))
    return [
        relative(found, shard_tensor(expected, -2, manager())),
        relative(mine.grad, shard_tensor(whole.grad, -2, manager())),
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    size=st.sampled_from([1, 2, 3, 4]),
    height=st.integers(8, 19),
    rows=st.integers(0, 7),
    columns=st.integers(0, 3),
    by_object=st.booleans(),
    stretch=st.sampled_from([1, 1, 2]),
)
def test_every_rank_is_scored_at_its_own_latitudes(worlds, size, height, rows, columns, by_object, stretch) -> None:
    for errors in worlds(size).run(unpadded, height, 8, rows, columns, by_object, stretch):
        assert max(errors) < 1e-12


def sharded() -> tuple:
    fields = {"x": torch.arange(13.0)[:, None].expand(2, 13, 4), "more": [torch.zeros(3, 13, 4)], "name": "t2m"}
    mine = shard_spatial(fields, manager())
    model = convert_to_domain_parallel(nn.Conv2d(3, 3, 3, padding=1), manager())
    replicated = nn.parallel.DistributedDataParallel(model)
    assert get_raw_model(replicated) is model
    assert get_raw_model(torch.compile(replicated)) is model
    assert get_domain_manager(replicated) is manager()
    return mine["x"][0, :, 0].tolist(), mine["more"][0].shape, mine["name"]


def test_shards_of_nested_fields_and_what_a_model_is_made_of(worlds) -> None:
    found = worlds(3).run(sharded)
    assert [rows for rows, *_ in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert [shape for _, shape, _ in found] == [(3, 5, 4), (3, 4, 4), (3, 4, 4)]
    assert get_domain_manager(nn.Linear(2, 2)) is None
    x = torch.zeros(3)
    assert shard_spatial(x, None) is x


def test_a_whole_field_is_unpadded_without_ranks() -> None:
    x = torch.arange(60.0).view(1, 6, 10)
    assert torch.equal(unpad_shard_interp(x, {"pad_lat": (1, 2), "pad_lon": 3}, None, 3, 4), x[:, 1:4, 3:7])
    assert unpad_shard_interp(x, None, None, 6, 10) is x
