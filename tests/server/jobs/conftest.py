"""Services with jobs, over SQLite and over PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import wait_until_up
from tests.postgres import Cluster, needs_postgres
from tests.serving import Live, running, scripted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL."""
    found = Cluster()
    found.start()
    yield found
    found.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def job_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a new and empty storage of jobs, once per kind of database."""
    fields: dict[str, Any] = {"jobs": True, "state_dir": tmp_path}
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        fields["jobs_database_url"] = cluster.new_database()
    return fields


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A running service with jobs, shared by the tests of a module, once per kind of database."""
    fields: dict[str, Any] = {"jobs": True, "state_dir": tmp_path_factory.mktemp("state")}
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        fields["jobs_database_url"] = cluster.new_database()
    with running(scripted(**fields)) as live:
        wait_until_up(live.client)
        yield live
