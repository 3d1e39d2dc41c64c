"""API keys with scopes and limits, in a file of hashes written by `hyper keys` and read by the service.

A key has 256 random bits, so its plain SHA-256 cannot be guessed or looked up. A stolen file therefore contains no
usable key. The service checks the file several times per second, so a revocation needs no restart. The module is
independent of HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyper_model.errors import HyperError
from server.telemetry.labels import Priority

logger = logging.getLogger("hyper.server")

PREFIX = "hyp_"
NUM_RANDOM_BYTES = 32
NUM_SHOWN_CHARS = 8
MAX_KEY_CHARS = 200

Scope = Literal["ask", "metrics"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class KeyFileError(HyperError):
    """Error for an unusable key file, or a key that cannot be added or revoked."""


class Key(BaseModel):
    """An API key and its limits. None means no limit.

    Attributes:
        name: The key's owner, written to logs. Callers with different names share no cache.
        sha256: Digest of the key; the key itself is not stored.
        starts: Its first characters, for recognition.
        priority: Highest permitted class of its requests.
        requests_per_minute: Request rate; also the maximum burst after an idle minute.
        concurrent: Maximum number of requests in flight.
        audio_s_per_day: Seconds of audio per day; used seconds return evenly over a day.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    starts: str
    scopes: tuple[Scope, ...] = ("ask",)
    priority: Priority = "interactive"
    requests_per_minute: float | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)
    audio_s_per_day: float | None = Field(default=None, gt=0)
    created: datetime
    expires: datetime | None = None

    def is_expired(self) -> bool:
        """Return whether the key has expired, by the wall clock."""
        return self.expires is not None and self.expires <= datetime.now(UTC)


class KeyFile(BaseModel):
    """Content of a key file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()


class KeyRing:
    """The keys of a file, reloaded when it changes."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            KeyFileError: If it cannot be read.
        """
        self.path = path
        self.seen = self.look()
        self.keys: Sequence[Key] = read(path).keys

    def look(self) -> tuple[int, int, int] | None:
        """Return the file's time stamp, size and inode, or None without a file."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def refresh(self) -> None:
        """Read the file again if it has changed; keep the old keys if it is unreadable."""
        if (stamp := self.look()) == self.seen:
            return
        self.seen = stamp
        try:
            self.keys = read(self.path).keys
        except KeyFileError as error:
            logger.error("the keys stay as they were: the key file cannot be read", extra={"reason": error.message})
        else:
            logger.info("keys read", extra={"keys": len(self.keys)})

    def find(self, presented: str) -> Key | None:
        """Return the presented key, or None; in constant time, whether it exists or not."""
        digest = digest_of(presented)
        match = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest) and not key.is_expired():
                match = key
        return match


def read(path: Path) -> KeyFile:
    """Read a key file.

    Raises:
        KeyFileError: If it is missing or invalid.
    """
    try:
        file = KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KeyFileError(f"{path} is not a valid key file: {where}: {first['msg']}") from None
    names = [key.name for key in file.keys]
    if len(set(names)) < len(names):
        raise KeyFileError(f"{path} is not a valid key file: two keys have the same name; remove one")
    return file


def write(path: Path, file: KeyFile) -> None:
    """Replace the key file atomically.

    Only its owner can read a new file. A replaced file keeps its user and group, as far as this process may set them.
    Otherwise a revocation would make the file unreadable for the service.
    """
    text = json.dumps(file.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with contextlib.ExitStack() as undo:
        undo.callback(_unlink, temporary)
        with open(descriptor, "w", encoding="utf-8") as stream:
            with contextlib.suppress(FileNotFoundError):
                old_status = path.stat()
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, old_status.st_uid, old_status.st_gid)
                os.fchmod(descriptor, old_status.st_mode & 0o666)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        undo.pop_all()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def add(path: Path, **fields: object) -> str:
    """Add a key to the file and return it; create the file if needed. The key cannot be shown again.

    Raises:
        KeyFileError: If the name is taken or a field is invalid.
    """
    file = read(path) if path.exists() else KeyFile()
    if any(key.name == fields["name"] for key in file.keys):
        raise KeyFileError(f"a key named {fields['name']} exists already; revoke it or choose another name")
    secret = PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)
    try:
        key = Key.model_validate(
            {
                **fields,
                "sha256": digest_of(secret),
                "starts": secret[:NUM_SHOWN_CHARS],
                "created": datetime.now(UTC).replace(microsecond=0),
            }
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise KeyFileError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    write(path, KeyFile(keys=(*file.keys, key)))
    return secret


def revoke(path: Path, name: str) -> None:
    """Remove a key from the file.

    Raises:
        KeyFileError: If no key has the name.
    """
    file = read(path)
    remaining = tuple(key for key in file.keys if key.name != name)
    if len(remaining) == len(file.keys):
        raise KeyFileError(f"{path} has no key named {name}")
    write(path, KeyFile(keys=remaining))


def digest_of(secret: str) -> str:
    """Return the stored digest of a key."""
    return hashlib.sha256(secret[:MAX_KEY_CHARS].encode("utf-8", "surrogatepass")).hexdigest()
