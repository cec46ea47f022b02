"""How a statement is signed and read: bounded, canonical, for one purpose and one collective.

    {"format": 1, "type": "claim", "statement": {...}, "signatures": [{"key": ..., "signature": ...}]}

The signed bytes also hold the type and the collective's identity, so that a signature made for one purpose or one
collective is worth nothing in another.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Generic, Literal

from pydantic import Field

from atoll.collective.keys import Key, KeyId, SignatureHex, canonical, is_signed, short
from atoll.collective.statements import Statement, StatementT
from atoll.errors import AtollError
from atoll.storage.cards import CardRecord, parse_record

FORMAT = 1


class _Signature(CardRecord):
    key: KeyId
    signature: SignatureHex


class _Envelope(CardRecord):
    format: Literal[1]
    type: Annotated[str, Field(strict=True, max_length=64)]
    statement: dict[str, Any]
    signatures: tuple[_Signature, ...] = Field(min_length=1, max_length=64)


@dataclass(frozen=True)
class Signed(Generic[StatementT]):
    """A statement whose signatures were checked.

    Attributes:
        statement: its content.
        signers: the key ids that signed it.
        sha256: the hash of its object.
    """

    statement: StatementT
    signers: frozenset[str]
    sha256: str

    def signer(self, where: str) -> str:
        """Return the only signer. Raises AtollError if there are several."""
        if len(self.signers) != 1:
            raise AtollError(f"{where}: has {len(self.signers)} signatures, expected one")
        return next(iter(self.signers))


def sign(statement: Statement, keys: Sequence[Key], collective: str) -> bytes:
    """Sign a statement.

    Args:
        statement: what to sign.
        keys: the signers.
        collective: the collective's identity; "" for the first charter, whose hash becomes the identity.

    Returns:
        The object's bytes. The same arguments always give the same bytes.
    """
    content = statement.model_dump(mode="json", by_alias=True)
    data = _signed_bytes(statement.type, content, collective)
    signatures = [{"key": key.id, "signature": key.sign(data)} for key in keys]
    return canonical({"format": FORMAT, "type": statement.type, "statement": content, "signatures": signatures})


def read_signed(kind: type[StatementT], data: bytes, where: str, collective: str) -> Signed[StatementT]:
    """Check a signed statement.

    Args:
        kind: the class that is expected.
        data: the object's bytes, already bounded.
        where: its place, for messages.
        collective: as in `sign`.

    Raises:
        AtollError: not canonical JSON, of another format or type, a value out of bounds, or a signature that does not
            fit.
    """
    content = parse_canonical(data, where)
    # A later format may have other keys, so it comes first.
    if isinstance(content, dict) and isinstance(number := content.get("format"), int) and number > FORMAT:
        raise AtollError(f"{where}: format {number}, this version of atoll reads format {FORMAT}; update atoll")
    envelope = parse_record(_Envelope, content, where)
    if envelope.type != kind.type:
        raise AtollError(f"{where}: is a signed {envelope.type!r:.40}, expected a signed {kind.type!r}")
    # The signatures, before the content is looked at.
    signed = _signed_bytes(kind.type, envelope.statement, collective)
    for one in envelope.signatures:
        if not is_signed(one.key, one.signature, signed):
            raise AtollError(
                f"{where}: the signature of {short(one.key)} does not fit; the object was changed, "
                "or signed for another collective or purpose"
            )
    signers = frozenset(one.key for one in envelope.signatures)
    if len(signers) < len(envelope.signatures):
        raise AtollError(f"{where}: a key signed twice")
    return Signed(parse_record(kind, envelope.statement, where), signers, sha256(data).hexdigest())


def parse_canonical(data: bytes, where: str) -> Any:
    """Parse canonical JSON. Raises AtollError for any other bytes, also for equal values in another spelling."""
    try:
        content = json.loads(data)
        # One spelling only: no repeated keys, no NaN, nothing after the end.
        if canonical(content) != data:
            raise ValueError("not canonical")
    except (ValueError, RecursionError, AtollError) as error:
        problem = " ".join(str(error).split())[:80]
        raise AtollError(f"{where}: no canonical JSON ({problem}); it is damaged or not of Atoll") from None
    return content


def _signed_bytes(kind: str, statement: dict[str, Any], collective: str) -> bytes:
    return canonical(
        {"atoll": "collective", "format": FORMAT, "collective": collective, "type": kind, "statement": statement}
    )
