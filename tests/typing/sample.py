"""What a user writes, with every type spelled out: for mypy --strict, and to be run on a model."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tdaengine import (
    TDA,
    ContextOverflow,
    Engine,
    Error,
    GenerateOptions,
    GenerationStats,
    Grammar,
    Output,
    Session,
    Stream,
    Thresholds,
    TokenLogprobs,
)


def answer(engine: Engine, question: str, tda: TDA | bool | None = None) -> str:
    out: Output = engine.chat(
        [{"role": "user", "content": question}], max_new_tokens=8, temperature=0.7, seed=1, tda=tda
    )
    stats: GenerationStats = out.stats
    layers: list[float] = stats.ffn_active_by_layer
    assert 0 < min(layers) <= stats.ffn_active <= 1
    assert out.finish_reason is None or isinstance(out.finish_reason, str)
    return out.text or ""


def pieces(engine: Engine, prompt: str | Sequence[int]) -> list[str]:
    stream: Stream = engine.stream(prompt, stop=["\n"], max_new_tokens=8)
    texts: list[str] = list(stream)
    stream.cancel()
    ids: list[int] = stream.output.token_ids
    assert len(ids) == stream.output.stats.new_tokens
    return texts


def constrained(engine: Engine, prompt: str) -> list[float]:
    allowed: set[int] = set(range(5, 50))
    out: Output = engine.generate(
        prompt,
        max_new_tokens=4,
        logprobs=2,
        logit_bias={5: -1.5},
        presence_penalty=0.5,
        allowed_tokens=lambda ids: allowed if len(ids) < 2 else None,
    )
    places: list[TokenLogprobs] = out.logprobs or []
    best: list[tuple[int, float]] = places[0].top
    assert len(best) == 2
    grammar: Grammar = Grammar.json_schema({"enum": ["a", "b"]})
    assert grammar == Grammar.json_schema('{"enum": ["a", "b"]}')
    return [place.logprob for place in places]


def logits(engine: Engine, ids: list[int]) -> npt.NDArray[np.float32]:
    session: Session = engine.session(capacity=len(ids))
    last: npt.NDArray[np.float32] = session.prefill(ids)
    return np.concatenate([engine.logits(ids), last[None]])


def main(folder: Path) -> None:
    engine = Engine(folder, weights="int8", threads=2, max_context=512, tda=TDA())
    vocabulary: int = engine.config.vocab_size
    ids: list[int] = engine.tokenizer.encode("One two three four")
    assert logits(engine, ids).shape == (len(ids) + 1, vocabulary)
    assert isinstance(answer(engine, "Name a river.", tda=False), str)
    assert len(constrained(engine, "One two")) == 4
    assert pieces(engine, ids) == pieces(engine, "One two three four")
    scores: npt.NDArray[np.float32] = engine.score(ids, prompt_tokens=2)
    assert scores.shape == (len(ids) - 2,)
    thresholds: Thresholds = engine.calibrate(["Some text.", ids], error=0.2)
    path = Path("thresholds.json")
    thresholds.save(path)
    per_layer: list[float] = Thresholds.load(path).values
    assert len(per_layer) == engine.config.num_layers
    several: list[Output] = engine.generate(["a", "b"], max_tokens=2, seed=[1, 2], tda=TDA())
    assert [str(out) for out in several] == [out.text for out in several]
    one: Output = engine.generate("a", GenerateOptions(max_new_tokens=2))
    warned: list[str] = one.stats.warnings
    assert not warned and one.stats.tda != "dense"
    names: list[str] = GenerateOptions.fields
    assert "top_k" in names
    try:
        engine.generate([5] * 512, tda=TDA(thresholds=thresholds))
    except ContextOverflow as error:
        root: Error = error
        print(root)
    with Engine(folder) as other:
        name: str = repr(other)
    assert name != repr(other)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
