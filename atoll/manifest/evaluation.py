"""The `evaluate` section: what is measured of a model."""

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator

from atoll.choices import Method
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest.base import Section

EVEN = "even"


class SpaceSettings(Section):
    """A feature space, in which drawn and real images are compared.

    Attributes:
        feature: as in the `feature` section; or {name: inception, weights: ...}, whose distance is FID.
        components: project on this many principal components of the real images' features; None: the whole vector.
        statistics: a file with mean and covariance of other images' features (`atoll statistics`, or an .npz with mu
            and sigma), for a second Fréchet distance. The components are then those of the file.
    """

    feature: dict[str, Any]
    components: PositiveInt | None = None
    statistics: str | None = None


class DiversitySettings(Section):
    """Diversity within a prompt: `images` for each of `prompts` (HDDM: 10 for each of 100).

    Attributes:
        feature: the network whose taps define the perceptual distance; {name: lpips} for LPIPS itself.
    """

    feature: dict[str, Any]
    prompts: PositiveInt = 100
    images: int = Field(10, ge=2)


class SweepSettings(Section):
    """The axes of a sweep: every combination is measured. An axis without values keeps the ensemble's own.

    Attributes:
        alignment: "snr", "native", "snr-clamp" (HDDM's clamp instead of calibrations), "snr-alone".
        experts: named choices of one expert (or replicas) per cluster, by objective:
            {mixed: {all: flow, 0: eps-cosine, 1: [flow, eps-cosine]}}.
        grid: "even" steps in t, or a schedule in whose time the steps are even ("cosine" with euler is DDIM).
        monolith, student: measure them too, with each number of steps and each guidance.
    """

    routing: tuple[str, ...] = ()
    guidance_scale: tuple[float, ...] = ()
    steps: tuple[PositiveInt, ...] = ()
    method: tuple[Method, ...] = ()
    alignment: tuple[Literal["snr", "native", "snr-clamp", "snr-alone"], ...] = ()
    replicas: tuple[str, ...] = ()
    grid: tuple[str, ...] = ()
    experts: dict[str, dict[int | str, str | tuple[str, ...]]] = Field(default_factory=dict)
    monolith: bool = False
    student: bool = False

    @field_validator("routing")
    @classmethod
    def _known(cls, routings: tuple[str, ...]) -> tuple[str, ...]:
        from atoll.ensemble.routing import parse_routing

        try:
            for routing in routings:
                parse_routing(routing)
        except AtollError as error:
            raise ValueError(str(error)) from None
        return routings

    @field_validator("grid")
    @classmethod
    def _schedules(cls, grids: tuple[str, ...]) -> tuple[str, ...]:
        from atoll.schedule import build_schedule

        try:
            for grid in grids:
                if grid != EVEN:
                    build_schedule(grid)
        except AtollError as error:
            raise ValueError(f"{error}; or {EVEN}") from None
        return grids


class EvaluateSettings(Section):
    """The settings that the report's numbers depend on.

    Attributes:
        images: per variant.
        steps, method, guidance_scale: of the measured images; the grid uses the ensemble's own defaults.
    """

    renamed: ClassVar[dict[str, str]] = {"kept": "max_features", "diagnosed": "diagnostic_samples"}

    images: PositiveInt = 512
    steps: PositiveInt = 15
    method: Method = "dpm++2m"
    guidance_scale: float = 1.0
    components: PositiveInt = 48  # of the PCA of pixels
    spaces: tuple[SpaceSettings, ...] = ()  # in addition to that PCA
    max_features: PositiveInt = 5000  # per side, for metrics that compare image with image
    diversity: DiversitySettings | None = None
    clip: dict[str, Any] | None = None  # for the CLIP score: {weights: openai/clip-vit-large-patch14}
    # Trajectories and held-out latents for the alignment diagnostics; 0: none.
    diagnostic_samples: int = Field(0, ge=0)
    sweep: tuple[SweepSettings, ...] = ()  # measured instead of the usual variants
    reference: PositiveInt = 20_000  # maximum number of real images
    held_out: PositiveInt = 128  # maximum number of latents
    levels: tuple[float, ...] = tuple((2 * i + 1) / 20 for i in range(10))  # t of the denoising error
    prompts: tuple[str, ...] = ()  # of the grid; none: captions of held-out images
    sizes: tuple[str, ...] = ()  # "WIDTHxHEIGHT": the grid shows the ensemble at these sizes, too
    seeds: PositiveInt = 4  # images per prompt in the grid
    batch: PositiveInt = 128
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the codec; auto: bf16 if the hardware has it
    workers: PositiveInt | None = None  # parallel batches, each with its part of the threads; None: one per core
    seed: int = Field(0, ge=0)

    @field_validator("sizes")
    @classmethod
    def _parsed(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(str(ImageSize.parse(size, "evaluate.sizes")) for size in sizes)
        except AtollError as error:
            raise ValueError(str(error)) from None
