"""What contenders cost: arithmetic and time, of training and of a request, and money by the config's prices."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import jax
import numpy as np

from ftjax.hub import families, resolve, weights
from ftjax.lm import continue_ids
from ftjax.training import features
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.flops import flops_per_token
from ftjax.training.program import with_task
from ftjax.tuning import METHODS, Spec
from ftjax.verdict.energy import metered


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one contender; means over its seeds."""

    parameters: int  # of the model
    trained: int = 0  # of those, and beside them
    stored: int = 0  # bytes of what was trained
    train_seconds: float = 0.0  # of a run's steps, by their tokens a second
    run_seconds: float = 0.0  # of the whole run: reading, compiling and validation too
    train_tokens: float = 0.0  # that the steps read
    train_flops: float = 0.0
    train_joules: float | None = None  # of the processors, see ftjax.verdict.energy; None: not readable
    prompt_tokens: float = 0.0  # of a request; virtual tokens are among them
    answer_tokens: float = 0.0
    request_seconds: float = 0.0  # in a batch of generate.batch_size, or of evaluate.batch_size for labels
    request_flops: float = 0.0
    request_joules: float | None = None


def training(config, labels: int, examples, steps: int) -> tuple[int, float]:
    """(parameters that are trained, FLOPs) of `steps` steps of a run's resolved config on `examples`; labels: how many
    names its head has.

    By formula, see flops_per_token, of the rows' mean number of tokens. Where a head alone is trained, the states that
    it reads are computed once.
    """
    folder = resolve.resolve(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    shape = with_task(config, family, shape, folder, labels)
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


def count(shapes) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def run_seconds(run_dir: str | Path) -> float:
    """Seconds that a run took, up to its last checkpoint; NaN without one."""
    saved = Checkpoints(run_dir, read_only=True)
    step = saved.latest()
    seconds = saved.record(step)["seconds"] if step else math.nan
    saved.close()
    return seconds


def steps_seconds(history: list[dict], tokens: float, whole: float) -> float:
    """Seconds of a run's steps that read so many tokens, by the speed in its metrics; `whole` where it has none."""
    speed = next((row["tokens_per_second"] for row in reversed(history) if row.get("tokens_per_second")), 0.0)
    return min(tokens / speed, whole) if speed else whole


def middle(lengths, size: int) -> list[int]:
    """The indices of the middle batch of `size`, by length."""
    batches = range(0, len(lengths), size)
    first = batches[len(batches) // 2]
    return sorted(range(len(lengths)), key=lambda i: lengths[i])[first : first + size]


def timed(run, rows: int) -> dict[str, float | None]:
    """`request_seconds` and `request_joules` of a row, by the clock, of a function that answers so many at once."""
    begun = time.perf_counter()
    with metered() as meter:
        run()
    seconds = time.perf_counter() - begun
    return {
        "request_seconds": seconds / rows,
        "request_joules": None if meter.joules is None else meter.joules / rows,
    }


def request(lm, ids: list[list[int]], answers: list[str], config) -> dict[str, float]:
    """What a request to a model costs, as fields of Cost. ids: prompts that it has answered, so that its programs are
    compiled; answers: in their order.

    The middle batch by length is answered once more, against the clock.
    """
    chosen = [ids[i] for i in middle(list(map(len, ids)), config.generate.batch_size)]
    found = timed(
        lambda: continue_ids(lm, lm.variables, chosen, seed=config.seed, **config.generate.to_dict()), len(chosen)
    )
    virtual = lm.model.config.max_positions - lm.max_tokens
    prompt = float(np.mean([len(i) for i in ids])) + virtual
    told = lm.tokenizer(answers, add_special_tokens=False)["input_ids"]
    answer = float(np.mean([len(i) for i in told]))
    return found | {
        "prompt_tokens": prompt, "answer_tokens": answer,
        "request_flops": forward_flops(lm, prompt + answer),
    }  # fmt: skip


def forward_flops(lm, tokens: float) -> float:
    """FLOPs of one forward pass over so many tokens: nothing is trained, and that is what the formula leaves."""
    return tokens * flops_per_token(lm.model.config, lm.params, {}, {}, int(tokens))


# ---------------------------------------------------------------------------------------------- money


HOURS = 730  # of a month


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one contender, in dollars, or in device seconds where the config has no price for it."""

    unit: str  # dollars | seconds
    training: float
    request: float
    standing: float = 0.0  # of a month, whatever is asked: an endpoint by the hour, storage
    month: float | None = None  # all requests of a month and what stands; None where compare.requests is 0


def price(cost: Cost, prices, kind: str = "tuned") -> Price:
    """What a contender costs by the prices of a config.

    Training: by tokens and by the hour of a service, or else by `device_hour` for the whole run. A request: by tokens,
    where an endpoint for the base or for tuned models has such a price; nothing where an endpoint is paid by the hour;
    or else `device_hour` for the seconds that were measured.

    Args:
        cost: What the contender takes.
        prices: config.compare.
        kind: See ftjax.verdict.contenders.Contender: `prompt` is the base, `majority` is no model.
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


NOISE = 0.1  # share of a request's price by which two must differ: clocks do not tell less


def _saved(tuned: Price, other: Price) -> float:
    """What a request to the tuned model costs less; 0 where clocks cannot tell."""
    saved = other.request - tuned.request
    return saved if abs(saved) > NOISE * other.request else 0.0


def load(tuned: Price, other: Price) -> float:
    """Requests a month from which the tuned model is cheaper to run than the other; inf: never, NaN: unlike units."""
    more, saved = tuned.standing - other.standing, _saved(tuned, other)
    if tuned.unit != other.unit:
        return math.nan
    return more / saved if saved > 0 and more > 0 else 0.0 if more <= 0 <= saved else math.inf


def break_even(tuned: Price, other: Price, requests: float = 0) -> float:
    """Requests after which a tuned model has cost less than the other, its training included.

    Args:
        tuned: Of the tuned model.
        other: Of the same task by a longer prompt, or by a hosted model.
        requests: A month. Where one of the two costs something whatever is asked, the number depends on it.

    Returns:
        inf where it never will, as far as can be told; NaN where the two are in different units.
    """
    if tuned.unit != other.unit:
        return math.nan
    saved, more = _saved(tuned, other), tuned.standing - other.standing
    if more and requests:
        saved -= more / requests
    elif more > 0:
        return math.inf
    return max(tuned.training - other.training, 0.0) / saved if saved > 0 else math.inf
