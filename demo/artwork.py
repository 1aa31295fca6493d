"""Fetch the four emoji sets from npm and rasterise the demo's objects (``make demo-data``; needs Node's ``npm``).

Writes ``artwork.npz``: ``rgba_<size>`` uint8 with shape (objects, artists, size, size, 4), straight alpha, in the
order of ``vocabulary.OBJECTS`` and ``vocabulary.ARTISTS``; and ``sources.json`` with each package's version,
licence and author. Rasterising is resvg's (``resvg_py``).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from excise.demo.vocabulary import ARTISTS, OBJECTS

#: Edge of a drawing in pixels; the image is 64 × 64.
SIZES: tuple[int, ...] = (54, 56, 58, 60)

#: Versions that the shipped weights were trained on.
VERSIONS: dict[str, str] = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
}


def fetch(package: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Download one icon set with ``npm pack`` and return its ``icons.json`` and ``info.json``."""
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{VERSIONS[package]}"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:

        def read(name: str) -> dict[str, Any]:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            content: dict[str, Any] = json.load(member)
            return content

        return read("icons.json"), read("info.json")


def svg(icons: dict[str, Any], name: str) -> str:
    """One icon of an iconify set as an SVG document."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def rasterise(document: str, size: int) -> np.ndarray:
    """An SVG document as uint8 RGBA of shape (size, size, 4), its drawing cropped and scaled to fill the square."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=256, height=256))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    assert box is not None, "an empty drawing"
    picture = picture.crop(box)
    scale = size / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/work"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sets = {}
    sources = {}
    with tempfile.TemporaryDirectory() as folder:
        for artist, package in tqdm(ARTISTS.items(), desc="npm"):
            icons, info = fetch(package, Path(folder))
            sets[artist] = icons
            sources[artist] = {
                "package": package,
                "version": VERSIONS[package],
                "name": info["name"],
                "author": info["author"]["name"],
                "licence": info["license"]["spdx"],
                "licence_url": info["license"]["url"],
            }
    arrays = {}
    for size in tqdm(SIZES, desc="rasterise"):
        arrays[f"rgba_{size}"] = np.stack(
            [np.stack([rasterise(svg(sets[artist], icon), size) for artist in ARTISTS]) for icon in OBJECTS.values()]
        )
    np.savez_compressed(arguments.out / "artwork.npz", **arrays)  # type: ignore[arg-type]
    (arguments.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
    print(f"{arguments.out / 'artwork.npz'}: {len(OBJECTS)} objects x {len(ARTISTS)} artists", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
