"""The one exception that speaks to the user."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

_LONGEST = 2000  # characters


class UserError(ValueError):
    """Bad input, told in one sentence that names what was wrong and what would be right.

    The commands print it without a traceback and exit with a non-zero code. It is one line of readable length, whatever
    stands in the names that it quotes.
    """

    def __init__(self, sentence: str) -> None:
        line = " ".join(sentence.split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 500]} … {line[-400:]}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, each once: an error that is raised again may be among its own causes."""
    seen: list[int] = []
    while error is not None and id(error) not in seen:
        yield error
        seen.append(id(error))
        error = error.__cause__ or error.__context__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``word``, or an empty string when none is close."""
    match = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
