"""Timestep shifts against the schedulers and pipelines of diffusers."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from atoll.time_shift import TimeShift, shift_time

TIMES = torch.linspace(1, 0.01, 100, dtype=torch.float64)


def test_flux_shifts_by_the_tokens() -> None:
    for tokens in (64, 256, 1024, 4096, 16384):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=TIMES.numpy(), mu=calculate_shift(tokens))
        own = shift_time(TIMES, TimeShift.parse({"rule": "flux"}).at(tokens))
        torch.testing.assert_close(own, scheduler.sigmas[:-1].double(), atol=1e-6, rtol=0)


def test_a_constant_shift_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=TIMES.numpy())
    torch.testing.assert_close(shift_time(TIMES, 3.0), scheduler.sigmas[:-1].double(), atol=1e-6, rtol=0)
