"""Reading JSON that somebody may have torn or edited: every value is there and of its type, or the line says which not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.numbers import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "a whole number": (int,),
    "true or false": (bool,),
    "a list": (list,),
    "an object": (dict,),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a JSON file that knows its place.

    Attributes:
        value: as read.
        file: for messages.
        place: such as `cells[0].curve`.
    """

    value: Any
    file: str
    place: str = ""

    def wrong(self, what: str) -> BadInputError:
        """The error that says what is wrong with this value."""
        at = f": {self.place}" if self.place else ""
        return BadInputError(f"{self.file}{at}: {what}; restore it from git, or delete it and record again")

    def get(self, key: str) -> Node:
        """The value of a key.

        Raises:
            BadInputError: this is no object, or lacks the key.
        """
        if not isinstance(self.value, Mapping):
            self._refuse("an object")
        if key not in self.value:
            message = f"'{key}' is missing"
            raise self.wrong(message)
        return Node(self.value[key], self.file, f"{self.place}.{key}" if self.place else key)

    def items(self) -> Iterator[Node]:
        """The members of a list.

        Raises:
            BadInputError: this is none.
        """
        for index, item in enumerate(self._typed("a list")):
            yield Node(item, self.file, f"{self.place}[{index}]")

    def at(self, index: int) -> Node:
        """The member of a list.

        Raises:
            BadInputError: there is none.
        """
        found = self._typed("a list")
        if not 0 <= index < len(found):
            message = f"has no entry {index}"
            raise self.wrong(message)
        return Node(found[index], self.file, f"{self.place}[{index}]")

    def text(self) -> str:
        """A text."""
        return str(self._typed("text"))

    def optional_text(self) -> str | None:
        """A text or null."""
        return None if self.value is None else self.text()

    def integer(self) -> int:
        """A whole number."""
        if isinstance(self.value, bool):
            self._refuse("a whole number")
        return int(self._typed("a whole number"))

    def boolean(self) -> bool:
        """True or false."""
        return bool(self._typed("true or false"))

    def number(self) -> float:
        """A number, or the name of one that is not finite."""
        if isinstance(self.value, str) and self.value in NAMES:
            return NAMES[self.value]
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self._refuse("a number")
        return float(self.value)

    def numbers(self) -> tuple[float, ...]:
        """A list of numbers."""
        return tuple(item.number() for item in self.items())

    def texts(self) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(item.text() for item in self.items())

    def shape(self) -> tuple[int, ...] | None:
        """A list of whole numbers, or null."""
        return None if self.value is None else tuple(item.integer() for item in self.items())

    def object(self) -> dict[str, Any]:
        """An object as it is."""
        found = self._typed("an object")
        assert isinstance(found, dict)
        return found

    def text_table(self) -> dict[str, str]:
        """An object whose values are texts."""
        return {key: self.get(key).text() for key in self.object()}

    def _typed(self, kind: str) -> Any:
        if not isinstance(self.value, KINDS[kind]):
            self._refuse(kind)
        return self.value

    def _refuse(self, kind: str) -> NoReturn:
        message = f"must be {kind}, not {type(self.value).__name__}"
        raise self.wrong(message)
