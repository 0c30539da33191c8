"""Custom autograd functions and operators give the numbers of one device, whatever they do in their backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from credit.domain_parallel import DomainParallelError, verify_parity


class Scaled(Function):
    """Its backward is no derivative: it is not even linear."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grad = grad / grad.norm() + grad.clamp(-0.1, 0.1)
        return grad * w, (grad * x).sum()


class Total(Function):
    """Gives a tensor that is whole."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x * w).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grad = grad.tanh()
        return (grad * w).expand(x.shape), (grad * x).sum()


class Several(Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.count = y.numel()
        return x + y.mean(), y > 0, y.transpose(1, 2)

    @staticmethod
    def backward(ctx, a: Tensor, _: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return a.sign(), c.transpose(1, 2) + a.mean() / ctx.count


class Contiguous(Function):
    """May return what it is given; with a context that is set up apart."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class DoubledInPlace(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad.clamp(-0.1, 0.1)


@torch.library.custom_op("tests::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def _of_scaled(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return Scaled.backward(ctx, grad)


scaled.register_autograd(_of_scaled, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def several(x: Tensor, w: Tensor) -> Tensor:
    a, b, c = Several.apply(x * w, x)
    return a + b.to(x.dtype) * x + c.transpose(1, 2)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    first = y[:, :, :7]
    DoubledInPlace.apply(y)
    return torch.cat([y, first * w], 2)


def without_gradient(x: Tensor, w: Tensor) -> Tensor:
    y = x.detach() * 2
    z = Contiguous.apply(y)
    y += 1
    return x * w + z


CALLS = {
    "a field": lambda x, w: Scaled.apply(x * 2, w).relu(),
    "an operator": lambda x, w: scaled(x * 2, w).relu(),
    "a total": lambda x, w: x * Total.apply(x, w),
    "several results": several,
    "in place": in_place,
    "returned as it is": lambda x, w: Contiguous.apply(x * w),
    "another order": lambda x, w: Contiguous.apply((x * w).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "the cut elsewhere": lambda x, w: Scaled.apply(x.transpose(1, 2), w).transpose(1, 2),
    "complex numbers": lambda x, w: Contiguous.apply(torch.fft.rfft(x)[..., :2] * w).abs(),
    "a row": lambda x, w: x * Scaled.apply(x[:, :, 0], w)[:, :, None],
    "fewer rows than ranks": lambda x, w: Scaled.apply(x[:, :, :2], w),
    "weights alone": lambda x, w: x * Total.apply(w, w),
    "no gradient": without_gradient,
    "a checkpoint": lambda x, w: checkpoint(lambda y: Scaled.apply(y.tanh(), w).sin(), x, use_reentrant=False),
}


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return CALLS[self.name](x, self.w)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_custom_functions_are_given_whole_fields_and_whole_cotangents(name, ranks) -> None:
    report = verify_parity(Net(name), (torch.randn(2, 3, 13, 4),), ranks=ranks)
    assert report.exact, report
    assert len(report.errors) == 3


def test_gathers_of_custom_functions_are_told_and_can_be_refused() -> None:
    x = torch.randn(2, 3, 13, 4)
    (told,) = verify_parity(Net("a field"), (x,)).gathered
    assert told.startswith("Net: Scaled.apply has no sharded form")
    with pytest.raises(DomainParallelError, match=r"Scaled\.apply cannot be done .* its backward does not know"):
        verify_parity(Net("a field"), (x,), fallback="refuse")
