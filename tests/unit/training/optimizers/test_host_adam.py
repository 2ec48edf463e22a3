"""Adam on the host: equal to torch's AdamW, whatever share is offloaded and however it is cut into buckets."""

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwench.training.optimizers.host_adam import HostAdam

_CONSTANTS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_DTYPES = (torch.float32, torch.bfloat16)
_SHAPES = ((37, 5), (3, 64), (130,), (0, 7), (1,))


def _params(shapes: Sequence[tuple[int, ...]] = _SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def _groups(params: list[Tensor]) -> list[dict]:
    """Decay the first two more than the rest, at another rate."""
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3}]


def _set_gradients(params: Sequence[Tensor], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.decoupled_grad = torch.randn(param.shape, generator=draw) * 10.0 ** (step - 1)


def _train(optimizer: HostAdam, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        _set_gradients(params, step)
        optimizer.step()


def _trained(steps: int = 4, dtype: torch.dtype = torch.float32, **options) -> tuple[HostAdam, list[Tensor]]:
    params = _params(dtype=dtype)
    optimizer = HostAdam(_groups(params), **{**_CONSTANTS, **options})
    optimizer.reset()
    _train(optimizer, params, range(steps))
    return optimizer, params


def _torchs_adamw(steps: int = 4) -> tuple[torch.optim.AdamW, list[Tensor]]:
    params = _params()
    optimizer = torch.optim.AdamW(_groups(params), **_CONSTANTS, fused=True)
    for step in range(steps):
        _set_gradients(params, step)
        for param in params:
            param.grad = param.decoupled_grad
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("overlap", [False, True], ids=["in-order", "overlapped"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bucket_elements", [64, 1 << 24])
def test_float32_moments_equal_torchs_adamw_to_the_bit(fraction: float, overlap: bool, bucket_elements: int):
    optimizer, params = _trained(offload_fraction=fraction, overlap=overlap, bucket_elements=bucket_elements)
    expected, expected_params = _torchs_adamw()
    for param, wanted in zip(params, expected_params, strict=True):
        assert torch.equal(param, wanted)
        state, wanted_state = optimizer.state[param], expected.state[wanted]
        assert torch.equal(state["master_param"], wanted)
        assert all(torch.equal(state[name], wanted_state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_gradients_may_stand_in_grad():
    params = _params()
    optimizer = HostAdam(params, **_CONSTANTS)
    optimizer.reset()
    for param in params:
        param.grad = torch.ones_like(param)
    before = params[0].detach().clone()
    optimizer.step()
    # The first step of Adam moves by the learning rate, beside the decay.
    torch.testing.assert_close(params[0].detach(), before * (1 - 1e-2 * 0.1) - 1e-2)


@pytest.mark.parametrize(("fraction", "on_host"), [(0.0, 0), (0.1, 1), (0.4, 2), (0.75, 3), (1.0, 5)])
def test_the_share_is_reached_in_order_of_the_groups(fraction: float, on_host: int):
    # Elements: 185, 192, 130, 0, 1, in all 508.
    optimizer, params = _trained(steps=0, offload_fraction=fraction)
    separate = [optimizer.state[param]["master_param"].data_ptr() != param.data_ptr() for param in params if param.numel()]
    assert separate == [index < on_host for index in (0, 1, 2, 4)]


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    bucket_lanes=st.integers(1, 8),
    fraction=st.floats(0, 1),
    overlap=st.booleans(),
    moment_dtypes=st.tuples(st.sampled_from(_DTYPES), st.sampled_from(_DTYPES)),
    bf16_weights=st.booleans(),
)
@settings(max_examples=40)
def test_buckets_shares_and_overlap_do_not_change_a_bit(sizes, bucket_lanes, fraction, overlap, moment_dtypes, bf16_weights):
    def train(**options) -> list[Tensor]:
        params = _params([(size,) for size in sizes], torch.bfloat16 if bf16_weights else torch.float32)
        optimizer = HostAdam(params, **_CONSTANTS, moment_dtypes=moment_dtypes, **options)
        optimizer.reset()
        _train(optimizer, params, range(3))
        return params

    plain = train(offload_fraction=0.0)
    other = train(offload_fraction=fraction, overlap=overlap, bucket_elements=64 * bucket_lanes)
    assert all(torch.equal(left, right) for left, right in zip(plain, other, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0], ids=["device", "host"])
def test_bfloat16_moments_are_float32_arithmetic_stored_rounded(fraction: float):
    optimizer, params = _trained(offload_fraction=fraction, moment_dtypes=(torch.bfloat16, torch.bfloat16), bucket_elements=128)
    for index, wanted in enumerate(_params()):
        wanted = wanted.detach()
        rate, decay = (1e-2, 0.1) if index < 2 else (3e-3, 0.0)
        mean = square = torch.zeros(wanted.shape, dtype=torch.bfloat16)
        for step in range(4):
            gradients = _params()
            _set_gradients(gradients, step)
            gradient = gradients[index].decoupled_grad
            exact_mean = 0.9 * mean.float() + 0.1 * gradient
            exact_square = 0.95 * square.float() + 0.05 * gradient * gradient
            corrected = exact_mean / (1 - 0.9 ** (step + 1))
            spread = (exact_square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            wanted = wanted * (1 - rate * decay) - rate * corrected / spread
            mean, square = exact_mean.bfloat16(), exact_square.bfloat16()
        state = optimizer.state[params[index]]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        torch.testing.assert_close(params[index].detach(), wanted, rtol=1e-5, atol=1e-6)
        # A last bit of float32 may turn a rounding: then by one of bfloat16's 2^-8.
        torch.testing.assert_close(state["exp_avg"].float(), mean.float(), rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"].float(), square.float(), rtol=2**-7, atol=1e-6)
        assert (state["exp_avg_sq"] == square).float().mean() > 0.99 or not square.numel()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_low_precision_weights_are_the_rounded_masters(fraction: float):
    optimizer, params = _trained(dtype=torch.bfloat16, offload_fraction=fraction)
    for param, before in zip(params, _params(dtype=torch.bfloat16), strict=True):
        master = optimizer.state[param]["master_param"]
        assert master.dtype == torch.float32
        assert torch.equal(param, master.bfloat16())
        assert not param.numel() or not torch.equal(master, before.float())


@pytest.mark.parametrize("fraction", [0.0, 1.0], ids=["device", "host"])
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_round_trips_exactly_and_goes_on_bit_for_bit(fraction: float, moments_dtype: torch.dtype):
    options = {"offload_fraction": fraction, "moment_dtypes": (moments_dtype, moments_dtype), "dtype": torch.bfloat16}
    optimizer, params = _trained(**options)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, resumed_params = _trained(steps=1, **options)
    resumed.load_state_dict(saved)
    for param in resumed_params:
        resumed.set_master(param, resumed.master(param))
    for param, loaded in zip(params, resumed_params, strict=True):
        assert torch.equal(param, loaded)
        for name, value in optimizer.state[param].items():
            assert torch.equal(resumed.state[loaded][name], value)
            assert resumed.state[loaded][name].dtype == value.dtype
        assert resumed.state[loaded]["step"] == 4
    assert [group["step"] for group in resumed.param_groups] == [4, 4]
    _train(optimizer, params, range(4, 6))
    _train(resumed, resumed_params, range(4, 6))
    assert all(torch.equal(left, right) for left, right in zip(params, resumed_params, strict=True))


def test_a_state_moves_between_host_and_device_and_between_dtypes():
    optimizer, params = _trained(offload_fraction=1.0, dtype=torch.bfloat16, moment_dtypes=(torch.bfloat16, torch.bfloat16))
    moved, moved_params = _trained(steps=0, offload_fraction=0.0, dtype=torch.bfloat16)
    moved.load_state_dict(optimizer.state_dict())
    for param, loaded in zip(params, moved_params, strict=True):
        for name in ("master_param", "exp_avg", "exp_avg_sq"):
            assert moved.state[loaded][name].dtype == torch.float32
            assert torch.equal(moved.state[loaded][name], optimizer.state[param][name].float())


def test_after_weights_are_loaded_masters_equal_them():
    optimizer, params = _trained(dtype=torch.bfloat16)
    loaded = [torch.full_like(param, 0.3) for param in params]
    with torch.no_grad():
        for param, value in zip(params, loaded, strict=True):
            param.copy_(value)
    optimizer.reload_masters()
    assert all(torch.equal(optimizer.state[param]["master_param"], param.detach().float()) for param in params)
    assert optimizer.state[params[0]]["exp_avg"].any()
    optimizer.reset()
    assert not optimizer.state[params[0]]["exp_avg"].any()
    assert optimizer.state[params[0]]["step"] == 0


def test_restart_keeps_masters_and_forgets_moments():
    optimizer, params = _trained(dtype=torch.bfloat16)
    masters = [optimizer.state[param]["master_param"].clone() for param in params]
    optimizer.restart(7)
    for param, master in zip(params, masters, strict=True):
        state = optimizer.state[param]
        assert torch.equal(state["master_param"], master)
        assert state["step"] == 7
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_what_sleeps_is_what_is_on_the_device_besides_the_weights():
    sizes = {0.0: 508 * (4 + 2 + 2), 1.0: 0}
    for fraction, num_bytes in sizes.items():
        optimizer, _ = _trained(dtype=torch.bfloat16, offload_fraction=fraction, moment_dtypes=(torch.bfloat16, torch.bfloat16))
        assert sum(tensor.nbytes for tensor in optimizer.device_tensors()) == num_bytes
    optimizer, _ = _trained(offload_fraction=0.0)
    assert sum(tensor.nbytes for tensor in optimizer.device_tensors()) == 508 * 8


def test_the_state_of_an_optimizer_that_was_never_reset_resets_one_that_has_stepped():
    never_reset = HostAdam(_groups(_params()), **_CONSTANTS)
    optimizer, params = _trained(dtype=torch.bfloat16)
    stepped = [param.detach().clone() for param in params]
    optimizer.load_state_dict(never_reset.state_dict())
    for param, value in zip(params, stepped, strict=True):
        state = optimizer.state[param]
        assert torch.equal(param, value) and torch.equal(state["master_param"], value.float())
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 0
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


def test_parameters_may_be_replaced_before_a_state_without_parameters_is_loaded():
    """As megatron-core's DistributedOptimizer does: it takes the optimizer of whole parameters, and gives it its shards."""
    whole, shards = _params(), _params([(64,), (9,)], torch.bfloat16)
    optimizer = HostAdam(whole, **_CONSTANTS)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": shards}]
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(optimizer.state) == shards
    _train(optimizer, shards, range(1))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.get_unscaled_state(shards[0], "exp_avg").dtype == torch.float32


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("kind", "dtype", "fraction", "splits", "kernel"),
    [
        (OnGpu, torch.bfloat16, 0.0, True, True),
        (OnGpu, torch.bfloat16, 0.1, True, True),
        (OnGpu, torch.bfloat16, 1.0, True, False),
        (OnGpu, torch.bfloat16, 0.0, False, False),
        (OnGpu, torch.float32, 0.0, True, False),
        (Tensor, torch.bfloat16, 0.0, True, False),
    ],
)
def test_the_kernel_steps_split_masters_on_a_gpu(kind, dtype, fraction, splits, kernel):
    params = [torch.ones(3, dtype=dtype).as_subclass(kind).requires_grad_() for _ in range(4)]
    optimizer = HostAdam(params, **_CONSTANTS, offload_fraction=fraction, splits_masters=splits)
    optimizer.reset()
    assert optimizer._split_kernel_steps is kernel
