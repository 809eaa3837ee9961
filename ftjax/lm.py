"""LM, a language model ready for use, and how one is made from a model directory.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ftjax import config as configs
from ftjax import cpus, tasks, xla
from ftjax.data import chat_templates
from ftjax.data.batches import by_example
from ftjax.data.labelled import encode_texts
from ftjax.data.prepare import fingerprint
from ftjax.data.template import Rendered, asked
from ftjax.data.tokenise import Example, continuation, encode_prompts
from ftjax.decoding import generate
from ftjax.errors import FtjaxError, NotFinite, check_known
from ftjax.foreign import check_fields, listed, mapped, maybe, number, read_json
from ftjax.hub import families, pooling, resolve, weights
from ftjax.hub import tokenizer as tokenizers
from ftjax.hub.pooling import Pooling
from ftjax.models import quantised
from ftjax.models.transformer import Transformer, max_tokens
from ftjax.objectives import contrast
from ftjax.progress import doing
from ftjax.tuning import Spec
from ftjax.tuning.adapters import pick, weighted

BYTE = re.compile("<0x[0-9A-F]{2}>")  # the token of a byte, where a tokenizer of sentencepiece has no other one
# Fields of a run that decide what its model predicts for a row, if it has a head.
PREDICTS: tuple[str, ...] = ("data.max_length", "data.long", "data.label", "task.text", "task.pair", "task.subwords")
PREDICTS += ("task.stride", "task.labels_as", "task.max_answer", "task.no_answer", "task.threshold")


@dataclasses.dataclass
class LM:
    """A language model with its parameters and its tokenizer, as `ftjax.load` returns it.

    Attributes:
        model: The Flax module. `lm.model.apply(lm.variables, tokens, positions, segment_ids)` computes logits.
        params: Parameters of the base model, a nested dict.
        adapter: The `adapter` collection, which changes linear maps; empty for a model without an adapter.
        tokenizer: The tokenizer, from transformers.
        folder: Local directory of the base model.
        end_tokens: Ids of the tokens that end an answer.
        adapters: {name: this model with that adapter}, of the adapters that were loaded beside it.
        labels: Names of the labels of its head, in the order of their ids; empty without such a head.
        kind: The task that the model's head is for, as in `task.kind`.
        pooling: How `embed` makes vectors of texts.
        tokenizer_folder: Local directory of the tokenizer, where that is not the base model's.
        recipe: How the run that trained it reads rows and predicts, see `recipe_of`; empty if no run trained it, or for
            the task `causal`.
    """

    model: Transformer
    params: dict
    adapter: dict
    tokenizer: Any
    folder: Path
    end_tokens: tuple[int, ...]
    adapters: dict[str, LM] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: str = "causal"
    pooling: Pooling = Pooling()
    tokenizer_folder: Path | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict:
        """The Flax variables that `model.apply` takes: the parameters, and the adapter if there is one."""
        return {"params": self.params, "adapter": self.adapter} if self.adapter else {"params": self.params}

    @property
    def max_tokens(self) -> int:
        """Most tokens of a row: the number of the model's positions less the number of virtual tokens."""
        return max_tokens(self.model.config, self.variables)

    def with_adapter(self, adapter: str | dict[str, float], combine: str = "cat") -> LM:
        """This model with one of its `adapters`, or with a weighted sum of several LoRAs.

        Args:
            adapter: Name of an adapter, or {name: weight}, such as {"a": 0.7, "b": 0.3}.
            combine: How several LoRAs are added, `cat` or `linear`, see ftjax.tuning.adapters.weighted.

        Returns:
            An LM that shares the parameters of the base with this one. It uses the tokenizer of the adapter, or the
            one that all of several adapters share.

        Raises:
            FtjaxError: If an adapter was not loaded, or if adapters cannot be added.
        """
        if isinstance(adapter, str):
            return dataclasses.replace(pick(self.adapters, adapter), adapters=self.adapters)
        added = [pick(self.adapters, name) for name in adapter]
        if len({fingerprint(lm.tokenizer) for lm in added}) > 1:
            raise FtjaxError(
                f"adapters {', '.join(adapter)}: they have different tokenizers or chat templates, but their sum needs "
                "one; give all of them the same tokenizer files"
            )
        collections = {name: lm.variables for name, lm in self.adapters.items()}
        variables = {"params": self.params, "adapter": weighted(collections, self.params, adapter, combine)}
        return dataclasses.replace(added[0], adapters=self.adapters).applied(variables)

    def reading(self, folder: Path) -> LM:
        """This model with the tokenizer, the chat template and the recipe in a directory; what is not there stays.

        Raises FtjaxError for a tokenizer that cannot be loaded, and for one that has more tokens than the model has
        embeddings.
        """
        tokenizer, own = self.tokenizer, None
        if tokenizers.has_tokenizer(folder):
            tokenizer, own = tokenizers.load_tokenizer(folder, self.folder), Path(folder)
        elif text := tokenizers.chat_template(folder):
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = text
        tokenizers.check_vocab(tokenizer, self.model.config.vocab_size)
        ends = tokenizers.end_tokens(self.folder, tokenizer)
        recipe = recipe_in(folder) or self.recipe
        return dataclasses.replace(self, tokenizer=tokenizer, tokenizer_folder=own, end_tokens=ends, recipe=recipe)

    def applied(self, variables: dict) -> LM:
        """This model with other Flax variables, {"params": ..., "adapter": ...}. Their vocabulary may have another
        size."""
        shape = dataclasses.replace(self.model.config, vocab_size=variables["params"]["embed"]["embedding"].shape[0])
        model = self.model if shape == self.model.config else self.model.clone(config=shape)
        return dataclasses.replace(self, model=model, params=variables["params"], adapter=variables.get("adapter", {}))

    def logits(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> np.ndarray:
        """Logits of the next token after each token.

        Args:
            input_ids: (B, T) token ids, as lists or an array.
            attention_mask: (B, T), 1 for a token and 0 for padding, on either side; None: no padding.

        Returns:
            (B, T, V) float32. Logits at padding positions are undefined.

        Raises:
            FtjaxError: If the shapes differ, if rows are longer than the model's positions, or if an id is no token of
                the model.
        """
        try:
            ids = np.asarray(input_ids)
            mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        except ValueError:  # rows of several lengths
            raise FtjaxError(
                "logits: the rows have different lengths; pad them to one, and mark the padding in attention_mask"
            ) from None
        if ids.ndim != 2 or not ids.size or mask.shape != ids.shape:
            raise FtjaxError(
                f"logits: expected ids and mask of one shape (B, T), neither B nor T 0; found {ids.shape} and "
                f"{mask.shape}"
            )
        if not (np.issubdtype(ids.dtype, np.integer) and np.isin(mask, (0, 1)).all()):
            raise FtjaxError("logits: expected whole numbers as input_ids, and 1 and 0 in attention_mask")
        V = self.model.config.vocab_size
        if len(bad := ids[(mask == 1) & ((ids < 0) | (ids >= V))]):
            raise FtjaxError(f"logits: the id {bad[0]} is no token of this model, whose ids are 0 to {V - 1:,}")
        if ids.shape[1] > (limit := self.max_tokens):
            raise FtjaxError(f"logits: rows of {ids.shape[1]} tokens exceed the model's {limit} positions")
        tokens, segments = jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        return np.asarray(_logits(self.model, self.variables, tokens, positions, segments))

    def embed(self, texts: list[str], *, pool: str = "", max_length: int = 0, batch_size: int = 32) -> np.ndarray:
        """Vectors of texts, from the hidden states after the last norm.

        Args:
            texts: N texts, none of them empty.
            pool: `mean` of the states of a text's tokens, or `cls`, the state of the first one. Empty: as the files of
                the model or its run say, else `mean`.
            max_length: Most tokens of a text; what is longer is cut. 0: as the files say, else the model's positions.
            batch_size: Texts that are computed at once.

        Returns:
            (N, D) float32, each vector of length 1.

        Raises:
            FtjaxError: If `texts` is not a list of texts, or `pool` is unknown. It is a NotFinite if a vector is NaN
                or infinite.
        """
        if pool:
            check_known(pool, contrast.POOLS, "embed: unknown pool")
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise FtjaxError("embed: expected a list of texts, none of them empty")
        if not texts:
            return np.zeros((0, self.model.config.width), np.float32)
        most = min(max_length or self.pooling.max_length or self.max_tokens, self.max_tokens)
        ids, _ = encode_texts(self.tokenizer, list(texts), most)
        examples = [Example(x, np.arange(len(x)) == 0, np.zeros(1, np.int32)) for x in ids]
        with cpus.dealt(self.variables, batch_size, self.model.config.width) as variables:
            f = functools.partial(contrast.embed, self.model, variables, pool=pool or self.pooling.pool)
            vectors = np.concatenate(by_example(f, examples, batch_size, most, apart=True))
        if len(bad := np.flatnonzero(~np.isfinite(vectors).all(1))):
            raise NotFinite(
                f"embed: the vector of text {bad[0] + 1} holds NaN or infinite values, as the model's weights do"
            )
        return vectors

    def generate(
        self, prompts: list | str | dict, *, max_new_tokens: int = 64, stop: tuple[str, ...] = (), **sampling: Any
    ) -> list[str]:
        """Continue each prompt.

        Args:
            prompts: Texts to continue, or conversations to answer, which are rendered by the chat template: each a list
                of messages with `role` and `content`, or a dict {"messages": [...], "tools": [...]}. A single prompt
                needs no list around it.
            max_new_tokens: Most tokens of an answer.
            stop: Strings that end an answer, each of which is one token, beside the model's own end tokens.
            sampling: temperature, top_k, top_p, seed, ..., see ftjax.decoding.generate. Without them the
                most probable token is taken at each step.

        Returns:
            The new text of each prompt, without the prompt.

        Raises:
            FtjaxError: If messages are malformed, if the tokenizer has no chat template for them, or if the model's
                task is not `causal`.
        """
        messages = isinstance(prompts, list) and prompts and isinstance(prompts[0], dict) and "role" in prompts[0]
        ids = self._encoded([prompts] if messages or isinstance(prompts, str | dict) else prompts)
        new = continue_tokens(self, self.variables, ids, max_new_tokens=max_new_tokens, stop=stop, **sampling)
        return continuations(self.tokenizer, ids, new)

    def stream(
        self, prompt: list | str | dict, *, max_new_tokens: int = 64, stop: tuple[str, ...] = (), **sampling: Any
    ) -> Iterator[str]:
        """Continue one prompt, and hand out the new text while it is made.

        Args:
            prompt: A text, or a conversation: a list of messages or a dict, as in `generate`.
            max_new_tokens: Most tokens of the answer.
            stop: As in `generate`.
            sampling: As in `generate`.

        Returns:
            An iterator over pieces of the new text, none of which is empty or ends within a character. Joined, they are
            the text that `generate` returns.

        Raises:
            FtjaxError: As `generate` does.
        """
        (ids,) = self._encoded([prompt])
        return stream_ids(self, self.variables, ids, max_new_tokens=max_new_tokens, stop=stop, **sampling)

    def _encoded(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, each a text, a list of messages or a dict."""
        rows = [
            Rendered(prompt=p)
            if isinstance(p, str)
            else asked(p if isinstance(p, dict) else {"messages": p}, f"prompt {n}")
            for n, p in enumerate(prompts, 1)
        ]
        return [i.tolist() for i in encode_prompts(rows, self.tokenizer, lambda n: f"prompt {n + 1}", goes_on=True)]


def continue_tokens(
    lm: LM, variables, ids: list[list[int]], *, stop: tuple[str, ...] = (), **sampling
) -> list[list[int]]:
    """Continue prompts that are token ids.

    Args:
        lm: The model and its tokenizer.
        variables: The Flax variables that `lm.model` is applied to.
        ids: The prompts, lists of token ids.
        stop: As in LM.generate.
        sampling: See ftjax.decoding.generate.

    Returns:
        The new ids of each prompt, up to an end token of the model or one of `stop`.

    Raises:
        FtjaxError: If the model's task is not `causal`.
    """
    with doing(f"answering {len(ids):,} prompts"):
        return list(generate(lm.model, variables, ids, **token_rules(lm, stop), **sampling))


def stream_ids(lm: LM, variables, ids: list[int], *, stop: tuple[str, ...] = (), **sampling) -> Iterator[str]:
    """As `continue_tokens` after one prompt, but return an iterator over pieces of the new text, see LM.stream."""
    answers = generate(lm.model, variables, [ids], **token_rules(lm, stop), stream=True, **sampling)
    return _pieces(lm.tokenizer, ids, (new for _, new in answers))


def token_rules(lm: LM, stop: tuple[str, ...]) -> dict:
    """The tokens that end an answer and those that it may have. Raises FtjaxError if the model cannot continue text."""
    if lm.kind != "causal":
        raise FtjaxError(
            f"generate: this model is for task.kind {lm.kind}, and cannot continue text; use `ftjax predict`"
        )
    ends = tuple(lm.end_tokens) + stop_tokens(lm.tokenizer, stop)
    # A padded table has rows without a token.
    return {"end_tokens": ends, "vocab_size": min(lm.model.config.vocab_size, len(lm.tokenizer))}


def _pieces(tokenizer, prompt: list[int], answers: Iterator[list[int]]) -> Iterator[str]:
    """The text of an answer in pieces that no later token changes; `answers`: the ids that it has so far, rising."""
    hidden = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    by_words = " ." not in tokenizer.decode(tokenizer("a .", add_special_tokens=False)["input_ids"])
    shown, new = 0, []
    for new in answers:
        n = len(new)
        # A run of single bytes is decoded as a whole: one byte too many makes all of its characters unreadable.
        while n and (new[n - 1] in hidden or BYTE.fullmatch(tokenizer.convert_ids_to_tokens(new[n - 1]))):
            n -= 1
        text = continuations(tokenizer, [prompt], [new[:n]])[0].rstrip("\ufffd")  # an unfinished character
        if by_words:  # this tokenizer removes spaces before the punctuation that follows them
            text = text[: max(text.rfind(" "), 0)]
        if text[shown:]:
            yield text[shown:]
            shown = len(text)
    if rest := continuations(tokenizer, [prompt], [new])[0][shown:]:
        yield rest


def continuations(tokenizer, prompts: list[list[int]], new: list[list[int]]) -> list[str]:
    """Text of new tokens after their prompts. They are decoded together with the prompt, because a tokenizer may drop
    the space before the first token of a text."""
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    after = tokenizer.batch_decode([p + n for p, n in zip(prompts, new, strict=True)], skip_special_tokens=True)
    return [a[len(b) :] for a, b in zip(after, before, strict=True)]


def stop_tokens(tokenizer, stop: tuple[str, ...] | str) -> tuple[int, ...]:
    """Token ids of stop strings, or of a single one. Raises FtjaxError for a string that is not a single token of this
    tokenizer."""
    ids: list[int] = []
    for text in (stop,) if isinstance(stop, str) else stop:
        pieces = continuation(tokenizer, text)  # it follows other text
        if len(pieces) != 1:
            raise FtjaxError(
                f"stop: the tokenizer makes {len(pieces)} tokens of {text!r}; expected a text of exactly one token"
            )
        ids += pieces
    return tuple(ids)


@functools.partial(xla.jit, static_argnums=0)
def _logits(model, variables, ids, positions, segments):
    return model.apply(variables, ids, positions, segments)


def recipe_of(config, thresholds: list[float] | None) -> dict[str, Any]:
    """The settings of a run that decide what its model predicts for a row; empty for a model that continues texts.

    Args:
        config: The run's config.
        thresholds: The least probability of each label that counts as predicted; None: the run chose none.

    Returns:
        {key of PREDICTS: value, "thresholds": `thresholds`}.
    """
    if tasks.find(config.task.kind).head == "causal":
        return {}
    return {key: configs.flat(config)[key] for key in PREDICTS} | {"thresholds": thresholds}


def recipe_in(folder: Path) -> dict[str, Any]:
    """The recipe that an export wrote into a folder; empty without one. Raises FtjaxError for unusable values."""
    file = Path(folder) / resolve.MARKER
    kept = read_json(file, recipe=mapped()).get("recipe") if file.is_file() else None
    if not kept:
        return {}
    check_fields(kept, {"thresholds": maybe(listed(number()))}, file)
    known = configs.flat(configs.from_dict({key: kept[key] for key in PREDICTS if key in kept}, f"{file}: "))
    return {key: known[key] for key in PREDICTS} | {"thresholds": kept.get("thresholds")}


def open_base(
    folder: Path,
    dtype: str = "auto",
    config=None,
    quantise: str = "",
    task: tuple[str, tuple[str, ...]] | None = None,
    tokenizer_folder: Path | None = None,
) -> tuple[LM, Spec]:
    """Load the model in a local directory, to the default device.

    Args:
        folder: The model directory.
        dtype: See ftjax.load.
        config: Config of a run, whose chat template and end token replace the directory's; None: no run. With a
            `tokenizer_folder` it is the resolved one of a run with tokens of its own; else the model gets the tokens of
            data.add_tokens, with rows as they are before training.
        quantise: See ftjax.load; empty: as `config` says.
        task: (task.kind, names of labels), for which the model gets a head instead of its own; the head is initialised
            by the seed where the directory has none. None: the directory's own head.
        tokenizer_folder: The directory of the tokenizer; None: `folder`.

    Returns:
        The LM, and its Spec with the default config.tuning.
    """
    cpus.offer()
    folder = Path(folder)
    family, shape = families.read_config(folder)
    grows = config is not None and (config.data.add_tokens or config.data.pad_vocabulary_to)
    if grows and tokenizer_folder is None:
        config = configs.copy(config)
        tokenizer, read = tokenizers.of_run(config, folder)
        shape = with_tokens(config, shape, tokenizer)
        tokenizer_folder = None if read == folder else read
    else:
        tokenizer = tokenizers.load_tokenizer(tokenizer_folder or folder, folder)
        shape = shape if config is None else families.with_rows(shape, config.tuning.token_ids)
    if tokenizer_folder is None:  # a tokenizer from elsewhere may belong to a larger table
        tokenizers.check_vocab(tokenizer, shape.vocab_size)
    ends: Sequence[int] = ()
    if config is not None:
        ends, tokenizer = chat_templates.ends_of_run(config, tokenizer), chat_templates.installed(config, tokenizer)
    compute, settings = compute_dtype(dtype), configs.default() if config is None else config
    small = quantiser(quantise or settings.model.quantise, settings.model, compute)
    labels = families.label_names(folder) if shape.head.labels else ()
    if task:
        kind, labels = task
        shape = families.with_head(family, shape, tasks.find(kind).head, len(labels), folder, settings.task.pool)
    else:
        problem = read_json(folder / "config.json").get("problem_type") or ""
        kind = tasks.kind_of(shape.head.task, problem, shape.head.labels)
    params = weights.read_params(
        folder, family, shape, dtype=lambda path: compute, quantise=small,
        new_head=jax.random.key(settings.seed) if task else None, new_rows=None if config is None else config.seed,
    )  # fmt: skip
    weights.check_finite(folder, params, family, shape)
    ends = tokenizers.end_tokens(folder, tokenizer, ends)
    of_texts = None
    if kind == "embed":
        of_texts = run_pooling(config, shape.max_positions) if config is not None else pooling.read(folder)
    lm = LM(Transformer(shape, compute), params, {}, tokenizer, folder, ends, labels=labels, kind=kind)
    lm.pooling, lm.tokenizer_folder = of_texts or lm.pooling, tokenizer_folder
    return lm, Spec(shape, families.linear_names(family, shape), configs.default().tuning, family)


def with_tokens(config, shape, tokenizer):
    """The model's shape with a row for each token of data.add_tokens, padded as data.pad_vocabulary_to says.

    Sets config.tuning.token_ids.

    Args:
        config: The run's config.
        shape: The ModelConfig of the model's files.
        tokenizer: The tokenizer with the tokens.

    Raises:
        FtjaxError: If the tokenizer has other tokens beyond the rows of the files, or if the config has
            tuning.token_ids of its own.
    """
    if config.tuning.token_ids and not (config.data.add_tokens or config.data.pad_vocabulary_to):
        raise FtjaxError("tuning.token_ids: a run fills it in; leave it out, and name the tokens in data.add_tokens")
    rows, ids = shape.vocab_size, tokenizer.convert_tokens_to_ids(list(config.data.add_tokens))
    tokenizers.check_vocab(tokenizer, rows, ids)
    needed, multiple = max([rows - 1, *ids]) + 1, config.data.pad_vocabulary_to or 1
    padded = -(-needed // multiple) * multiple
    config.tuning.token_ids = tuple(sorted({*ids, *range(rows, padded)}))
    return families.with_rows(shape, config.tuning.token_ids)


def run_pooling(config, max_positions: int) -> Pooling:
    """How a run of task.kind embed makes vectors of texts. A row of its batches holds two texts."""
    pool = "mean" if config.task.pool == "auto" else config.task.pool
    return Pooling(pool, min(config.data.max_length // 2, max_positions))


def quantiser(kind: str, settings, dtype):
    """The function that weights.read_params quantises parameters with.

    Args:
        kind: Number format of the kernels of the blocks: `int8`, `nf4` or `none`.
        settings: config.model, which says what else is quantised and how.
        dtype: Type of computation.

    Returns:
        A function from the path of a parameter to the function that quantises it, or to None if it is not quantised.
    """
    quantise = functools.partial(quantised.quantise, double=settings.double_quantise, dtype=dtype)
    small = {name: jax.jit(functools.partial(quantise, kind=name)) for name in quantised.VALUES}
    return lambda path: small.get(quantised.kind_of(path, kind, settings.quantise_tables))


def compute_dtype(name: str, platform: str = ""):
    """The numpy dtype of `float32`, `bfloat16` or `auto`, which goes by the platform; empty: of the backend in use."""
    if name == "auto":
        name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(name)
