"""The section of atoll.yaml about sampling."""

from pydantic import Field, PositiveInt, field_validator

from atoll.choices import Method
from atoll.errors import AtollError
from atoll.manifest.base import Section


class SamplingSettings(Section):
    """The defaults of sampling, saved in the ensemble."""

    steps: PositiveInt = 25
    guidance_scale: float = 2.0
    method: Method = "euler"
    routing: str = "top-2"
    shift: float | None = Field(None, gt=0, le=1000)  # of the solver's times; null: what the experts were trained with
    replicas: str = Field("stacked", pattern=r"^(stacked|inverse-error|equal|time-switch-(\d*\.)?\d+)$")

    @field_validator("routing")
    @classmethod
    def _known(cls, routing: str) -> str:
        from atoll.ensemble.routing import parse_routing

        try:
            parse_routing(routing)
        except AtollError as error:
            raise ValueError(str(error)) from None
        return routing
