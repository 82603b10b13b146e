"""What TDA says of a setting: its words, and warnings of what to expect."""

import warnings

import pytest
from conftest import PROMPT

from tdaengine import TDA, Engine, TdaWarning

LONG = "x" * 70  # of as many tokens


def warned(engine: Engine, prompt: str, tda: TDA) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = engine.generate(prompt, max_new_tokens=4, ignore_eos=True, tda=tda)
    assert all(w.category is TdaWarning and w.filename == __file__ for w in caught)
    found = [str(w.message) for w in caught]
    assert found == out.stats.warnings
    return found


def test_settings_that_need_no_warning(engine: Engine):
    for tda in (TDA(), TDA(scope="token", active=0.3), TDA(scope="token", error=0.3)):
        assert warned(engine, PROMPT, tda) == []
    assert warned(engine, LONG, TDA(active=0.9)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT, {"active": 0.9}, "a prompt of under 64 tokens"),
        (LONG, {"active": 0.75}, "on SmolLM2-135M error 0.1 costs 23% perplexity"),
        (LONG, {"error": 0.1}, "on SmolLM2-135M error 0.1 costs 23% perplexity"),
    ],
)
def test_a_sequence_mask_that_a_model_does_not_stand(engine: Engine, prompt, options, message):
    (found,) = warned(engine, prompt, TDA(**options))
    assert message in found


def test_thresholds_from_little_text(engine: Engine):
    thresholds = engine.calibrate([LONG], error=0.01)
    (found,) = warned(engine, LONG, TDA(thresholds=thresholds))
    assert found.startswith(f"thresholds calibrated on {thresholds.tokens} tokens")
    much = engine.calibrate([LONG + "y" * 50] * 10, error=0.01)
    assert warned(engine, LONG, TDA(thresholds=much)) == []


def test_the_recommended_setting_goes_by_the_weights(folder):
    for weights, by_hand in (
        ("graded", TDA(inputs=0.2)),
        ("int8", False),
        ("int4", TDA(inputs=0.2)),
        ("bf16", False),
        ("bf16c", False),
    ):
        with Engine(folder, weights=weights, threads=1, tda=TDA()) as engine:
            options = {"max_new_tokens": 12, "ignore_eos": True}
            found = engine.generate(PROMPT, **options)
            expected = engine.generate(PROMPT, **options, tda=by_hand)
        assert found.token_ids == expected.token_ids
        assert found.stats.ffn_bytes == expected.stats.ffn_bytes
        if by_hand is False:
            assert found.stats.tda.startswith(f"dense: with {weights} weights no setting is faster")
            assert expected.stats.tda == "dense"
        else:
            assert found.stats.tda == expected.stats.tda
            assert (found.stats.ffn_bytes_fraction < 1) == (weights == "graded")
            assert found.stats.head_bytes_fraction < 1
