"""The options of diffusers' `from_pretrained`: dtypes by component, options that mean nothing here, and refusals."""

from collections.abc import Mapping
from typing import Any

import torch

from atoll.ensemble.offload import WeightDtype
from atoll.errors import AtollError

COMPONENTS = ("ensemble", "scheduler")
_DTYPES: dict[torch.dtype | None, WeightDtype | None] = {
    None: None,
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}

# They concern downloads, or how diffusers fills its own models: a local directory of safetensors needs neither.
_HARMLESS = (
    *("cache_dir", "force_download", "local_files_only", "mirror", "proxies", "resume_download", "token"),
    *("use_auth_token", "disable_mmap", "low_cpu_mem_usage", "offload_state_dict"),
)
# They would change what is loaded: the values that change nothing, and what to do instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "variant": ((None,), "an ensemble has one set of weights; leave it out, and set dtype to round them"),
    "revision": (
        (None, "main"),
        "a directory has one revision; leave it out, and download the one that you need",
    ),
    "device_map": ((None,), "load without, and move the pipeline by .to(device), or call enable_model_cpu_offload()"),
    "max_memory": ((None,), "load without, and call enable_model_cpu_offload(), or use atoll.Pipeline's memory_budget"),
    "offload_folder": ((None,), "load without, and call enable_group_offload(offload_to_disk_path=...)"),
    "use_safetensors": ((None, True), "the weights are always safetensors; leave it out"),
    "quantization_config": ((None,), "load without; AtollEnsemble(path, weights='int8') rounds to 8 bits"),
    "custom_pipeline": ((None,), "nothing in the directory is executed; leave it out"),
    "custom_revision": ((None,), "nothing in the directory is executed; leave it out"),
    "trust_remote_code": ((None, False), "nothing in the directory is executed; leave it out"),
    "use_onnx": ((None, False), "the weights are always safetensors; leave it out"),
    "use_flashpack": ((None, False), "the weights are always safetensors; leave it out"),
    "load_connected_pipeline": ((None, False), "there is no connected pipeline; leave it out"),
    "output_loading_info": ((None, False), "there are no missing or unexpected keys to list; leave it out"),
    "subfolder": ((None, ""), "pass the path of the directory itself"),
}


def check_options(options: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raise AtollError for an option of `from_pretrained` that is unknown, or that would be ignored.

    Args:
        options: those that were passed.
        own: the names of Atoll's own.
    """
    for name, value in options.items():
        if name in own or name in _HARMLESS:
            continue
        if name not in _REFUSED:
            raise AtollError(f"unknown option {name!r}; expected one of {', '.join(own)}")
        neutral, instead = _REFUSED[name]
        if value not in neutral:
            raise AtollError(f"{name} {value!r:.60}: {instead}")


def weight_dtype(torch_dtype: Any, dtype: Any) -> WeightDtype | None:
    """Return the dtype that the ensemble's weights are rounded to; None: as stored.

    Args:
        torch_dtype: float32, bfloat16 or float16, or their names; or, as in diffusers, a dictionary of these by
            component, with "default" for the others (float32 if there is none).
        dtype: its new name in diffusers; only one of the two may be set.

    Raises:
        AtollError: both are set, another dtype, or a component that there is not.
    """
    if torch_dtype is not None and dtype is not None:
        raise AtollError("torch_dtype and dtype were both passed; expected one of them")
    value = dtype if torch_dtype is None else torch_dtype
    # A dictionary names the components; the scheduler has no weights.
    if isinstance(value, Mapping):
        if unknown := value.keys() - {*COMPONENTS, "default"}:
            raise AtollError(
                f"dtype of {min(map(str, unknown))!r}: no such component; expected {', '.join(COMPONENTS)} or default"
            )
        value = value.get("ensemble", value.get("default", torch.float32))
    # The name of a dtype is as good as the dtype.
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if not isinstance(value, torch.dtype | None) or value not in _DTYPES:
        raise AtollError(f"dtype {value!r:.60}: expected torch.float32, torch.bfloat16 or torch.float16")
    return _DTYPES[value]
