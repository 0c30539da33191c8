"""What of a model's modules a recording has taken for constant: their attributes, their parts and their hooks.

Compared before each replay, by identity first, so that a number changed between two steps (the probability of a
dropout, a flag) is noticed. What a forward reads from elsewhere (globals, the insides of objects that a module keeps)
is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_OURS = ("credit.domain_parallel.", "credit.parallel.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_TORCHS = frozenset(nn.Module().__dict__) - {*_TENSORS, "_modules"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple, torch.dtype, torch.device)

Slot = tuple[dict[str, Any], str]
"""Where a module has a parameter or a buffer: the dictionary, and the name in it."""


class ModulesChanged(Exception):
    """Says what a forward changes in modules, besides the values of buffers."""


class _Held(NamedTuple):
    """A list, dictionary or set that a module has, and what was in it; of the module's own attributes, no name."""

    path: str
    name: str | None
    now: Any
    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, path: str, name: str | None, held: Any) -> _Held:
        return cls(path, name, held, (*held,), (*_values(held),))

    @property
    def is_as_it_was(self) -> bool:
        return len(self.now) == len(self.keys) and all(map(is_, _values(self.now), self.values))

    def change(self) -> str | None:
        """What is not as it was."""
        if self.is_as_it_was:
            return None
        of = self.path or "the model"
        if not isinstance(self.now, dict) or self.name == "_modules":
            return f"{of} has other parts" if self.name == "_modules" else f"{of} has another {self.name!r}"
        if self.name in _TENSORS and [*self.now] == [*self.keys]:
            return None  # they may be other tensors by now
        then = dict(zip(self.keys, self.values, strict=True))
        name = next((name for name in {**self.now, **then} if not _is_same(self.now, then, name)), None)
        return None if name is None else f"{of} has another {(self.name or name)!r}"

    def restore(self) -> None:
        if self.is_as_it_was and (*self.now,) == self.keys:
            return
        self.now.clear()
        if isinstance(self.now, list):
            self.now.extend(self.values)
        else:
            self.now.update(zip(self.keys, self.values, strict=True) if isinstance(self.now, dict) else self.values)


class ModulesState:
    """The modules of `root`, as they are now.

    Attributes:
        slots: of each parameter and buffer, all places that have it; parameters first.
        parameters: how many of them are parameters.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = [*root.named_modules()]
        places: dict[tuple[str, int], tuple[str, list[Slot]]] = {}
        for kind in _TENSORS:
            for path, module in self._modules:
                for name, tensor in vars(module)[kind].items():
                    if tensor is not None:
                        _, slots = places.setdefault((kind, id(tensor)), (f"{path}.{name}".strip("."), []))
                        slots.append((vars(module)[kind], name))
        self._paths = [path for path, _ in places.values()]
        self.slots = [slots for _, slots in places.values()]
        self.parameters = sum(kind == "_parameters" for kind, _ in places)
        self._held = [_Held.of(path, None, vars(module)) for path, module in self._modules]
        self._held += [
            _Held.of(path, name, held)
            for path, module in self._modules
            for name, held in vars(module).items()
            if isinstance(held, list | dict | set) and name not in _TORCHS
        ]
        self._likes = [*map(_like, self.tensors())]
        self._hooks = -1

    def tensors(self) -> list[Tensor]:
        """The parameters and the buffers, each once."""
        return [slots[0][0][slots[0][1]] for slots in self.slots]

    def hook(self) -> str | None:
        """A hook that a replay would not call; None if there is none."""
        if self._hooks == RemovableHandle.next_id:  # no hook was made since
            return None
        held_inside = [(path, vars(module)) for path, module in self._modules[1:]]
        held_inside += [("the model", vars(self._modules[0][1]).get("_hooks_inside", {}))]
        for path, held in held_inside:
            for kind in _HOOKS:
                for hook in held.get(kind, {}).values():
                    if not getattr(hook, "__module__", "").startswith(_OURS):
                        return f"{path} has a hook, {getattr(hook, '__qualname__', type(hook).__name__)}"
        self._hooks = RemovableHandle.next_id
        return None

    def change(self) -> str | None:
        """What is not as it was; None if all is."""
        for held in self._held:
            if (change := held.change()) is not None:
                return change
        for path, x, like in zip(self._paths, self.tensors(), self._likes, strict=True):
            if _like(x) != like:
                return f"{path} is of another shape or type, or has a gradient or none, as it had not"
        return None

    @contextmanager
    def replaced(self, tensors: list[Tensor]) -> Iterator[None]:
        """While it lasts, the modules have these parameters and buffers; all is afterwards as it was.

        Raises:
            ModulesChanged: if another was put in place of one of them, or something else has changed.
        """
        before = self.tensors()
        self._set(tensors)
        try:
            yield
            for path, slots, x in zip(self._paths, self.slots, tensors, strict=True):
                if not all(held[name] is x for held, name in slots):
                    raise ModulesChanged(f"its forward puts another tensor in place of {path}")
            self._set(before)
            if change := self.change():
                raise ModulesChanged(f"after a forward {change}")
        finally:
            self.restore()
            self._set(before)

    def restore(self) -> None:
        """The modules' attributes, and what is in lists, dictionaries and sets of theirs; not the values of tensors."""
        for held in self._held:
            held.restore()

    def changed_numbers(self) -> list[str]:
        """Attributes that are other numbers by now, such as counts of calls."""
        return [
            f"{held.path}.{name}".strip(".")
            for held in self._held
            if held.name is None
            for name, then in zip(held.keys, held.values, strict=True)
            if isinstance(then, int | float) and name in held.now and not _is_same(held.now, {name: then}, name)
        ]

    def _set(self, tensors: list[Tensor]) -> None:
        for slots, tensor in zip(self.slots, tensors, strict=True):
            for held, name in slots:
                held[name] = tensor


def _like(x: Any) -> tuple[Any, ...]:
    x, wants = getattr(x, "_local_tensor", x), x.requires_grad
    return x.shape, x.stride(), x.dtype, x.device, wants


def _values(held: Any) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def _is_same(now: dict[str, Any], then: dict[str, Any], name: str) -> bool:
    if name not in now or name not in then:
        return False
    a, b = now[name], then[name]
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)
