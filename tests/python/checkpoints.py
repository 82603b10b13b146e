"""A tiny checkpoint with a tokenizer."""

import json
from pathlib import Path

import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

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
