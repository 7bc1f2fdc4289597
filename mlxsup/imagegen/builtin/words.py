"""From a prompt to rows of the word table. Nothing here needs MLX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_STOPWORDS = "a an and at by for in is its me my of on one or please some that the this to with your"

STOPWORDS = frozenset(_STOPWORDS.split())
"""Words that carry no picture; they are dropped from prompts and from captions alike."""

_WORD = re.compile(r"[a-z0-9]+")


def split(text: str) -> list[str]:
    """Return the words of a prompt or of a picture's name that may mean something, in lower case and order."""
    return [word for word in _WORD.findall(text.lower()) if word not in STOPWORDS]


class Vocabulary:
    """The words the model was trained with; row `i + 1` of the word table belongs to `words[i]`.

    Args:
        words: each once, in the order of the table.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._rows = {word: row for row, word in enumerate(self.words, start=1)}

    @classmethod
    def of(cls, names: Iterable[str]) -> Vocabulary:
        """Collect the words of pictures' names such as `red-heart`, in alphabetical order."""
        return cls(sorted({word for name in names for word in split(name)}))

    def __len__(self) -> int:
        return len(self.words)

    def rows(self, text: str) -> tuple[list[int], list[str]]:
        """Look a prompt up.

        A plural whose singular is known (or the reverse) counts as known. Each row is named once.

        Returns:
            The rows of the word table, and the words that are not in it.
        """
        rows: list[int] = []
        unknown: list[str] = []
        for word in split(text):
            row = next((self._rows[form] for form in _forms(word) if form in self._rows), None)
            if row is None:
                unknown.append(word)
            elif row not in rows:
                rows.append(row)
        return rows, unknown


def _forms(word: str) -> list[str]:
    forms = [word, word + "s"]
    if word.endswith("s"):
        forms.append(word[:-1])
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("y"):
        forms.append(word[:-1] + "ies")
    return forms
