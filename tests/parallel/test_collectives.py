"""Failing together, and gradients averaged over the domain."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from credit.errors import CreditError, DataError
from credit.parallel import collectives
from credit.parallel.collectives import sync_domain_gradients, together
from credit.parallel.meters import Wire
from tests.domain_parallel import parity
from tests.ranks import RankError


def fail_on(ranks: list[int], kind: type[Exception]) -> None:
    with together("reading"):
        if dist.get_rank() in ranks:
            raise kind("no such file")


def test_one_rank_fails_and_all_know_why(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(3).run(fail_on, [1], DataError)
    assert [str(error) for error in caught.value.errors.values()] == ["reading failed on rank 1: no such file"] * 3
    assert {type(error) for error in caught.value.errors.values()} == {CreditError}


def test_an_error_of_all_ranks_is_said_once(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(3).run(fail_on, [0, 1, 2], DataError)
    assert [str(error) for error in caught.value.errors.values()] == ["no such file"] * 3


def test_an_unexpected_error_keeps_its_type_where_it_happened_and_is_told_to_peers(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(2).run(fail_on, [0], ZeroDivisionError)
    assert isinstance(caught.value.errors[0], ZeroDivisionError)
    assert "reading failed on rank 0: ZeroDivisionError: no such file" in str(caught.value.errors[1])


def test_no_failure_is_no_failure(worlds) -> None:
    worlds(2).run(fail_on, [], DataError)


def averaged(bucket_bytes: int) -> tuple[list[list[float]], int]:
    """Gradients of rank + 1, one parameter without a gradient on rank 0, in buckets of two dtypes; and how many sums
    it took."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(4)])
    model.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for i, parameter in enumerate(model):
        if not (i == 1 and dist.get_rank() == 0):
            parameter.grad = torch.full_like(parameter, (dist.get_rank() + 1) * 10**i)
    with patch.object(collectives, "BUCKET_BYTES", bucket_bytes), Wire() as wire:  # these ranks go on to other tests
        sync_domain_gradients(model, parity.manager())
    return [parameter.grad.tolist() for parameter in model], wire.names["allreduce_"]


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 5), (24, 3), (25 * 2**20, 2)])
def test_gradients_are_averaged_over_the_domain(worlds, bucket_bytes: int, buckets: int) -> None:
    for found, sums in worlds(2).run(averaged, bucket_bytes):
        assert found == [[1.5] * 3, [10.0] * 3, [150.0] * 3, [1500.0] * 3, [15000.0] * 2]
        assert sums == buckets
