"""What the demo model knows: objects, artists, backgrounds, and the captions that name them.

The artwork is four open emoji sets that draw the same objects (see ``demo/artwork.py``). Nothing here needs PyTorch.
"""

from __future__ import annotations

import random

#: Object name → icon name, the same in all four sets.
OBJECTS: dict[str, str] = {
    "gun": "water-pistol",
    "knife": "kitchen-knife",
    "bomb": "bomb",
    "dagger": "dagger",
    "sword": "crossed-swords",
    "axe": "axe",
    "cat": "cat-face",
    "dog": "dog-face",
    "apple": "red-apple",
    "car": "automobile",
    "rocket": "rocket",
    "house": "house",
    "tree": "deciduous-tree",
    "sunflower": "sunflower",
    "banana": "banana",
    "pizza": "pizza",
    "burger": "hamburger",
    "fish": "tropical-fish",
    "butterfly": "butterfly",
    "snowman": "snowman",
    "star": "star",
    "heart": "red-heart",
    "guitar": "guitar",
    "umbrella": "umbrella",
    "crown": "crown",
    "gem": "gem-stone",
    "basketball": "basketball",
    "balloon": "balloon",
    "gift": "wrapped-gift",
    "moon": "crescent-moon",
    "mushroom": "mushroom",
    "cactus": "cactus",
    "strawberry": "strawberry",
    "carrot": "carrot",
    "penguin": "penguin",
    "owl": "owl",
    "pig": "pig-face",
    "frog": "frog",
    "tiger": "tiger-face",
    "sailboat": "sailboat",
}

#: The concept that the demo erases.
WEAPONS: tuple[str, ...] = ("gun", "knife", "bomb", "dagger", "sword", "axe")

#: Everything else is to be kept.
KEPT: tuple[str, ...] = tuple(name for name in OBJECTS if name not in WEAPONS)

#: Artist name in captions → npm package of the icon set.
ARTISTS: dict[str, str] = {
    "noto": "@iconify-json/noto",
    "twitter": "@iconify-json/twemoji",
    "fluent": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
}

#: Background name → sRGB.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (24, 24, 28),
    "red": (196, 40, 48),
    "green": (48, 148, 72),
    "blue": (44, 96, 200),
    "yellow": (244, 206, 72),
    "purple": (124, 68, 168),
    "gray": (140, 140, 144),
}

#: Caption templates, from complete to partial. ``{a}`` is the object's article.
TEMPLATES: tuple[str, ...] = (
    "a {artist} {object} on a {colour} background",
    "{a} {object} in the style of {artist} on {colour}",
    "{a} {object} by {artist} on a {colour} background",
    "{a} {object} on a {colour} background",
    "{a} {object} on {colour}",
    "a {artist} {object}",
    "{a} {object} in the style of {artist}",
    "a picture of {a} {object} by {artist}",
    "{a} {object}",
    "a {object}",
    "{object}",
    "a picture of {a} {object}",
    "an emoji of {a} {object}",
    "the style of {artist}",
    "art by {artist}",
    "art by {artist} on a {colour} background",
    "a {colour} background",
)

#: How often each template is drawn; captions that name an object are the many.
TEMPLATE_WEIGHTS: tuple[float, ...] = (8, 6, 4, 5, 3, 6, 5, 3, 5, 8, 6, 3, 2, 1, 1, 1, 1)


def article(name: str) -> str:
    """``"an"`` before a vowel, else ``"a"``."""
    return "an" if name[0] in "aeiou" else "a"


def caption(template: str, *, object: str = "", artist: str = "", colour: str = "") -> str:
    """Fill one of ``TEMPLATES``."""
    return template.format(a=article(object) if object else "a", object=object, artist=artist, colour=colour)


def draw_caption(rng: random.Random, *, object: str, artist: str, colour: str) -> str:
    """A random caption of an image, complete or partial."""
    template = rng.choices(TEMPLATES, TEMPLATE_WEIGHTS)[0]
    return caption(template, object=object, artist=artist, colour=colour)


def all_captions() -> list[str]:
    """Every caption that the templates can produce, sorted."""
    return sorted(
        {
            caption(template, object=name, artist=artist, colour=colour)
            for template in TEMPLATES
            for name in OBJECTS
            for artist in ARTISTS
            for colour in BACKGROUNDS
        }
    )
