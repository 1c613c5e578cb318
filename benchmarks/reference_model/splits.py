"""Development and report splits, by a fixed hash, and the other names of each concept."""

import dataclasses
import hashlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from benchmarks.reference_model.pictures import DEFAULT_CACHE, Concept, install_packages, keywords

Split = Literal["development", "report"]
WORD = re.compile(r"[a-z][a-z' -]{2,}")


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another name of one concept; `seen`: a training caption may contain it, as it is a listed keyword."""

    text: str
    seen: bool


def split_of(text: str) -> Split:
    """Development where SHA-256 of the text is even, report where it is odd."""
    return "report" if hashlib.sha256(text.encode()).digest()[-1] % 2 else "development"


def find_wordnet(cache: Path = DEFAULT_CACHE) -> Path:
    """Folder of WordNet's dictionary: installed, or unpacked from Debian's `wordnet-base` into the cache."""
    installed, unpacked = Path("/usr/share/wordnet"), cache / "wordnet" / "usr/share/wordnet"
    for folder in (installed, unpacked):
        if (folder / "data.noun").exists():
            return folder
    root = cache / "wordnet"
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "wordnet-base"], cwd=root, check=True)
    subprocess.run(["dpkg-deb", "-x", str(next(root.glob("*.deb"))), str(root)], check=True)
    return unpacked


def _synset(data: BinaryIO, offset: int) -> tuple[set[str], list[int]]:
    """Lemmas of the synset at a byte offset, and the offsets of its direct hyponyms."""
    data.seek(offset)
    fields = data.readline().decode().split()
    end = 4 + 2 * int(fields[3], 16)
    lemmas = {lemma.replace("_", " ").lower() for lemma in fields[4:end:2]}
    pointers = (fields[i : i + 4] for i in range(end + 1, end + 1 + 4 * int(fields[end]), 4))
    return lemmas, [int(place) for symbol, place, *_ in pointers if symbol == "~"]


def wordnet_names(words: Iterable[str], folder: Path) -> dict[str, tuple[set[str], set[str]]]:
    """For each word, the lemmas of its first (commonest) noun sense, and those of the direct hyponyms."""
    wanted = {word.lower().replace(" ", "_"): word for word in words}
    offsets = {}
    for line in (folder / "index.noun").read_text("utf-8").splitlines():
        fields = line.split()
        if not line.startswith(" ") and fields[0] in wanted:
            offsets[wanted[fields[0]]] = int(fields[-int(fields[2])])
    found = {}
    with (folder / "data.noun").open("rb") as data:
        for word, offset in offsets.items():
            lemmas, narrower = _synset(data, offset)
            found[word] = lemmas, {lemma for place in narrower for lemma in _synset(data, place)[0]}
    return found


def _is_new_name(word: str, label: str, labels: set[str]) -> bool:
    """Letters only, no concept's label, and neither a plural nor an extension of the concept's own label."""
    return bool(WORD.fullmatch(word)) and word not in labels and label not in word


def aliases(concepts: Sequence[Concept], cache: Path = DEFAULT_CACHE) -> dict[str, tuple[Alias, ...]]:
    """Label to its aliases: WordNet synonyms, hyponyms and keywords that belong to one concept only.

    Order: unseen synonyms, seen synonyms, other unseen names, keywords; then shorter ones first.
    """
    labels = {concept.label.lower() for concept in concepts}
    listed = keywords(install_packages(cache))
    nouns = wordnet_names(labels, find_wordnet(cache))
    tagged = {tag.lower() for concept in concepts for tag in concept.tags}
    names, same = {}, {}
    for concept in concepts:
        same[concept.label], narrower = nouns.get(concept.label.lower(), (set(), set()))
        tags = listed.get(concept.label, ())
        names[concept.label] = {*concept.tags, *tags, *same[concept.label], *narrower}
    owners = Counter(word for words in names.values() for word in words)
    found = {}
    for label, words in names.items():
        kept = [w for w in words if owners[w] == 1 and _is_new_name(w, label.lower(), labels)]
        ordered = sorted(kept, key=lambda w: (w not in same[label], w in tagged, w.count(" "), len(w), w))
        found[label] = tuple(Alias(word, word in tagged) for word in ordered)
    return found
