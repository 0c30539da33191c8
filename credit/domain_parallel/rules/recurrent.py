"""Recurrent layers whose batch are the points of a grid: each point has its own sequence."""

from __future__ import annotations

from typing import Any

from credit.domain_parallel.binding import bind
from credit.domain_parallel.outcome import replaced
from credit.domain_parallel.reshard import cut_along, reshard
from credit.domain_parallel.slab import Declined, is_slab, register_rule, torch_functions


def _recurrent(func: Any) -> Any:
    """The rule of a layer, (input, hidden states, weights, ...), cut over its batch while it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None or "data" in given or not is_slab(given["input"]):
            raise Declined
        x, states, weights = given.pop("input"), given.pop("hx"), given.pop("params")
        if x.ndim != 3 or any(map(is_slab, weights)) or (given["train"] and given["dropout"]):
            raise Declined  # masks are drawn of a sequence
        batch = 0 if given["batch_first"] else 1
        there = reshard(x, batch)
        mine = replaced(states, lambda h: cut_along(h, 1, there))
        out, *last = func(there.local, mine, weights, **given)
        return there.like(out, batch), *[there.like(h, 1) for h in last]

    return call


def _cell(func: Any) -> Any:
    """The rule of one step."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None or not is_slab(given["input"]):
            raise Declined
        x, states = given.pop("input"), given.pop("hx")
        if x.ndim != 2 or any(map(is_slab, given.values())):
            raise Declined
        there = reshard(x, 0)
        mine = replaced(states, lambda h: cut_along(h, 0, there))
        return replaced(func(there.local, mine, **given), lambda h: there.like(h, 0))

    return call


for _name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
    for _func in torch_functions(_name):
        register_rule(_func, _recurrent(_func))
    for _func in torch_functions(f"{_name}_cell"):
        register_rule(_func, _cell(_func))
