"""What members of a collective sign: one class per purpose, each value bounded. `signed.py` signs and checks them."""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from atoll.collective.keys import KeyId
from atoll.storage.bounds import MAX_EXPERTS, ClusterNumber, Name, Number, Sha256
from atoll.storage.cards import CardRecord
from atoll.storage.layout import CARD, WEIGHTS

STATEMENT_BYTES = 1 << 20  # of most statements
LIST_BYTES = 32 << 20  # of an index or a list of files: 100,000 files take 20 MiB
MAX_KEYS = 10_000  # members, or files' paths, named in one statement
MAX_NUMBER = 999_999  # of an epoch or a version: six digits, so that names sort
_EXACT = 2**53 - 1  # the largest integer that RFC 8785 holds


def _whole(value: Any) -> Any:
    """Read an integer, or a string of digits where JSON cannot hold the integer. One value has one spelling."""
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) <= 20 and int(value) > _EXACT):
            raise ValueError(f"got {value!r:.40}, expected an integer; a string only above 2^53-1")
        return int(value)
    return value


def _spelled(value: int) -> int | str:
    return value if value <= _EXACT else str(value)


# An unsigned 64-bit integer, such as a seed or a size.
Whole64 = Annotated[
    int, BeforeValidator(_whole), Field(strict=True, ge=0, lt=2**64), PlainSerializer(_spelled, when_used="json")
]


def _printable(text: str) -> str:
    # Names are shown in terminals, where control characters would act.
    if not text.isprintable():
        raise ValueError(f"got {text!r:.60}, expected printable characters")
    return text


Label = Annotated[Name, AfterValidator(_printable)]  # a name, for people
Reason = Annotated[str, Field(strict=True, min_length=1, max_length=1000), AfterValidator(_printable)]
WorkName = Annotated[str, Field(strict=True, pattern=r"^(0|[1-9][0-9]{0,3})(\.[1-9][0-9]?)?$")]
SubmissionId = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]
Numbered = Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER)]
Nonce = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]
UnixTime = Annotated[int, Field(strict=True, ge=0, le=_EXACT)]  # seconds, by the store's clock
KeyCount = Annotated[int, Field(strict=True, ge=1, le=64)]


def safe_path(path: str) -> str:
    """Return a relative path that stays inside its directory on every system. Raises ValueError for any other."""
    parts = path.split("/")
    safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
    if len(path) > 1024 or len(parts) > 16:
        raise ValueError(f"got {path!r:.60}, expected a shorter path")
    for part in parts:
        # No leading dot: neither . nor .. nor a hidden file.
        if not part or len(part) > 255 or part[0] == "." or any(letter not in safe for letter in part):
            raise ValueError(f"got {path!r:.60}, expected a relative path of letters, digits, _, - and .")
    return path


SafePath = Annotated[str, Field(strict=True), AfterValidator(safe_path)]


class FileDigest(CardRecord):
    """Size and hash of an object. size: in bytes."""

    sha256: Sha256
    size: Whole64


class Position(CardRecord):
    """A place in a chain: the version, and the hash of its object."""

    version: Numbered
    sha256: Sha256


class Statement(CardRecord):
    """What is signed.

    Attributes:
        type: names the purpose of the signature.
        most: the largest object accepted, in bytes.
    """

    type: ClassVar[str]
    most: ClassVar[int] = STATEMENT_BYTES


class FoundedRun(CardRecord):
    """The run that a collective is founded on: the hash of its atoll.yaml, the format of its shards, its clusters."""

    manifest: Sha256
    encoded_format: Literal[1]
    clusters: Annotated[int, Field(strict=True, ge=1, le=4096)]


class Roles(CardRecord):
    """Who may change the charter, admit experts and retire them."""

    founders: tuple[KeyId, ...] = Field(min_length=1, max_length=64)
    admitters: tuple[KeyId, ...] = Field(min_length=1, max_length=64)
    retirers: tuple[KeyId, ...] = Field(min_length=1, max_length=64)


class Thresholds(CardRecord):
    """How many of them must sign."""

    founders: KeyCount = 1
    admitters: KeyCount = 1
    retirers: KeyCount = 1


class MemberRecord(CardRecord):
    """A member's name, for people. The key id is the identity."""

    name: Label


class Charter(Statement):
    """Who is who. Version n+1 is signed by the founders of version n.

    Attributes:
        files: the list of the run's files, an object named by its hash.
        joining: "open": any key that is not removed may claim and publish; "invited": members only.
        removed: keys that may do nothing any more.
        previous: the hash of the charter before; None for the first one.
        lease_seconds: how long a lease lasts after its last heartbeat.
    """

    type: ClassVar[str] = "charter"
    most: ClassVar[int] = LIST_BYTES

    version: Numbered
    name: Label
    founded: FoundedRun
    files: FileDigest
    roles: Roles
    thresholds: Thresholds
    joining: Literal["open", "invited"]
    members: dict[KeyId, MemberRecord] = Field(max_length=MAX_KEYS)
    removed: tuple[KeyId, ...] = Field(max_length=MAX_KEYS)
    lease_seconds: Annotated[int, Field(strict=True, ge=1, le=10 * 365 * 86_400)]
    previous: Sha256 | None
    expires: UnixTime

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # A threshold above the number of keys could never be reached again.
        for role in ("founders", "admitters", "retirers"):
            keys, need = getattr(self.roles, role), getattr(self.thresholds, role)
            if len(set(keys)) < len(keys) or need > len(keys):
                raise ValueError(f"{need} of {len(keys)} {role}; expected as many different keys as must sign")
            if set(keys) & set(self.removed):
                raise ValueError(f"a removed key is among the {role}")
        return self


class Request(Statement):
    """A key's owner introduces themselves."""

    type: ClassVar[str] = "request"
    name: Label


class Claim(Statement):
    """The signer takes a work item for one epoch."""

    type: ClassVar[str] = "claim"
    work: WorkName
    epoch: Numbered
    nonce: Nonce


class End(Statement):
    """The signer gives up the lease of an epoch, or has finished the work."""

    type: ClassVar[str] = "end"
    work: WorkName
    epoch: Numbered
    state: Literal["released", "finished"]


class SharedCheckpoint(Statement):
    """The signer shares the state of a training: a file in one of two slots that are written in turn."""

    type: ClassVar[str] = "checkpoint"
    work: WorkName
    epoch: Numbered
    number: Numbered
    slot: Annotated[int, Field(strict=True, ge=0, le=1)]
    file: FileDigest


class Submission(Statement):
    """The signer offers an expert.

    Attributes:
        name: the expert's name in its card.
        epoch: of the lease under which it was trained; 0 without a lease.
        files: its files, among them card.json, whose hash pins the weights.
    """

    type: ClassVar[str] = "submission"
    name: Label
    clusters: tuple[ClusterNumber, ...] = Field(min_length=1, max_length=4096)
    work: WorkName
    epoch: Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]
    files: dict[SafePath, FileDigest] = Field(min_length=2, max_length=16)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := {CARD, WEIGHTS} - set(self.files):
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        # An admitter reads the shards of each.
        if len(set(self.clusters)) < len(self.clusters):
            raise ValueError("a cluster is named twice")
        return self


class AdmissionReport(Statement):
    """The signer's judgement of a submission.

    Attributes:
        submission: the hash of its submission.json.
        charter: the version that the signer acted under.
        seed: of the probe's noise.
    """

    type: ClassVar[str] = "admission-report"
    submission: Sha256
    charter: Numbered
    accepted: Annotated[bool, Field(strict=True)]
    reasons: tuple[Reason, ...] = Field(max_length=100)
    statistics: dict[Name, Number] = Field(max_length=1000)
    seed: Whole64


class Retirement(Statement):
    """The signer wants an expert out."""

    type: ClassVar[str] = "retirement"
    submission: Sha256
    charter: Numbered
    why: Reason


class RouterApproval(Statement):
    """The signer wants a router in the model.

    Attributes:
        files: card.json, whose hash pins the weights, and these.
        after: the index that brought the router which this one replaces; 0 if no index names one. So an approval is
            worth nothing once another router is in.
        charter: the version that the signer acted under.
    """

    type: ClassVar[str] = "router-approval"
    files: dict[SafePath, FileDigest] = Field(min_length=2, max_length=2)
    after: Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]
    charter: Numbered

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := {CARD, WEIGHTS} - set(self.files):
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        return self


class IndexedExpert(CardRecord):
    """An admitted expert: its submission, the hash of its submission.json, its clusters and the reports for it."""

    submission: SubmissionId
    sha256: Sha256
    clusters: tuple[ClusterNumber, ...] = Field(min_length=1, max_length=4096)
    reports: tuple[Sha256, ...] = Field(min_length=1, max_length=64)


class RetiredExpert(CardRecord):
    """An expert that was retired, and the hashes of the retirements."""

    submission: SubmissionId
    sha256: Sha256
    retirements: tuple[Sha256, ...] = Field(min_length=1, max_length=64)


class Index(Statement):
    """The experts of the model. router: the files of its router, below router/<hash of its card>/."""

    type: ClassVar[str] = "index"
    most: ClassVar[int] = LIST_BYTES

    version: Numbered
    previous: Sha256 | None
    charter: Position
    expires: UnixTime
    router: dict[SafePath, FileDigest] | None = Field(None, max_length=16)
    experts: tuple[IndexedExpert, ...] = Field(max_length=MAX_EXPERTS)
    retired: tuple[RetiredExpert, ...] = Field(max_length=MAX_EXPERTS)

    @model_validator(mode="after")
    def _different(self) -> Self:
        ids = [one.submission for one in self.experts] + [one.submission for one in self.retired]
        if len(set(ids)) < len(ids):
            raise ValueError("a submission is named twice")
        return self


StatementT = TypeVar("StatementT", bound=Statement)
