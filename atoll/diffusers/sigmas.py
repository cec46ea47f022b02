"""The edge between Atoll's times and the sigmas of diffusers' schedulers.

The path is the same on both sides, x = (1 - sigma) x0 + sigma noise with velocity noise - x0, and t = sigma. A
scheduler's timesteps are not used as times: several schedulers round them to integers.
"""

from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage.memory import refuse_out_of_memory

with quiet("diffusers"):
    from diffusers import FlowMatchEulerDiscreteScheduler

_EXPECTED = (
    "expected FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or UniPC or DPM-Solver++ with "
    "prediction_type='flow_prediction' and use_flow_sigmas=True"
)
_START = 0.9  # the smallest sigma at which x may be pure noise; UniPC with Karras' spacing starts at 0.994


def flow_sigmas(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Set the timesteps of a diffusers scheduler, and return the sigma of each.

    FlowMatchEulerDiscreteScheduler gets even sigmas, like `solver.sample`: its own last step goes from 0.001 to 0,
    which is nearly wasted. If its config names a spacing (Karras, exponential, beta), and with every other scheduler,
    the scheduler's own sigmas are used.

    Args:
        scheduler: of diffusers.
        steps: N.
        device: for the timesteps and the sigmas.

    Returns:
        Sigmas [N] float32.

    Raises:
        AtollError: the scheduler is not for flow matching, its sigmas do not lead from noise to data, or it needs more
            than a number of steps (with `use_dynamic_shifting`).
    """
    # Only flow matching has this path.
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if config.get("prediction_type", "flow_prediction") != "flow_prediction" or not config.get("use_flow_sigmas", True):
        raise AtollError(f"{name}, as it is set, is not for flow matching; {_EXPECTED}")

    # Even sigmas for the Euler scheduler.
    options: dict[str, Any] = {"num_inference_steps": steps, "device": device}
    spaced = any(config.get(f"use_{spacing}_sigmas") for spacing in ("karras", "exponential", "beta"))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not spaced:
        options["sigmas"] = torch.linspace(1, 0, steps + 1)[:-1].numpy()

    # The sigmas must fall from noise to data.
    try:
        scheduler.set_timesteps(**options)
        sigmas, count = scheduler.sigmas.float().cpu(), len(scheduler.timesteps)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        refuse_out_of_memory(error, name)
        reason = " ".join(str(error).split())[:200]
        raise AtollError(
            f"{name}, as it is set, cannot be driven by a number of steps ({reason}); {_EXPECTED}"
        ) from None
    if len(sigmas) != count + 1 or not (sigmas.diff() <= 0).all() or not _START <= float(sigmas[0]) <= 1:
        raise AtollError(f"{name}, as it is set, has no sigmas that fall from 1 to 0; {_EXPECTED}")
    if sigmas[-1] != 0:
        raise AtollError(f"{name} stops in noise, at sigma {float(sigmas[-1]):.3g}; set its final_sigmas_type='zero'")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise it looks up the first timestep, among rounded ones
    # The last sigma is 0, where nothing is evaluated.
    output: Tensor = sigmas[:-1].to(device)
    return output
