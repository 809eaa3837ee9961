"""The tokenizer of a model directory: loading, checking and copying it, its chat template and its end tokens."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError
from ftjax.files import below, replace_json
from ftjax.foreign import either, limited, listed, mapped, maybe, read_json, read_text, string, whole
from ftjax.hub import spm

# Names in tokenizer_config.json of the class that is made of tokenizer.json alone.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Fields of tokenizer_config.json, and of config.json and generation_config.json, that are read here.


def token(value) -> str | None:
    """The kind, see ftjax.foreign, of a special token."""
    named = isinstance(value, str) or isinstance(value, dict) and isinstance(value.get("content"), str)
    return None if named else "a text, or an object with a text as its content"


NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPECIAL = dict.fromkeys(NAMED, maybe(token))  # fields of special_tokens_map.json
SETTINGS = SPECIAL | {
    "tokenizer_class": maybe(string),
    "chat_template": maybe(either(string, listed(mapped(name=string, template=string)))),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ENDS = {"eos_token_id": maybe(either(whole(), listed(whole())))}
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
    "preprocessor_config.json",  # of images and sound, for models that read them too
    "processor_config.json",
)


def files(folder: Path) -> dict[str, Path]:
    """{path within the directory: file} of the tokenizer files and chat templates in a directory; may be empty."""
    there = [Path(folder) / name for name in FILES]
    found = [file for file in there if file.is_file()]
    found += [file for at in there if at.is_dir() for file in below(at) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in found}


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer's vocabulary, and not just a chat template or settings."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer files and chat templates as they are: what one transformers saves, another may refuse to load."""
    for name, file in files(source).items():
        (Path(out) / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, Path(out) / name)


def load_tokenizer(folder: Path, model_folder: Path | None = None):
    """The tokenizer in a directory. If there is a tokenizer.json, the tokenizer follows its rules.

    model_folder: the directory of its model; None: `folder`. Raises FtjaxError if there is no tokenizer, if it cannot
    be loaded without the repository's own code, or if it cannot be used.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise FtjaxError(f"{folder}: no tokenizer; expected tokenizer.json, tokenizer.model, vocab.json or vocab.txt")
    for name, fields in (("tokenizer_config.json", SETTINGS), ("special_tokens_map.json", SPECIAL)):
        if (folder / name).is_file():
            read_json(folder / name, **fields)
    model_folder = Path(model_folder or folder)
    plain = _is_plain(folder, model_folder)
    if plain:
        from transformers import PreTrainedTokenizerFast  # noqa: F401  the import must not count for the time limit
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

        with contextlib.suppress(*(Exception,) if file.is_file() else ()):  # the class may be unable to read the file
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
            if not file.is_file() or _follow_file(getattr(tokenizer, "backend_tokenizer", None), file):
                return tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _follow_file(backend, file: Path) -> bool:
    """Replace the parts of a tokenizer that differ from a tokenizer.json. Returns whether it now equals the file's.

    transformers 5 builds most classes from the vocabulary alone, with the class's own normalizer and pre-tokenizer. All
    other programs that read the exported file follow the file.
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
    """Whether AutoTokenizer would choose the plain class.

    This check saves the four seconds that AutoTokenizer takes, most of them for importing torch.
    """
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json", model_folder / "config.json"]
    if not all(file.is_file() for file in files):
        return False
    settings, model = read_json(files[1]), read_json(files[2]).get("model_type")
    return settings.get("tokenizer_class") in PLAIN and "auto_map" not in settings and model == "llama"


def extended(tokenizer, folder: Path, tokens: tuple[str, ...]) -> Path:
    """A copy of a directory's tokenizer files with further tokens, in a folder that vanishes with this process.

    As with `tokenizer.add_tokens` of transformers, the tokens are found before a text is split, wherever they stand in
    it. They are not special, so that decoding keeps them. A token that was added to the tokenizer before is left as it
    is.

    Args:
        tokenizer: The tokenizer in the directory, from transformers.
        folder: The directory.
        tokens: Texts of the tokens.

    Raises:
        FtjaxError: For a token that is given twice or that is an ordinary token of the vocabulary, and for a tokenizer
            that is not of the package tokenizers.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocab, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    if backend is None:
        raise FtjaxError(
            f"data.add_tokens: {folder}: tokens can only be added to a tokenizer that has a tokenizer.json"
        )
    for token in tokens:
        if tokens.count(token) > 1:
            raise FtjaxError(f"data.add_tokens: {token!r} is given twice; name each token once")
        if token in vocab and token not in added:
            raise FtjaxError(
                f"data.add_tokens: {token!r} is an ordinary token of this tokenizer, with the id {vocab[token]}. As an "
                "added token it would be cut out of longer words too; leave it out, or choose another text"
            )
    out = Path(tempfile.mkdtemp(prefix="ftjax-tokenizer-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    copy_tokenizer(folder, out)
    file, settings = out / "tokenizer.json", out / "tokenizer_config.json"
    if not file.is_file():
        backend.save(str(file))
    # Only the lists of added tokens are changed: files that these versions write as a whole, older ones may not read.
    own = Tokenizer.from_file(str(file))
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    own.add_tokens([AddedToken(token, **rules) for token in tokens])
    new = {own.token_to_id(token): {"content": token, **rules} for token in tokens if token not in added}
    if taken := new.keys() & vocab.values():
        raise FtjaxError(
            f"data.add_tokens: {folder}: the ids of this vocabulary have gaps, so that {new[min(taken)]['content']!r} "
            f"would get the id {min(taken)} of another token; fill the gaps in tokenizer.json first"
        )
    content = read_json(file)
    entries = [{"id": i, **entry} for i, entry in new.items()]
    replace_json(file, content | {"added_tokens": [*(content.get("added_tokens") or ()), *entries]})
    if "added_tokens_decoder" in (there := read_json(settings) if settings.is_file() else {}):
        entries = there["added_tokens_decoder"] | {str(i): entry for i, entry in new.items()}
        replace_json(settings, there | {"added_tokens_decoder": entries})
    return out


def of_run(config, folder: Path, model_folder: Path | None = None):
    """The tokenizer of a run.

    Args:
        config: The run's config.
        folder: The directory of the tokenizer.
        model_folder: The directory of its model; None: `folder`.

    Returns:
        (The tokenizer with data.add_tokens, the directory of its files, which is not `folder` if tokens were added).

    Raises:
        FtjaxError: As `load_tokenizer` and `extended`.
    """
    tokenizer = load_tokenizer(folder, model_folder)
    if not config.data.add_tokens:
        return tokenizer, Path(folder)
    out = extended(tokenizer, folder, tuple(config.data.add_tokens))
    return load_tokenizer(out, model_folder or folder), out


def check_vocab(tokenizer, vocab_size: int, new: Iterable[int] = ()) -> None:
    """Raise FtjaxError if the tokenizer has ids (from 0) beyond the `vocab_size` rows of the embedding that are not
    among `new`, the ids that get rows."""
    new = set(new)
    vocab = {token: i for token, i in tokenizer.get_vocab().items() if i not in new}
    token = max(vocab, key=vocab.get)
    if vocab[token] >= vocab_size:
        raise FtjaxError(
            f"{tokenizer.name_or_path}: the tokenizer is larger than the embedding: token {token!r} has id "
            f"{vocab[token]}, the embedding {vocab_size} rows; use the tokenizer that belongs to this model"
        )


def end_tokens(folder: Path, tokenizer, trained: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end an answer, the most official first, without duplicates.

    In this order: `eos_token_id` of generation_config.json (or of config.json if there is none), the tokenizer's
    end-of-text token, the token that ends an assistant's turn in the chat template, and `trained`.

    Args:
        folder: The model directory.
        tokenizer: The tokenizer, from transformers.
        trained: Ids with which answers are trained to end.
    """
    eos = generation(folder).get("eos_token_id")
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *turn_end(tokenizer), *trained]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def generation(folder: Path) -> dict:
    """The generation_config.json of a model directory, or else the special tokens in its config.json.

    A model that reads images too may name them in the part for its text model.
    """
    file, config = Path(folder) / "generation_config.json", Path(folder) / "config.json"
    if file.is_file():
        return read_json(file, **ENDS)
    hf = read_json(config, **ENDS, text_config=maybe(mapped(**ENDS))) if config.is_file() else {}
    parts = hf.get("text_config") or {}, hf
    return {key: part[key] for part in parts for key in TOKEN_IDS if part.get(key) is not None}


def end_token(tokenizer, end: str = "") -> int:
    """Id of the token `end`; if empty, the tokenizer's end-of-text. Raises FtjaxError if it has no such token."""
    if not end and tokenizer.eos_token_id is None:
        raise FtjaxError(
            "the tokenizer names no end-of-text token: set data.end, or `eos_token` in tokenizer_config.json"
        )
    if not end:
        return tokenizer.eos_token_id
    # Some tokenizers put a blank before the first word of a text. Then the token is encoded after a line feed.
    alone, line, both = tokenizer([end, "\n", "\n" + end], add_special_tokens=False)["input_ids"]
    ids = both[len(line) :] if len(alone) > 1 and both[: len(line)] == line else alone
    if len(ids) != 1:
        raise FtjaxError(
            f"data.end: the tokenizer makes {len(alone)} tokens of {end!r}; expected a text of exactly one token"
        )
    return ids[0]


def pad_token(tokenizer) -> int | None:
    """Id of the padding token: the tokenizer's own, or else its end-of-text.

    A classifier of transformers reads a text at the last token that is not this one.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class Marks(NamedTuple):
    """How a chat template marks the ends of turns, by tokens whose texts mean the token wherever they occur."""

    tokens: re.Pattern  # every added token
    ends: re.Pattern  # tokens that can end a turn: the special tokens, and the token that ends a plain answer
    last: str = ""  # token that ends the last answer of a plain chat; empty: there is none
    between: str = ""  # text that ends an answer before a question, up to its last token; empty: no token ends it
    around: re.Pattern = re.compile("(?!)")  # special tokens that begin and end texts, or that the template writes


def marks(tokenizer, chat_template: str | None = None) -> Marks:
    """The Marks of a tokenizer and a chat template, found by rendering some plain chats.

    chat_template: Jinja text; None: the tokenizer's own, which it may lack. Raises FtjaxError if the template cannot
    render these chats.
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
    written = {*tokens.findall(f"{before}{behind}{chat_template or tokenizer.chat_template}")}
    written |= {str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")}
    with contextlib.suppress(FtjaxError):  # some templates refuse the role
        written |= {*tokens.findall(show(tokenizer, [{"role": "system", "content": "-"}, question], chat_template))}
    # The token that opens the chat opens turns. It does not end them, even if the template puts it after the last one.
    opening = {next((token for token in tokens.findall(before) if token != tokenizer.bos_token), "")}
    plain = Marks(tokens, _any_of(every - opening))
    try:
        (_, goes_on), (header, _) = around([question, answer, question], answer), around([question], question)
    except FtjaxError:
        goes_on = header = ""
    close = last_close(behind, lambda: goes_on, plain)
    last = plain.ends.findall(behind, 0, close)[-1] if close else ""
    # Between two turns are the end of one and the opening of the next. The opening is known from the first question.
    gap = goes_on.rpartition(question["content"])[0]
    gap = gap[: len(gap) - shared(gap[::-1], header[::-1], _any_of({token[::-1] for token in every}))]
    found = list(plain.ends.finditer(gap))
    between = gap[: found[-1].end()] if found else ""
    return Marks(tokens, _any_of((special | {last}) - opening), last, between, _any_of(special & written))


def turn_end(tokenizer, chat_template: str | None = None) -> list[int]:
    """The id of the token with which a chat template ends the last answer of a chat, in a list; empty if there is none.

    chat_template: Jinja text; None: the tokenizer's own, which it may lack. Raises FtjaxError as `marks` does.
    """
    last = marks(tokenizer, chat_template).last
    return [tokenizer.convert_tokens_to_ids(last)] if last else []


def _any_of(texts: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts - {""}, key=len, reverse=True))) or "(?!)")


def shared(a: str, b: str, tokens: re.Pattern) -> int:
    """Length of the longest common prefix of two texts that does not cut a token in either.

    Args:
        a: The first text.
        b: The second text.
        tokens: Pattern of the tokens' texts.
    """
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
    """Length of the text that closes an answer's turn, up to the end of its last end token; None if it has none.

    Args:
        a: The text after an answer in a chat.
        b: The text after the same answer in another chat. One of the chats ends with the answer, or they continue
            differently. So their common prefix closes the turn.
        marks: See `marks`.
    """
    n = shared(a, b, marks.tokens)
    found = list(marks.ends.finditer(a, 0, n))
    # A token directly before words that differ opens the next turn, such as the `<|im_start|>` before two roles.
    if found and found[-1].end() == n and all(_word_first(text[n:], marks.tokens) for text in (a, b)):
        found.pop()
    return found[-1].end() if found else None


def _word_first(text: str, tokens: re.Pattern) -> bool:
    return bool(text) and not text[0].isspace() and not tokens.match(text)


def last_close(behind: str, goes_on: Callable[[], str], marks: Marks) -> int | None:
    """Like `turn_close`, for the last answer of a chat, after which a template may write more than the end of the turn.

    Args:
        behind: The text after the answer.
        goes_on: Returns the text after the same answer in a chat that continues.
        marks: See `marks`.
    """
    found = list(marks.ends.finditer(behind))
    close = turn_close(behind, goes_on(), marks) if len(found) > 1 else None
    return close or (found[0].end() if found else None)


def show(tokenizer, messages: list[dict], chat_template: str | None = None, tools=None, generation=False) -> str:
    """The text of messages, rendered by a chat template.

    Args:
        tokenizer: The tokenizer, from transformers.
        messages: Each with `role` and `content`.
        chat_template: Jinja text; None: the tokenizer's own.
        tools: JSON schemas; None: no tools.
        generation: Whether the text that opens an answer follows.

    Raises:
        FtjaxError: If the template refuses the messages.
    """

    def shown(tools) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, tokenize=False, add_generation_prompt=generation
        )

    with limited(""):  # callers say what was to be shown
        try:
            return shown(tools)
        except TypeError:
            if tools is not None:
                raise
            return shown([])  # a template made for tools may not check whether there are any


def chat_template(folder: Path) -> str:
    """The Jinja text of a directory's chat template, read without loading its tokenizer; empty if there is none."""
    file, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if file.is_file():
        return read_text(file)
    own = read_json(settings, **SETTINGS).get("chat_template") if settings.is_file() else None
    if isinstance(own, list):  # named templates
        own = next((each.get("template") for each in own if each.get("name") == "default"), None)
    return own or ""


def write_chat_template(folder: Path, chat_template: str) -> None:
    """Make a Jinja text the chat template of the tokenizer in `folder`, in place of any other template there.

    It is written to tokenizer_config.json, which all versions of transformers read.
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
