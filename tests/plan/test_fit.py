from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.nn import SIZES
from atoll.plan.cost import DiTSizes, block_parameters, training_flops
from atoll.plan.fit import (
    EAGER,
    Switches,
    accumulation,
    all_switches,
    fastest,
    ladder,
    largest_batch,
    needed_bytes,
    smallest_memory,
    step_seconds,
)
from atoll.plan.gpus import GPUS, find_gpu
from atoll.plan.rules import CPU_BF16, CUDA_BF16

XL = DiTSizes.from_config({"size": (32, 32), "channels": 4, "states_dim": 768, **SIZES["XL/2"]}, tokens=77)
B = DiTSizes.from_config({"size": (32, 32), "channels": 4, "states_dim": 768, **SIZES["B/2"]}, tokens=77)
A100 = 312e12 * 0.4


def test_batches_of_xl2_as_measured() -> None:
    """24 in 24 GB and 84 in 48 GB, compiled."""
    assert largest_batch(XL, CUDA_BF16, Switches(), 24e9) == pytest.approx(24, abs=1)
    assert largest_batch(XL, CUDA_BF16, Switches(), 48e9) == pytest.approx(84, abs=3)


@given(st.sampled_from([XL, B]), st.sampled_from(list(all_switches())), st.floats(1e9, 2e11))
def test_the_largest_batch_is_the_largest(network: DiTSizes, switches: Switches, memory: float) -> None:
    batch = largest_batch(network, CUDA_BF16, switches, memory)
    assert batch == 0 or needed_bytes(network, CUDA_BF16, switches, batch) <= memory * (1 + 1e-9)
    assert needed_bytes(network, CUDA_BF16, switches, batch + 1) > memory


def test_every_switch_makes_room() -> None:
    plain = largest_batch(XL, CUDA_BF16, Switches(compile=False), 24e9)
    for change in ({"compile": True}, {"checkpointing": "selective"}, {"checkpointing": "full"},
                   {"optimizer_state": "8bit"}, {"ema_device": "cpu"}, {"fused_backward": True}):  # fmt: skip
        assert largest_batch(XL, CUDA_BF16, replace(Switches(compile=False), **change), 24e9) > plain, change


def test_the_ladder_has_every_line_once() -> None:
    names = [str(switches) for switches in ladder(XL)]
    assert len(set(names)) == len(names)
    assert names[0] == "none"


@given(st.integers(1, 5000), st.integers(1, 600))
def test_accumulation_is_the_fewest_equal_parts(batch: int, largest: int) -> None:
    parts = accumulation(batch, largest)
    assert batch % parts == 0
    assert batch // parts <= largest
    assert not any(batch % p == 0 and batch // p <= largest for p in range(1, parts))


def test_plain_training_where_it_fits() -> None:
    fit = fastest(XL, CUDA_BF16, 128, 80e9, A100)
    assert fit is not None
    assert fit.switches == Switches()
    assert (fit.accumulate, fit.micro_batch) == (1, 128)
    assert fit.step_seconds == pytest.approx(128 * training_flops(XL) / A100)


def test_accumulation_before_what_costs_time_or_precision() -> None:
    fit = fastest(XL, CUDA_BF16, 128, 24e9, A100)
    assert fit is not None
    assert fit.switches == Switches()
    assert fit.accumulate * fit.micro_batch == 128
    assert fit.micro_batch <= fit.largest == largest_batch(XL, CUDA_BF16, Switches(), 24e9)


def test_the_last_resort_where_nothing_else_fits() -> None:
    every = Switches("full", "8bit", "cpu", compile=True)
    least = needed_bytes(XL, CUDA_BF16, every, 1)
    fit = fastest(XL, CUDA_BF16, 128, least * 1.0001, A100)
    assert fit is not None
    assert fit.switches == every
    assert fit.micro_batch == 1
    assert fastest(XL, CUDA_BF16, 128, least * 0.999, A100) is None
    assert smallest_memory(XL, CUDA_BF16) == least


def test_a_recipes_swap_and_fused_backward_fit_where_nothing_else_does() -> None:
    swapped = Switches("full", ema_device="cpu", compile=False, fused_backward=True, block_swap=28)
    chosen = {"fused_backward": True, "block_swap": 28}
    least = smallest_memory(XL, CUDA_BF16, **chosen)
    assert least < 0.3 * smallest_memory(XL, CUDA_BF16)
    fit = fastest(XL, CUDA_BF16, 1, least * 1.0001, A100, **chosen)
    assert fit is not None
    assert fit.switches == swapped
    assert fastest(XL, CUDA_BF16, 1, least * 0.999, A100, **chosen) is None
    # A fused backward pass takes the batch at once.
    assert fastest(XL, CUDA_BF16, 128, least * 1.0001, A100, **chosen) is None


def test_swapped_blocks_leave_one_block_and_cost_their_copies() -> None:
    """Per block: 22 bytes a parameter less, and 12 bytes over PCIe in a step."""
    n, plain = block_parameters(XL, 0), Switches("full", compile=False)
    one, two = (needed_bytes(XL, CUDA_BF16, replace(plain, block_swap=count), 8) for count in (1, 2))
    assert (one - two) * 0.98 == pytest.approx(22 * n, rel=1e-6)
    none, all_of_them = (step_seconds(XL, 8, 2, replace(plain, block_swap=count), A100) for count in (0, 28))
    assert all_of_them - none == pytest.approx(2 * 28 * 12 * n / 20e9)


def test_a_swap_is_planned_with_what_training_accepts_beside_it() -> None:
    for switches in all_switches(fused_backward=True, block_swap=2):
        values = {name: getattr(switches, name) for name in asdict(switches)}
        TrainSettings(**values, clip=None)


def test_a_recipes_fused_backward_stays_on() -> None:
    fit = fastest(XL, CUDA_BF16, 24, 24e9, A100, fused_backward=True)
    assert fit is not None
    assert fit.switches == Switches(fused_backward=True)
    assert fit.accumulate == 1


@given(st.sampled_from([XL, B]), st.integers(1, 512), st.floats(1e10, 1.5e11), st.sampled_from([3e13, 4e14]))
def test_nothing_that_fits_is_faster(network: DiTSizes, batch: int, memory: float, flops: float) -> None:
    fit = fastest(network, CUDA_BF16, batch, memory, flops)
    for switches in all_switches():
        largest = largest_batch(network, CUDA_BF16, switches, memory)
        if largest:
            assert fit is not None
            seconds = step_seconds(network, batch, accumulation(batch, largest), switches, flops)
            assert fit.step_seconds <= seconds * 1.01


def test_where_compile_brings_nothing_it_is_off() -> None:
    fit = fastest(B, CPU_BF16, 8, 24e9, 1e12, compiles=False)
    assert fit is not None
    assert not fit.switches.compile
    assert fit.step_seconds == pytest.approx(8 * training_flops(B) / 1e12)
    compiled = step_seconds(B, 8, 1, Switches(), 1e12)
    assert step_seconds(B, 8, 1, Switches(compile=False), 1e12) == pytest.approx(EAGER * compiled)


def test_small_parts_wait_for_their_kernels() -> None:
    assert step_seconds(XL, 64, 64, Switches(), 1e15) > 1.5 * step_seconds(XL, 64, 1, Switches(), 1e15)


@pytest.mark.parametrize("name", [*GPUS, "A100", "RTX 4090", "rtx-3090", "NVIDIA H200"])
def test_known_gpus(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu.tflops
    assert 0 < gpu.mfu <= 0.5


@pytest.mark.parametrize(("name", "memory"), [("24GB", 24e9), ("11.5 gb", 11.5e9), ("80G", 80e9)])
def test_a_size_is_a_gpu_without_a_speed(name: str, memory: float) -> None:
    gpu = find_gpu(name)
    assert gpu.memory == memory
    assert gpu.tflops is None


@pytest.mark.parametrize("name", ["a1000", "", "GB", "0GB", "-24GB", "24TB"])
def test_unknown_gpus_are_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(AtollError, match=r"expected one of 3090.*h200.*or a size such as 24GB"):
        find_gpu(name)
