"""Builds the two labelled emoji corpora that ship with the package.

The recipe renders open-licensed SVG emoji at 64x64 pixels on plain backgrounds and writes
``emoji-nature.parquet`` and ``emoji-things.parquet``: two classification data sets with
disjoint concepts. All renderings of one SVG (a concept in a style) fall on one side of the
split. The same packages and tool versions give the same bytes.

DIR holds the unpacked npm packages below, in folders of any name; ``npm pack NAME@VERSION``
fetches each as a tarball. Also needed: ``resvg-py`` 0.5, ``pillow`` and ``pyarrow``.

* Apache-2.0: @iconify-json/noto@1.2.9, @iconify-json/noto-v1@1.2.5, @iconify-json/fxemoji@1.2.2
* MIT: @iconify-json/fluent-emoji-flat@1.2.6, @iconify-json/fluent-emoji@1.2.7
* CC-BY-4.0: @iconify-json/twemoji@1.2.5, @iconify-json/emojione@1.2.3

Run ``python -m one4all.assets.build_emoji --packages DIR --out one4all/assets/corpora``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

SIZE = 64
TRAIN_ROWS, TEST_ROWS = 3000, 700
TEST_SHARE, MAX_VARIANTS = 0.19, 8

#: Style -> (npm version, licence) of the npm package @iconify-json/STYLE.
STYLES = {
    "noto": ("1.2.9", "Apache-2.0"),
    "noto-v1": ("1.2.5", "Apache-2.0"),
    "fxemoji": ("1.2.2", "Apache-2.0"),
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "fluent-emoji": ("1.2.7", "MIT"),
    "twemoji": ("1.2.5", "CC-BY-4.0"),
    "emojione": ("1.2.3", "CC-BY-4.0"),
}

COLUMNS = [("key", "string"), ("split", "string"), ("image", "binary"), ("format", "string")]
COLUMNS += [("coarse", "int32"), ("fine", "int32"), ("coarse_name", "string")]
COLUMNS += [("fine_name", "string"), ("style", "string"), ("source", "string")]

#: Plain backgrounds: the digits of red, green and blue.
BACKGROUNDS = ("fff", "fed", "eef", "efe")

#: Corpus -> text in which each coarse class is followed by its concepts, the fine labels.
CORPORA = {
    "emoji-nature": """
    mammals: monkey-face monkey gorilla dog-face dog poodle wolf fox raccoon cat-face cat lion
        tiger-face tiger leopard horse-face horse zebra deer cow-face ox water-buffalo cow pig-face
        pig boar ram ewe goat camel two-hump-camel elephant rhinoceros mouse-face mouse rat hamster
        rabbit-face rabbit chipmunk bear koala panda kangaroo
    birds: turkey chicken rooster hatching-chick baby-chick front-facing-baby-chick bird penguin
        dove eagle duck swan owl dodo flamingo peacock parrot black-bird goose phoenix
    sea-creatures: spouting-whale whale dolphin orca seal fish tropical-fish blowfish shark octopus
        coral jellyfish crab lobster shrimp squid oyster spiral-shell
    reptiles-and-bugs: frog crocodile turtle lizard snake dragon-face dragon sauropod t-rex snail
        butterfly bug ant honeybee beetle lady-beetle cockroach spider scorpion mosquito fly worm
    plants: bouquet cherry-blossom lotus rose wilted-flower hibiscus sunflower blossom
        tulip hyacinth seedling potted-plant evergreen-tree deciduous-tree palm-tree cactus
        sheaf-of-rice herb shamrock four-leaf-clover maple-leaf fallen-leaf leaf-fluttering-in-wind
    fruit-and-vegetables: grapes melon watermelon tangerine lemon banana pineapple mango red-apple
        green-apple pear peach cherries strawberry kiwi-fruit coconut avocado eggplant potato carrot
        ear-of-corn hot-pepper cucumber broccoli garlic onion peanuts tomato
    dishes: hamburger french-fries pizza hot-dog sandwich taco burrito tamale stuffed-flatbread
        falafel cooking shallow-pan-of-food pot-of-food fondue bowl-with-spoon green-salad bento-box
        rice-ball cooked-rice curry-rice steaming-bowl spaghetti oden sushi fried-shrimp dumpling
        takeout-box
    sweets: soft-ice-cream shaved-ice ice-cream doughnut cookie birthday-cake shortcake cupcake pie
        chocolate-bar candy lollipop custard honey-pot moon-cake dango fortune-cookie pancakes
        waffle
    drinks: baby-bottle glass-of-milk hot-beverage teapot teacup-without-handle sake
        bottle-with-popping-cork wine-glass cocktail-glass tropical-drink beer-mug
        clinking-beer-mugs clinking-glasses tumbler-glass pouring-liquid cup-with-straw bubble-tea
        beverage-box mate
    weather: sun sun-with-face cloud sun-behind-cloud sun-behind-small-cloud sun-behind-large-cloud
        sun-behind-rain-cloud cloud-with-rain cloud-with-snow cloud-with-lightning
        cloud-with-lightning-and-rain tornado wind-face cyclone rainbow snowflake snowman
        snowman-without-snow comet droplet water-wave crescent-moon full-moon full-moon-face
        new-moon-face first-quarter-moon-face""",
    "emoji-things": """
    land-vehicles: locomotive railway-car high-speed-train bullet-train train metro light-rail
        station tram monorail mountain-railway tram-car bus oncoming-bus trolleybus minibus
        ambulance fire-engine police-car oncoming-police-car taxi oncoming-taxi automobile
        oncoming-automobile sport-utility-vehicle pickup-truck delivery-truck articulated-lorry
        tractor racing-car motorcycle motor-scooter auto-rickshaw bicycle kick-scooter
    boats-and-aircraft: sailboat canoe speedboat passenger-ship ferry motor-boat ship airplane
        small-airplane airplane-departure airplane-arrival helicopter rocket flying-saucer satellite
        parachute mountain-cableway aerial-tramway suspension-railway
    buildings: stadium classical-building hut houses derelict-house house house-with-garden
        office-building japanese-post-office post-office hospital bank hotel love-hotel
        convenience-store school department-store factory japanese-castle castle church mosque
        hindu-temple synagogue shinto-shrine tokyo-tower wedding
    clothing: lab-coat safety-vest necktie t-shirt jeans scarf gloves coat socks dress kimono sari
        one-piece-swimsuit briefs shorts bikini womans-clothes running-shirt martial-arts-uniform
    shoes-hats-bags: purse handbag clutch-bag shopping-bags backpack thong-sandal mans-shoe
        running-shoe hiking-boot flat-shoe high-heeled-shoe womans-sandal ballet-shoes womans-boot
        crown womans-hat top-hat graduation-cap billed-cap military-helmet rescue-workers-helmet
        briefcase luggage
    sports: soccer-ball baseball softball basketball volleyball american-football rugby-football
        tennis flying-disc bowling cricket-game field-hockey ice-hockey lacrosse ping-pong badminton
        boxing-glove goal-net flag-in-hole ice-skate skis sled curling-stone pool-8-ball yo-yo
    music: saxophone trumpet trombone accordion guitar musical-keyboard violin banjo drum long-drum
        maracas flute harp postal-horn bell microphone studio-microphone headphone
    tools: hammer axe pick hammer-and-pick hammer-and-wrench dagger crossed-swords bow-and-arrow
        carpentry-saw wrench screwdriver nut-and-bolt clamp toolbox ladder shovel hook chains
        kitchen-knife scissors broom plunger boomerang
    books-and-paper: notebook-with-decorative-cover closed-book open-book green-book blue-book
        orange-book books notebook ledger page-with-curl scroll page-facing-up newspaper
        rolled-up-newspaper bookmark-tabs envelope incoming-envelope envelope-with-arrow love-letter
        memo calendar tear-off-calendar spiral-notepad spiral-calendar clipboard chart-increasing
        chart-decreasing bar-chart receipt
    electronics: radio mobile-phone mobile-phone-with-arrow telephone telephone-receiver pager
        fax-machine laptop desktop-computer printer keyboard computer-mouse trackball computer-disk
        floppy-disk optical-disk dvd movie-camera film-projector television camera camera-with-flash
        video-camera videocassette video-game joystick battery electric-plug
    household: door mirror window bed couch-and-lamp chair toilet shower bathtub seat elevator
        wastebasket file-cabinet card-file-box shopping-cart bucket basket candle light-bulb
        red-paper-lantern""",
}

#: The names of fxemoji that differ from ours (ours=theirs).
RENAMED_FX = """dog-face=dog dog=dogside cat-face=cat cat=catside tiger-face=tiger tiger=tigerside
    leopard=leopardside mouse-face=mouse mouse=mouseside pig-face=pig pig=pigside rabbit-face=bunny
    rabbit=bunnyside ewe=sheep camel=dromedarycamel dove=doveofpeace spouting-whale=spurtingwhale
    dragon-face=dragonhead dragon=dragonside evergreen-tree=evergreen eggplant=aubergine
    ear-of-corn=earofmaize hot-pepper=chilipepper pizza=sliceofpizza house=housebuilding
    castle=europeancastle necktie=tie t-shirt=mansshirt mans-shoe=mensshoe running-shoe=mensrunner
    high-heeled-shoe=heels womans-boot=boot tennis=tennisball pool-8-ball=billiards"""


@dataclass(frozen=True)
class Drawing:
    """One SVG emoji: the body of the SVG, its box (left, top, width, height) and its labels."""

    style: str
    concept: str
    body: str
    box: tuple[float, float, float, float]


def digest(*parts: object) -> int:
    """Returns a stable 64-bit number for ``parts``."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def parse_classes(text: str) -> dict[str, list[str]]:
    """Reads the text of a corpus into its concepts by coarse class."""
    classes: dict[str, list[str]] = {}
    for word in text.split():
        if word.endswith(":"):
            concepts = classes[word[:-1]] = []
        else:
            concepts.append(word)
    return classes


def load_style(folder: Path, style: str, concepts: list[str]) -> list[Drawing]:
    """Reads the drawings that one icon package has of ``concepts``.

    Args:
        folder: The unpacked npm package.
        style: A key of ``STYLES``.
        concepts: The wanted concepts.

    Returns:
        One drawing for each concept that the package has, in the order of ``concepts``.

    Raises:
        ValueError: If the version or the licence is not the one that ``STYLES`` states.
    """
    version = json.loads((folder / "package.json").read_text("utf-8"))["version"]
    licence = json.loads((folder / "info.json").read_text("utf-8"))["license"]["spdx"]
    if (version, licence) != STYLES[style]:
        raise ValueError(f"{style}: found {version} under {licence}, not {STYLES[style]}")
    data: dict[str, Any] = json.loads((folder / "icons.json").read_text("utf-8"))
    names = {name.replace("-", ""): name for name in data["icons"]}
    for alias, target in data.get("aliases", {}).items():
        if set(target) == {"parent"} and target["parent"] in data["icons"]:
            names.setdefault(alias.replace("-", ""), target["parent"])
    renamed = dict(pair.split("=") for pair in RENAMED_FX.split()) if style == "fxemoji" else {}
    drawings: dict[str, Drawing] = {}
    for concept in concepts:
        name = renamed.get(concept, concept).replace("-", "")
        found = names.get(name) or names.get(name + "face")
        if found and found not in drawings:
            icon = data["icons"][found]
            width, height = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
            box = (icon.get("left", 0), icon.get("top", 0), width, height)
            drawings[found] = Drawing(style, concept, icon["body"], box)
    return list(drawings.values())


def render(drawing: Drawing, variant: int) -> bytes:
    """Returns a drawing as a lossless WebP file; its look follows from names and variant."""
    rng = random.Random(digest("render", drawing.style, drawing.concept, variant))
    fill = rng.choice(BACKGROUNDS)
    left, top, width, height = drawing.box
    scale = 0.88 * SIZE / max(width, height) * rng.uniform(0.95, 1.05)
    x, y = (SIZE / 2 + rng.uniform(-2, 2) for _ in range(2))
    angle = rng.uniform(-4, 4)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}">'
        f'<rect width="{SIZE}" height="{SIZE}" fill="#{fill}"/>'
        f'<g transform="translate({x:.3f} {y:.3f}) rotate({angle:.3f}) scale({scale:.5f}) '
        f'translate({-left - width / 2} {-top - height / 2})">{drawing.body}</g></svg>'
    )
    png = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))
    buffer = io.BytesIO()
    png.convert("RGB").save(buffer, "WEBP", lossless=True, quality=75, method=4)
    return buffer.getvalue()


def in_test(drawing: Drawing) -> bool:
    """Tells whether all renderings of ``drawing`` belong to the test split."""
    return digest("split", drawing.concept, drawing.style) < TEST_SHARE * 2**64


def choose(drawings: list[Drawing], rows: int) -> list[tuple[Drawing, int]]:
    """Picks up to ``rows`` (drawing, variant) pairs, all drawings as evenly as possible."""
    ordered = sorted(drawings, key=lambda each: digest("order", each.style, each.concept))
    return [(each, variant) for variant in range(MAX_VARIANTS) for each in ordered][:rows]


def build(corpus: str, packages: dict[str, Path]) -> pa.Table:
    """Renders one corpus.

    Args:
        corpus: A key of ``CORPORA``.
        packages: The folder of each npm package by its name.

    Returns:
        The table: the training split first, each split in the order of a hash of the key.
    """
    classes = parse_classes(CORPORA[corpus])
    fine_names = [concept for concepts in classes.values() for concept in concepts]
    sources = {style: f"@iconify-json/{style}" for style in STYLES}
    drawings: list[Drawing] = []
    for style, source in sources.items():
        drawings += load_style(packages[source], style, fine_names)
    rows: list[tuple[str | int | bytes, ...]] = []
    for coarse, (name, concepts) in enumerate(classes.items()):
        mine = [drawing for drawing in drawings if drawing.concept in concepts]
        for split, total in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            part = [drawing for drawing in mine if in_test(drawing) == (split == "test")]
            for drawing, variant in choose(part, round(total / len(classes))):
                style, concept = drawing.style, drawing.concept
                key, image = f"{style}_{concept}_{variant}", render(drawing, variant)
                labels = (coarse, fine_names.index(concept), name, concept)
                rows.append((key, split, image, "webp", *labels, style, sources[style]))
    rows.sort(key=lambda row: (row[1] != "train", digest("row", row[0])))
    about = {
        "name": corpus,
        "coarse_names": list(classes),
        "fine_names": fine_names,
        "licences": {style: licence for style, (_, licence) in STYLES.items()},
        "packages": {sources[style]: version for style, (version, _) in STYLES.items()},
    }
    schema = pa.schema(COLUMNS, metadata={b"one4all": json.dumps(about).encode()})
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def main() -> None:
    """Builds both corpora and prints a summary of each."""
    parser = argparse.ArgumentParser(description="Builds the two emoji corpora.")
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    packages = {
        json.loads(path.read_text("utf-8"))["name"]: path.parent
        for path in sorted(arguments.packages.rglob("package.json"))
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for corpus in CORPORA:
        table = build(corpus, packages)
        path = arguments.out / f"{corpus}.parquet"
        pq.write_table(table, path, compression="zstd")
        print(f"{path.name}: {table.num_rows} rows, {path.stat().st_size} bytes")
        names, splits = (table[column].to_pylist() for column in ("coarse_name", "split"))
        counts = Counter(zip(names, splits, strict=True))
        for name in parse_classes(CORPORA[corpus]):
            print(f"  {name:20} train {counts[name, 'train']:4} test {counts[name, 'test']:4}")


if __name__ == "__main__":
    main()
