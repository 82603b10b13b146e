"""The engine with text on both sides: prompts and chats in, pieces of text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from . import _native, hub, together
from ._native import TDA, CalibrateOptions, ContextOverflow, GenerateOptions, OptionError
from .chat import ChatTemplate, Tools
from .checks import (
    check_count,
    check_progress,
    check_stop,
    check_tda,
    check_type,
    is_id,
    naming,
    warn_caller,
)
from .contents import Contents
from .grammar import Grammar, GrammarCompiler
from .masks import AllowedTokens, Mask, MaskOfFunction
from .options import GenerateKeywords, generate_options, options_of_each
from .prefix_cache import PrefixCache, check_prefix_cache, size
from .stream import Output, Stream, whole
from .tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._native import Thresholds
    from .options import CalibrateKeywords

Prompt = str | Sequence[int]


class TdaWarning(UserWarning):
    """What to expect of a TDA setting with this model and prompt; also in stats.warnings."""


class Engine(_native.Engine):
    """A loaded model.

        with Engine("path/to/checkpoint", weights="int8") as engine:
            print(engine.generate("The sky is", tda=TDA()))

    Any number of threads may use it, and so may a child of fork(), with threads of its own; what
    they decode at the same time shares steps. It is not pickled: load one in each process that is
    spawned (from an engine folder they share its pages). `with` or `close` gives it up.

    model: a checkpoint folder, a GGUF file (of several the first), or a Hugging Face hub id.
    device: auto | cpu | cuda (f32 and bf16 weights).
    weights: auto | f32 | bf16 | bf16c (bf16, compressed without loss) | int8 | int4
        | graded (8 bits of which TDA reads 4 or 8). auto: bf16, or as the file has them.
    kv: how keys and values are cached, auto | f32 | bf16 | int8.
    threads: default as many as this process may run on, by CPU affinity and quota, rounded up.
    max_context: in tokens, default the checkpoint's own.
    max_batch: the most sequences that are decoded together, default what the device can.
    prefix_cache: a PrefixCache, or how much memory one may take to keep beginnings of prompts, as
        "512 MiB"; default none. CPU; models with dynamic RoPE or longrope keep nothing.
    cache_memory: the most that the KV caches of all generations, scores and logits under way may
        take, as "2 GiB"; default no limit. What does not fit beside the others waits at its first
        token, in the order of coming; what never fits is an OptionError. Sessions do not count.
    progress(done, total): of packing, in bytes of weights; those of an engine folder are packed.
    tda: used wherever a call gives none; `tda=False` in a call turns it off there.
    Raises CheckpointError, OptionError or DeviceError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str = "auto",
        weights: str = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        max_batch: int | None = None,
        kv: str = "auto",
        tda: TDA | None = None,
        progress: Callable[[int, int], None] | None = None,
        prefix_cache: PrefixCache | int | str | None = None,
        cache_memory: int | str | None = None,
    ) -> None:
        self.path: Path = hub.find(model)
        self._contents = Contents.of(self.path)
        self.tda = check_tda(tda)
        super().__init__(
            str(self.path),
            device=check_type(device, "device", str),
            weights=check_type(weights, "weights", str),
            kv=check_type(kv, "kv", str),
            threads=check_count(threads, "threads", 2**31 - 1),
            max_context=check_count(max_context, "max_context"),
            max_batch=check_count(max_batch, "max_batch"),
            prefix_cache=check_prefix_cache(prefix_cache),
            cache_memory=0 if cache_memory is None else size(cache_memory, "cache_memory"),
            progress=check_progress(progress),
        )
        warn_caller(self.notices, UserWarning)

    def __repr__(self) -> str:
        names = () if self.closed else ("weights", "device", "threads", "max_context")
        values = [f"{name}={getattr(self, name)!r}" for name in names] or ["closed"]
        return f"Engine({str(self.path)!r}, {', '.join(values)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint has none."""
        return Tokenizer.load(self._contents, self.config.vocab_size)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises CheckpointError if the checkpoint has none."""
        return ChatTemplate.load(self._contents)

    @overload
    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        grammar: Grammar | None = None,
        allowed_tokens: AllowedTokens | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        options: GenerateOptions | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        grammar: Grammar | None = None,
        allowed_tokens: AllowedTokens | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        options: GenerateOptions | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        grammar: Grammar | None = None,
        allowed_tokens: AllowedTokens | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Output | list[Output]:
        """Continues `prompt`, a text or a list of token ids. Several in a list are decoded
        together, each as if alone.

        options or keywords: the fields of GenerateOptions, max_new_tokens=128 (or max_tokens),
        temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, logit_bias={}, logprobs=None, seed=None,
        ignore_eos=False, prefix_cache=None (the engine's). Of several prompts, prompt i has the
        seed `seed + i`, or seed[i] of a list.
        stop: strings that end the text, which stops before them. They may be or contain special
        tokens, which the text does not show.
        tda: TDA() for the recommended setting or one by hand, False for none; without it that of
        the engine.
        grammar: what the text must look like, as Grammar.json_schema(...); the generation ends
        where the grammar does.
        allowed_tokens: instead of it a function, called before each choice with the ids generated
        so far, that returns the ids that may come next, or None for all.
        Raises OptionError, or ContextOverflow if prompt and max_new_tokens exceed max_context.
        Warns with TdaWarning.
        """
        if isinstance(prompt, list | tuple) and prompt and not is_id(prompt[0]):
            encoded = [self._encode(each, f"prompt[{i}]") for i, each in enumerate(prompt)]
            each_options = options_of_each(options, keywords, len(encoded))

            def start(i: int) -> Stream:
                mask = self._mask(grammar, allowed_tokens)
                return self._stream(encoded[i], stop, tda, each_options[i], mask)

            return together.outputs(start, len(encoded), self.max_batch)
        mask = self._mask(grammar, allowed_tokens)
        chosen = generate_options(options, keywords)
        return self._generate(cast(Prompt, prompt), stop, tda, chosen, mask)

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        grammar: Grammar | None = None,
        allowed_tokens: AllowedTokens | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """`generate` for one `prompt`, piece by piece; for a chat pass `chat_prompt(messages)`.

        options, keywords, stop, tda, grammar, allowed_tokens: as in `generate`. What is wrong with
        them raises here, what goes wrong in computing raises with the piece.
        """
        if (
            isinstance(prompt, list | tuple)
            and prompt
            and isinstance(prompt[0], str | list | tuple)
        ):
            raise OptionError(
                f"prompt: found a list of {len(prompt)} prompts, expected one: a stream takes one, "
                "generate several"
            )
        self.tokenizer  # noqa: B018  raises where there is none: ids alone make no pieces
        mask = self._mask(grammar, allowed_tokens)
        return self._stream(prompt, stop, tda, generate_options(options, keywords), mask)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: GenerateOptions | None = None,
        *,
        parse_special: bool = True,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        grammar: Grammar | None = None,
        allowed_tokens: AllowedTokens | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Output:
        """Answers `messages`, [{"role": "user", "content": "..."}, ...], one conversation.

        parse_special: as in `chat_prompt`; options, keywords, stop, tda, grammar and
        allowed_tokens: as in `generate`.
        Raises what `chat_prompt` and `generate` raise.
        """
        chosen = generate_options(options, keywords)
        prompt = self.chat_prompt(messages, parse_special=parse_special)
        return self._generate(prompt, stop, tda, chosen, self._mask(grammar, allowed_tokens))

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        parse_special: bool = True,
        tools: Tools | None = None,
    ) -> list[int]:
        """Token ids of a conversation, `messages`, up to where the answer begins.

        parse_special: special and other added tokens that the messages spell out become those
        tokens, as in transformers, so that a message with "<|im_end|>" in it can end its turn and
        begin another. With False they are text like any other and only the template writes such
        tokens: right for messages from others.
        tools: the functions that the model may call, as the OpenAI API describes them; how it calls
        one is up to its template.
        Raises CheckpointError if the checkpoint has no chat template, OptionError for tools that it
        does not take and for messages that are of the wrong shape, that the template refuses, or
        that hold a special token which the tokenizer has no other way to write.
        """
        parse_special = check_type(parse_special, "parse_special", bool)
        check = partial(self._check_length, name="messages")
        tokenizer = self.tokenizer  # if it is missing, this is said before the template is
        return self.chat_template.encode(messages, tokenizer, parse_special, check, tools)

    def score(  # type: ignore[override]  # what has text on both sides takes other arguments
        self, token_ids: Sequence[int], prompt_tokens: int, tda: TDA | bool | None = None
    ) -> np.ndarray:
        """Log-probability of each of `token_ids` [T] after the first `prompt_tokens`,
        [T - prompt_tokens] f32.

        The prompt is prefilled, the rest goes through the decode path that `generate` uses.
        tda: as in `generate`. Raises OptionError, or ContextOverflow if T exceeds max_context.
        """
        count = check_count(prompt_tokens, "prompt_tokens")
        return super().score(token_ids, count, self._tda(tda)).log_probabilities

    def score_each(  # type: ignore[override]
        self,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        tda: TDA | bool | None = None,
    ) -> list[np.ndarray]:
        """`score` of each of `continuations` behind `prompt`, prefilled once; tda: as there."""
        each = super().score_each(prompt, continuations, self._tda(tda))
        return [result.log_probabilities for result in each]

    def calibrate(  # type: ignore[override]
        self,
        texts: Sequence[str | Sequence[int]] | None = None,
        error: float | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[CalibrateKeywords],
    ) -> Thresholds:
        """Searches, per layer, the largest threshold whose error (see TDA) on the texts stays at or
        under `error` (default 0.1). With graded weights it measures instead what fewer inputs at 8
        bits cost, for TDA(loss=...): each text's first half is the prompt, its second is scored.
        Without texts the model writes its own.

        options: the further fields of CalibrateOptions, scope="sequence" or "token"; bytes: instead
        of error, with scope "token", the share of FFN bytes to read; max_tokens=512 and
        sample_tokens=32 of each text; self_texts=16 texts of self_tokens=128 that the model writes
        from seed=0 on. progress(done, total) counts texts, then (for a budget of bytes) layers.
        Raises OptionError.
        """
        if texts is not None:
            if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) == 0:
                raise OptionError(f"texts: found {texts!r}, expected a list of texts, or None")
            for name in ("self_texts", "self_tokens", "seed"):
                if name in options:
                    found = cast(dict[str, Any], options)[name]
                    raise OptionError(f"{name} {found!r}: expected only without texts")
        if error is not None and options.get("bytes") is not None:
            raise OptionError(f"error {error!r}: expected only without bytes")
        wanted = {} if error is None else {"error": error}
        # Of these, however long, the beginning is taken.
        ids = [
            self._encode(text, f"texts[{i}]", is_prompt=False) for i, text in enumerate(texts or ())
        ]
        return super().calibrate(
            ids, CalibrateOptions(**wanted, **options), check_progress(progress)
        )

    def _generate(
        self,
        prompt: Prompt,
        stop: str | Sequence[str] | None,
        tda: TDA | bool | None,
        options: GenerateOptions,
        mask: Mask | None,
    ) -> Output:
        return whole(self._stream(prompt, stop, tda, options, mask))

    def _stream(
        self,
        prompt: Prompt,
        stop: str | Sequence[str] | None,
        tda: TDA | bool | None,
        options: GenerateOptions,
        mask: Mask | None,
    ) -> Stream:
        stop = check_stop(stop)
        needs_text = bool(stop) or has_tokenizer(self._contents)
        text = self.tokenizer.stream() if needs_text else None
        generation = self.start(self._encode(prompt), options, self._tda(tda))
        warn_caller(generation.stats.warnings, TdaWarning)
        return Stream(generation, text, stop, options, mask)

    def _mask(self, grammar: Grammar | None, allowed_tokens: AllowedTokens | None) -> Mask | None:
        """Of one generation."""
        if grammar is not None and allowed_tokens is not None:
            raise OptionError("grammar: found allowed_tokens, too, expected one or the other")
        if grammar is not None:
            return self._grammars.start(grammar)
        if allowed_tokens is not None:
            return MaskOfFunction(allowed_tokens, self.config.vocab_size)
        return None

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises OptionError for a `grammar` that is wrong or that nothing matches."""
        self._grammars.start(grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.config.eos_tokens)

    def _encode(self, text: Prompt, name: str = "prompt", is_prompt: bool = True) -> Sequence[int]:
        if isinstance(text, str):
            if is_prompt:
                self._check_length(text, name)
            tokenizer = self.tokenizer  # without which no item is to blame
            with naming("" if name == "prompt" else name):
                ids: Sequence[int] = tokenizer.encode(text)
        elif isinstance(text, Mapping | bytes) or not isinstance(text, Iterable):
            raise OptionError(f"{name}: found {text!r}, expected a text or a list of token ids")
        else:
            ids = text
        if isinstance(ids, Sized) and len(ids) == 0:
            raise OptionError(f"{name}: found {text!r}, expected at least one token")
        return ids

    def _check_length(self, text: str, name: str) -> None:
        least = self.tokenizer.least_tokens(text)
        if least > self.max_context:
            raise ContextOverflow(
                f"{name}: found {len(text)} characters, which are {least} tokens or more, "
                f"expected at most max_context {self.max_context}"
            )

    def _tda(self, tda: TDA | bool | None) -> TDA | None:
        if tda is False:
            return None
        return self.tda if tda is None else check_tda(tda)
