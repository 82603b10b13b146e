"""Fixtures shared by the tests: the demo model, and a tiny one with a tokenizer."""

import os
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from tdaengine import Engine, Output

PROMPT = "The sky is"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what auto means")
    parser.addoption("--without-model", action="store_true", help="no tests of the demo model")


def pytest_configure(config: pytest.Config) -> None:
    """All engines of the tests, those of programs they start included, take this device."""
    os.environ["TDA_DEVICE"] = config.getoption("--device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For machines that the demo model does not reach."""
    if config.getoption("--without-model"):
        left_out = [item for item in items if "smollm2" in item.fixturenames]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not SMOLLM2.is_dir():
        pytest.fail(f"{SMOLLM2} is missing: run `make model`")
    return SMOLLM2


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture(scope="session")
def engine(folder: Path) -> Engine:
    return Engine(folder, threads=1)


@pytest.fixture(scope="session")
def dense(engine: Engine) -> Output:
    """40 greedy tokens, none of them special, so that text and tokens match one to one."""
    out = engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert len(out.text) == len(out.token_ids) == 40
    return out
