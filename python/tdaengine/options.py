"""How calls take options: as keywords that editors know, and one by one for several prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ._native import TDA, GenerateOptions, OptionError, Predictor, Thresholds
from .prefix_cache import PrefixCache

RECOMMENDED = "recommended"  # TDA() on the command line
FILES = {"thresholds": Thresholds.load, "predictor": Predictor.load}  # fields of TDA that are read


class GenerateKeywords(TypedDict, total=False):
    """The fields of GenerateOptions; max_tokens is another name for max_new_tokens, and seed may be
    a list with one for each of several prompts."""

    max_new_tokens: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    seed: int | Sequence[int] | None
    ignore_eos: bool
    prefix_cache: PrefixCache | None


class CalibrateKeywords(TypedDict, total=False):
    """The fields of CalibrateOptions but error."""

    scope: str
    bytes: float | None
    max_tokens: int
    sample_tokens: int
    self_texts: int
    self_tokens: int
    seed: int


def generate_options(
    options: GenerateOptions | None, keywords: Mapping[str, Any]
) -> GenerateOptions:
    """Whichever of the two is given. Raises OptionError for both."""
    if options is not None:
        if not isinstance(options, GenerateOptions):
            raise OptionError(f"options: found {options!r}, expected GenerateOptions")
        if keywords:
            given = ", ".join(keywords)
            raise OptionError(f"options: found GenerateOptions and {given}, expected one or other")
        return options
    values = dict(keywords)
    if "max_tokens" in values:
        if "max_new_tokens" in values:
            raise OptionError(
                "max_tokens: found max_new_tokens, too, expected one: they are the same"
            )
        values["max_new_tokens"] = values.pop("max_tokens")
    return GenerateOptions(**values)


def options_of_each(
    options: GenerateOptions | None, keywords: Mapping[str, Any], count: int
) -> list[GenerateOptions]:
    """For `count` prompts. Each has a seed of its own: the one in the list, or seed + i, modulo
    2**64, for prompt i."""
    seed = keywords.get("seed")
    if options is None and isinstance(seed, list | tuple):
        if len(seed) != count:
            raise OptionError(f"seed: found {len(seed)}, expected one for each of {count} prompts")
        return [generate_options(None, {**keywords, "seed": each}) for each in seed]
    common = generate_options(options, keywords)
    if common.seed is None:
        return [common] * count
    fields = {name: getattr(common, name) for name in GenerateOptions.fields}
    seeds = [(common.seed + i) % 2**64 for i in range(count)]
    return [GenerateOptions(**{**fields, "seed": each}) for each in seeds]


def parse_tda(text: str, option: str = "") -> TDA | None:
    """What the option --tda says: "recommended", "off", or "name=value,name=value" with fields of
    TDA, of which thresholds and predictor are names of files. option: how messages name it, default
    --tda and the text. Raises OptionError or CheckpointError."""
    option = option or f"--tda {text}"
    if text == RECOMMENDED:
        return TDA()
    if text == "off":
        return None
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator:
            hint = "; a prompt goes before --tda" if " " in text else ""
            raise OptionError(
                f"{option}: found {part!r}, expected NAME=VALUE, recommended or off{hint}"
            )
        if name in values:
            raise OptionError(f"{option}: found {name!r} twice")
        values[name] = FILES[name](value) if name in FILES else _parse_value(value)
    return TDA(**values)


def _parse_value(text: str) -> Any:
    """true and false, a number, or else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
