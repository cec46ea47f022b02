"""The callback after each step: what it sees, and what it may replace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atoll.diffusers.arguments import checked_latents
from atoll.diffusers.prompts import Prompts
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet

with quiet("diffusers"):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

Callback = Callable[..., dict[str, Any]]  # (pipeline, step, timestep, tensors by name) -> tensors by name


@dataclass(frozen=True, eq=False)
class StepCallback:
    """A caller's function with the names of the tensors that it sees.

    Attributes:
        function: (pipeline, step, timestep, tensors) -> tensors.
        names: "latents", "prompt_embeds", "negative_prompt_embeds".
    """

    function: Callback
    names: tuple[str, ...]

    @classmethod
    def of(cls, function: Callback | None, names: Sequence[str] | None, known: Sequence[str]) -> "StepCallback | None":
        """Return the callback of a call, None if there is none; diffusers' own classes bring their names.

        Raises:
            AtollError: no function, or a name that is not known.
        """
        if function is not None and not callable(function):
            raise AtollError(f"callback_on_step_end is a {type(function).__name__}; expected a function")
        if isinstance(function, PipelineCallback | MultiPipelineCallbacks):
            names = function.tensor_inputs
        if unknown := set(names or ()) - set(known):
            raise AtollError(
                f"callback_on_step_end_tensor_inputs: unknown {min(unknown)!r}; expected {', '.join(known)}"
            )
        return None if function is None else cls(function, tuple(names or ()))

    def __call__(
        self, pipeline: Any, step: int, timestep: Tensor, x: Tensor, prompts: Prompts
    ) -> tuple[Tensor, Prompts]:
        """Return x [B, C, H, W] and the prompts of the next step.

        Raises:
            AtollError: the function returned no dictionary, or a tensor of another shape.
        """
        tensors = {name: x if name == "latents" else prompts.states(name) for name in self.names}
        returned = self.function(pipeline, step, timestep, tensors)
        # A callback that forgets to return would replace x by None.
        if not isinstance(returned, dict):
            raise AtollError(f"callback_on_step_end returned a {type(returned).__name__}; expected a dictionary")
        # Only what it was shown is replaced.
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if name in self.names and name in returned:
                prompts = prompts.changed(name, returned[name])
        return checked_latents(returned.get("latents", x), tuple(x.shape), x.device), prompts
