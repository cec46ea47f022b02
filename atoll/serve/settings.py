"""What a server accepts and how long it remembers; every limit has one home here."""

from dataclasses import dataclass

HEADER_BYTES = 16_384  # of a request's address and headers
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        tokens: the accepted bearer tokens; with none, every request is accepted.
        hosts: the names that a request's Host header may have, against DNS rebinding; None: any.
        max_n: images per request.
        max_steps: steps per image.
        max_pixels: pixels of all images of a request.
        max_prompt: characters of a prompt, and of a negative prompt.
        max_previews: previews per job.
        max_priority: the highest priority that a client may choose; 0: clients can only step back.
        max_deadline: seconds.
        max_body: bytes of a request's body.
        body_seconds: time for a request's body to arrive.
        rate: requests per minute and client that make images; 0: no limit.
        client_queue: unfinished images per client; None: half of the engine's queue.
        client_streams: open event streams per client.
        keep_seconds: how long finished jobs and files stay.
        keep_bytes: size of all finished images in memory, as PNG; and of all previews, about.
        keep_jobs: number of finished jobs in memory.
        licence: the licence of the images or the models, shown in /v1/models.
        weights: the dtype that the experts' weights were rounded to, for the images' settings; None: as stored.
        log_prompts: whether prompts are logged.
        replicated: whether requests of one client reach different processes: then there are neither files nor jobs,
            which live in one process.
    """

    tokens: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = LOOPBACK_NAMES
    max_n: int = 64
    max_steps: int = 250
    max_pixels: int = 2**26
    max_prompt: int = 4000
    max_previews: int = 1024
    max_priority: int = 0
    max_deadline: float = 86_400.0
    max_body: int = 2**17
    body_seconds: float = 30.0
    rate: float = 600.0
    client_queue: int | None = None
    client_streams: int = 64
    keep_seconds: float = 600.0
    keep_bytes: int = 2**28
    keep_jobs: int = 1024
    licence: str | None = None
    weights: str | None = None
    log_prompts: bool = False
    replicated: bool = False


DEFAULTS = ServerSettings()
