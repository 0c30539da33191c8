"""A planned step is the real one: what a rank allocates, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from credit.checks.plan import plan
from credit.config import load_config
from credit.config.parallelism import Sharding
from credit.domain_parallel import DomainParallelManager
from credit.errors import ConfigError
from credit.models import DOMAIN_CONVERTERS
from credit.models.transformer import WindowTransformer
from credit.models.unet import UNet
from credit.parallel import build_device_mesh, parallelize, reduce_gradients, shard_spatial
from credit.parallel.mesh import MeshShape
from credit.parallel.meters import Wire
from credit.parallel.plan import Planner, StepCost, Work
from credit.training.rollout import changes

FIELD, OUT, BATCH = (8, 32, 64), 6, 4
BUILD = {
    "unet": lambda rows: UNet(FIELD[0], OUT, (rows, FIELD[2]), width=16, levels=2),
    "transformer": lambda rows: WindowTransformer(FIELD[0], OUT, (rows, FIELD[2]), width=32, depth=2, window=4),
}


def conf(data: str, tp: int, domain: int, **more: Any) -> dict[str, Any]:
    return {"trainer": {"parallelism": {"data": data, "tensor": tp, "domain": domain}, "batch_size": BATCH, **more}}


def planned(name: str, given: dict[str, Any], shape: MeshShape) -> StepCost:
    return Planner(BUILD[name], FIELD, Sharding.of(given), work(given), DOMAIN_CONVERTERS).cost(shape)


def work(given: dict[str, Any]) -> Work:
    trainer = given["trainer"]
    return Work(trainer["batch_size"], trainer.get("rollout", 1), trainer.get("rollout_detach", False))


def allocated(name: str, given: dict[str, Any], dp: int) -> tuple[int, ...]:
    """(bytes of a step at its worst moment by the allocator, of parameters, of optimiser; flops; messages, bytes,
    calls)."""
    torch.manual_seed(0)
    mesh, _ = build_device_mesh(given["trainer"]["parallelism"], "cpu")
    manager = DomainParallelManager.from_mesh(mesh)
    model = parallelize(BUILD[name](FIELD[1]), mesh, given, manager, DOMAIN_CONVERTERS)
    optimizer = torch.optim.AdamW(model.parameters())
    whole, steps = torch.randn(BATCH // dp, *FIELD), given["trainer"].get("rollout", 1)

    def step() -> None:
        x = shard_spatial(whole, manager).clone()
        targets = torch.zeros_like(x[:, None]).repeat(1, steps, 1, 1, 1)
        batch = {"x": x, "y": targets, "forcings": targets[:, 1:, :0]}
        made = changes(model, batch, (OUT, 1), torch.ones(OUT, 1, 1), detach=False)
        sum((y - target[:, :OUT]).square().mean() for y, target in zip(made, targets.unbind(1), strict=True)).backward()
        reduce_gradients(model, mesh, given)

    step()  # after which DDP lays its buckets out anew
    optimizer.step()
    optimizer.zero_grad()
    step()
    manager.traffic.reset()
    with Wire() as wire, FlopCounterMode(display=False) as counter:
        step()
    messages = manager.traffic.messages
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)

    def bytes_of(tensors: Any) -> int:
        return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)

    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    sizes = peak, bytes_of(model.parameters()), bytes_of(states)
    return *sizes, counter.get_total_flops(), messages, wire.bytes, wire.calls


CASES = [
    ("unet", "none", 1, 1, 1, {}),
    ("unet", "none", 1, 1, 2, {}),
    ("unet", "ddp", 2, 1, 2, {}),
    ("unet", "fsdp2", 2, 1, 2, {}),
    ("transformer", "none", 1, 1, 1, {}),
    ("transformer", "none", 1, 2, 1, {}),
    ("transformer", "none", 1, 2, 2, {}),
    ("transformer", "fsdp2", 2, 1, 2, {}),
    ("transformer", "fsdp2", 1, 2, 2, {}),
    ("unet", "fsdp2", 2, 1, 2, {"rollout": 3}),
    ("transformer", "fsdp2", 2, 1, 1, {"rollout": 2, "reshard_after_forward": False}),
    ("transformer", "none", 1, 2, 2, {"rollout": 3}),
]


@pytest.mark.parametrize(("name", "data", "dp", "tp", "domain", "more"), CASES)
def test_memory_is_within_a_tenth_of_what_is_allocated(worlds, name, data, dp, tp, domain, more) -> None:
    """And what it sends is what torch is seen to send, whoever starts it."""
    given = conf(data, tp, domain, **more)
    expected = planned(name, given, MeshShape(dp, tp, domain))
    found = worlds(dp * tp * domain).run(allocated, name, given, dp)
    busiest = max(found, key=lambda one: one[0])
    assert expected.step == pytest.approx(busiest[0], rel=0.1)
    assert expected.memory == pytest.approx(sum(busiest[:3]), rel=0.1)
    # FSDP2 rounds shards of each parameter up.
    assert expected.parameters == pytest.approx(busiest[1], rel=0.03)
    assert expected.optimizer == pytest.approx(busiest[2], rel=0.03)
    # A meta tensor's attention is written out: its backward multiplies once less than the fused kernel's.
    assert expected.flops == pytest.approx(found[domain // 2][3], rel=0.02)
    assert expected.messages == found[domain // 2][4]
    assert expected.data + expected.tensor + expected.domain == pytest.approx(max(one[5] for one in found), rel=0.01)
    buckets = 1 if data == "ddp" else 0  # DDP begins with a bucket of 1 MiB
    assert 0 <= max(one[6] for one in found) - expected.messages - expected.collectives <= buckets


def test_what_peers_compute_twice_counts_against_them() -> None:
    """Only its attention is cut over tensor-parallel ranks: the convolutions of this model are computed by both."""
    model = "model={name: unet_diffusion, width: 16, levels: 1, heads: 4}"
    flops = {tuple(row[:3]): float(row[7]) for row in lines(plan(config(model), 8, 80, 4))}
    one, cut = flops["8", "1", "1"], flops["4", "2", "1"]
    assert cut > 1.3 * one


def test_detached_steps_need_the_memory_of_one_and_send_as_much_as_all() -> None:
    shape = MeshShape(2, 1, 2)
    one, joined, apart = (
        planned("unet", conf("fsdp2", 1, 2, rollout=steps, rollout_detach=detach), shape)
        for steps, detach in ((1, False), (3, False), (3, True))
    )
    assert one.step < apart.step < 1.2 * one.step
    assert joined.step > 2 * one.step
    assert apart.messages == 3 * one.messages
    assert apart.data == joined.data > 2 * one.data


def test_activation_checkpointing_and_smaller_batches_need_less() -> None:
    plain, again, parts = (
        planned("transformer", conf("ddp", 1, 1, **more), MeshShape(1, 1, 1)).step
        for more in ({}, {"activation_checkpointing": True}, {"accumulate": 4})
    )
    assert again < 0.8 * plain
    assert parts < 0.35 * plain


class Ranked(UNet):
    """Has an operation without a sharded form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.linalg.svdvals(x[:, 0]).mean()


def test_what_is_gathered_is_said_and_counted_and_refused_on_request() -> None:
    named = f"model.name={__name__}.Ranked"
    text = plan(config(named), gpus=2, gpu_memory=1.0, gpus_per_node=2)
    said = [line for line in text.splitlines() if line.startswith("gathered on dp 1 x tp 1 x domain 2: Ranked: ")]
    assert len(said) == 1
    assert "torch.linalg.svdvals has no sharded form; " in said[0]
    more, less = (
        Planner(
            lambda rows, kind=kind: kind(*FIELD[:1], OUT, (rows, FIELD[2])),
            FIELD,
            Sharding.of(conf("ddp", 1, 2)),
            Work(BATCH),
        ).cost(MeshShape(1, 1, 2))
        for kind in (Ranked, UNet)
    )
    half = 4 * BATCH * FIELD[1] * FIELD[2] // 2
    assert more.domain - less.domain == half  # to the other rank; the input has no gradient to come back
    refused = plan(config(named, "trainer.fallback=refuse"), gpus=2, gpu_memory=1.0, gpus_per_node=2)
    assert "not possible: dp 1 x tp 1 x domain 2: Ranked: torch.linalg.svdvals cannot be done" in refused


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line[:4].strip().isdigit()]


def config(*changes: str) -> Any:
    return load_config("configs/quickstart.yaml", changes)


def test_the_table_holds_every_mesh_and_recommends_one_that_fits() -> None:
    changes = ("model={name: transformer, width: 16}", "trainer.parallelism.data=fsdp2")
    text = plan(config(*changes), gpus=8, gpu_memory=1.0, gpus_per_node=4)
    rows = lines(text)
    assert sorted(tuple(map(int, row[:3])) for row in rows) == sorted(
        (8 // tp // domain, tp, domain) for tp in (1, 2, 4) for domain in (1, 2, 4, 8) if tp * domain <= 8
    )
    assert all(row[-1] == "yes" for row in rows)
    assert f"Recommended: dp {rows[0][0]} x tp {rows[0][1]} x domain {rows[0][2]}." in text
    assert "dp 1 x tp 8 x domain 1: blocks.0.attention (WindowAttention): torch.Tensor.view cannot be done" in text
    least = min(float(row[6]) for row in rows)
    tight = plan(config(*changes), gpus=8, gpu_memory=least / 1000 * 1.3, gpus_per_node=4)
    assert {row[-1] for row in lines(tight)} == {"yes", "no"}
    assert lines(tight)[0][-1] == "yes"
    none = plan(config(*changes), gpus=8, gpu_memory=1e-6, gpus_per_node=4)
    assert "None fits into 90% of 1e-06 GB" in none
    assert "use more devices, trainer.activation_checkpointing" in none


def test_plans_reach_from_one_rank_to_thousands() -> None:
    assert "Recommended: dp 1 x tp 1 x domain 1." in plan(config(), 1, 1.0, 4)
    changes = ("trainer.batch_size=1024", "trainer.parallelism.data=fsdp2")
    rows = lines(plan(config(*changes), 4096, 1.0, 4))
    assert {tuple(map(int, row[:3])) for row in rows} == {(4096 // d, 1, d) for d in (4, 8, 16, 32)}
    with pytest.raises(ConfigError, match=r"4096 ranks make no mesh for this config; .*latitudes cannot be cut over"):
        plan(config("trainer.batch_size=2"), 4096, 1.0, 4)
