"""The tokenizer of a model directory: loading and checking it, the tokens that end an answer, the files to copy."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError
from ftjax.files import replace_json
from ftjax.foreign import either, limited, listed, mapped, maybe, read_json, read_text, string, whole
from ftjax.hub import spm

# What tokenizer_config.json calls the class that is made of tokenizer.json and nothing else.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Fields of tokenizer_config.json, and of config.json and generation_config.json, that are read here.
SETTINGS = {
    "tokenizer_class": maybe(string),
    "chat_template": maybe(either(string, listed(mapped(name=string, template=string)))),
}
ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), maybe(either(whole(), listed(whole()))))
LOADING = 600.0  # seconds; a large vocabulary of an old format takes one minute
PROBE = 'Once upon a time, 3 dogs said: "Où?" ☃\n'  # a tokenizer that cannot encode it cannot be used

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


def files(folder: Path) -> dict[str, Path]:
    """The tokenizer files and chat templates in a directory, by their paths within it; empty where there are none."""
    there = [Path(folder) / name for name in FILES]
    found = [file for file in there if file.is_file()]
    found += [file for at in there if at.is_dir() for file in sorted(at.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in found}


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds the vocabulary of a tokenizer, and not only a chat template or settings."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer files and chat templates as they are: what one transformers saves another may refuse."""
    for name in FILES:
        file = Path(source) / name
        if file.is_dir():
            shutil.copytree(file, out / name)
        elif file.exists():
            shutil.copyfile(file, out / name)


def load_tokenizer(folder: Path, model_folder: Path | None = None):
    """The tokenizer in a directory, with the rules of its tokenizer.json where there is one.

    model_folder: the directory of its model, where that is another one. Raises FtjaxError where none loads without the
    repository's own code.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise FtjaxError(f"{folder}: no tokenizer; expected tokenizer.json, tokenizer.model, vocab.json or vocab.txt")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_json(settings, **SETTINGS)
    model_folder = Path(model_folder or folder)
    plain = not spm.alone(folder) and _is_plain(folder, model_folder)
    if plain:
        from transformers import PreTrainedTokenizerFast  # noqa: F401  importing it is not what the limit is for
    else:
        from transformers import AutoTokenizer  # noqa: F401
    with limited(f"{folder}: the tokenizer cannot be loaded", LOADING):
        tokenizer = spm.load(folder) if spm.alone(folder) else _loaded(folder, plain)
        if not (vocab := tokenizer.get_vocab()):
            raise FtjaxError(f"{folder}: the tokenizer has no vocabulary")
        ids = tokenizer(PROBE)["input_ids"]
        tokenizer.decode(ids)
        if ids and max(ids) > max(vocab.values()):
            raise FtjaxError(f"{folder}: the tokenizer makes the id {max(ids)}, which its vocabulary does not have")
    return tokenizer


def _loaded(folder: Path, plain: bool):
    file = folder / "tokenizer.json"
    if not plain:
        from transformers import AutoTokenizer

        with contextlib.suppress(*(Exception,) if file.is_file() else ()):  # a class that cannot read the file
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
            if not file.is_file():
                return tokenizer
            if _follow_file(getattr(tokenizer, "backend_tokenizer", None), file):
                return tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _follow_file(backend, file: Path) -> bool:
    """Give a tokenizer the parts of a tokenizer.json that it has otherwise. Returns whether it then is the file's.

    transformers 5 makes most classes anew of the vocabulary alone, with the class's own rules of normalising and
    splitting. Everything else that reads the exported file goes by the file.
    """
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    if backend is None:
        return False
    for part in ("normalizer", "pre_tokenizer", "model", "decoder"):
        ours, theirs = getattr(own, part), getattr(backend, part)
        if ours is None or theirs is None or ours.__getstate__() != theirs.__getstate__():
            setattr(backend, part, ours)
    return all(backend.token_to_id(str(token)) == i for i, token in own.get_added_tokens_decoder().items())


def _is_plain(folder: Path, model_folder: Path) -> bool:
    """Whether AutoTokenizer would come to the plain class: it takes four seconds, most of them to import torch."""
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json", model_folder / "config.json"]
    if not all(file.is_file() for file in files):
        return False
    settings, model = read_json(files[1]), read_json(files[2]).get("model_type")
    return settings.get("tokenizer_class") in PLAIN and "auto_map" not in settings and model == "llama"


def check_vocab(tokenizer, vocab_size: int) -> None:
    """Raises FtjaxError where the tokenizer has ids (0-based) that the embedding's `vocab_size` rows do not reach."""
    vocab = tokenizer.get_vocab()
    token = max(vocab, key=vocab.get)
    if vocab[token] >= vocab_size:
        raise FtjaxError(
            f"{tokenizer.name_or_path}: the tokenizer is larger than the embedding: token {token!r} has id "
            f"{vocab[token]}, the embedding {vocab_size} rows; use the tokenizer that belongs to this model"
        )


def end_tokens(folder: Path, tokenizer, trained: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end an answer, most official first, none twice.

    The `eos_token_id` of generation_config.json (or else of config.json), the tokenizer's own, the one by which the
    chat template ends an assistant's turn, and those that answers were `trained` to end with.
    """
    folder = Path(folder)
    official = next((f for n in ("generation_config.json", "config.json") if (f := folder / n).is_file()), None)
    eos = read_json(official, **ENDS).get("eos_token_id") if official else None
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *turn_end(tokenizer), *trained]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def end_token(tokenizer, end: str = "") -> int:
    """Id of the token `end`, by default the tokenizer's end-of-text. Raises FtjaxError where it has no such token."""
    if not end and tokenizer.eos_token_id is None:
        raise FtjaxError(
            "the tokenizer names no end-of-text token: set data.end, or `eos_token` in tokenizer_config.json"
        )
    if not end:
        return tokenizer.eos_token_id
    # Some tokenizers put a blank before the first word of a text: then the token is the last of two lines.
    alone, line, both = tokenizer([end, "\n", "\n" + end], add_special_tokens=False)["input_ids"]
    ids = both[len(line) :] if len(alone) > 1 and both[: len(line)] == line else alone
    if len(ids) != 1:
        raise FtjaxError(f"data.end: {end!r} is {len(alone)} tokens for this tokenizer; expected exactly one")
    return ids[0]


def pad_token(tokenizer) -> int | None:
    """Id of the token that fills rows up: the tokenizer's own, or else its end-of-text.

    A classifier of transformers reads a text at its last token that is not this one.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class Marks(NamedTuple):
    """How a chat template marks where turns end: tokens whose texts stand for themselves wherever they occur."""

    tokens: re.Pattern  # every added token
    ends: re.Pattern  # those that can end a turn: the special tokens, and the token that ends a plain answer
    last: str = ""  # the token that ends the last answer of a plain chat; empty: none
    between: str = ""  # what ends an answer before a question, up to its last token; empty: no token does


def marks(tokenizer, chat_template: str | None = None) -> Marks:
    """The Marks of a tokenizer and a chat template, by plain chats that the template is asked to show.

    chat_template: Jinja text; None: the tokenizer's own, which it may lack. Raises FtjaxError for a template that
    cannot show them.
    """
    question, answer = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Zebra crossing"}

    def around(turns: list[dict], of: dict) -> tuple[str, str]:
        try:
            text = show(tokenizer, turns, chat_template)
        except FtjaxError as error:
            raise FtjaxError(
                f"{tokenizer.name_or_path}: the chat template cannot show a turn of `user` and one of `assistant`: "
                f"{error}"
            ) from None
        before, found, behind = text.rpartition(of["content"])
        if not found:
            raise FtjaxError(
                f"{tokenizer.name_or_path}: the chat template leaves out the text of the {of['role']}'s turn"
            )
        return before, behind

    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    every = special | {str(token) for token in added}
    tokens = _any_of(every)
    if not (chat_template or tokenizer.chat_template):
        return Marks(tokens, _any_of(special))
    before, behind = around([question, answer], answer)
    # A token that opens the chat opens turns: it ends none, even where the template puts it behind the last one.
    opening = {next((token for token in tokens.findall(before) if token != tokenizer.bos_token), "")}
    plain = Marks(tokens, _any_of(every - opening))
    try:
        (_, goes_on), (header, _) = around([question, answer, question], answer), around([question], question)
    except FtjaxError:
        goes_on = header = ""
    close = last_close(behind, lambda: goes_on, plain)
    last = plain.ends.findall(behind, 0, close)[-1] if close else ""
    # Between two turns lies the end of one and the opening of the next, which is known from the first question.
    gap = goes_on.rpartition(question["content"])[0]
    gap = gap[: len(gap) - shared(gap[::-1], header[::-1], _any_of({token[::-1] for token in every}))]
    found = list(plain.ends.finditer(gap))
    return Marks(tokens, _any_of((special | {last}) - opening), last, gap[: found[-1].end()] if found else "")


def turn_end(tokenizer, chat_template: str | None = None) -> list[int]:
    """The id of the token by which a chat template ends the last answer of a chat; empty where no token does.

    chat_template: Jinja text; None: the tokenizer's own, which it may lack. Raises FtjaxError as `marks` does.
    """
    last = marks(tokenizer, chat_template).last
    return [tokenizer.convert_tokens_to_ids(last)] if last else []


def _any_of(texts: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts - {""}, key=len, reverse=True))) or "(?!)")


def shared(a: str, b: str, tokens: re.Pattern) -> int:
    """Length of the longest common start of two texts that cuts through none of `tokens` in either."""
    n = len(os.path.commonprefix([a, b]))
    cut = n
    for text in (a, b):
        for found in tokens.finditer(text):
            if found.start() >= n:
                break
            if found.end() > n:
                cut = min(cut, found.start())
    return cut


def turn_close(a: str, b: str, marks: Marks) -> int | None:
    """Length of the text that closes an answer's turn, to the end of its last end token; None where it holds none.

    `a` and `b` are what a template writes behind the same answer in two chats, one of which ends with the answer, or
    which go on differently. What they share closes the turn.
    """
    n = shared(a, b, marks.tokens)
    found = list(marks.ends.finditer(a, 0, n))
    # A token right before words that differ begins the next turn, such as the `<|im_start|>` before two roles.
    if found and found[-1].end() == n and all(_word_first(text[n:], marks.tokens) for text in (a, b)):
        found.pop()
    return found[-1].end() if found else None


def _word_first(text: str, tokens: re.Pattern) -> bool:
    return bool(text) and not text[0].isspace() and not tokens.match(text)


def last_close(behind: str, goes_on: Callable[[], str], marks: Marks) -> int | None:
    """Like `turn_close` for the last answer of a chat, behind which a template may write more than the turn's end.

    Args:
        behind: The text behind the answer.
        goes_on: Gives the text behind the same answer in a chat that goes on.
        marks: See `marks`.
    """
    found = list(marks.ends.finditer(behind))
    close = turn_close(behind, goes_on(), marks) if len(found) > 1 else None
    return close or (found[0].end() if found else None)


def show(tokenizer, messages: list[dict], chat_template: str | None = None, tools=None, generation=False) -> str:
    """The text of messages under a chat template. Raises FtjaxError where the template refuses them.

    Args:
        tokenizer: Of transformers.
        messages: With `role` and `content`.
        chat_template: Jinja text; None: the tokenizer's own.
        tools: JSON schemas; None: no tools.
        generation: Whether the text that opens an answer follows.
    """

    def shown(tools) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, tokenize=False, add_generation_prompt=generation
        )

    with limited("the chat template cannot show these messages"):
        try:
            return shown(tools)
        except TypeError:
            if tools is not None:
                raise
            return shown([])  # a template that is for tools alone does not ask whether there are any


def chat_template(folder: Path) -> str:
    """The Jinja text of the chat template in a directory, without its tokenizer; empty where there is none."""
    file, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if file.is_file():
        return read_text(file)
    own = read_json(settings, **SETTINGS).get("chat_template") if settings.is_file() else None
    return own if isinstance(own, str) else ""


def write_chat_template(folder: Path, chat_template: str) -> None:
    """Make a Jinja text the chat template of the tokenizer in `folder`, in place of any other that it has.

    It goes into tokenizer_config.json, where all versions of transformers look.
    """
    for name in ("chat_template.jinja", "chat_template.json"):
        (Path(folder) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder) / "additional_chat_templates", ignore_errors=True)
    write_settings(folder, chat_template=chat_template)


def write_settings(folder: Path, **settings) -> None:
    """Set fields of tokenizer_config.json in `folder`."""
    file = Path(folder) / "tokenizer_config.json"
    there = read_json(file) if file.is_file() else {}
    replace_json(file, there | settings)
