"""What is measured of a model: the `evaluate` section."""

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator

from atoll.choices import Method
from atoll.errors import AtollError
from atoll.manifest.base import Section

EVEN = "even"


class SpaceSettings(Section):
    """A feature space, in which drawn and real images are compared.

    feature: as in the `feature` section; or {name: inception, weights: ...}, whose distance is FID. components: a
    projection on so many principal components of the real images' features; None: the whole vector. statistics: a
    file with mean and covariance of other images' features (`atoll statistics`, or an .npz with mu and sigma), to
    which a Fréchet distance is taken too; then the components are theirs.
    """

    feature: dict[str, Any]
    components: PositiveInt | None = None
    statistics: str | None = None


class DiversitySettings(Section):
    """How unlike the images of one prompt are: `images` for each of `prompts` (HDDM: 10 for each of 100).

    feature: the network whose taps make the perceptual distance; {name: lpips} for LPIPS itself.
    """

    feature: dict[str, Any]
    prompts: PositiveInt = 100
    images: int = Field(10, ge=2)


class SweepSettings(Section):
    """Every combination of the axes that are named is measured; one that is not keeps the ensemble's own value.

    alignment: "snr", "native", "snr-clamp" (HDDM's clamp instead of calibrations), "snr-alone". experts: by a name of
    the choice, whose expert is taken of each cluster: {mixed: {all: flow, 0: eps-cosine, 1: [flow, eps-cosine]}}.
    grid: "even" steps in t, or a schedule, in whose own time they are even ("cosine": with euler, that is DDIM).
    monolith, student: they are measured too, with each number of steps and each guidance.
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
        from atoll.ensemble.routing import build_routing

        try:
            for routing in routings:
                build_routing(routing)
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
    """What the report's numbers depend on. images: per variant; steps, method, guidance_scale: of the images measured
    (those of the grid are drawn by the ensemble's own defaults)."""

    renamed: ClassVar[dict[str, str]] = {"kept": "max_features", "diagnosed": "diagnostic_samples"}

    images: PositiveInt = 512
    steps: PositiveInt = 15
    method: Method = "dpm++2m"
    guidance_scale: float = 1.0
    components: PositiveInt = 48  # of the PCA of pixels
    spaces: tuple[SpaceSettings, ...] = ()  # beside that PCA, which is always measured in
    max_features: PositiveInt = 5000  # features at most, of either side, for what compares image with image
    diversity: DiversitySettings | None = None
    clip: dict[str, Any] | None = None  # for the CLIP score: {weights: openai/clip-vit-large-patch14}
    diagnostic_samples: int = Field(
        0, ge=0
    )  # trajectories, and held-out latents, for the alignment diagnostics; 0: none
    sweep: tuple[SweepSettings, ...] = ()  # what is measured instead of the usual variants
    reference: PositiveInt = 20_000  # real images at most
    held_out: PositiveInt = 128  # latents at most
    levels: tuple[float, ...] = tuple((2 * i + 1) / 20 for i in range(10))  # t of the denoising error
    prompts: tuple[str, ...] = ()  # of the grid; none: captions of held-out images
    seeds: PositiveInt = 4  # images per prompt in the grid
    batch: PositiveInt = 128
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the codec; auto: bf16 where the hardware multiplies it
    workers: PositiveInt | None = None  # batches side by side, each on its share of threads; None: one per core
    seed: int = Field(0, ge=0)
