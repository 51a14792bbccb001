"""Text as it is spoken: token by token, never half a character, and cut exactly before a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet one


class Spoken:
    """The text of one answer, in pieces that can be shown at once.

    A piece ends before a character whose bytes have not all come, and before what may be the beginning of a stop
    string. All pieces together are decode(all tokens), up to the first stop string.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("an empty stop string stops everything")
        self.decode, self.stops = decode, stops
        self.tokens: list[int] = []
        self.start = self.read = 0  # tokens[start:read] are known and give the rest its context, tokens[read:] are new
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown once `token` has come; `stopped` is True when it completes a stop string."""
        self.tokens.append(token)
        return self._piece(last=False)

    def end(self) -> str:
        """What is left to show when nothing more comes."""
        return "" if self.stopped else self._piece(last=True)

    def _piece(self, last: bool) -> str:
        text = self.decode(self.tokens[self.start :])
        if last or not text.endswith(UNFINISHED):
            self.held += text[len(self.decode(self.tokens[self.start : self.read])) :]
            self.start, self.read = self.read, len(self.tokens)
        found = [at for at in map(self.held.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may become the whole of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
