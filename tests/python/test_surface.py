"""What help(), pickle and repr make of the public names."""

import inspect
import pickle
import re
from pathlib import Path

import pytest
from conftest import PROMPT

import tdaengine
from tdaengine import TDA, Engine, Error, GenerateOptions, GenerationStats, Thresholds

CLASSES = [thing for thing in vars(tdaengine).values() if inspect.isclass(thing)]
ERRORS = [kind for kind in CLASSES if issubclass(kind, Error)]
# What an argument's name goes without saying.
CONVENTIONS = {"self", "args", "kwargs", "arg"}


def members(kind: type) -> dict[str, object]:
    """The public methods and properties, those of its own bases included."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("tdaengine")]
    names = {name for base in own for name in vars(base) if not name.startswith("_")}
    return {name: inspect.getattr_static(kind, name) for name in names}


DOCUMENTED = {
    **{kind.__name__: kind for kind in CLASSES},
    **{
        f"{kind.__name__}.{name}": getattr(kind, name, member)
        for kind in CLASSES
        if kind not in ERRORS
        for name, member in members(kind).items()
    },
    "measure_read_bandwidth": tdaengine.measure_read_bandwidth,
}


def arguments(thing: object, documentation: str) -> set[str]:
    """Names from the signature; that of a native function is its documentation's first line."""
    if inspect.isfunction(thing):
        return set(inspect.signature(thing).parameters)
    native = re.match(r"\w*\((.*)\) ->", documentation)
    return set(re.findall(r"(?:^|, )\*{0,2}(\w+):", native[1])) if native else set()


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_help(name: str):
    thing = DOCUMENTED[name]
    documentation = inspect.getdoc(thing) or ""
    signature, _, text = documentation.partition("\n\n")
    if not re.match(r"\w*\(", signature):
        text = documentation
    assert len(text.split()) >= 2, f"{name}: {documentation!r}"
    unnamed = arguments(thing, documentation) - CONVENTIONS
    assert not {a for a in unnamed if not re.search(rf"\b{a}\b", text)}, f"{name}: {documentation}"


def test_help_of_the_module_and_of_what_takes_keywords():
    assert "Engine(" in tdaengine.__doc__
    for kind in (TDA, GenerateOptions, tdaengine.CalibrateOptions):
        for option in kind.fields:
            assert f"{option}: " in kind.__init__.__doc__
    for option in GenerateOptions.fields:
        assert option in Engine.generate.__doc__
    for option in tdaengine.CalibrateOptions.fields:
        assert option in Engine.calibrate.__doc__


def test_one_tree_of_errors_the_same_in_cpp():
    header = Path(__file__).parents[2] / "cpp" / "include" / "tda" / "error.h"
    declared = dict(re.findall(r"struct (\w+) : ([\w:]+) \{", header.read_text()))
    assert declared.pop("Error") == "std::runtime_error"
    found = {kind.__name__: kind.__base__.__name__ for kind in ERRORS if kind is not Error}
    assert found == declared
    assert Error.__base__ is Exception


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_travel_between_processes(kind: type):
    error = kind("thing: found this, expected that")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), repr(again)) == (kind, repr(error))
    assert repr(error) == f"{kind.__name__}('thing: found this, expected that')"


def test_results_and_options_travel_between_processes(engine: Engine):
    thresholds = engine.calibrate([PROMPT], error=0.2)
    out = engine.generate(PROMPT, max_new_tokens=5, tda=TDA(thresholds=thresholds, refresh=2))
    for thing in (
        thresholds,
        TDA(scope="token", active=0.5),
        TDA(thresholds=thresholds),
        GenerateOptions(temperature=0.5, seed=2**64 - 1),
        tdaengine.CalibrateOptions(bytes=0.5, scope="token"),
        out,
    ):
        again = pickle.loads(pickle.dumps(thing))
        assert repr(again) == repr(thing)
    again = pickle.loads(pickle.dumps(thresholds))
    assert (again.values, again.fingerprint) == (thresholds.values, engine.fingerprint)
    tda = pickle.loads(pickle.dumps(TDA(thresholds=thresholds, refresh=2)))
    assert engine.generate(PROMPT, max_new_tokens=5, tda=tda).token_ids == out.token_ids


def test_repr_shows_what_was_chosen(engine: Engine):
    assert repr(TDA(scope="token", active=0.5)) == "TDA(scope='token', active=0.5)"
    assert repr(GenerateOptions()) == "GenerateOptions()"
    assert repr(GenerateOptions(top_k=5, seed=0)) == "GenerateOptions(top_k=5, seed=0)"
    thresholds = engine.calibrate([PROMPT], error=0.2)
    assert repr(thresholds).startswith(
        f"Thresholds(model='llama', fingerprint='{engine.fingerprint}'"
    )
    stats = engine.generate(PROMPT, max_new_tokens=5).stats
    assert isinstance(stats, GenerationStats)
    assert "prompt_tokens=11, new_tokens=5" in repr(stats)
    assert Thresholds.__module__.startswith("tdaengine")
