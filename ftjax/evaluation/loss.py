"""Loss over held-out batches and over plain documents.

B rows, T tokens.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from ftjax import tasks, xla
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.progress import doing


@functools.partial(xla.jit, static_argnums=0, static_argnames=("kind", "options"))
def _sums(model, variables, batch, *, kind: str, options: tuple):
    return tasks.find(kind).sums(model, variables, batch, **dict(options))


def sums(model, variables, batch, *, kind: str = "causal", **options):
    """The sums of a task's objective as in evaluation: without dropout, label smoothing and the like.

    Args:
        model: The Flax module.
        variables: The Flax variables.
        batch: {name: array (B, ...)}.
        kind: The task, as in task.kind.
        options: Options of the objective that also apply in evaluation, see ftjax.tasks.Task.always.

    Returns:
        (loss sum, weight sum, metric sums), see ftjax.objectives.
    """
    return _sums(model, variables, batch, kind=kind, options=tuple(options.items()))


AHEAD = 8  # batches that may be queued on the device before the first result is read
SEPARATOR = "<|endoftext|>"


def evaluate_loss(sums_fn: Callable, batches: Iterable) -> dict[str, float]:
    """Means over the trained tokens of all batches.

    Args:
        sums_fn: sums_fn(batch) -> (loss sum, weight sum, {"loss", "correct"}), as of an objective, jitted by the
            caller. Sums are added in float64 and divided once.
        batches: The batches.

    Returns:
        {"loss" (nats), "perplexity", "accuracy", "tokens" (the number of trained tokens)}, and the means of what else
        the sums hold.

    Raises:
        FtjaxError: If there is no trained token.
        NotFinite: If the loss is NaN or infinite.
    """
    totals, pending = collections.defaultdict(float), collections.deque()

    def read():
        _, weight, metrics = jax.device_get(pending.popleft())
        for name, value in {"tokens": weight, **metrics}.items():
            totals[name] += float(value)

    with doing("measuring the loss"):
        for batch in batches:
            pending.append(sums_fn(batch))
            if len(pending) > AHEAD:
                read()
        while pending:
            read()
    tokens = totals.pop("tokens", 0.0)
    if not tokens:
        raise FtjaxError(
            "evaluation: no row has a token whose loss counts, so there is no loss; evaluate at least one row with an "
            "answer"
        )
    means = {name: total / tokens for name, total in totals.items()}
    loss = means.pop("loss")
    right = {"accuracy": means.pop("correct")} if "correct" in means else {}
    if not math.isfinite(loss):
        raise NotFinite(f"evaluation: the loss is {loss}, so no score of this model is meaningful. {WEIGHTS}")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **right, "tokens": tokens} | means


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a UTF-8 text file, separated by `<|endoftext|>`. White space around them and empty ones are
    removed.

    Raises FtjaxError if the file cannot be read or has no document.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FtjaxError(f"{path}: expected a readable text file in UTF-8: {error}") from None
    documents = [d.strip() for d in text.split(SEPARATOR) if d.strip()]
    if not documents:
        raise FtjaxError(f"{path}: contains no text; expected documents, separated by {SEPARATOR}")
    return documents


def text_loss(
    sums_fn: Callable, tokenizer, documents: list[str], *, max_positions: int, batch_size: int = 8
) -> dict[str, float]:
    """`evaluate_loss` on every token of every document, each after BOS (EOS if the tokenizer has no BOS).

    The end of a document is not scored, because it may be part of a longer text. A document that exceeds
    `max_positions` is cut into pieces that share one token, so that each token is scored once.

    Args:
        sums_fn: See `evaluate_loss`.
        tokenizer: The tokenizer.
        documents: The documents.
        max_positions: Most tokens of a row.
        batch_size: Rows per batch.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    examples = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids = np.array(([] if start is None else [start]) + ids, np.int32)
        for first in range(0, max(len(ids) - 1, 1), max_positions - 1):
            piece = ids[first : first + max_positions]
            examples.append(Example(piece, np.arange(len(piece)) > 0))
    batches = Batches(examples, min(batch_size, len(examples)), max_positions, shuffle=False)
    return evaluate_loss(sums_fn, (batches[i] for i in range(len(batches))))
