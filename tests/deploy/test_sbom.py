"""The software bill of materials: valid CycloneDX, including libraries inside wheels."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from typing import Any

import av
import pytest

from server import page
from tests.process import ROOT


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The list for three packages with libraries; all packages would take a minute."""
    folder = tmp_path_factory.mktemp("sbom")
    lock = folder / "some.txt"
    locked = (ROOT / "requirements/cpu.txt").read_text(encoding="utf-8")
    lock.write_text("\n".join(re.findall(r"^(?:av|soundfile|numpy)==\S+", locked, re.M)), encoding="utf-8")
    out = folder / "sbom.cdx.json"
    command = [sys.executable, ROOT / "requirements/sbom.py", out, "--lock", lock]
    done = subprocess.run(command, capture_output=True, text=True)
    # It has validated the result against the schema of CycloneDX 1.6.
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_list_names_what_wheels_bring_along(contents: dict[str, Any]) -> None:
    assert (contents["bomFormat"], contents["specVersion"]) == ("CycloneDX", "1.6")
    found = {each["bom-ref"]: each for each in contents["components"]}
    versions = {each["name"]: each.get("version") for each in found.values()}
    assert {"ffmpeg", "opus", "lame", "libsndfile", "flac", "libvorbis", "openblas", "python"} <= versions.keys()
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    assert versions["libavcodec.so"] == libavcodec
    (needs,) = (set(each["dependsOn"]) for each in contents["dependencies"] if each["ref"] == f"av=={av.__version__}")
    assert any(found[ref]["name"] == "ffmpeg" for ref in needs), "and says where"
    for each in found.values():
        if each["type"] == "file":
            assert re.fullmatch(r"[0-9a-f]{64}", each["hashes"][0]["content"])


def test_the_list_has_the_javascript_of_the_page(contents: dict[str, Any]) -> None:
    components = {each["bom-ref"]: each for each in contents["components"]}
    packages = json.loads((page.DIRECTORY / "vendor/vendored.json").read_text(encoding="utf-8"))
    assert {package["name"] for package in packages} == {"wavesurfer.js", "swagger-ui-dist"}
    for package in packages:
        found = components[f"pkg:npm/{package['name']}@{package['version']}"]
        assert found["licenses"] == [{"license": {"id": package["licence"]}}]
        hashes = {each["name"]: each["hashes"][0]["content"] for each in found["components"]}
        # Those of the files that the service sends.
        assert hashes == {
            name: hashlib.sha256((page.DIRECTORY / "vendor" / name).read_bytes()).hexdigest()
            for name in package["files"]
        }
    (needs,) = (
        each["dependsOn"]
        for each in contents["dependencies"]
        if each["ref"] == contents["metadata"]["component"]["bom-ref"]
    )
    assert {package["purl"] for package in packages} <= set(needs)


def test_the_list_leaves_out_what_is_not_locked(contents: dict[str, Any]) -> None:
    text = json.dumps(contents)
    packages = {each["name"] for each in contents["components"] if each.get("purl", "").startswith("pkg:pypi/")}
    assert packages == {"av", "soundfile", "numpy"}
    # Nothing of the build machine.
    assert str(ROOT) not in text and sys.prefix not in text and "file:///" not in text
