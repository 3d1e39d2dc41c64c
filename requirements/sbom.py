"""Writes what an environment is made of as CycloneDX: its packages, what is compiled into their wheels, the system.

    python requirements/sbom.py OUT [--python PYTHON] [--lock FILE ...] [--debian]

cyclonedx-py lists the packages. Wheels bring more than their own code: FFmpeg in av, libsndfile and what it is linked
with in soundfile, OpenBLAS in numpy, crates of Rust. Some say so themselves (PEP 770); for the others this looks at the
libraries they carry and at the versions written in those. What is linked in without such a mark stays unseen. The web
page brings JavaScript, with a list of its own.

The result is the same for the same environment: no time, no random number. Runs in the image's build, so it needs
cyclonedx-bom and the standard library alone; knows nothing of the service.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

HERE = Path(__file__).resolve().parent
# The image's build has both in one folder.
PYPROJECT = next(folder / "pyproject.toml" for folder in (HERE, HERE.parent) if (folder / "pyproject.toml").is_file())
Component = dict[str, Any]

# The mark that a library leaves in what it is compiled into, its version behind it, and the names by which its
# vulnerabilities are filed.
MARKS = {
    "aom": (b"AOMedia Project AV1 ", rb"(?:En|De)coder (\d+\.\d+\.\d+)", "aomedia:aomedia"),
    "ffmpeg": (b"FFmpeg version ", rb"n?(\d+\.\d+(?:\.\d+)?)", "ffmpeg:ffmpeg"),
    "flac": (b"libFLAC ", rb"(\d+\.\d+\.\d+)", "flac_project:flac"),
    "gnutls": (b"GnuTLS ", rb"(\d+\.\d+\.\d+)", "gnu:gnutls"),
    "lame": (b"LAME", rb" ?(3\.\d+)", "lame_project:lame"),
    "libpng": (b"libpng version ", rb"(\d+\.\d+\.\d+)", "libpng:libpng"),
    "libsndfile": (b"libsndfile-", rb"(\d+\.\d+\.\d+)", "libsndfile_project:libsndfile"),
    "libtiff": (b"LIBTIFF, Version ", rb"(\d+\.\d+\.\d+)", "libtiff:libtiff"),
    "libvorbis": (b"Xiph.Org libVorbis ", rb"(\d+\.\d+\.\d+)", None),
    "libvpx": (b"WebM Project VP", rb"[89] (?:En|De)coder v(\d+\.\d+\.\d+)", "webmproject:libvpx"),
    "openblas": (b"OpenBLAS ", rb"(\d+\.\d+\.\d+)", "openblas_project:openblas"),
    "openssl": (b"OpenSSL ", rb"(\d+\.\d+\.\d+[a-z]?) ", "openssl:openssl"),
    "opus": (b"libopus ", rb"(\d+\.\d+(?:\.\d+)?)", "opus-codec:opus"),
    "soxr": (b"soxr-", rb"(\d+\.\d+\.\d+)", None),
}
# Names as auditwheel writes them: libavcodec-5e6b81c2.so.62.28.102, libopenblasp-r0-59ffcd50.3.15.so.
BUNDLED = re.compile(r"^(lib[\w+-]+?)(?:-[0-9a-f]{6,})*-?(?:\.[\d.]+)?\.so(?:\.([\w.]+))?$")


def main(arguments: list[str]) -> int:
    """Writes the list; returns 1 when it does not hold to the schema."""
    parser = argparse.ArgumentParser(description="Write what an environment is made of as CycloneDX JSON.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the environment's interpreter  [this one]")
    parser.add_argument("--lock", type=Path, action="append", help="list only what these lock files name")
    parser.add_argument("--debian", action="store_true", help="list the system's Debian packages too")
    options = parser.parse_args(arguments)
    bom = packages(options.python)
    if options.lock:
        keep(bom, {name for lock in options.lock for name in locked(lock)})
    graph = {each["ref"]: set(each.get("dependsOn", ())) for each in bom["dependencies"]}
    found = {each["bom-ref"]: each for each in bom["components"]}
    owners = {normalized(each["name"]): each["bom-ref"] for each in bom["components"]}
    for distribution in metadata.distributions(path=site_packages(options.python)):
        owner = owners.get(normalized(distribution.metadata["Name"]))
        if owner is None:
            continue
        for each in (*declared(distribution), *bundled(distribution)):
            found.setdefault(each["bom-ref"], each)
            graph.setdefault(owner, set()).add(each["bom-ref"])
    for each in vendored(options.python):
        found[each["bom-ref"]] = each
        graph.setdefault(bom["metadata"]["component"]["bom-ref"], set()).add(each["bom-ref"])
    for each in (interpreter(options.python), *(debian_packages() if options.debian else ())):
        found[each["bom-ref"]] = each
    bom["components"] = [found[ref] for ref in sorted(found)]
    bom["dependencies"] = [
        {"ref": ref, **({"dependsOn": sorted(graph[ref])} if graph.get(ref) else {})}
        for ref in sorted(graph.keys() | found.keys())
    ]
    text = json.dumps(bom, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        print(f"Not valid CycloneDX: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(found)} components", file=sys.stderr)
    return 0


def packages(python: str) -> dict[str, Any]:
    """Lists the Python packages of an environment and what each needs."""
    command = [*(sys.executable, "-m", "cyclonedx_py", "environment", "--spec-version", "1.6", "--of", "JSON")]
    command += ["--output-reproducible", "--no-validate", "--pyproject", str(PYPROJECT), python]
    bom = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    # Where a package was installed from is this machine's business.
    for each in (bom["metadata"]["component"], *bom["components"]):
        each["externalReferences"] = [one for one in each.get("externalReferences", ()) if is_public(one["url"])]
        if "purl" in each:
            each["purl"] = each["purl"].partition("?")[0]
    return bom


def is_public(url: str) -> bool:
    """Whether an address means something elsewhere."""
    return url.startswith("https://")


def locked(lock: Path) -> Iterator[str]:
    """Reads the names of a lock file."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([\w.-]+)==", line):
            yield normalized(found[1])


def keep(bom: dict[str, Any], names: set[str]) -> None:
    """Leaves out the packages that are not named, and what is said of them."""
    bom["components"] = [each for each in bom["components"] if normalized(each["name"]) in names]
    refs = {each["bom-ref"] for each in (*bom["components"], bom["metadata"]["component"])}
    bom["dependencies"] = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", ()) if ref in refs]}
        for each in bom["dependencies"]
        if each["ref"] in refs
    ]


def normalized(name: str) -> str:
    """Writes a package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def site_packages(python: str) -> list[str]:
    """Returns where an interpreter's packages are."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sep='\\n')"
    lines = subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted(set(filter(None, lines)))


def declared(distribution: metadata.Distribution) -> Iterator[Component]:
    """Reads the lists that a wheel brings itself (PEP 770), without their nesting."""
    for path in distribution.files or ():
        if ".dist-info/sboms/" in str(path) and path.name.endswith(".json"):
            text = path.read_text(encoding="utf-8")
            for each in flat(json.loads(text).get("components", ())):
                purl = each.get("purl", "").partition("?")[0]
                # Without its version or its address there is nothing to look it up by; the wheel itself is known.
                if not purl or "version" not in each or purl.startswith("pkg:pypi/"):
                    continue
                kept = {key: each[key] for key in ("type", "name", "version", "cpe", "licenses") if key in each}
                yield {**kept, "bom-ref": purl, "purl": purl}


def flat(components: Iterable[Component]) -> Iterator[Component]:
    """Walks components and those inside them."""
    for each in components:
        yield each
        yield from flat(each.get("components", ()))


def bundled(distribution: metadata.Distribution) -> Iterator[Component]:
    """Finds the libraries that a wheel carries as files, and those that are marked inside its own."""
    for path in distribution.files or ():
        name = BUNDLED.match(path.name)
        is_library = name is not None and (path.parent.name.endswith(".libs") or path.name.startswith("libgomp"))
        if not is_library and not re.search(r"\.so(\.|$)", path.name):
            continue
        code = Path(str(path.locate())).read_bytes()
        for project, (mark, version_pattern, cpe) in MARKS.items():
            # Files of half a gigabyte are looked through for words much faster than for patterns.
            found = re.findall(re.escape(mark) + version_pattern, code) if mark in code else []
            for version in sorted({one.decode() for one in found}):
                purl = f"pkg:generic/{project}@{version}"
                one: Component = {"type": "library", "name": project, "version": version, "purl": purl}
                if cpe is not None:
                    one["cpe"] = f"cpe:2.3:a:{cpe}:{version}:*:*:*:*:*:*:*"
                yield one | {"bom-ref": purl}
        if is_library and name is not None:
            yield {
                "type": "file",
                "name": f"{name[1]}.so",
                # That of its interface, which is all that a file's name tells.
                **({"version": name[2]} if name[2] else {}),
                "bom-ref": f"file:{path}",
                "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(code).hexdigest()}],
                "properties": [{"name": "hyper:path", "value": str(path)}],
            }


def vendored(python: str) -> Iterator[Component]:
    """Lists the JavaScript and style sheets that the web page brings, each package with its files.

    Raises:
        FileNotFoundError: If neither the environment nor the working copy has the page.
        ValueError: If a file is another one than its list says.
    """
    places = [*map(Path, site_packages(python)), HERE.parent]
    folders = [place / "server" / "page" / "vendor" for place in places]
    folder = next((folder for folder in folders if (folder / "vendored.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"The page's vendored.json is in none of {', '.join(map(str, folders))}.")
    for package in json.loads((folder / "vendored.json").read_text(encoding="utf-8")):
        files: list[Component] = []
        for name, facts in sorted(package["files"].items()):
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if digest != facts["sha256"]:
                raise ValueError(f"{name} has the SHA-256 {digest}; vendored.json says {facts['sha256']}.")
            path = f"server/page/vendor/{name}"
            hashes = [{"alg": "SHA-256", "content": digest}]
            files.append({"type": "file", "name": name, "bom-ref": f"file:{path}", "hashes": hashes})
            files[-1]["properties"] = [{"name": "hyper:path", "value": path}]
        yield {
            "type": "library",
            "name": package["name"],
            "version": package["version"],
            "purl": package["purl"],
            "bom-ref": package["purl"],
            "licenses": [{"license": {"id": package["licence"]}}],
            "components": files,
        }


def interpreter(python: str) -> Component:
    """Describes the interpreter, which no package manager knows where it was compiled for the image."""
    code = "import platform; print(platform.python_version())"
    version = subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    purl = f"pkg:generic/python@{version}"
    cpe = f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*"
    return {"type": "application", "name": "python", "version": version, "purl": purl, "cpe": cpe, "bom-ref": purl}


def debian_packages() -> Iterator[Component]:
    """Lists the system's packages."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    distro = f"debian-{release['VERSION_ID'].strip(chr(34))}"
    fields = "${Package}\\t${Version}\\t${Architecture}\\t${source:Package}\\n"
    listing = subprocess.run(["dpkg-query", "-W", "-f", fields], check=True, capture_output=True, text=True).stdout
    for line in listing.splitlines():
        name, version, architecture, source = line.split("\t")
        about = f"arch={architecture}&distro={distro}" + (f"&upstream={quote(source)}" if source != name else "")
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?{about}"
        yield {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
