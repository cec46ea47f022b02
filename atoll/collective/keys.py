"""Members' keys, and canonical JSON, the bytes that they sign.

ed25519 (RFC 8032) over RFC 8785. A signature is deterministic: the same statement signed twice has the same bytes.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from atoll.errors import AtollError
from atoll.runtime.libraries import import_library

_EXTRA = "collective"
_PREFIX = "ed25519:"
KeyId = Annotated[str, Field(strict=True, pattern=f"^{_PREFIX}[0-9a-f]{{64}}$")]  # holds the public key itself
SignatureHex = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{128}$")]


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of a plain value (RFC 8785): equal values have equal bytes.

    Raises:
        AtollError: a number that JSON cannot hold exactly: NaN, infinity, or an integer beyond 2^53-1, which must be
            a string.
    """
    try:
        data: bytes = import_library("rfc8785", _EXTRA).dumps(value)
    # A lone surrogate, which JSON can escape, has no UTF-8 form.
    except (import_library("rfc8785", _EXTRA).CanonicalizationError, UnicodeError, RecursionError) as error:
        raise AtollError(f"no canonical JSON ({error}); larger numbers are written as strings") from None
    return data


def hex_of(key: str) -> str:
    """Return a key id's hexadecimal digits, for the names of objects: some stores treat colons specially."""
    return key.removeprefix(_PREFIX)


def short(key: str) -> str:
    """Return the beginning of a key id, for messages."""
    return f"{key[: len(_PREFIX) + 12]}..."


class Key:
    """A member's private key. private: an Ed25519PrivateKey of `cryptography`."""

    def __init__(self, private: Any):
        self._private = private
        self.id = _PREFIX + private.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Self:
        """Draw a new key from the system's random numbers."""
        return cls(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, file: Path) -> Self:
        """Load a key's file.

        Raises:
            AtollError: missing, readable by others, or no ed25519 key in PEM.
        """
        serialization = import_library("cryptography.hazmat.primitives.serialization", _EXTRA)
        try:
            # As ssh does: others who could read the key could sign with it.
            if (mode := file.stat().st_mode) & 0o077:
                raise AtollError(
                    f"{file}: its mode is {mode & 0o777:o}, so others may use the key; run `chmod 600 {file}`"
                )
            if file.stat().st_size > 10_000:
                raise ValueError("too large")
            private = serialization.load_pem_private_key(file.read_bytes(), password=None)
        except FileNotFoundError:
            raise AtollError(f"{file}: no such key; `atoll collective key {file}` makes one") from None
        except (OSError, ValueError, TypeError) as error:
            raise AtollError(f"{file}: no key of a member ({' '.join(str(error).split())[:80]})") from None
        if not isinstance(private, _ed25519().Ed25519PrivateKey):
            raise AtollError(f"{file}: expected an ed25519 key, as `atoll collective key` makes")
        return cls(private)

    def save(self, file: Path) -> None:
        """Write the key, readable by its owner alone. Raises AtollError if the file exists."""
        serialization = import_library("cryptography.hazmat.primitives.serialization", _EXTRA)
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            # Never replaced: whoever loses a key loses what its signatures allow.
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise AtollError(f"{file}: exists; a key is never replaced, choose another name") from None
        except OSError as error:
            raise AtollError(f"{file}: cannot be written ({error.strerror})") from None
        with os.fdopen(descriptor, "wb") as out:
            out.write(pem)
            out.flush()
            os.fsync(out.fileno())

    def sign(self, data: bytes) -> str:
        """Return the signature of some bytes, as 128 hexadecimal digits."""
        signature: bytes = self._private.sign(data)
        return signature.hex()


def is_signed(key: str, signature: str, data: bytes) -> bool:
    """Return whether a signature of these bytes is of this key. Both are well formed."""
    exceptions = import_library("cryptography.exceptions", _EXTRA)
    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(hex_of(key)))
        public.verify(bytes.fromhex(signature), data)
    # 32 bytes that are no point of the curve are a ValueError in some versions.
    except (exceptions.InvalidSignature, ValueError):
        return False
    return True


def _ed25519() -> Any:
    return import_library("cryptography.hazmat.primitives.asymmetric.ed25519", _EXTRA)
