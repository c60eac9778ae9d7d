"""Writes the attribution that is part of the model, from data/sources.csv."""

from __future__ import annotations

from recipe.photos import photos

_LICENCES = {
    "public-domain": "public domain",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}


def _licence_address(licence: str) -> str:
    if licence in _LICENCES:
        return _LICENCES[licence]
    return f"https://creativecommons.org/licenses/by/{licence.removeprefix('CC-BY-')}/"


def notice() -> str:
    """Returns a line for each photograph: title, author, licence, source and changes."""
    lines = [
        "atelier was trained on crops, scalings and filtered renderings of these photographs",
        "(rows marked 'test' only measured it). Thanks to their authors.",
        "",
    ]
    lines += [
        f"{photo.id} ({photo.split}): {photo.author}; {photo.licence}, "
        f"{_licence_address(photo.licence)}; {photo.source}; shipped by {photo.package}"
        for photo in photos()
    ]
    return "\n".join(lines) + "\n"
