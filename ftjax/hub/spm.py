"""The tokenizer of a directory that has only tokenizer.model, a SentencePiece model, as LLaMA 2's first files."""

from __future__ import annotations

from pathlib import Path

from ftjax.errors import FtjaxError

FILE = "tokenizer.model"
OTHERS = ("tokenizer.json", "vocab.json", "vocab.txt")
# The converted tokenizer and the SentencePiece model must give the same tokens for this text.
PROBE = 'The quick brown fox, in 2024, says: "naïve café".\n\tJumped over  Łódź?'


def alone(folder: Path) -> bool:
    """Whether tokenizer.model is the only vocabulary in a directory."""
    return (folder / FILE).is_file() and not any((folder / name).is_file() for name in OTHERS)


def load(folder: Path):
    """The tokenizer that transformers makes of the file, by the class that the directory names.

    Raises FtjaxError if the file has another format, if the package that reads it is missing, or if transformers makes
    another tokenizer of it, as it does if the class uses another algorithm than the file. The caller turns the errors
    of SentencePiece and transformers into one that names the directory.
    """
    file, way = folder / FILE, f"or put the tokenizer.json of this tokenizer into {folder}"
    if file.read_bytes()[:1] != b"\n":  # the tag of the first field of the format, a piece
        raise FtjaxError(
            f"{file}: not a SentencePiece model, and other formats of this file name are not supported; {way[3:]}"
        )
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise FtjaxError(
            f"{file}: a SentencePiece model, which the package sentencepiece reads, and this is not installed: "
            f"pip install sentencepiece, {way}"
        ) from None
    from transformers import AutoTokenizer

    pieces = SentencePieceProcessor(model_file=str(file))
    found = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    if found(PROBE, add_special_tokens=False)["input_ids"] != pieces.encode(PROBE):
        raise FtjaxError(
            f"{file}: transformers' {type(found).__name__} makes other tokens of this model than SentencePiece does; "
            f"set tokenizer_class in tokenizer_config.json to the class of this tokenizer, {way}"
        )
    return found
