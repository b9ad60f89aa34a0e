"""The envelope of a record in Redis: schema version, whose record it is, and proof of both.

    4 bytes  magic "ICML"
    1 byte   schema version
    1 byte   proof: 0 a checksum (sha256), 1 an HMAC-SHA256
   32 bytes  adapter id
    8 bytes  length of the content, big-endian
   32 bytes  proof over all the above and the content
    n bytes  content: `AdapterRecord.to_bytes`

A checksum finds accidents. Only the HMAC, whose secret Redis does not know, finds a value that
somebody wrote there on purpose: without a secret, who can write to Redis decides what is served.
"""

import hashlib
import hmac
import struct
from typing import Literal

RejectionReason = Literal[
    "truncated", "version", "wrong_key", "forged", "unverifiable", "corrupt", "invalid"
]
"""Why a value is not used: cut off or too long; not this schema; another adapter's; its HMAC is
wrong or missing; signed, and this service has no secret; its checksum is wrong; a genuine record
that may not serve (of an unknown layout, or refused by the validity gate)."""

SCHEMA_VERSION = 2

_MAGIC = b"ICML"
_HEAD = struct.Struct(">4sBB32sQ")
_PROOF_BYTES = hashlib.sha256().digest_size
_CHECKSUM, _HMAC = 0, 1


class RejectedValueError(Exception):
    """A value of Redis cannot be trusted.

    Attributes:
        reason: one of a few words, for metrics.
    """

    def __init__(self, reason: RejectionReason) -> None:
        super().__init__(reason)
        self.reason = reason


class ValueSeal:
    """Seals and opens values.

    Args:
        secret: shared by all replicas; empty for checksums only.
    """

    def __init__(self, secret: bytes = b"") -> None:
        self._secret = secret
        self._proof_kind = _HMAC if secret else _CHECKSUM

    def seal(self, adapter_id: str, content: bytes) -> bytes:
        """The value to store under the adapter's key."""
        head = _HEAD.pack(
            _MAGIC, SCHEMA_VERSION, self._proof_kind, bytes.fromhex(adapter_id), len(content)
        )
        return head + self._prove(head, content) + content

    def open(self, adapter_id: str, value: bytes) -> bytes:
        """The content of a value that was found under the adapter's key.

        Raises:
            RejectedValueError: it cannot be trusted.
        """
        if len(value) < _HEAD.size + _PROOF_BYTES:
            raise RejectedValueError("truncated")
        head, content = value[: _HEAD.size], value[_HEAD.size + _PROOF_BYTES :]
        magic, version, proof_kind, owner, length = _HEAD.unpack(head)
        if magic != _MAGIC or version != SCHEMA_VERSION:
            raise RejectedValueError("version")
        if length != len(content):
            raise RejectedValueError("truncated")
        if proof_kind != self._proof_kind:
            raise RejectedValueError("forged" if self._secret else "unverifiable")
        proof = value[_HEAD.size : _HEAD.size + _PROOF_BYTES]
        if not hmac.compare_digest(proof, self._prove(head, content)):
            raise RejectedValueError("forged" if self._secret else "corrupt")
        if owner != bytes.fromhex(adapter_id):
            raise RejectedValueError("wrong_key")
        return content

    def _prove(self, head: bytes, content: bytes) -> bytes:
        if self._secret:
            proof = hmac.new(self._secret, head, hashlib.sha256)
            proof.update(content)
            return proof.digest()
        total = hashlib.sha256(head)
        total.update(content)
        return total.digest()
