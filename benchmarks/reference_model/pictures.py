"""Emoji pictures of one concept in five drawing styles, rendered from npm icon packages.

`python -m benchmarks.reference_model.pictures` installs the packages into the cache and renders them once.
"""

import argparse
import dataclasses
import io
import json
import re
import subprocess
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realera_edit import files

DEFAULT_CACHE = Path("~/.cache/realera_edit/reference_model").expanduser()
STYLES: Mapping[str, str] = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent": "fluent-emoji-flat",
    "emojione": "emojione",
    "monochrome": "emojione-monotone",
}
GROUPS = range(3, 8)  # Unicode groups: animals and nature, food, travel, activities, objects
CLOCK_FACE = re.compile(r"o.clock|-thirty")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One thing an emoji shows: its Unicode label, group and subgroup numbers, and keywords."""

    label: str
    group: int
    subgroup: int
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """`pictures[i, j]` is concept i in style j: uint8, shape [concepts, styles, size, size, 3]."""

    pictures: np.ndarray
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...] = tuple(STYLES)


def slug(label: str) -> str:
    """The icon name of a Unicode label: ASCII, lower case, words joined by hyphens."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label).strip("-")


def read_concepts(path: Path) -> tuple[Concept, ...]:
    """Concepts of a `concepts.json`, which is either a list or an object with the key "concepts"."""
    content = json.loads(path.read_text("utf-8"))
    rows = content["concepts"] if isinstance(content, dict) else content
    return tuple(Concept(r["label"], r["group"], r["subgroup"], tuple(r["tags"])) for r in rows)


def write_atomically(path: Path, content: bytes) -> None:
    """As the package's, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)


def install_packages(cache: Path) -> Path:
    """Install the icon and keyword packages with npm where they are missing; return `node_modules`."""
    names = [f"@iconify-json/{name}" for name in STYLES.values()] + ["emojibase-data", "emojilib"]
    modules = cache / "npm" / "node_modules"
    if not all((modules / name).is_dir() for name in names):
        prefix = modules.parent
        prefix.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(prefix), "--no-audit", "--no-fund"]
        subprocess.run([*command, *names], check=True)
    return modules


def keywords(modules: Path) -> dict[str, tuple[str, ...]]:
    """Unicode label to the sorted keywords that emojibase and emojilib give it."""
    lib = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text("utf-8"))
    found = {}
    for row in json.loads((modules / "emojibase-data/en/data.json").read_text("utf-8")):
        words = {*row.get("tags", ()), *lib.get(row["emoji"], lib.get(row.get("text"), ()))}
        found[row["label"]] = tuple(sorted(word.replace("_", " ").lower() for word in words))
    return found


def find_icon(icons: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """An icon's record; an alias that only renames is followed, one that flips or turns is not."""
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name, {})
        if set(alias) != {"parent"}:
            return None
        name = alias["parent"]
    record: Mapping[str, Any] = icons["icons"][name]
    return record


def render(icons: Mapping[str, Any], icon: Mapping[str, Any], size: int) -> np.ndarray:
    """Draw one icon on white, centred: uint8 [size, size, 3]."""
    import resvg_py  # only for drawing the set anew; reading it needs no renderer

    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}">{icon["body"]}</svg>'
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))


def build(cache: Path = DEFAULT_CACHE, size: int = 64) -> PictureSet:
    """Render every concept that all five packages draw."""
    modules = install_packages(cache)
    paths = [modules / f"@iconify-json/{name}/icons.json" for name in STYLES.values()]
    sets = [json.loads(path.read_text("utf-8")) for path in paths]
    words = keywords(modules)
    concepts, pictures = [], []
    for row in json.loads((modules / "emojibase-data/en/data.json").read_text("utf-8")):
        if row.get("group") not in GROUPS or CLOCK_FACE.search(row["label"]):
            continue
        found = [find_icon(icons, slug(row["label"])) for icons in sets]
        if all(found):
            pictures.append([render(i, icon, size) for i, icon in zip(sets, found, strict=True) if icon])
            concepts.append(Concept(row["label"], row["group"], row["subgroup"], words[row["label"]]))
    return PictureSet(np.asarray(pictures, dtype=np.uint8), tuple(concepts))


def load(cache: Path = DEFAULT_CACHE, size: int = 64) -> PictureSet:
    """The picture set from the cache; built and saved there on first use."""
    array_path, concept_path = cache / f"pictures-{size}.npz", cache / "pictures.json"
    if not (array_path.exists() and concept_path.exists()):
        built = build(cache, size)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pictures=built.pictures)
        rows = [dataclasses.asdict(concept) for concept in built.concepts]
        write_atomically(concept_path, json.dumps(rows, indent=1).encode())
        write_atomically(array_path, buffer.getvalue())
    return PictureSet(np.load(array_path)["pictures"], read_concepts(concept_path))


def main() -> None:
    """Build the picture set and print its size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--size", type=int, default=64, help="edge in pixels")
    options = parser.parse_args()
    found = load(options.cache, options.size)
    print(f"{len(found.concepts)} concepts in {len(found.styles)} styles, array {found.pictures.shape}")


if __name__ == "__main__":
    main()
