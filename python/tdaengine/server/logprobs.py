"""Log-probabilities as clients of the OpenAI API expect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..token_bytes import token_bytes
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Place:
    """A token of a text and the likeliest ones at its place. logprob: None for a prompt's first."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


class LogprobShapes:
    """Of one answer, whose places come in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = tokenizer.stream()
        self._length = 0  # characters of the answer so far

    def chat(self, places: Sequence[Place]) -> dict[str, Any]:
        content = [
            {
                **self._token(place.token, place.logprob),
                "top_logprobs": [self._token(*each) for each in place.top],
            }
            for place in places
        ]
        return {"content": content, "refusal": None}

    def completion(self, places: Sequence[Place], top: int) -> dict[str, Any]:
        offsets = []
        for place in places:
            offsets.append(self._length)
            self._length += len(self._text.push(place.token))
        return {
            "tokens": [self._name(place.token) for place in places],
            "token_logprobs": [place.logprob for place in places],
            "top_logprobs": [self._top(place) for place in places] if top else None,
            "text_offset": offsets,
        }

    def _top(self, place: Place) -> dict[str, float] | None:
        """With the token itself, however unlikely it was."""
        if place.logprob is None:
            return None
        likeliest = {self._name(token): logprob for token, logprob in place.top}
        return {**likeliest, self._name(place.token): place.logprob}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        (content,) = token_bytes(self._tokenizer, [token])
        return {"token": self._name(token), "logprob": logprob, "bytes": list(content)}

    def _name(self, token: int) -> str:
        """Its text; of a token that is part of a character, its id."""
        (content,) = token_bytes(self._tokenizer, [token])
        try:
            return content.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return f"token_id:{token}"
