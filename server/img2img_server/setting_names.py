"""Names settings in sentences for operators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "IMG2IMG_"
_VARIABLE: Final = re.compile(rf"`?\b{PREFIX}([A-Z0-9_]+)\b`?")


def variable(name: str) -> str:
    """Returns the environment variable of a setting."""
    return PREFIX + name.upper()


def in_words_of_settings(message: str) -> str:
    """Returns a message of pydantic in the words of the errors of settings.

    >>> in_words_of_settings("Input should be less than 3")
    'must be less than 3'
    """
    return re.sub("^(Input|String|Value) should", "must", message)


@dataclass(frozen=True, slots=True)
class Origin:
    """The place where the values of settings come from: the environment, or an entry of a file.

    All code writes sentences with the variables of the environment. Where a sentence leaves the
    process, `explain` replaces those that the entry sets.

    Attributes:
        entry: The file and its entry, such as "models.toml: entry photo"; empty: the values come
            from the environment.
        fields: The fields of the entry by the settings that they stand for.
    """

    entry: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def explain(self, sentence: str) -> str:
        """Returns a sentence that names the entry and its fields instead of variables.

        >>> origin = Origin("models.toml: entry photo", {"model": "source"})
        >>> origin.explain("IMG2IMG_MODEL: there is no model at /gone")
        'models.toml: entry photo: source: there is no model at /gone'
        """
        if not self.entry or sentence.startswith(f"{self.entry}: "):
            return sentence
        head, colon, rest = sentence.partition(": ")
        if colon and (match := _VARIABLE.fullmatch(head)):
            name = self.fields.get(match[1].lower(), head)
            return f"{self.entry}: {name}: {self._with_fields(rest)}"
        return f"{self.entry}: {self._with_fields(sentence)}"

    def _with_fields(self, text: str) -> str:
        def replacement(match: re.Match[str]) -> str:
            name = self.fields.get(match[1].lower())
            return f"`{name}`" if name else match[0]

        return _VARIABLE.sub(replacement, text)
