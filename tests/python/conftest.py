"""Fixtures shared by the tests: the demo model, and a tiny one with a tokenizer."""

import json
import os
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from tdaengine import Engine, Output

PROMPT = "The sky is"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}"
    "{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


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


def write_tokenizer(folder: Path) -> None:
    """One token per character: <unk>, <s>, </s>, newline, then ASCII from the space on."""
    pieces = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 32 + 92))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint with 96 tokens, a context of 128, and one character per token."""
    tiny.write(folder, "llama")
    write_tokenizer(folder)
    # Logit 0 for <unk>, <s> and </s>: greedy decoding never chooses them, the best is far above.
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:3] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


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
