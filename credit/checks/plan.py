"""What `credit plan` prints: what a rank needs and sends on every mesh of some devices, and which mesh to take."""

from __future__ import annotations

from dataclasses import dataclass

from credit.checks.parity import assumption, model_shape
from credit.config import Config
from credit.errors import ConfigError
from credit.parallel.collectives import USER_ERRORS
from credit.parallel.mesh import MeshShape
from credit.parallel.plan import StepCost
from credit.training.slicing import HEADROOM, planner_of, sliced_costs

GB, MB = 1e9, 1e6
INSIDE_BYTES_PER_S, ACROSS_BYTES_PER_S = 200e9, 25e9
"""Assumed of a device's links: NVLink 3 (A100, 300 GB/s a direction, two thirds of it), one 200 Gbit/s network port."""
FLOPS_PER_S = {"bf16": 100e12, "tf32": 50e12, "ieee": 10e12}
"""Assumed of a device, by `trainer.precision`: a third of what an A100 multiplies in bfloat16 and TF32, half else."""


@dataclass(frozen=True)
class Layout:
    """One mesh and its cost for a rank, with the bytes that it sends by link."""

    shape: MeshShape
    cost: StepCost
    inside: int
    across: int
    flops_per_s: float

    @property
    def computing_s(self) -> float:
        """Of a step, at the assumed speed."""
        return self.cost.flops / self.flops_per_s

    @property
    def sending_s(self) -> float:
        """Time on the wire of a step, at the assumed speeds."""
        return self.inside / INSIDE_BYTES_PER_S + self.across / ACROSS_BYTES_PER_S


def plan(config: Config, gpus: int, gpu_memory: float, gpus_per_node: int) -> str:
    """The table of all meshes of `gpus` devices of `gpu_memory` GB each, and the recommendation.

    No device and no data are needed, but the store, for its grid and channels.

    Raises:
        ConfigError: if no mesh is possible, with the reasons.
    """
    planner = planner_of(config, model_shape(config))
    layouts, refused = [], {}
    for shape in _shapes(gpus):
        try:
            if shape.dp > 1 and config.trainer.parallelism.data == "none":
                raise ConfigError("trainer.parallelism.data is none, which allows one replica")
            cost = planner.cost(shape)
        except (*USER_ERRORS, ValueError) as error:
            refused[shape] = str(error).splitlines()[0]
            continue
        layouts.append(
            Layout(shape, cost, *_by_link(shape, cost, gpus_per_node), FLOPS_PER_S[config.trainer.precision])
        )
    if not layouts:
        raise ConfigError(f"{gpus} ranks make no mesh for this config; {'; '.join(_refusals(refused)[:4])}")
    layouts.sort(key=lambda layout: (not _fits(layout, gpu_memory), layout.computing_s + layout.sending_s))
    notes = [*filter(None, [assumption(config)]), *_gathers(layouts), *_refusals(refused)]
    return "\n".join([*_table(layouts, gpu_memory), "", _recommendation(layouts, gpu_memory), *notes])


def traffic(config: Config, mesh: tuple[int, int, int]) -> list[tuple[str, str]]:
    """(name, value) of what a rank of one mesh (dp, tp, domain) sends in a step, and needs.

    Raises:
        ConfigError: if the config does not fit the mesh.
    """
    cost = planner_of(config, model_shape(config)).cost(MeshShape(*mesh))
    return [
        ("mesh", _named(MeshShape(*mesh))),
        *(
            (f"sent {words}, MB", f"{sent / MB:.3f}")
            for words, sent in (
                ("to domain neighbours and back", cost.domain),
                ("for tensor parallelism", cost.tensor),
                ("for gradients and parameters", cost.data),
            )
        ),
        ("messages; collective calls", f"{cost.messages}; {cost.collectives}"),
        ("parameters and optimiser, MB", f"{(cost.parameters + cost.optimizer) / MB:.3f}"),
        ("memory at the worst moment, MB", f"{cost.memory / MB:.1f}"),
        ("GFLOP", f"{cost.flops / 1e9:.2f}"),
    ]


def plan_slices(config: Config, memory: float | None) -> str:
    """The table of numbers of slices on one device, and which to take where it has `memory` GB.

    Raises:
        ConfigError: if the model cannot be sliced.
    """
    planner, lines = planner_of(config, model_shape(config)), []
    for name, is_training in (("forecast", False), ("train", True)):
        try:
            costs = [*sliced_costs(planner, is_training)]
        except (*USER_ERRORS, ValueError) as error:
            raise ConfigError(f"{config.model.name} cannot be sliced: {str(error).splitlines()[0]}") from None
        lines += [
            f"credit {name} --slices N, GB of a step:",
            "  slices   at most  of plain   resting  copied",
            *(
                f"{cost.number:8d} {cost.memory / GB:9.3f} {cost.memory / costs[0].memory:9.2f} "
                f"{cost.resting / GB:9.3f} {cost.moved / GB:7.3f}"
                for cost in costs
            ),
            "",
        ]
        if memory is not None:
            fitting = next((cost.number for cost in costs if cost.memory <= HEADROOM * memory * GB), None)
            room = f"{HEADROOM:.0%} of {memory:g} GB"
            lines[-1:] = [f"None fits into {room}." if fitting is None else f"{fitting} fit into {room}.", ""]
    return "\n".join([*lines, *filter(None, [assumption(config)])]).rstrip()


def _shapes(gpus: int) -> list[MeshShape]:
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    pairs = [(tp, domain) for tp in divisors for domain in divisors if gpus % (tp * domain) == 0]
    return [MeshShape(gpus // tp // domain, tp, domain) for tp, domain in pairs]


def _by_link(shape: MeshShape, cost: StepCost, gpus_per_node: int) -> tuple[int, int]:
    """(bytes inside a node, bytes across nodes) that a rank sends, where ranks are numbered node by node.

    A group is inside if no member is on another node; where a group straddles nodes its slowest link is across.
    """
    inside = across = 0
    reach = {"domain": shape.domain, "tensor": shape.tp * shape.domain, "data": shape.dp * shape.tp * shape.domain}
    for name, ranks in reach.items():
        if gpus_per_node % ranks == 0:
            inside += getattr(cost, name)
        else:
            across += getattr(cost, name)
    return inside, across


def _fits(layout: Layout, gpu_memory: float) -> bool:
    return layout.cost.memory <= HEADROOM * gpu_memory * GB


def _named(shape: MeshShape) -> str:
    return f"dp {shape.dp} x tp {shape.tp} x domain {shape.domain}"


def _table(layouts: list[Layout], gpu_memory: float) -> list[str]:
    unit, name = (GB, "GB") if layouts[0].cost.memory >= GB else (MB, "MB")
    lines = [
        f"of a rank and step:  memory, {name}                                       sent, MB",
        "  dp   tp  domain  parameters  optimizer      step     total     GFLOP    inside    across  messages  calls"
        "  fits",
    ]
    for layout in layouts:
        shape, cost = layout.shape, layout.cost
        memory = [f"{part / unit:9.3f}" for part in (cost.optimizer, cost.step, cost.memory)]
        lines.append(
            f"{shape.dp:4d} {shape.tp:4d} {shape.domain:7d} {cost.parameters / unit:11.3f}  {' '.join(memory)}"
            f" {cost.flops / 1e9:9.2f} {layout.inside / MB:9.1f} {layout.across / MB:9.1f} {cost.messages:9d}"
            f" {cost.collectives:6d}  {'yes' if _fits(layout, gpu_memory) else 'no'}"
        )
    return lines


def _recommendation(layouts: list[Layout], gpu_memory: float) -> str:
    best = layouts[0]
    if not _fits(best, gpu_memory):
        least = min(layouts, key=lambda layout: layout.cost.memory)
        return (
            f"None fits into {HEADROOM:.0%} of {gpu_memory:g} GB; {_named(least.shape)} needs least, "
            f"{least.cost.memory / GB:.3f} GB: use more devices, trainer.activation_checkpointing, trainer.accumulate, "
            f"trainer.precision: bf16 or trainer.parallelism.data: fsdp2"
        )
    shape = best.shape
    return (
        f"Recommended: {_named(shape)}. Of the {sum(_fits(one, gpu_memory) for one in layouts)} that fit into "
        f"{HEADROOM:.0%} of {gpu_memory:g} GB its step is shortest: {1e3 * best.computing_s:.2f} ms of computing at "
        f"{best.flops_per_s / 1e12:.0f} TFLOP/s, {1e3 * best.sending_s:.2f} ms on the wire at "
        f"{INSIDE_BYTES_PER_S / GB:.0f} GB/s inside a node and {ACROSS_BYTES_PER_S / GB:.0f} GB/s across.\n"
        f"  --set trainer.parallelism.tensor={shape.tp} --set trainer.parallelism.domain={shape.domain}"
    )


def _gathers(layouts: list[Layout]) -> list[str]:
    """One line for each call that is computed on whole fields, on the largest domain where it is."""
    found: dict[str, str] = {}
    for layout in sorted(layouts, key=lambda layout: layout.shape.domain):
        for call in layout.cost.gathered:
            found[call.partition(" has no")[0]] = f"gathered on {_named(layout.shape)}: {call}"
    return [*found.values()]


def _refusals(refused: dict[MeshShape, str]) -> list[str]:
    """One line for each reason."""
    reasons: dict[str, list[MeshShape]] = {}
    for shape, reason in refused.items():
        reasons.setdefault(reason, []).append(shape)
    lines = []
    for reason, shapes in reasons.items():
        more = " and more" if len(shapes) > 3 else ""
        lines.append(f"not possible: {', '.join(map(_named, shapes[:3]))}{more}: {reason}")
    return lines
