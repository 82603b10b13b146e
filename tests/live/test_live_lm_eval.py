"""tdaengine in the Language Model Evaluation Harness, beside the harness's own model `hf`."""

from __future__ import annotations

import sys
from pathlib import Path

import own_tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from own_tasks import CHOICES

from tdaengine import TDA, Engine, Error, OptionError
from tdaengine.lm_eval import EngineLM, main

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
TOLERANCE = 2e-4  # of a log-probability, in f32; one of a token is about -3
TEXT = "A ship left the harbour at dawn. Nobody saw it leave but a boy with a dog. " * 4
CHAT = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear"}]


@pytest.fixture(scope="module")
def hf() -> HFLM:
    return HFLM(pretrained=str(SMOLLM2), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def ours() -> EngineLM:
    return EngineLM(str(SMOLLM2), weights="f32")


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [(question, choice) for question, choices in CHOICES.items() for choice in choices]


def test_log_likelihoods(hf: HFLM, ours: EngineLM):
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    expected = hf.loglikelihood(requests("loglikelihood", PAIRS))
    for (total, greedy), (wanted, is_greedy) in zip(found, expected, strict=True):
        assert total == pytest.approx(wanted, abs=20 * TOLERANCE)
        assert greedy == is_greedy
    assert {greedy for _, greedy in found} == {True, False}


def test_questions_are_prefilled_once(ours: EngineLM, monkeypatch: pytest.MonkeyPatch):
    prompts: list[list[int]] = []
    native = Engine.__mro__[1]
    score_each = native.score_each

    def counted(engine, prompt, continuations, tda):
        prompts.append(prompt)
        return score_each(engine, prompt, continuations, tda)

    monkeypatch.setattr(native, "score_each", counted)
    ours.loglikelihood(requests("loglikelihood", PAIRS))
    assert len(prompts) == len(CHOICES)


def test_texts_longer_than_the_context():
    ours = EngineLM(str(SMOLLM2), weights="f32", max_context=33)
    hf = HFLM(pretrained=str(SMOLLM2), dtype="float32", device="cpu", max_length=32)
    texts = requests("loglikelihood_rolling", [(TEXT,), ("Short.",)])
    expected = hf.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=80 * TOLERANCE)
    pairs = requests("loglikelihood", [(TEXT, " Then it rained.")])
    ((found, _),), ((expected, _),) = ours.loglikelihood(pairs), hf.loglikelihood(pairs)
    assert found == pytest.approx(expected, abs=20 * TOLERANCE)
    with pytest.raises(OptionError, match="continuation: found 77 tokens, expected fewer than"):
        ours.loglikelihood(requests("loglikelihood", [("Once", " " + TEXT)]))


def test_written_texts(hf: HFLM, ours: EngineLM):
    asked = requests(
        "generate_until",
        [
            ("One, two, three,", {"until": ["six"], "max_gen_toks": 16}),
            ("The capital of France is", {"until": ["\n", "."], "do_sample": False}),
            ("One, two, three,", {"until": [], "max_gen_toks": 5, "temperature": 0.0}),
        ],
    )
    assert ours.generate_until(asked) == hf.generate_until(asked)
    for options, message in (
        ({"num_beams": 2}, 'generation: unknown option "num_beams"'),
        ({"max_gen_toks": 10**6}, "max_gen_toks 1000000: expected fewer than max_context 8192"),
    ):
        with pytest.raises(OptionError, match=message):
            ours.generate_until(requests("generate_until", [("A", options)]))


def test_chats(hf: HFLM, ours: EngineLM):
    for messages, prompt in ((CHAT[:1], True), (CHAT, False)):
        text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == hf.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours.tok_encode(text) == hf.tok_encode(text)
    assert ours.chat_template(True) == hf.chat_template(True)
    assert ours.tokenizer_name.endswith("SmolLM2-135M-Instruct")


def test_options(tmp_path: Path):
    lm = EngineLM(str(SMOLLM2), weights="graded", inputs=0.3, active=0.2, threads=1)
    assert repr(lm.engine.tda) == repr(TDA(inputs=0.3, active=0.2))
    assert (lm.engine.weights, lm.engine.threads) == ("graded", 1)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS[:1]))
    ids = lm.tok_encode("".join(PAIRS[0]))
    scores = lm.engine.score(ids, len(lm.tok_encode(PAIRS[0][0])))
    assert found[0][0] == pytest.approx(float(scores.sum()), abs=1e-4)
    with pytest.raises(OptionError, match="whole texts have no prompt to take masks from"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]))
    for options, message in (
        ({"wieghts": "int8"}, 'unknown option "wieghts": expected one of pretrained, weights, '),
        ({"tda": "on"}, "tda: found 'on', expected recommended or off, or fields by name"),
        ({"tda": "recommended", "active": 0.5}, "tda: found 'recommended' and active"),
        ({"active": 1.5}, "active 1.5"),
        ({"thresholds": str(tmp_path / "none")}, "none"),
        ({"batch_size": 8}, "batch_size: found 8, expected 1"),
    ):
        with pytest.raises(Error, match=message):
            EngineLM(str(SMOLLM2), **options)


def test_a_task_by_name_and_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own_tasks.write(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    common = {"tasks": ["own_choices"], "task_manager": manager, "bootstrap_iters": 0}
    results = {
        name: simple_evaluate(model=name, model_args=f"pretrained={SMOLLM2},{more}", **common)
        for name, more in (("hf", "dtype=float32,device=cpu"), ("tdaengine", "weights=bf16"))
    }
    expected, found = (results[name]["results"]["own_choices"] for name in ("hf", "tdaengine"))
    assert found["acc,none"] == expected["acc,none"]
    picked = []
    for name in ("hf", "tdaengine"):
        scores = [s["filtered_resps"] for s in results[name]["samples"]["own_choices"]]
        picked.append([row.index(max(row)) for row in scores])
    assert picked[0] == picked[1]
    model = ["--model", "tdaengine", "--model_args"]
    tasks = ["--tasks", "own_choices", "--include_path", str(tmp_path)]
    command = ["lm_eval", *model, f"pretrained={SMOLLM2},weights=graded,tda=recommended", *tasks]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert "|own_choices|" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm_eval", *model, f"pretrained={SMOLLM2},speed=1", *tasks])
    assert main() == 2
    assert 'error: unknown option "speed"' in capsys.readouterr().err
