"""Pixels that become channels, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import recut, whole
from credit.domain_parallel.slab import Declined, Slab, rule


@rule("pixel_shuffle")
def pixel_shuffle(input: Slab, upscale_factor: int) -> Slab:
    if input.cut == input.ndim - 3:
        raise Declined
    local = F.pixel_shuffle(input.local, upscale_factor)
    if input.cut < input.ndim - 3:
        return input.like(local)
    p = input.partition
    return input.like(local, partition=Partition(p.rows, p.parts, p.outer, p.inner * upscale_factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(input: Slab, downscale_factor: int) -> Any:
    if input.cut == input.ndim - 3:
        raise Declined
    if input.cut < input.ndim - 3:
        return input.like(F.pixel_unshuffle(input.local, downscale_factor))
    rows = input.shape[input.cut] // downscale_factor
    if rows < input.group.size or rows * downscale_factor != input.shape[input.cut]:
        return F.pixel_unshuffle(whole(input), downscale_factor)
    x = recut(input, Partition(rows, input.group.size, 1, downscale_factor))
    return x.like(F.pixel_unshuffle(x.local, downscale_factor), partition=Partition(rows, input.group.size))


@rule("channel_shuffle")
def channel_shuffle(input: Slab, groups: int) -> Slab:
    if input.cut == 1:
        raise Declined
    return input.like(torch.channel_shuffle(input.local, groups))
