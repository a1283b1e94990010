"""The moving average equals its formula and leaves momentum on the device."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastrdm.kernels.ema import ema_update


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 3), (7,), (), (2, 3, 3, 3))]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9995, 1.0])
def test_equals_its_formula(momentum: float) -> None:
    target, online = tensors(0), tensors(1)
    expected = [momentum * t + (1 - momentum) * o for t, o in zip(target, online, strict=True)]
    kept, followed = [t.data_ptr() for t in target], [o.clone() for o in online]
    ema_update(target, online, torch.tensor(momentum, dtype=torch.float64))
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(online, followed, rtol=0, atol=0)
    assert [t.data_ptr() for t in target] == kept


def test_equal_tensors_stay_and_momentum_one_freezes() -> None:
    target, online = tensors(0, torch.float32), tensors(0, torch.float32)
    ema_update(target, online, torch.tensor(0.99))
    torch.testing.assert_close(target, online, rtol=0, atol=0)
    ema_update(target, tensors(1, torch.float32), torch.tensor(1.0))
    torch.testing.assert_close(target, online, rtol=0, atol=0)


def test_parameters_that_train_are_followed_without_gradient() -> None:
    online = [torch.ones(3, requires_grad=True)]
    target = [torch.zeros(3, requires_grad=True)]
    ema_update(target, online, torch.tensor(0.75))
    assert target[0].tolist() == [0.25] * 3 and target[0].grad_fn is None


def test_reads_nothing_on_the_host() -> None:
    with FakeTensorMode():  # a read would raise: there is no value
        target, online = torch.empty(3), torch.empty(3)
        with pytest.raises(RuntimeError):
            torch.empty(()).item()
        ema_update([target], [online], torch.empty(()))
