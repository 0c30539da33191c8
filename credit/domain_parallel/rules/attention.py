"""Attention: cut along a batch-like axis it is local; cut along the tokens, every rank asks all keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.reshard import cut_along, reshard, whole
from credit.domain_parallel.rules.elementwise import result
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule


@rule("F.scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Cut along a batch-like axis: local. Cut along the tokens: every rank asks all keys for its own queries."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if dropout_p or min(query.ndim, key.ndim, value.ndim) < 2 or (attn_mask is not None and is_causal):
        raise Declined  # torch draws the dropped weights inside, in the order of all queries
    if not is_slab(query):
        return F.scaled_dot_product_attention(
            query, whole(key), whole(value), whole(attn_mask), is_causal=is_causal, **options
        )
    axis = query.cut - query.ndim
    if axis == -1 or (enable_gqa and axis == -3):
        query = reshard(query, query.ndim - 2)
        axis = -2
    mask = _mask(attn_mask, query, axis)
    if axis == -2:
        key, value = whole(key), whole(value)
        if is_causal:
            rows = torch.tensor(list(query.partition.indices(query.group.rank)), device=query.device)
            mask = torch.arange(key.shape[-2], device=query.device) <= rows[:, None]
        local = F.scaled_dot_product_attention(query.local, key, value, mask, **options)
    else:
        key, value = (_batch_part(x, query, axis) for x in (key, value))
        local = F.scaled_dot_product_attention(query.local, key, value, mask, is_causal=is_causal, **options)
    return result(local, query)


def _batch_part(x: Tensor, query: Slab, axis: int) -> Tensor:
    """The keys or values that belong to this rank's part of a batch-like axis."""
    if x.ndim + axis < 0 or x.shape[axis] == 1:
        return whole(x)
    if x.shape[axis] != query.shape[axis]:
        raise Declined
    return cut_along(x, x.ndim + axis, query)


def _mask(mask: Tensor | None, query: Slab, axis: int) -> Tensor | None:
    return mask if mask is None else _batch_part(mask, query, axis)
