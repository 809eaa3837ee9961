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
    train_seconds: float = 0.0  # of a run, with all that belongs to it
    train_flops: float = 0.0
    train_joules: float | None = None  # of the processors, see ftjax.verdict.energy; None: not readable
    prompt_tokens: float = 0.0  # of a request; virtual tokens are among them
    answer_tokens: float = 0.0
    request_seconds: float = 0.0  # in a batch of generate.batch_size
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


def request(lm, ids: list[list[int]], answers: list[str], config) -> dict[str, float]:
    """What a request to a model costs, as fields of Cost. ids: prompts that it has answered, so that its programs are
    compiled; answers: in their order.

    The middle batch by length is answered once more, against the clock.
    """
    size = config.generate.batch_size
    batches = range(0, len(ids), size)
    first = batches[len(batches) // 2]
    chosen = sorted(range(len(ids)), key=lambda i: len(ids[i]))[first : first + size]
    begun = time.perf_counter()
    with metered() as meter:
        continue_ids(lm, lm.variables, [ids[i] for i in chosen], seed=config.seed, **config.generate.to_dict())
    seconds = (time.perf_counter() - begun) / len(chosen)
    virtual = lm.model.config.max_positions - lm.max_tokens
    prompt = float(np.mean([len(i) for i in ids])) + virtual
    told = lm.tokenizer(answers, add_special_tokens=False)["input_ids"]
    answer = float(np.mean([len(i) for i in told]))
    # Nothing is trained: what is left of the formula is the forward pass.
    forward = flops_per_token(lm.model.config, lm.params, {}, {}, int(prompt + answer))
    return {
        "prompt_tokens": prompt, "answer_tokens": answer, "request_seconds": seconds,
        "request_flops": (prompt + answer) * forward,
        "request_joules": None if meter.joules is None else meter.joules / len(chosen),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- money


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one contender, in dollars, or in device seconds where the config names no price."""

    unit: str  # dollars | seconds
    training: float
    request: float
    month: float | None  # all requests of a month and storage; None where compare.requests is 0


def price(cost: Cost, prices, base: bool = False) -> Price:
    """prices: config.compare; base: whether the base answers, at the hosted endpoint where that has a price."""
    hosted = base and (prices.tokens_in or prices.tokens_out)
    if not prices.device_hour and not hosted:
        month = prices.requests * cost.request_seconds if prices.requests else None
        return Price("seconds", cost.train_seconds, cost.request_seconds, month)
    one = cost.request_seconds / 3600 * prices.device_hour
    if hosted:
        one = (cost.prompt_tokens * prices.tokens_in + cost.answer_tokens * prices.tokens_out) / 1e6
    month = prices.requests * one + cost.stored / 1e9 * prices.storage if prices.requests else None
    return Price("dollars", cost.train_seconds / 3600 * prices.device_hour, one, month)


NOISE = 0.1  # share of a request's price by which two must differ: clocks do not tell less


def break_even(tuned: Price, other: Price) -> float:
    """Requests after which a tuned model has cost less than the other, its training included; inf: never, as far as
    can be told, NaN: the two are told in different units."""
    if tuned.unit != other.unit:
        return math.nan
    saved = other.request - tuned.request
    return max(tuned.training - other.training, 0.0) / saved if saved > NOISE * other.request else math.inf
