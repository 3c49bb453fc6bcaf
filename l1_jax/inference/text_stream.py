"""Tokens in, text out as soon as it is certain: whole characters, and no part of a stop string."""

import codecs
from collections.abc import Callable, Iterable, Sequence


class TextStream:
    """The `text` of one completion as it grows.

    `finish_reason` is None until the end, then "stop" or "length".
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str]):
        self._token_bytes = token_bytes
        self._stop = stop
        # A character may come in the bytes of several tokens; the decoder waits for its last.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # What may yet become a stop string.
        self._held = ""

        self.text = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def add(self, tokens: Iterable[int]) -> str:
        """Takes tokens in; returns the text that is new. Ends at the first stop string."""
        new_text = ""
        for token in tokens:
            self.num_tokens += 1
            characters = self._decoder.decode(self._token_bytes(int(token)))
            new_text += self._release(characters, is_last=False)
            if self.finish_reason:
                break
        return new_text

    def end(self, reason: str) -> str:
        """Ends the text; returns what was held back."""
        characters = self._decoder.decode(b"", final=True)
        new_text = self._release(characters, is_last=True)
        self.finish_reason = self.finish_reason or reason
        return new_text

    def _release(self, characters: str, is_last: bool) -> str:
        """Takes characters in; returns those that are certain to be of the text."""
        self._held += characters
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]

        if found:
            self.finish_reason = "stop"
            certain = self._held[: min(found)]
            self._held = ""
        elif is_last:
            certain = self._held
            self._held = ""
        else:
            uncertain_length = max(map(self._overlap, self._stop), default=0)
            split = len(self._held) - uncertain_length
            certain = self._held[:split]
            self._held = self._held[split:]

        self.text += certain
        return certain

    def _overlap(self, stop: str) -> int:
        """How many of the last characters could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if stop.startswith(self._held[-length:]):
                return length
        return 0
