"""The page of an evaluation: its numbers are right, nothing runs or is fetched, nothing outside the folder is read."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realera_edit import RealEraError, contact_sheet, html_report, svg
from realera_edit.errors import ReportError
from realera_edit.evaluation_file import FORMAT

HOSTILE = '"\'><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">{{ 7 * 7 }}</title></pre>\ud800'
NONE = "\u2013"
Make = Callable[..., Path]


class Page(HTMLParser):
    """The tags with their attributes, the text of each table row by cell, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.cell = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and css in (attrs.get("class") or "")]

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row and start in row[0])


def rate(hits: int, count: int) -> dict[str, float]:
    return {
        "value": hits / count,
        "low": hits / count * 0.9,
        "high": 0.1 + 0.87 * hits / count,
        "hits": hits,
        "count": count,
    }


def evaluation() -> dict[str, Any]:
    """One of everything; pictures are added by `make`."""
    kinds = [("e", "cat", "a cat", "cat", 0), ("g", "cat", "a kitty", "cat", 1), ("r", "cat", "a purr", "cat", 0)]
    kinds += [("n", "cat", "a dog", "dog", 2), ("s", "", "a <b>key</b>", "key", 2)]
    prompts = [
        {"kind": kind, "owner": owner, "prompt": prompt, "truth": truth, "style": None}
        | {"original": 2, "edited": hits, "count": 2, "pictures": []}
        for kind, owner, prompt, truth, hits in kinds
    ]
    rates = {"acc_e": (1, 30), "acc_g": (7, 30), "acc_s": (59, 60), "acc_n": (12, 40), "acc_n_unseen": (5, 8)}
    line = [{"budget": 0.1, "success": 0.123, "low": 0.1, "high": 0.2}, {"budget": None, "success": 0.789}]
    return {
        "format": FORMAT,
        "model": {"original": "base", "edited": "base-no-cat"},
        "erased": ["cat"],
        "recipe": {"concepts": [{"name": "cat", "target": "object"}]},
        "judge": {"name": "a judge", "concepts": 12345},
        "settings": {"steps": 7, "guidance": 4.5, "seeds": [0, 1]},
        "rates": {key: {"edited": rate(*found), "original": rate(found[1], found[1])} for key, found in rates.items()},
        "harmonic": {"H_4": {"value": 0.8765, "low": 0.8123, "high": 0.9234, "concepts": 1}},
        "distances": {"pixel": {"value": 0.0321}, "frechet": {"value": 12.34, "floor": 5.678}},
        "concepts": [{"name": "cat", "acc_e": 0.0333, "acc_g": 0.2333, "acc_s": 0.9833, "acc_n": None, "H_4": 0.8765}],
        "prompts": prompts,
        "geometry": {"anything": [1]},
        "neighbourhood": [
            {"word": "cat", "x": 0.0, "y": 0.0, "role": "erased", "moved": 1.0},
            {"word": "dog", "x": 1.0, "y": 2.0, "role": "neighbour", "moved": 0.2},
            {"word": "key", "x": -3.0, "y": None, "role": "vocabulary", "moved": 0.1},
        ],
        "moved": [{"word": "fur", "shift": 0.321}, {"word": "purr", "shift": 0.654}],
        "attack": [{"name": "embedding", "points": line}],
        "curves": [
            {"editor": "ours", "metric": "H_4", "points": [{"count": n, "value": 0.9 - n / 200} for n in (1, 50)]}
        ],
        "command": "realera-edit evaluate 'base  2'",
        "versions": {"torch": "2.13"},
        "seconds": 12.5,
        "date": "2026-01-02",
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(data, size, seeds)`: a folder with that evaluation and pictures of its prompts, red before, blue after."""

    def build(data: dict[str, Any] | None = None, size: int = 8, seeds: int = 2) -> Path:
        folder = tmp_path / "evaluation"
        data = evaluation() if data is None else data
        for side, colour in (("original", "red"), ("edited", "blue")):
            (folder / "pictures" / side).mkdir(parents=True, exist_ok=True)
            for i, prompt in enumerate(data.get("prompts") or []):
                for seed in range(seeds):
                    name = f"pictures/{side}/{i}-{seed}.png"
                    Image.new("RGB", (size, size), colour).save(folder / name)
                    if side == "original":
                        prompt["pictures"].append({"seed": seed, "pixel": 0.1, "original_verdict": prompt["truth"]})
                    prompt["pictures"][seed] |= {side: name, "edited_verdict": "object"}
        store(folder, data)
        return folder

    return build


def store(folder: Path, data: Any) -> None:
    (folder / "evaluation.json").write_text(json.dumps(data), encoding="utf-8")


def load(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return data


def poison(value: Any, key: str = "") -> Any:
    """Every text but the paths, kinds and roles replaced by `HOSTILE`, keys of free objects too."""
    if isinstance(value, dict):
        free = key in ("settings", "versions", "recipe", "geometry")
        return {(HOSTILE + name if free else name): poison(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [poison(item, key) for item in value]
    kept = key in ("format", "kind", "role") or str(value).startswith("pictures/")
    return HOSTILE if isinstance(value, str) and not kept else value


# What is shown


def test_the_numbers_are_those_of_the_file(make: Make) -> None:
    folder = make()
    assert html_report.write(folder) == folder / "report.html"
    page, data = Page(folder / "report.html"), load(folder)
    for key, sides in data["rates"].items():
        row = page.row(key)
        for cell, r in ((row[2], sides["edited"]), (row[3], sides["original"])):
            value, low, high = (f"{100 * r[name]:.1f}" for name in ("value", "low", "high"))
            assert cell == f"{value}\u00a0% [{low}, {high}] {r['hits']} of {r['count']}"
    assert page.row("H_4")[2] == "87.6\u00a0% [81.2, 92.3] 1 concepts"
    assert page.row("cat")[1:] == ["3.3\u00a0%", "23.3\u00a0%", "98.3\u00a0%", NONE, "87.6\u00a0%", NONE, NONE]
    assert page.row("Pixels")[1:] == ["0.0321", NONE]
    assert page.row("Fréchet")[1:] == ["12.34", "5.678"]
    assert page.row("embedding") == ["embedding", "0.1", "12.3\u00a0%", "[10.0, 20.0]"]
    assert ["embedding", "no limit", "78.9\u00a0%", ""] in page.rows
    assert ["ours", "50", "65.0\u00a0%", ""] in page.rows
    assert page.text.index("0.654") < page.text.index("0.321")
    for text in (
        "tells 12345 concepts",
        "12.5 s",
        "realera-edit evaluate 'base  2'",
        '"target": "object"',
        "[0, 1]",
    ):
        assert text in page.text


def test_the_verdicts(make: Make) -> None:
    folder = make()
    html_report.write(folder)
    text = " ".join(Page(folder / "report.html").text.split())
    assert "“cat” was erased By name: ✓ gone, by other names: ~ partly gone, neighbours: ✗ damaged, unrelated" in text
    assert "concepts: ✓ kept. " in text
    # 3.3 % with an upper end of 12.9 %: the interval reaches beyond the limit of 10 %
    assert "Is it gone? ✓ Gone 3.3 % still show it when asked by its name 95 % interval [3.0, 12.9]" in text
    assert text.count("The interval leaves open: partly gone.") == 1
    # what must stay is judged against the unedited model, and a concept that it never drew tells nothing
    data = load(folder)
    data["rates"]["acc_n"]["original"]["value"] = 0.32
    data["rates"]["acc_e"]["original"]["value"] = 0.05
    store(folder, data)
    html_report.write(folder)
    text = " ".join(Page(folder / "report.html").text.split())
    assert "By name: ? cannot be told, by other names: ~ partly gone, neighbours: ✓ kept" in text


def test_pairs_are_grouped_and_their_pictures_are_inside(make: Make) -> None:
    folder = make()
    html_report.write(folder)
    page = Page(folder / "report.html")
    assert len(page.all("div", "stage")) == 5  # the first seed of every prompt; the second is in the folded grid
    assert len(page.all("div", "two")) == 5
    sources = [image["src"] or "" for image in page.all("img")]
    encoded = base64.b64encode((folder / "pictures" / "original" / "0-0.png").read_bytes()).decode()
    assert sources[0] == f"data:image/png;base64,{encoded}"
    assert len(sources) == 20
    assert all(image["alt"] for image in page.all("img"))
    sliders = [attrs for attrs in page.all("input") if attrs.get("aria-label")]
    assert len(sliders) == 5
    text = " ".join(page.text.split())
    assert re.search(
        "own name .*a cat.*By other names .*a kitty.*never name it .*a purr.*Neighbours, .*a dog.*Unrel", text
    )
    assert "✓ gone: cat → object" in text
    assert "✗ changed: dog → object" in text


def test_how_many_pairs_and_which(make: Make) -> None:
    names = [f"c{i:03}" for i in range(40)]
    data = evaluation() | {"erased": names, "prompts": []}
    for kind in "egrns":
        for name in names:
            data["prompts"] += [
                {"kind": kind, "owner": name, "prompt": f"{kind} {name} {i}", "truth": name, "pictures": []}
                for i in range(5)
            ]
    folder = make(data, seeds=1)
    found = html_report.pairs(folder, html_report.read(folder))
    chosen, rest = html_report.choose(found, names)
    assert sorted([*chosen, *rest], key=lambda pair: pair.index) == found
    count = {kind: sum(pair.kind == kind for pair in chosen) for kind in "egrns"}
    shown = html_report.CONCEPTS
    assert count == {"e": 4 * shown, "g": 4 * shown, "r": 2 * shown, "n": 12, "s": 12}
    assert {pair.owner for pair in chosen if pair.kind == "n"} == set(names[:12])
    # with few neighbours, more of the unrelated
    fewer, _ = html_report.choose([pair for pair in found if pair.kind != "n" or pair.index % 100 == 0], names)
    assert sum(pair.kind in "ns" for pair in fewer) == html_report.OTHERS
    html_report.write(folder)
    page = Page(folder / "report.html")
    assert len(page.all("div", "two")) == html_report.MAX_REST
    assert f"{1000 - len(chosen) - html_report.MAX_REST} pairs more" in page.text


def test_the_budget_holds_and_what_is_left_out_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    html_report.write(folder)
    whole = (folder / "report.html").stat().st_size
    three = sum(len(image["src"] or "") for image in Page(folder / "report.html").all("img")[:6])
    monkeypatch.setattr(html_report, "BUDGET", three + 5)
    html_report.write(folder)
    page = Page(folder / "report.html")
    assert len(page.all("img")) == 6
    assert "7 pairs more would make this page too large" in page.text
    assert (folder / "report.html").stat().st_size < whole


def test_wide_pictures_are_shrunk(make: Make) -> None:
    folder = make(size=512)
    html_report.write(folder)
    image = Page(folder / "report.html").all("img")[0]
    assert (image["width"], image["height"]) == ("384", "384")
    assert (image["src"] or "").startswith("data:image/jpeg;base64,")


# Hostile input


def test_every_text_is_escaped(make: Make) -> None:
    folder = make()
    html_report.write(folder)
    plain = Page(folder / "report.html")
    store(folder, poison(load(folder)))
    html_report.write(folder)
    contact_sheet.write(folder)
    page = Page(folder / "report.html")
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "b", "title")].count("script") == 1
    assert len(page.all("img")) == len(plain.all("img"))
    assert {name for _, attrs in page.tags for name in attrs} <= {name for _, attrs in plain.tags for name in attrs}
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert page.text.count("{{ 7 * 7 }}") > 20
    assert (folder / "report.html").read_text(encoding="utf-8").count("<script") == 1


def test_nothing_is_fetched_and_only_our_script_may_run(make: Make) -> None:
    folder = make()
    html_report.write(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search("https?:|//[a-z]|@import|url\\(", re.sub('base64,[^"]*', "", text))
    page = Page(folder / "report.html")
    links = [attrs[key] or "" for _, attrs in page.tags for key in ("src", "href", "srcset", "action") if key in attrs]
    assert links
    assert all(link.startswith("data:") for link in links)
    policy = next(attrs["content"] or "" for attrs in page.all("meta") if "http-equiv" in attrs)
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", "not the path of a .png file"),
        ("../secret.png", "leads out of the folder"),
        ("pictures/../../secret.png", "leads out of the folder"),
        ("pictures/../pictures/original/0-0.png", "leads out of the folder"),
        ("{absolute}", "leads out of the folder"),
        ("C:\\secret.png", "leads out of the folder"),
        ("C:secret.png", "leads out of the folder"),
        ("pictures\\secret.png", "leads out of the folder"),
        ("link.png", "a link leads out of the folder"),
        ("linked/secret.png", "a link leads out of the folder"),
        ("loop.png", "loop.png"),
        ("pictures/none.png", "no such picture"),
        ("folder.png", "no such picture"),
        ("pipe.png", "no such picture"),
        ("evaluation.json", "not the path of a .png file"),
        ("text.png", "not a PNG picture"),
        ("pictures/a\0.png", "not the path of a .png file"),
        ("\ud800.png", ".png"),
        ("x" * 5000 + ".png", ".png"),
        (None, "not the path of a .png file"),
        (7, "not the path of a .png file"),
    ],
)
@pytest.mark.parametrize("side", ["original", "edited"])
def test_a_picture_outside_the_folder_is_never_read(make: Make, name: Any, message: str, side: str) -> None:
    folder = make()
    secret = folder.parent / "secret.png"
    Image.new("RGB", (8, 8), "green").save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(folder.parent)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("a text, not a picture")
    os.mkfifo(folder / "pipe.png")
    data = load(folder)
    data["prompts"][0]["pictures"][0][side] = str(secret) if name == "{absolute}" else name
    store(folder, data)
    for draw in (html_report.write, contact_sheet.write):
        with pytest.raises(ReportError) as caught:
            draw(folder)
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)
    assert not list(folder.glob("*report*"))
    # control: a link that stays inside is a picture like any other
    (folder / "inside.png").symlink_to("pictures/original/1-0.png")
    data["prompts"][0]["pictures"][0][side] = "inside.png"
    store(folder, data)
    html_report.write(folder)


def test_broken_files_are_one_clear_error(make: Make, tmp_path: Path) -> None:
    folder = make()
    good = load(folder)
    path = folder / "evaluation.json"
    cases: dict[str, bytes] = {
        "not valid JSON": b'{"format": ',
        "not valid JSON (": b"\xff\xfe\xfa",
        "not valid JSON (maximum": b"[" * 100_000,
        "its format is None": b"[]",
        "its format is 'realera-edit evaluation 9', not": json.dumps(
            good | {"format": "realera-edit evaluation 9"}
        ).encode(),
        "'erased' is not a list": json.dumps(good | {"erased": "cat"}).encode(),
        "'rates' is not an object": json.dumps(good | {"rates": [1]}).encode(),
        "concepts[0] is not an object": json.dumps(good | {"concepts": ["cat"]}).encode(),
        "'x' is not a number": json.dumps(good | {"neighbourhood": [{"word": "a", "x": "1", "y": 2}]}).encode(),
        "'command' is not text": json.dumps(good | {"command": ["rm"]}).encode(),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(RealEraError) as caught:
            html_report.write(folder)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 500
    with pytest.raises(ReportError, match="no such file; run the evaluation with"):
        html_report.write(tmp_path / "nowhere")
    assert not (folder / "report.html").exists()


def test_a_bomb_and_a_truncated_picture(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(size=500)
    picture = folder / "pictures" / "edited" / "0-0.png"
    data = picture.read_bytes()
    picture.write_bytes(data[: len(data) // 2])
    with pytest.raises(ReportError, match=r"0-0\.png: not a readable PNG"):
        html_report.write(folder)
    picture.write_bytes(data[:16] + b"\0\0\x40\0\0\0\x40\0" + data[24:])
    with pytest.raises(ReportError, match=r"0-0\.png: not a readable PNG"):
        html_report.write(folder)
    picture.write_bytes(data[:16] + b"\x7f\xff\xff\xff\0\0\0\0" + data[24:])
    with pytest.raises(ReportError, match="pixels; draw smaller"):
        html_report.write(folder)
    monkeypatch.setattr("realera_edit.evaluation_file.MAX_PICTURE", 10)
    with pytest.raises(ReportError, match="MiB, and at most"):
        html_report.write(folder)


# What is missing


def parts(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The evaluation with each key, at each depth, left out or null."""
    for key in data:
        if key != "format":
            yield key, {name: value for name, value in data.items() if name != key}
            yield key, data | {key: None}
    for key, value in data.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        for name in inner if isinstance(inner, dict) and key != "prompts" else ():
            changed = copy.deepcopy(data)
            (changed[key][0] if isinstance(value, list) else changed[key])[name] = None
            yield f"{key}.{name}", changed


def test_missing_parts_are_left_out(make: Make) -> None:
    folder = make()
    whole = load(folder)
    tried = 0
    for key, data in parts(whole):
        store(folder, data)
        page = Page(html_report.write(folder))
        assert "None" not in page.text, key
        assert "nan" not in page.text.split(), key
        tried += 1
    assert tried > 70
    for prompt in whole["prompts"]:
        for key in ("kind", "owner", "prompt", "truth", "style", "original", "edited", "count"):
            prompt[key] = None
        for picture in prompt["pictures"]:
            picture.update(dict.fromkeys(("seed", "original_verdict", "edited_verdict", "pixel")))
    store(folder, whole)
    assert "None" not in Page(html_report.write(folder)).text
    store(folder, {"format": FORMAT})
    page = Page(html_report.write(folder))
    assert [tag for tag, _ in page.tags if tag == "section"] == ["section"]
    with pytest.raises(ReportError, match="names no pictures"):
        contact_sheet.write(folder)


@pytest.mark.parametrize("number", [math.nan, math.inf, -1, 0, 7, 1e308, pytest.param(10**400, id="huge")])
def test_odd_numbers_do_no_harm(make: Make, number: float) -> None:
    def spread(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key == "prompts" else spread(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spread(item) for item in value]
        return number if isinstance(value, (int, float)) else value

    folder = make()
    store(folder, spread(load(folder)))
    page = Page(html_report.write(folder))
    assert page.all("h1")
    assert "nan" not in page.text.lower().replace("\u00a0", " ").split()
    assert not [value for _, attrs in page.tags for value in attrs.values() if re.search(r"\bnan\b", value or "")]


# Files


def test_the_same_bytes_twice_and_no_leftovers(make: Make) -> None:
    folder = make()
    files = {path.name for path in folder.iterdir()}
    first = [html_report.write(folder).read_bytes(), contact_sheet.write(folder).read_bytes()]
    code = (
        "import sys, pathlib\nfrom realera_edit import contact_sheet, html_report\nfolder = pathlib.Path(sys.argv[1])"
    )
    code += "\nhtml_report.write(folder), contact_sheet.write(folder)\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
    assert [(folder / name).read_bytes() for name in ("report.html", "report.png")] == first
    assert {path.name for path in folder.iterdir()} == files | {"report.html", "report.png"}


def test_a_failed_write_leaves_the_old_report(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    old = html_report.write(folder).read_bytes()
    store(folder, load(folder) | {"erased": ["dog"]})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ReportError, match=r"report\.html: cannot be written: No space left"):
        html_report.write(folder)
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob(".*"))


def test_a_link_in_the_report_s_place_is_replaced_not_followed(make: Make) -> None:
    folder = make()
    victim = folder.parent / "victim"
    victim.write_text("precious")
    (folder / "report.html").symlink_to(victim)
    html_report.write(folder)
    assert victim.read_text() == "precious"
    assert not (folder / "report.html").is_symlink()


def test_the_contact_sheet_has_every_pair(make: Make) -> None:
    folder = make()
    assert contact_sheet.write(folder) == folder / "report.png"
    with Image.open(folder / "report.png") as sheet:
        colours = {colour: n for n, colour in sheet.convert("RGB").getcolors(2**20) or []}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 5 * 112 * 112


# Charts


def boxes(chart: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)<', chart)
    return [(float(x), float(y) - 10, float(x) + 7.2 * len(text), float(y) + 3) for x, y, text in found]


def test_labels_of_the_map_do_not_overlap_and_the_erased_come_first() -> None:
    words = [(f"word {i}", math.cos(i), math.sin(i * i), "vocabulary", i / 300) for i in range(300)]
    chart = svg.scatter([*words, ("cat", 0.1, 0.1, "erased", 1.0)], "map")
    placed = boxes(chart)
    assert 10 < len(placed) <= 120
    for i, a in enumerate(placed):
        for b in placed[:i]:
            # half a unit for the rounding of what is written
            assert a[2] <= b[0] + 0.5 or b[2] <= a[0] + 0.5 or a[3] <= b[1] + 0.5 or b[3] <= a[1] + 0.5
    assert ">cat</text>" in chart
    assert chart.count("<title>") == 301
    # control: without the words in between, the labels that found no room appear
    assert len(boxes(svg.scatter(words[:8], "map"))) == 8


def test_lines_stand_where_the_numbers_are() -> None:
    chart = svg.lines([("a", [(1, 0.0, None, None), (2, 0.5, 0.4, 0.6), (3, 1.0, None, None)])], "x", "y", "t")
    found = re.search('<polyline points="([^"]*)"', chart)
    assert found
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, point.split(","))) for point in found[1].split()]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end" class="axis">(\d+)', chart))
    assert ticks == {f"{y1 + 4 - (y1 - y3) * share / 100:.1f}": str(share) for share in (0, 25, 50, 75, 100)}
    # logarithmic where the range is wide: equal ratios, equal steps
    found = re.search(
        '<polyline points="([^"]*)"', svg.lines([("a", [(n, 0.5, None, None) for n in (1, 10, 100)])], "", "", "")
    )
    assert found
    x = [float(point.split(",")[0]) for point in found[1].split()]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


# In a browser


@pytest.mark.slow
def test_in_a_browser(make: Make, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    folder = make(size=64)
    page_of = {"plain": html_report.write(folder).read_bytes()}
    store(folder, poison(load(folder)))
    page_of["hostile"] = html_report.write(folder).read_bytes()
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, content in page_of.items():
            path = tmp_path / f"{name}.html"
            path.write_bytes(content)
            for scheme, width in (("light", 1200), ("dark", 400)):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                wrong: list[str] = []
                page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
                page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
                asked: list[str] = []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(path.as_uri())
                assert page.evaluate("document.images.length === 20 && [...document.images].every(i => i.naturalWidth)")
                assert page.evaluate("window.hacked") is None
                assert page.evaluate("document.documentElement.scrollWidth") == width
                background = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 19, 24)")
                clip = "getComputedStyle(document.querySelectorAll('.after')[{}]).clipPath"
                assert page.evaluate(clip.format(0)) == "inset(0px 0px 0px 50%)"
                slider = page.locator(".stage input").first
                slider.focus()
                page.keyboard.press("ArrowLeft")
                assert page.evaluate(clip.format(0)) == "inset(0px 0px 0px 49%)"
                box = slider.locator("xpath=..").bounding_box()
                assert box
                page.mouse.move(box["x"] + box["width"] * 0.49, box["y"] + box["height"] / 2)
                page.mouse.down()
                page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
                page.mouse.up()
                # the divider is under the pointer
                moved = float(page.evaluate(clip.format(0)).split()[-1].rstrip("%)"))
                assert moved == pytest.approx(80, abs=2)
                assert page.evaluate(clip.format(1)) == "inset(0px 0px 0px 50%)"
                page.locator("#all").focus()
                page.keyboard.press("Home")
                assert {page.evaluate(clip.format(i)) for i in range(5)} == {"inset(0px 0px 0px 0%)"}
                assert wrong == []
                assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
                page.close()
        page = browser.new_page()
        page.goto((tmp_path / "plain.html").as_uri())
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.querySelector('.after')).clipPath") == "none"
        # control: the policy blocks a script that is not ours
        page.set_content(page_of["plain"].decode().replace("<script>", "<script>window.hacked = 1</script><script>", 1))
        assert page.evaluate("window.hacked") is None
        browser.close()
