"""The cost of contenders: FLOPs, tokens and time of training and of a request, and money by the config's prices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from ftjax.evaluation.best import continued
from ftjax.hub import families, resolve, weights
from ftjax.training import features
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.flops import flops_per_token
from ftjax.training.program import count, with_task
from ftjax.tuning import METHODS, Spec
from ftjax.verdict.energy import metered


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one contender, as means over its seeds."""

    parameters: int  # of the model
    trained: int = 0  # trained parameters, of the model or added to it
    stored: int = 0  # bytes of the trained parameters
    train_seconds: float = 0.0  # of a run's steps, from their tokens per second
    run_seconds: float = 0.0  # of the whole run, with reading, compiling and validation
    train_tokens: float = 0.0  # tokens that the steps read
    train_flops: float = 0.0
    train_joules: float | None = None  # of the processors, see ftjax.verdict.energy; None: cannot be read
    prompt_tokens: float = 0.0  # of a request, with virtual tokens
    answer_tokens: float = 0.0
    request_seconds: float = 0.0  # per row, in a batch of generate.batch_size, or of evaluate.batch_size for labels
    request_flops: float = 0.0
    request_joules: float | None = None


def training(config, labels: int, examples, steps: int) -> tuple[int, float]:
    """Trained parameters and FLOPs of a run.

    FLOPs are those of flops_per_token for rows of the mean length. If only a head is trained, the states that it reads
    are computed once.

    Args:
        config: The run's resolved config.
        labels: Number of labels of the model's head.
        examples: The training examples.
        steps: Number of steps.

    Returns:
        (number of trained parameters, FLOPs of all steps).
    """
    folder = resolve.resolve_model(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    shape = families.with_rows(with_task(config, family, shape, folder, labels), config.tuning.token_ids)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    method, base = METHODS[config.tuning.method], weights.param_shapes(shape, np.float32)
    trained, frozen = jax.eval_shape(lambda key, base: method.init(key, base, spec), jax.random.key(0), base)
    length = float(np.mean(examples.length)) + method.virtual_tokens(spec)
    row = length * flops_per_token(shape, base, trained, frozen, length)
    size = config.train.batch_size
    if features.usable(config, trained, steps, math.ceil(len(examples.length) / size)):
        places = float(np.mean(examples.labels))
        return count(trained), len(examples.length) * row + steps * size * places * features.flops_per_token(trained)
    return count(trained), steps * size * row


def run_seconds(run_dir: str | Path) -> float:
    """Seconds that a run took up to its last checkpoint; NaN without a checkpoint."""
    saved = Checkpoints(run_dir, read_only=True)
    step = saved.latest()
    seconds = saved.record(step)["seconds"] if step else math.nan
    saved.close()
    return seconds


def steps_seconds(history: list[dict], tokens: float, whole: float) -> float:
    """Seconds that a run's steps took.

    Args:
        history: Rows of metrics.jsonl. The speed is the last `tokens_per_second`.
        tokens: Number of tokens that the steps read.
        whole: Seconds of the whole run: the upper bound, and the result if there is no speed.
    """
    speed = next((row["tokens_per_second"] for row in reversed(history) if row.get("tokens_per_second")), 0.0)
    return min(tokens / speed, whole) if speed else whole


def middle(lengths, size: int) -> list[int]:
    """Indices of the middle batch, if the rows are sorted by length into batches of `size`."""
    batches = range(0, len(lengths), size)
    first = batches[len(batches) // 2]
    return sorted(range(len(lengths)), key=lambda i: lengths[i])[first : first + size]


def timed(run, rows: int) -> dict[str, float | None]:
    """`request_seconds` and `request_joules` per row of a function that answers `rows` rows, by one timed call."""
    begun = time.perf_counter()
    with metered() as meter:
        run()
    seconds = time.perf_counter() - begun
    return {
        "request_seconds": seconds / rows,
        "request_joules": None if meter.joules is None else meter.joules / rows,
    }


def request(
    lm, ids: list[list[int]], answers: list[str], config, ranked: Callable[[list[int]], dict[int, str]], tried: float
) -> dict[str, float]:
    """The cost of a request to a model, as fields of Cost. The middle batch by length is answered once more and timed.

    Args:
        lm: The model.
        ids: Prompts that it has answered, so that its programs are compiled.
        answers: The answers, in the order of `ids`.
        config: The config, for `generate` and `seed`.
        ranked: ranked(indices of prompts) -> {place among the indices: answer} of those whose answer is chosen among
            labels; the others are generated.
        tried: Mean number of answers that the model computes for a prompt.
    """
    chosen = middle(list(map(len, ids)), config.generate.batch_size)
    known = ranked(chosen)  # compiled before the time is taken
    others = [ids[i] for n, i in enumerate(chosen) if n not in known]

    def run():
        if known:
            ranked(chosen)
        if others:
            continued(lm, lm.variables, others, seed=config.seed, **config.generate.to_dict())

    found = timed(run, len(chosen))
    virtual = lm.model.config.max_positions - lm.max_tokens
    prompt = float(np.mean([len(i) for i in ids])) + virtual
    answer_ids = lm.tokenizer(answers, add_special_tokens=False)["input_ids"]
    answer = float(np.mean([len(i) for i in answer_ids]))
    return found | {
        "prompt_tokens": prompt, "answer_tokens": answer,
        "request_flops": tried * forward_flops(lm, prompt + answer),
    }  # fmt: skip


def forward_flops(lm, tokens: float) -> float:
    """FLOPs of one forward pass over so many tokens: the formula without trained parameters."""
    return tokens * flops_per_token(lm.model.config, lm.params, {}, {}, int(tokens))


# ---------------------------------------------------------------------------------------------- money


HOURS = 730  # hours per month


@dataclasses.dataclass(frozen=True)
class Price:
    """The price of one contender, in dollars, or in device seconds if the config has no price for it."""

    unit: str  # dollars | seconds
    training: float
    request: float
    standing: float = 0.0  # fixed cost per month: an endpoint that is paid by the hour, and storage
    month: float | None = None  # all requests of a month and the fixed cost; None if compare.requests is 0


def price(cost: Cost, prices, kind: str = "tuned") -> Price:
    """The price of a contender by the config.

    Training is paid by tokens and by the hour of a service if these have a price, else by `device_hour` for the whole
    run. A request is paid by tokens if an endpoint for the base or for tuned models has such a price. It costs nothing
    if an endpoint is paid by the hour. Else it is paid by `device_hour` for the measured seconds.

    Args:
        cost: The contender's cost.
        prices: config.compare.
        kind: See ftjax.verdict.contenders.Contender: `prompt` is the base, `majority` is no model.

    Returns:
        The Price.
    """
    base, own = kind == "prompt", kind in ("tuned", "model")
    hosted = base and bool(prices.tokens_in or prices.tokens_out)
    by_tokens = hosted or own and bool(prices.tuned_in or prices.tuned_out)
    by_hour = bool(prices.hosting_hour) and not hosted and kind != "majority"
    bought = bool(prices.training_hour or prices.training_tokens)
    known = prices.device_hour or (by_tokens or by_hour) and (bought or kind != "tuned")
    if not known:
        month = prices.requests * cost.request_seconds if prices.requests else None
        return Price("seconds", cost.run_seconds, cost.request_seconds, month=month)
    training = cost.train_tokens / 1e6 * prices.training_tokens + cost.train_seconds / 3600 * prices.training_hour
    training = training if bought else cost.run_seconds / 3600 * prices.device_hour
    one = 0.0 if by_hour else cost.request_seconds / 3600 * prices.device_hour
    if by_tokens:
        way = (prices.tokens_in, prices.tokens_out) if hosted else (prices.tuned_in, prices.tuned_out)
        one = (cost.prompt_tokens * way[0] + cost.answer_tokens * way[1]) / 1e6
    standing = by_hour * HOURS * prices.hosting_hour + cost.stored / 1e9 * prices.storage
    month = prices.requests * one + standing if prices.requests else None
    return Price("dollars", training, one, standing, month)


NOISE = 0.1  # two prices count as equal if they differ by less than this share: clocks are not more accurate


def _saved(tuned: Price, other: Price) -> float:
    """How much less a request to the tuned model costs; 0 if the difference is within the accuracy of the clock."""
    saved = other.request - tuned.request
    return saved if abs(saved) > NOISE * other.request else 0.0


def load(tuned: Price, other: Price) -> float:
    """Requests per month from which the tuned model is cheaper to run than the other; inf if never, NaN if their units
    differ."""
    more, saved = tuned.standing - other.standing, _saved(tuned, other)
    if tuned.unit != other.unit:
        return math.nan
    return more / saved if saved > 0 and more > 0 else 0.0 if more <= 0 <= saved else math.inf


def break_even(tuned: Price, other: Price, requests: float = 0) -> float:
    """Number of requests after which a tuned model has cost less than the other, its training included.

    Args:
        tuned: Price of the tuned model.
        other: Price of the same task by a longer prompt, or by a hosted model.
        requests: Requests per month. The result depends on it if one of the two has a fixed cost per month.

    Returns:
        inf if the tuned model never gets cheaper, as far as is known; NaN if their units differ.
    """
    if tuned.unit != other.unit:
        return math.nan
    saved, more = _saved(tuned, other), tuned.standing - other.standing
    if more and requests:
        saved -= more / requests
    elif more > 0:
        return math.inf
    return max(tuned.training - other.training, 0.0) / saved if saved > 0 else math.inf
