"""Tests the loss in blocks against cross entropy on whole logits."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from unitransformer.linear_cross_entropy import IGNORED, linear_cross_entropy

BLOCKS = [(0, 0), (0, 1), (0, 7), (1, 0), (8, 7), (36, 22), (37, 23), (1000, 1000)]


def make_head(
    rows: int = 37, width: int = 12, classes: int = 23, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        (scale * torch.randn(*shape, generator=generator)).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[::5] = IGNORED
    return states, weight, bias, targets


def reference(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = functional.linear(states, weight, bias).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED)


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * 3, parameters)  # as accumulation and loss scales do


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), BLOCKS)
def test_blocks_give_the_loss_and_the_gradients_of_whole_logits(
    rows: int, columns: int, has_bias: bool
) -> None:
    states, weight, bias, targets = make_head()
    parameters = (states, weight, bias) if has_bias else (states, weight)
    given = (states, weight, bias if has_bias else None, targets)
    whole = reference(*given)
    parts = linear_cross_entropy(*given, rows=rows, columns=columns)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(parts, whole, **close)
    pairs = zip(gradients(parts, parameters), gradients(whole, parameters), strict=True)
    for ours, wanted in pairs:
        torch.testing.assert_close(ours, wanted, **close)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_large_logits_neither_overflow_nor_give_a_negative_loss(scale: float) -> None:
    states, weight, bias, targets = make_head(scale=scale)  # logits up to thousands
    whole = reference(states, weight, bias, targets)
    parts = linear_cross_entropy(states, weight, bias, targets, rows=8, columns=7)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    best = functional.linear(states, weight, bias).argmax(1)
    certain = linear_cross_entropy(states, weight, bias, best, columns=7)
    assert certain >= 0
    parameters = (states, weight, bias)
    for ours, wanted in zip(
        gradients(parts, parameters), gradients(whole, parameters), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("columns", [0, 5, 7])
def test_columns_of_padding_change_nothing(columns: int) -> None:
    states, weight, bias, targets = make_head()
    padded_weight = functional.pad(weight, (0, 0, 0, 17))
    padded_bias = functional.pad(bias, (0, 17), value=-torch.inf)
    whole = reference(states, weight, bias, targets)
    parts = linear_cross_entropy(states, padded_weight, padded_bias, targets, columns=columns)
    torch.testing.assert_close(parts, whole)
    parameters = (states, weight, bias)
    for ours, wanted in zip(
        gradients(parts, parameters), gradients(whole, parameters), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_autocast", [True, False])
def test_sixteen_bits_differ_by_their_rounding(dtype: torch.dtype, with_autocast: bool) -> None:
    tensors = make_head(rows=64, width=16, classes=100, scale=0.5)
    given = tensors if with_autocast else (*(t.to(dtype) for t in tensors[:3]), tensors[3])
    with torch.autocast("cpu", dtype, enabled=with_autocast):
        parts = linear_cross_entropy(*given, rows=20, columns=30)
    expected = reference(*tensors)
    assert parts.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parts, expected, rtol=2 * eps, atol=0)
    found = torch.autograd.grad(parts, given[:3])
    for ours, wanted, parameter in zip(
        found, torch.autograd.grad(expected, tensors[:3]), given, strict=False
    ):
        assert ours.dtype == parameter.dtype
        error = (ours.float() - wanted).norm() / wanted.norm()
        assert error < 4 * eps


def test_float16_keeps_the_gradients_of_rare_classes() -> None:
    # Each probability is 1 / 2,000 and each gradient 1 / 16,000,000: half of float16's smallest.
    states, weight = torch.ones(8000, 4, requires_grad=True), torch.zeros(2000, 4)
    targets = torch.zeros(8000, dtype=torch.long)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(states, weight, None, targets, columns=500)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient[1:], torch.full((1999, 4), 1 / 2000), rtol=2e-3, atol=0)


def test_targets_that_do_not_count_have_neither_loss_nor_gradient() -> None:
    states, weight, bias, targets = make_head()
    nothing = torch.full_like(targets, IGNORED)
    loss = linear_cross_entropy(states, weight, bias, nothing, rows=8, columns=7)
    loss.backward()
    assert loss.item() == 0
    for parameter in (states, weight, bias):
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_memory_never_holds_all_logits() -> None:
    states, weight, bias, targets = make_head(rows=512, width=8, classes=512)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        linear_cross_entropy(states, weight, bias, targets, rows=16, columns=100).backward()
    assert largest == 16 * 512


def test_without_gradients_no_gradients_are_computed() -> None:
    states, weight, bias, targets = make_head()
    with torch.no_grad():
        loss = linear_cross_entropy(states, weight, bias, targets, columns=7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(states, weight, bias, targets))


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    states, weight, bias, targets = make_head()
    loss = linear_cross_entropy(states, weight, bias, targets, columns=7)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_of_the_head_is_not_copied() -> None:
    states, weight, _, targets = make_head()
    made: list[str] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            out = func(*args, **(kwargs or {}))
            is_new = isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in before
            if is_new and out.numel() >= weight.numel() and "out" not in (kwargs or {}):
                made.append(func.overloadpacket.__name__)
            return out

    loss = linear_cross_entropy(states, weight, None, targets, columns=7)
    with Allocations():
        loss.backward()
    assert made == []


# Dynamo warns when it traces a custom autograd function.
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_the_compiler_sees_one_graph() -> None:
    states, weight, bias, targets = make_head()
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    whole = reference(states, weight, bias, targets)
    parts = compiled(states, weight, bias, targets, rows=20, columns=10)
    parameters = (states, weight, bias)
    for ours, wanted in zip(
        gradients(parts, parameters), gradients(whole, parameters), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_negative_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least 0"):
        linear_cross_entropy(*make_head(), **{name: -1})
