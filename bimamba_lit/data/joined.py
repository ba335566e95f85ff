"""All of a text as one document, as quantization papers evaluate perplexity."""

from collections.abc import Iterator
from dataclasses import dataclass

from bimamba_lit.data.sources import Part, digest, size_of

_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Joined:
    r"""Parts as one document, blank lines between what they hold.

    Args:
        parts: What to join.
        lines: Join lines instead of documents, the way papers join the rows that the data set WikiText has of every
            line: ``"\n\n".join(rows)``, a row being a line with its end, or nothing where the line is blank.
    """

    parts: tuple[Part, ...]
    lines: bool = False

    def texts(self, document_end: str | None) -> Iterator[tuple[str, bool]]:
        """Yield text in order; the document ends with the last."""
        yield from ((text, False) for text in self._joined(document_end))
        yield "", True

    def digest(self) -> str:
        """Return a line that stands for the content, wherever it lies."""
        return f"joined {self.lines} {digest(self.parts)}"

    def size(self) -> int | None:
        """Return the bytes of text, or None where that takes reading all of it."""
        return size_of(self.parts)

    def _joined(self, document_end: str | None) -> Iterator[str]:
        begun, between = False, ""
        for part in self.parts:
            for text, ends in part.texts(document_end):
                for row in _rows(text) if self.lines else [text]:
                    if row or self.lines:
                        yield between + row
                        begun, between = True, _BETWEEN if self.lines else ""
                if begun and ends:
                    between = _BETWEEN


def _rows(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n") if text else []
    return [f"{line}\n" if line.strip() else "" for line in lines]
