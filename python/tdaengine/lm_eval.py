"""tdaengine as a model of the Language Model Evaluation Harness (lm_eval).

    python -m tdaengine.lm_eval --model tdaengine --model_args pretrained=FOLDER --tasks NAME

is the command `lm_eval` with this model known to it: the harness has no entry point for models that
live elsewhere. In Python, importing this module makes model="tdaengine" known.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ._native import TDA, Error, OptionError
from .contents import Contents
from .engine import Engine
from .options import FILES
from .tasks import Pair, score_pairs
from .tokenizer_files import Settings

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found,unused-ignore]
    from lm_eval.api.registry import (  # type: ignore[import-not-found,unused-ignore]
        register_model,
    )
    from lm_eval.models.utils import (  # type: ignore[import-not-found,unused-ignore]
        normalize_gen_kwargs,
    )
    from lm_eval.utils import (  # type: ignore[import-not-found,unused-ignore]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        f"tdaengine.lm_eval: needs lm_eval, pip install 'tdaengine[eval]': {error}"
    ) from error

ENGINE_OPTIONS = ("weights", "device", "kv", "threads", "max_context")
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")

log = logging.getLogger(__name__)


@register_model("tdaengine")
class EngineLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """pretrained: as Engine's model. Further arguments are weights, device, kv, threads and
    max_context of Engine, and the setting of TDA: tda=recommended, or its fields, as scope=token
    and active=0.3, of which thresholds is a file's name.

    Requests run one by one, and choices behind the same question share its prefill and the masks
    made from it. Texts that are too long lose their beginning, as with the harness's own models.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size not in (None, 1, "1", "auto"):
            raise OptionError(f"batch_size: found {batch_size!r}, expected 1: requests run in turn")
        known = ("pretrained", *ENGINE_OPTIONS, "tda", *TDA.fields)
        for name in options:
            if name not in known:
                raise OptionError(f'unknown option "{name}": expected one of {", ".join(known)}')
        given = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
        if given.get("device") == "cuda:0":  # what the command says where nothing is asked for
            given["device"] = "auto"
        self.engine = Engine(pretrained, tda=_setting(**options), **given)
        roles = Settings.read(Contents.of(self.engine.path)).special_tokens
        self._bos, self._eos = roles.get("bos_token"), roles.get("eos_token")
        self._told: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The end of a text: the tokenizer's token for it, or else the checkpoint's first."""
        if self._eos is not None:
            return self.engine.tokenizer.added_tokens[self._eos]
        if not self.engine.config.eos_tokens:
            raise OptionError(f"{self.engine.path}: found no token that ends a text, expected one")
        return self.engine.config.eos_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """What texts without a context follow."""
        if self._bos is None:
            return self.eot_token_id
        return self.engine.tokenizer.added_tokens[self._bos]

    @property
    def max_length(self) -> int:
        """Tokens that go in: the last one of a text that is scored does not."""
        return self.engine.max_context - 1

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.path.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise OptionError(
                f"--apply_chat_template: found {chat_template!r}, expected no name: the "
                "checkpoint's own template is used"
            )
        return self.engine.chat_template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """add_generation_prompt: if False, the last message is the answer's beginning."""
        template = self.engine.chat_template
        if add_generation_prompt:
            return template.render(chat_history)
        *before, last = chat_history
        if last["role"] != "assistant":
            raise OptionError(f"messages: found {last['role']!r} last, expected 'assistant'")
        return template.render(before) + last["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:  # a template may have begun the text with <s>
            add_special_tokens = self._bos is None or not string.startswith(self._bos)
        return self.engine.tokenizer.encode(string, add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        tda = self.engine.tda
        if tda is not None and not (tda.scope == "token" and tda.thresholds):
            raise OptionError(
                f"loglikelihood_rolling: found {tda}, expected dense, or scope token with "
                "thresholds: whole texts have no prompt to take masks from; use tdaengine "
                "evaluate --data"
            )
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Texts"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs, True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Continuations")
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[0][: pair[1]]):
            same_context = list(group)
            for (ids, prompt), score in zip(
                same_context, score_pairs(self.engine, same_context, self.engine.tda), strict=True
            ):
                total = float(score.log_probabilities.sum(dtype="f8"))
                answer = (total, score.top_tokens.tolist() == ids[prompt:])
                texts = requests[len(answers)][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers.append(answer)
                self._tell(score.stats.warnings)
            progress.update(len(same_context))
        progress.close()
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Without the beginning of the context where both are too long."""
        room = self.engine.max_context - len(continuation)
        if room < 1:
            raise OptionError(
                f"continuation: found {len(continuation)} tokens, expected fewer than max_context "
                f"{self.engine.max_context}"
            )
        if len(context) > room:
            self._tell(["contexts longer than max_context lose their beginning"])
        context = context[-room:]
        return context + continuation, len(context)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Texts"):
            context, given = request.args
            options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stop = tuple(filter(None, options.pop("until")))
            new = options.pop("max_gen_toks")
            sampled = options.pop("do_sample")
            temperature = options.pop("temperature", 1.0 if sampled else 0.0)
            for name in options:
                if name not in SAMPLING:
                    expected = ("until", "max_gen_toks", "do_sample", "temperature", *SAMPLING)
                    raise OptionError(
                        f'generation: unknown option "{name}": expected one of '
                        f"{', '.join(expected)}"
                    )
            room = self.max_length - new
            if room < 1:
                raise OptionError(
                    f"max_gen_toks {new}: expected fewer than max_context {self.max_length + 1}"
                )
            ids = self.tok_encode(context)
            if len(ids) > room:
                self._tell(["contexts longer than max_context lose their beginning"])
            out = self.engine.generate(
                ids[-room:], max_new_tokens=new, temperature=temperature, stop=stop, **options
            )
            texts.append(out.text or "")
            self.cache_hook.add_partial("generate_until", (context, given), texts[-1])
        return texts

    def _tell(self, warnings: Sequence[str]) -> None:
        """Each once, as thousands of requests may share it."""
        for warning in warnings:
            if warning not in self._told:
                self._told.add(warning)
                log.warning(warning)


def _setting(tda: str | None = None, **fields: Any) -> TDA | None:
    if tda not in (None, "recommended", "off"):
        raise OptionError(
            f"tda: found {tda!r}, expected recommended or off, or fields by name, as active=0.5"
        )
    if tda is not None and fields:
        raise OptionError(f"tda: found {tda!r} and {', '.join(fields)}, expected one or the other")
    for name in FILES.keys() & fields.keys():
        fields[name] = FILES[name](fields[name])
    return TDA(**fields) if fields or tda == "recommended" else None


def main() -> int:
    """The command lm_eval. Returns the exit code."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found,unused-ignore]

    try:
        cli_evaluate()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
