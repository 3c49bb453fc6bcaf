"""Tokens in, text out as soon as it is certain: whole characters, and no part of a stop string."""

import codecs
from collections.abc import Callable, Iterable, Sequence


class TextStream:
    """The `text` of one completion as it grows; `finish_reason` is None until the end, then "stop" or "length"."""

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str]):
        self._token_bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self.text, self.num_tokens = "", "", 0
        self.finish_reason: str | None = None

    def add(self, tokens: Iterable[int]) -> str:
        """Takes tokens in; returns the text that is new. Ends at the first stop string."""
        out = ""
        for token in tokens:
            self.num_tokens += 1
            out += self._let_out(self._decoder.decode(self._token_bytes(int(token))))
            if self.finish_reason:
                break
        return out

    def end(self, reason: str) -> str:
        """Ends the text; returns what was held back."""
        out = self._let_out(self._decoder.decode(b"", final=True), final=True)
        self.finish_reason = self.finish_reason or reason
        return out

    def _let_out(self, text: str, final: bool = False) -> str:
        self._held += text
        if found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            self.finish_reason = "stop"
            out, self._held = self._held[: min(found)], ""
        else:
            certain = len(self._held) - (0 if final else max(map(self._overlap, self._stop), default=0))
            out, self._held = self._held[:certain], self._held[certain:]
        self.text += out
        return out

    def _overlap(self, stop: str) -> int:
        """How many of the last characters could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
