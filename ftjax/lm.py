"""A language model ready for use, and the way to one from a model directory.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import config as configs
from ftjax import cpus
from ftjax.data import chat_templates
from ftjax.data.batches import by_example
from ftjax.data.pairs import encode_texts
from ftjax.data.prepare import fingerprint
from ftjax.data.template import Rendered, asked
from ftjax.data.tokenise import Example, encode_prompts
from ftjax.errors import FtjaxError, NotFinite, nearest
from ftjax.hub import families, pooling, resolve, tokenizer, weights
from ftjax.hub.pooling import Pooling
from ftjax.models import quantised
from ftjax.models.transformer import Transformer, max_tokens
from ftjax.objectives import TASKS, contrast, kind_of
from ftjax.progress import doing
from ftjax.tuning import Spec
from ftjax.tuning.adapters import pick, weighted


@dataclasses.dataclass
class LM:
    """A model, what it is applied to, and its tokenizer.

    model: the Flax module; params: the base's parameters; adapter: the `adapter` collection, empty for a plain model;
    folder: the local directory of the base; end_tokens: ids that end an answer; adapters: name -> this model under an
    adapter that was loaded beside, see `with_adapter`; tokenizer_folder: the directory of a tokenizer that is not the
    base's.
    """

    model: Transformer
    params: dict
    adapter: dict
    tokenizer: Any
    folder: Path
    end_tokens: tuple[int, ...]
    adapters: dict[str, LM] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()  # names of those of its head, in the order of their ids
    kind: str = "causal"  # a row of ftjax.objectives.TASKS
    pooling: Pooling = Pooling()  # how vectors of texts are made
    tokenizer_folder: Path | None = None

    @property
    def variables(self) -> dict:
        """What `model.apply` takes."""
        return {"params": self.params, "adapter": self.adapter} if self.adapter else {"params": self.params}

    @property
    def max_tokens(self) -> int:
        """Tokens that a row may have: the model's positions, less those of virtual tokens."""
        return max_tokens(self.model.config, self.variables)

    def with_adapter(self, adapter: str | dict[str, float], combine: str = "cat") -> LM:
        """This model under one of its `adapters`, or under the sum of several LoRAs: {"a": 0.7, "b": 0.3}.

        combine: how they are added, `cat` or `linear`, see ftjax.tuning.adapters.weighted. Nothing of the base is
        copied. Texts are read by the tokenizer of the adapter, or by the one that all of several share. Raises
        FtjaxError for an adapter that was not loaded, and for what cannot be added.
        """
        if isinstance(adapter, str):
            return dataclasses.replace(pick(self.adapters, adapter), adapters=self.adapters)
        added = [pick(self.adapters, name) for name in adapter]
        if len({fingerprint(lm.tokenizer) for lm in added}) > 1:
            raise FtjaxError(
                f"adapters {', '.join(adapter)}: they bring different tokenizers or chat templates, and their sum can "
                "read texts by one alone; give all of them the same tokenizer files"
            )
        collections = {name: lm.variables for name, lm in self.adapters.items()}
        variables = {"params": self.params, "adapter": weighted(collections, self.params, adapter, combine)}
        return dataclasses.replace(added[0], adapters=self.adapters).applied(variables)

    def reading(self, folder: Path) -> LM:
        """This model with the tokenizer and chat template of a directory, as far as it brings them.

        Raises FtjaxError for a tokenizer that does not load, and for one with more tokens than the model's table of
        embeddings has rows.
        """
        words, own = self.tokenizer, None
        if tokenizer.has_tokenizer(folder):
            words, own = tokenizer.load_tokenizer(folder, self.folder), Path(folder)
        elif text := tokenizer.chat_template(folder):
            words = copy.copy(words)
            words.chat_template = text
        tokenizer.check_vocab(words, self.model.config.vocab_size)
        ends = tokenizer.end_tokens(self.folder, words)
        return dataclasses.replace(self, tokenizer=words, tokenizer_folder=own, end_tokens=ends)

    def applied(self, variables: dict) -> LM:
        """This model under `variables`: {"params": ..., "adapter": ...}; their vocabulary may have another size."""
        shape = dataclasses.replace(self.model.config, vocab_size=variables["params"]["embed"]["embedding"].shape[0])
        model = self.model if shape == self.model.config else self.model.clone(config=shape)
        return dataclasses.replace(self, model=model, params=variables["params"], adapter=variables.get("adapter", {}))

    def logits(self, input_ids, attention_mask=None) -> np.ndarray:
        """input_ids, attention_mask (B, T) int -> logits (B, T, V) float32; padding may lie on either side."""
        ids = jnp.asarray(np.asarray(input_ids), jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(np.asarray(attention_mask), jnp.int32)
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise FtjaxError(f"logits: expected ids and mask of one shape (B, T); found {ids.shape} and {mask.shape}")
        if ids.shape[1] > (limit := self.max_tokens):
            raise FtjaxError(f"logits: rows of {ids.shape[1]} tokens exceed the model's {limit} positions")
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return np.asarray(_logits(self.model, self.variables, ids, positions, mask))

    def embed(self, texts: list[str], *, pool: str = "", max_length: int = 0, batch_size: int = 32) -> np.ndarray:
        """Vectors (N, D) float32 of length 1 of texts, from the hidden states behind the last norm.

        pool: mean | cls; max_length: tokens to which a text is cut; empty and 0: as the model's files or its run say,
        or else the mean of as many tokens as it has positions for.
        """
        if pool not in ("", *contrast.POOLS):
            raise FtjaxError(f"embed: pool {pool!r}{nearest(pool, contrast.POOLS)}; one of {', '.join(contrast.POOLS)}")
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
        self, prompts: list | str | dict, *, max_new_tokens: int = 64, stop: tuple[str, ...] = (), **sampling
    ) -> list[str]:
        """Continue each prompt.

        Args:
            prompts: Texts, or conversations to answer, which the chat template shows: each a list of messages with
                `role` and `content`, or a row {"messages": [...], "tools": [...]}. One prompt may stand alone.
            max_new_tokens: The most tokens of an answer.
            stop: Strings of one token each that end an answer beside the model's own end tokens.
            sampling: temperature, top_k, top_p, …, see ftjax.evaluation.generate.generate.

        Returns:
            The new text of each.

        Raises:
            FtjaxError: for messages that are none, or that the tokenizer has no chat template for; for a model that
                predicts no next token.
        """
        messages = isinstance(prompts, list) and prompts and isinstance(prompts[0], dict) and "role" in prompts[0]
        prompts = [prompts] if messages or isinstance(prompts, str | dict) else prompts
        rows = [
            Rendered(prompt=p)
            if isinstance(p, str)
            else asked(p if isinstance(p, dict) else {"messages": p}, f"prompt {n}")
            for n, p in enumerate(prompts, 1)
        ]
        ids = [i.tolist() for i in encode_prompts(rows, self.tokenizer, lambda n: f"prompt {n + 1}", goes_on=True)]
        return continue_ids(self, self.variables, ids, max_new_tokens=max_new_tokens, stop=stop, **sampling)


def continue_ids(lm: LM, variables, ids: list[list[int]], *, stop: tuple[str, ...] = (), **sampling) -> list[str]:
    """The new text behind each prompt, up to one of the model's end tokens or of `stop`.

    variables: what lm.model is applied to; sampling: see ftjax.evaluation.generate.generate. Raises FtjaxError for a
    model that predicts no next token.
    """
    from ftjax.evaluation.generate import generate

    if lm.kind != "causal":
        raise FtjaxError(
            f"generate: this model is for task.kind {lm.kind}, and continues no text; `ftjax predict` has what it says"
        )
    ends = tuple(lm.end_tokens) + stop_tokens(lm.tokenizer, stop)
    drawn = min(lm.model.config.vocab_size, len(lm.tokenizer))  # a padded table has rows that are no token
    with doing(f"answering {len(ids):,} prompts"):
        new = generate(lm.model, variables, ids, end_tokens=ends, vocab_size=drawn, **sampling)
    return continuations(lm.tokenizer, ids, new)


def continuations(tokenizer, prompts: list[list[int]], new: list[list[int]]) -> list[str]:
    """Text of new tokens as it stands behind their prompts: a tokenizer may drop the space of a text's first token."""
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    after = tokenizer.batch_decode([p + n for p, n in zip(prompts, new, strict=True)], skip_special_tokens=True)
    return [a[len(b) :] for a, b in zip(after, before, strict=True)]


def stop_tokens(tokenizer, stop: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of stop strings. Raises FtjaxError for one that is not a single token of this tokenizer."""
    ids = []
    for text in stop:
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            raise FtjaxError(f"stop {text!r}: is {len(pieces)} tokens for this tokenizer; expected exactly one")
        ids += pieces
    return tuple(ids)


@jax.jit(static_argnums=0)
def _logits(model, variables, ids, positions, segments):
    return model.apply(variables, ids, positions, segments)


def open_base(
    folder: Path,
    dtype: str = "auto",
    config=None,
    quantise: str = "",
    task: tuple[str, tuple[str, ...]] | None = None,
    tokenizer_folder: Path | None = None,
) -> tuple[LM, Spec]:
    """The model in a local directory, on the default device, and its Spec with the default tuning.

    dtype, quantise: see ftjax.load; config: of a run, whose chat template and end token then take the directory's
    place; task: (kind, names of labels), for which the model gets a head instead of its own, new where it has none;
    tokenizer_folder: the directory of its tokenizer, where that is not the base's.
    """
    folder = Path(folder)
    family, shape = families.read_config(folder)
    words = tokenizer.load_tokenizer(tokenizer_folder or folder, folder)
    if tokenizer_folder is None:  # a tokenizer from elsewhere may come with a larger table
        tokenizer.check_vocab(words, shape.vocab_size)
    ends = ()
    if config is not None:
        ends, words = chat_templates.ends_of_run(config, words), chat_templates.installed(config, words)
    compute = compute_dtype(dtype)
    kept = (configs.default() if config is None else config).model
    small = quantiser(quantise or kept.quantise, kept, compute)
    labels = families.label_names(folder) if shape.head.labels else ()
    if task:
        kind, labels = task
        pool = "auto" if config is None else config.task.pool
        shape = families.with_head(family, shape, TASKS[kind].head, len(labels), folder, pool)
    else:
        kind = kind_of(shape.head.task, resolve.read_json(folder / "config.json").get("problem_type") or "")
    key = jax.random.key(0 if config is None else config.seed)
    params = weights.read_params(
        folder, family, shape, dtype=lambda path: compute, quantise=small, new_head=key if task else None
    )
    ends = tokenizer.end_tokens(folder, words, ends)
    of_texts = None
    if kind == "embed":
        of_texts = run_pooling(config, shape.max_positions) if config is not None else pooling.read(folder)
    lm = LM(Transformer(shape, compute), params, {}, words, folder, ends, labels=labels, kind=kind)
    lm.pooling, lm.tokenizer_folder = of_texts or lm.pooling, tokenizer_folder
    return lm, Spec(shape, families.linear_names(family, shape), configs.default().tuning, family)


def run_pooling(config, max_positions: int) -> Pooling:
    """How a run makes vectors of texts, of which a row of its batches holds two."""
    pool = "mean" if config.task.pool == "auto" else config.task.pool
    return Pooling(pool, min(config.data.max_length // 2, max_positions))


def quantiser(kind: str, settings, dtype):
    """path of a parameter -> what weights.read_params makes of it; None: it stays as it is.

    kind: of kernels of the blocks; settings: config.model, for what else is quantised and how.
    """
    quantise = functools.partial(quantised.quantise, double=settings.double_quantise, dtype=dtype)
    small = {name: jax.jit(functools.partial(quantise, kind=name)) for name in quantised.VALUES}
    return lambda path: small.get(quantised.kind_of(path, kind, settings.quantise_tables))


def compute_dtype(name: str):
    """`auto`, `float32` or `bfloat16` -> numpy dtype; auto by the backend in use."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
