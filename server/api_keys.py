"""API keys: who may ask, what for and how much. A file holds them, hashed; `hyper keys` writes it, the service reads.

A key is 256 random bits, so its plain SHA-256 can be neither guessed nor looked up, and a stolen file opens nothing.
The service looks at the file several times a second: a revoked key ends then, without a restart. Knows no HTTP.
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

logger = logging.getLogger("hyper.server")

PREFIX = "hyp_"
NUM_RANDOM_BYTES = 32
NUM_SHOWN_CHARS = 8
MAX_KEY_CHARS = 200

Scope = Literal["ask", "metrics"]
Priority = Literal["interactive", "batch"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class KeyFileError(HyperError):
    """Says why a key file cannot be used or a key not be added or revoked."""


class Key(BaseModel):
    """What a key allows. A limit that is None is none.

    Attributes:
        name: Whose it is; stands in logs. Callers with different names share no cache.
        sha256: Digest of the key itself, which is kept nowhere.
        starts: Its first characters, to recognize it by.
        priority: The most urgent class that its requests may have.
        requests_per_minute: As many may also come at once, after a minute of none.
        concurrent: Requests in flight at the same time.
        audio_s_per_day: Seconds of audio; spent ones come back evenly over a day.
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
        """Whether its time is over, by the wall clock."""
        return self.expires is not None and self.expires <= datetime.now(UTC)


class KeyFile(BaseModel):
    """The file as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()


class KeyRing:
    """Knows the keys of a file and notices when it changes."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            KeyFileError: It cannot be read.
        """
        self.path = path
        self.seen = self.look()
        self.keys: Sequence[Key] = read(path).keys

    def look(self) -> tuple[int, int, int] | None:
        """Returns what changes when the file does."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def refresh(self) -> None:
        """Reads the file again where it has changed; what cannot be read changes nothing."""
        if (now := self.look()) == self.seen:
            return
        self.seen = now
        try:
            self.keys = read(self.path).keys
        except KeyFileError as error:
            logger.error("the keys stay as they were: the key file cannot be read", extra={"reason": error.message})
        else:
            logger.info("keys read", extra={"keys": len(self.keys)})

    def find(self, presented: str) -> Key | None:
        """Returns the key that was presented; in the same time whichever it is, and whether or not it is one."""
        digest = digest_of(presented)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest) and not key.is_expired():
                found = key
        return found


def read(path: Path) -> KeyFile:
    """Reads a key file.

    Raises:
        KeyFileError: It is not there, or not one.
    """
    try:
        file = KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KeyFileError(f"{path} is not a key file: {where}: {first['msg']}") from None
    names = [key.name for key in file.keys]
    if len(set(names)) < len(names):
        raise KeyFileError(f"{path} is not a key file: a name stands in it twice")
    return file


def write(path: Path, file: KeyFile) -> None:
    """Replaces the file in one step: a reader sees the old one or the new one.

    A new file is readable by its owner alone. One that was given to the service's user or group stays theirs, as far as
    we may give files away: else a key that is revoked would lock the service out of the list that says so.
    """
    text = json.dumps(file.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            with contextlib.suppress(FileNotFoundError):
                before = path.stat()
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, before.st_mode & 0o666)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def add(path: Path, **fields: object) -> str:
    """Adds a key to the file, which is made where there is none, and returns the key: only now, and never again.

    Raises:
        KeyFileError: The name is taken, or a field is not valid.
    """
    file = read(path) if path.exists() else KeyFile()
    if any(key.name == fields["name"] for key in file.keys):
        raise KeyFileError(f"there is a key named {fields['name']} already: revoke it, or take another name")
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
    """Takes a key out of the file.

    Raises:
        KeyFileError: There is none of that name.
    """
    file = read(path)
    left = tuple(key for key in file.keys if key.name != name)
    if len(left) == len(file.keys):
        raise KeyFileError(f"{path} has no key named {name}")
    write(path, KeyFile(keys=left))


def digest_of(secret: str) -> str:
    """Returns what the file keeps of a key."""
    return hashlib.sha256(secret[:MAX_KEY_CHARS].encode("utf-8", "surrogatepass")).hexdigest()
