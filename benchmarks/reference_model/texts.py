"""What the reference model reads while it is trained: captions of pictures, WordNet's nouns and their glosses."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.reference_model.pictures import DEFAULT_CACHE, STYLES, Concept, read_concepts
from benchmarks.reference_model.splits import Alias, aliases, find_wordnet, split_of

PLAIN = ("an emoji of a {}", "{}", "a picture of a {}")
STYLED = ("a {style} emoji of a {}", "{} in {style} style", "a {style} picture of a {}")
# WordNet's lexicographer files of things that can be drawn: animal, artifact, body, food, object, phenomenon, plant.
DRAWABLE = frozenset({5, 6, 8, 13, 17, 19, 20})
NAMES = frozenset({15, 18})  # places and persons: many, and hardly ever drawn
SPLITS = Path(__file__).with_name("splits.json")


@dataclasses.dataclass(frozen=True)
class Noun:
    """The first sense of a WordNet noun: its gloss and the number of its lexicographer file."""

    lemma: str
    gloss: str
    file: int


def read_nouns(folder: Path) -> Iterator[Noun]:
    """Every noun of WordNet in its commonest sense, in the dictionary's order."""
    senses = {}
    for line in (folder / "data.noun").read_text("utf-8").splitlines():
        if not line.startswith(" "):
            head, _, gloss = line.partition("|")
            offset, file, *_ = head.split()
            senses[int(offset)] = int(file), gloss.split(";")[0].strip().lower()
    for line in (folder / "index.noun").read_text("utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            file, gloss = senses[int(fields[-int(fields[2])])]
            yield Noun(fields[0].replace("_", " "), gloss, file)


def write_splits(concepts: Sequence[Concept], path: Path = SPLITS, cache: Path = DEFAULT_CACHE) -> None:
    """Fix the splits in a file: concepts by hash; an alias is shown in training or never, by hash as well.

    Only keywords may be shown, half of them: what WordNet alone gives is never in a caption.
    """
    found = aliases(concepts, cache)
    shown = {
        label: [a.text for a in names if a.seen and split_of(f"{label}/{a.text}") == "development"]
        for label, names in found.items()
    }
    content = {
        "concepts": {concept.label: split_of(concept.label) for concept in concepts},
        "shown aliases": {label: names for label, names in shown.items() if names},
        "unseen aliases": {
            label: [a.text for a in names if a.text not in shown[label]]
            for label, names in found.items()
            if len(names) > len(shown[label])
        },
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def shown_aliases(path: Path = SPLITS) -> Mapping[str, Sequence[str]]:
    """Label to the aliases that training captions may use."""
    return dict(json.loads(path.read_text("utf-8"))["shown aliases"])


def unseen_aliases(path: Path = SPLITS) -> Mapping[str, Sequence[str]]:
    """Label to the aliases that no training caption contains."""
    return dict(json.loads(path.read_text("utf-8"))["unseen aliases"])


def fixed_aliases(path: Path = SPLITS) -> dict[str, tuple[Alias, ...]]:
    """Label to its aliases, unseen ones first, for each concept of the model that ships: no download is needed."""
    content = json.loads(path.read_text("utf-8"))
    kinds = [(content[kind], kind.startswith("shown")) for kind in ("unseen aliases", "shown aliases")]
    return {
        label: tuple(Alias(n, seen) for names, seen in kinds for n in names.get(label, ()))
        for label in content["concepts"]
    }


def captions(names: Sequence[str], styles: Sequence[str] = tuple(STYLES)) -> list[list[str]]:
    """Every caption of one concept's names: a row for pictures of any style, then one for each style."""
    plain = [template.format(name) for name in names for template in PLAIN]
    return [plain, *([t.format(name, style=style) for name in names for t in STYLED] for style in styles)]


def corpus(cache: Path = DEFAULT_CACHE) -> tuple[list[str], list[float]]:
    """(texts, how often each is drawn, relative): captions, nouns alone and in a caption, glosses."""
    shown, drawn = shown_aliases(), {}
    for concept in read_concepts(cache / "pictures.json"):
        rows = captions([concept.label.lower(), *shown.get(concept.label, ())])
        drawn |= dict.fromkeys((text for row in rows for text in row), 1.0)
    for noun in read_nouns(find_wordnet(cache)):
        weight = 2.0 if noun.file in DRAWABLE else 0.25 if noun.file in NAMES else 1.0
        drawn.setdefault(noun.lemma, weight)
        drawn.setdefault(noun.gloss, weight / 3)
        if noun.file in DRAWABLE:
            drawn.setdefault(f"an emoji of a {noun.lemma}", 1.0)
    return list(drawn), list(drawn.values())
