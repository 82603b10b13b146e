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
    Output,
    Session,
    Stream,
    Thresholds,
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


def logits(engine: Engine, ids: list[int]) -> npt.NDArray[np.float32]:
    session: Session = engine.session(capacity=len(ids))
    last: npt.NDArray[np.float32] = session.prefill(ids)
    return np.concatenate([engine.logits(ids), last[None]])


def main(folder: Path) -> None:
    engine = Engine(folder, weights="int8", threads=2, max_context=512, tda=TDA(active=0.9))
    vocabulary: int = engine.config.vocab_size
    ids: list[int] = engine.tokenizer.encode("One two three four")
    assert logits(engine, ids).shape == (len(ids) + 1, vocabulary)
    assert isinstance(answer(engine, "Name a river.", tda=False), str)
    assert pieces(engine, ids) == pieces(engine, "One two three four")
    scores: npt.NDArray[np.float32] = engine.score(ids, prompt_tokens=2)
    assert scores.shape == (len(ids) - 2,)
    thresholds: Thresholds = engine.calibrate(["Some text.", ids], error=0.2)
    path = Path("thresholds.json")
    thresholds.save(path)
    per_layer: list[float] = Thresholds.load(path).values
    assert len(per_layer) == engine.config.num_layers
    several = engine.generate(["a", "b"], max_new_tokens=2, tda=TDA(thresholds=thresholds))
    assert isinstance(several, list)
    names: list[str] = GenerateOptions.fields
    assert "top_k" in names
    try:
        engine.generate([5] * 512)
    except ContextOverflow as error:
        root: Error = error
        print(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
