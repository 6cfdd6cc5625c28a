"""Reading JSON that somebody may have torn or edited: every value is there and of its type, or the line says which not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.typed_records import value_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a JSON file that knows its place.

    Attributes:
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
        if key not in self.read(dict):
            message = f"'{key}' is missing"
            raise self.wrong(message)
        return Node(self.value[key], self.file, f"{self.place}.{key}" if self.place else key)

    def items(self) -> Iterator[Node]:
        """The members of a list.

        Raises:
            BadInputError: this is none.
        """
        for index, item in enumerate(self.read(list)):
            yield Node(item, self.file, f"{self.place}[{index}]")

    def at(self, index: int) -> Node:
        """The member of a list.

        Raises:
            BadInputError: there is none.
        """
        found = self.read(list)
        if not 0 <= index < len(found):
            message = f"has no entry {index}"
            raise self.wrong(message)
        return Node(found[index], self.file, f"{self.place}[{index}]")

    def read(self, kind: Any) -> Any:
        """The value as that type.

        Raises:
            BadInputError: it has another.
        """
        try:
            return value_of(self.value, kind, self.place)
        except TypeError as error:
            raise Node(None, self.file).wrong(str(error).lstrip()) from None
