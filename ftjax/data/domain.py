"""How the rows of a domain differ from general text: what the tokenizer makes of both, and which words are new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ftjax import config as configs
from ftjax.data.compared import Texts, sides
from ftjax.data.read import read_table
from ftjax.data.similar import normalise, units
from ftjax.data.tokenise import continuation
from ftjax.errors import FtjaxError

GENERAL = "general text"


def report(config, tokenizer) -> dict[str, dict]:
    """Compare the training rows of each source with the general text of data.domain_report.

    Words are in lower case and without punctuation; in scripts without blanks each character is a word.

    Args:
        config: The whole config.
        tokenizer: The tokenizer, from transformers.

    Returns:
        {GENERAL or the name of the source: its figures}: `words` and `distinct_words`, their numbers;
        `tokens_per_word`; `words_of_one_token`, the share of the words that are a single token, and not the unknown
        one; `vocabulary_used`, the share of the tokenizer's tokens that occur; `unknown_tokens`, their share of all
        tokens; `known_words` and `known_distinct_words`, the shares of the words that occur in the general text;
        `new_words`, the most frequent others with their counts.

    Raises:
        FtjaxError: If rows cannot be read, or if the general text holds no word.
    """
    found: dict[str, dict] = {}
    known: Counter[str] = Counter()
    general = configs.default()  # its columns are not those of the domain, and no template is for them
    general.data.train = config.data.domain_report
    sources = configs.sources(config)
    if GENERAL in (source.name for source in sources):
        raise FtjaxError(
            f"data.domain_report: {GENERAL!r} is the name of what the sources are compared with; give the "
            "source of data.mixture another name"
        )
    for name, data, _, _, own in (*configs.sources(general), *sources):
        table = read_table(data.train, "data.train" if known else "data.domain_report", None, data.columns)
        counts, figures = _counted(Texts((table, sides(data, table.columns, own.task).whole)), tokenizer)
        known = known or counts
        if not known:
            raise FtjaxError(f"data.domain_report: {data.train} holds no word; name rows with text")
        new = Counter({word: n for word, n in counts.items() if word not in known})
        shares = 1 - new.total() / max(counts.total(), 1), 1 - len(new) / max(len(counts), 1)
        figures |= dict(zip(("known_words", "known_distinct_words"), shares)) | {"new_words": new.most_common(10)}
        found[(name or "train") if found else GENERAL] = figures
    return found


def _counted(texts: Iterable[str], tokenizer) -> tuple[Counter[str], dict]:
    words: Counter[str] = Counter()
    tokens: Counter[int] = Counter()
    for text in texts:
        words.update(units(normalise(text))[0])
        tokens.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    total, unknown = max(words.total(), 1), tokenizer.unk_token_id
    alone = {word for word in words if len(ids := continuation(tokenizer, f" {word}")) == 1 and ids != [unknown]}
    return words, {
        "words": words.total(), "distinct_words": len(words), "tokens_per_word": tokens.total() / total,
        "words_of_one_token": sum(words[word] for word in alone) / total,
        "vocabulary_used": len(tokens) / len(tokenizer), "unknown_tokens": tokens[unknown] / max(tokens.total(), 1),
    }  # fmt: skip


def shown(found: dict[str, dict]) -> str:
    """The result of `report` as lines for the terminal."""
    forms = {"words": ",", "distinct_words": ",", "tokens_per_word": ".2f"}
    lines = [f"{'':<22}" + "".join(f"{name[:18]:>20}" for name in found)]
    for key in [key for key in found[GENERAL] if key != "new_words"]:
        cells = (f"{figures[key]:{forms.get(key, '.1%')}}" for figures in found.values())
        lines.append(f"{key.replace('_', ' '):<22}" + "".join(f"{cell:>20}" for cell in cells))
    new = {name: ", ".join(f"{word} ({n:,})" for word, n in x["new_words"]) for name, x in found.items()}
    return "\n".join([*lines, *(f"new words of {name}: {listed}" for name, listed in new.items() if listed)])
