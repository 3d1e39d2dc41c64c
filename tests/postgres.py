"""A private PostgreSQL cluster for tests, from Debian's package, run by a user without privileges."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

USERS = ("postgres", "nobody")
"""Users for a test run as root: PostgreSQL refuses to run as root."""


def program(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs, which Debian keeps out of PATH."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


needs_postgres = pytest.mark.skipif(
    not (program("initdb") and program("postgres")), reason="Debian's postgresql is not installed"
)


class Cluster:
    """One server on a free port of 127.0.0.1, with its data in a temporary folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hyper-postgres-"))
        self.user = self._user()
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.num_databases = 0
        initdb = program("initdb")
        assert initdb is not None
        command = [initdb, "-D", str(self.folder / "data"), "-U", "hyper", "-A", "trust", "--no-sync"]
        subprocess.run(command, user=self.user, cwd="/", check=True, capture_output=True, timeout=120)

    @staticmethod
    def _user() -> str | None:
        if os.getuid() != 0:
            return None
        known = {entry.pw_name for entry in pwd.getpwall()}
        return next(name for name in USERS if name in known)

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        postgres = program("postgres")
        assert postgres is not None
        command = [postgres, "-D", str(self.folder / "data"), "-p", str(self.port), "-h", "127.0.0.1"]
        command += ["-k", str(self.folder), "-c", "max_connections=200"]
        self.process = subprocess.Popen(
            command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            try:
                psycopg.connect(self.url_of("postgres"), connect_timeout=1).close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, "PostgreSQL has ended"
                signal.sigtimedwait((), 0.1)
        raise AssertionError("PostgreSQL does not start")

    def kill(self) -> None:
        """End the server and its connections at once, without a checkpoint: it recovers at its next start."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)
            self.process = None

    def new_database(self) -> str:
        """Create a database and return its URL."""
        self.num_databases += 1
        name = f"jobs_{self.num_databases}"
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url_of(name)

    def url_of(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://hyper@127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        """Stop the server and delete its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
