"""The tokenizer of a model directory: loading and checking it, the tokens that end an answer, the files to copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from ftjax.errors import FtjaxError
from ftjax.hub.families import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder
)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer files and chat templates as they are: what one transformers saves another may refuse."""
    for name in FILES:
        file = Path(source) / name
        if file.is_dir():
            shutil.copytree(file, out / name)
        elif file.exists():
            shutil.copyfile(file, out / name)


def load_tokenizer(folder: Path):
    """The tokenizer in a model directory. Raises FtjaxError where none loads without the repository's own code."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise FtjaxError(f"{folder}: no tokenizer; expected tokenizer.json, tokenizer.model, vocab.json or vocab.txt")
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise FtjaxError(f"{folder}: the tokenizer cannot be loaded: {error}") from None


def check_vocab(tokenizer, vocab_size: int) -> None:
    """Raises FtjaxError where the tokenizer has ids (0-based) that the embedding's `vocab_size` rows do not reach."""
    vocab = tokenizer.get_vocab()
    token = max(vocab, key=vocab.get)
    if vocab[token] >= vocab_size:
        raise FtjaxError(
            f"{tokenizer.name_or_path}: the tokenizer is larger than the embedding: token {token!r} has id "
            f"{vocab[token]}, the embedding {vocab_size} rows; use the tokenizer that belongs to this model"
        )


def end_tokens(folder: Path, tokenizer, end: str = "") -> tuple[int, ...]:
    """Ids that end an answer, most official first, none twice.

    `end`, a token that answers were trained to end with; the `eos_token_id` of generation_config.json (or else of
    config.json), the tokenizer's own, and the one by which the chat template ends an assistant's turn.
    """
    folder = Path(folder)
    official = next((f for n in ("generation_config.json", "config.json") if (f := folder / n).is_file()), None)
    eos = read_json(official).get("eos_token_id") if official else None
    ids = list(eos) if isinstance(eos, list) else [eos]
    ids += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    ids += [tokenizer.convert_tokens_to_ids(end)] if end else []
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _end_of_turn(tokenizer) -> int | None:
    """The first special token that the chat template puts behind an assistant's text, if any."""
    if not tokenizer.chat_template:
        return None
    import jinja2

    answer = "Zebra crossing"
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError as error:
        raise FtjaxError(
            f"{tokenizer.name_or_path}: the chat template cannot show a turn of `user` and one of `assistant`: {error}"
        ) from None
    _, found, tail = text.rpartition(answer)
    if not found:
        raise FtjaxError(f"{tokenizer.name_or_path}: the chat template leaves out the text of the assistant's turn")
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in ids if i in special), None)
