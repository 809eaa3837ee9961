"""Answers that earn rewards: the model writes answers to prompts, and learns from what they are worth."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ftjax import config as configs
from ftjax import tasks, user_code, xla
from ftjax.data import prepare, template, tokenise
from ftjax.data.batches import Batches
from ftjax.data.template import Rendered
from ftjax.data.tokenise import Example, answer_of, encode_prompts
from ftjax.decoding import generate
from ftjax.errors import FtjaxError
from ftjax.evaluation import best, metrics
from ftjax.lm import LM, continuations, token_rules
from ftjax.models.axes import constrain
from ftjax.objectives import causal, policy
from ftjax.objectives.policy import FIGURE
from ftjax.tasks import Collected, Task
from ftjax.tasks.preference import keeps_base
from ftjax.training import hosts, sharding

OPEN = "prompt alone"  # the form of rows that have a prompt and no answer
DRAWS = 2  # tells the random keys of draws from those of dropout and noise
SIZES = 4  # a length of rows is rounded up to a multiple of this part of the greatest, so that few shapes are compiled


# ---------------------------------------------------------------------------------------------- prompts


@dataclasses.dataclass(frozen=True)
class Prompts(prepare.Recipe):
    """How rows become prompts. An answer of a row is a reference for rewards, and is not trained.

    Attributes:
        max_length: Most tokens of a prompt and an answer.
        max_new_tokens: Most tokens of an answer.
        cut: Whether data.long is truncate, which a prompt cannot be.
    """

    shown: ClassVar[str] = "prompts"  # in reports
    goes_on: ClassVar[bool] = True  # a conversation that does not end in an answer is a prompt as a whole
    max_length: int
    max_new_tokens: int
    cut: bool

    def render(self, rows: list[dict], places: list[str]) -> list[Rendered]:
        """See Recipe.render. Rows need no answers."""
        if self.form != OPEN:
            return super().render(rows, places)
        return [self._open(row, place) for row, place in zip(rows, places, strict=True)]

    def _open(self, row: dict, place: str) -> Rendered:
        if self.prompt:
            row = _asking(template.fill(template.parse(self.prompt, "data.prompt"), row, place), row)
        if isinstance(row.get("prompt"), list):
            row = row | {"messages": row["prompt"]}
        if self.template or not isinstance(row.get("prompt"), str):
            return template.asked(row, place, self.template, self.system)
        return Rendered(prompt=row["prompt"])

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """One Example for each row, the ids of its prompt, of which none is trained. See Recipe.encode."""
        prompts = encode_prompts(self.render(rows, places), tokenizer, places.__getitem__, self.end, self.goes_on)
        for ids, place in zip(prompts, places, strict=True):
            if self.cut:
                self.check_room(ids, place)
        return [Example(ids, np.zeros(len(ids), bool), whole=len(ids) + self.max_new_tokens) for ids in prompts]

    def describe(self, example: Example) -> str:
        """What becomes of an example, for people."""
        return "a prompt: what the model writes after it is trained"

    def check_room(self, ids, place: str) -> None:
        """Raise FtjaxError if the ids of a prompt leave no room for an answer."""
        if len(ids) + self.max_new_tokens > self.max_length:
            raise no_room(
                place, len(ids), self.max_new_tokens, self.max_length, "leave such rows out by data.long=drop"
            )

    def given(self, prompt: str | list, row: dict, place: str) -> Rendered:
        """A prompt that an environment gives, text or messages, in place of the row's own."""
        return dataclasses.replace(self, prompt="")._open(_asking(prompt, row), place)


def no_room(place: str, tokens: int, new: int, most: int, remedy: str) -> FtjaxError:
    """The error for a prompt of `tokens` tokens without room for `new` more, of `most`. remedy: what else to do."""
    return FtjaxError(
        f"{place}: its prompt has {tokens:,} tokens, which leaves no room for generate.max_new_tokens={new:,} within "
        f"{most:,} (data.max_length, or the model's positions); lower the one or raise the other, or {remedy}"
    )


def _asking(prompt: str | list, row: dict) -> dict:
    """A row with this prompt, and with the system text and the tools of another row."""
    return {"prompt": prompt, "system": row.get("system"), "tools": row.get("tools")}


def recipe(config, data, columns: list[str], max_length: int, max_positions: int) -> tuple[Prompts, bool]:
    """See Task.recipe."""
    if _answerless(data, columns):
        fields = (data.prompt, data.completion, data.template, data.system, data.train_on, data.end)
        found, guessed = prepare.Recipe(OPEN, *fields, (), ""), False
    else:
        found, guessed = prepare.recipe(data, columns)
    if found.form == "text":
        raise FtjaxError(
            f"task.kind=policy: rows need a prompt; found the columns {', '.join(columns)}. Set data.prompt to a "
            "template of the prompt, such as data.prompt='{text}'"
        )
    most = config.generate.max_new_tokens
    fields = dataclasses.asdict(found) | {"max_length": max_length, "max_new_tokens": most}
    return Prompts(**fields, cut=config.data.long == "truncate"), guessed


def _answerless(data, columns: list[str]) -> bool:
    """Whether rows are read as prompts without an answer."""
    if data.completion or data.prompt:
        return not data.completion
    if data.form in ("messages", "sharegpt"):
        return True
    there = set(columns)
    pairs, turns, answers = "rejected" in there, there & {"messages", "conversations"}, {"completion", "response"}
    return not pairs and (
        (data.form == "auto" and bool(turns))
        or (data.form in ("auto", "prompt") and "prompt" in there and not there & answers)
    )


# ---------------------------------------------------------------------------------------------- rewards


def rewards(
    config, part: prepare.Part, rows: np.ndarray, prompts: list[list[int]], new: list[list[int]], tokenizer
) -> dict[str, np.ndarray]:
    """The rewards of answers.

    Args:
        config: The config.
        part: The rows.
        rows: (R,) index of each answer's example in the part.
        prompts: Ids of the R prompts.
        new: Ids of the R answers, without the token that ends them.
        tokenizer: The tokenizer.

    Returns:
        {"reward": the weighted sum, "reward/NAME": that of each of task.rewards}, (R,) float64.

    Raises:
        FtjaxError: See `check_rewards`; if a function fails or does not return a finite number. It then names the row
            and the function.
    """
    check_rewards(config.task)
    answers = [answer_of(text) for text in continuations(tokenizer, prompts, new)]
    settings = [source.config.evaluate for source in configs.sources(config)]  # a source may set some of its own
    known = {
        int(i): (part.row(i), [part.reference(i, tokenizer)], part.place(i), settings[part.source[i]])
        for i in np.unique(rows)
    }

    def found() -> dict[str, list[float]]:
        return {
            name: [_reward(name, answer, *known[int(i)]) for i, answer in zip(rows, answers, strict=True)]
            for name in config.task.rewards
            if not _is_model(name)
        }

    each = {name: np.array(x, float) for name, x in hosts.from_first(found).items()}
    for name in filter(_is_model, config.task.rewards):
        judge = user_code.once(_judge, name, tokenizer, jax.sharding.get_mesh())
        how = config.generate
        each[name] = best.scores(judge, prompts, new, how.max_new_tokens, how.batch_size, "task.rewards")
    each = {f"reward/{name}": each[name] for name in config.task.rewards}
    weights = config.task.reward_weights or [1.0] * len(each)
    return {"reward": sum(w * x for w, x in zip(weights, each.values(), strict=True)), **each}


def check_rewards(task) -> None:
    """Raise FtjaxError if config.task names no rewards, unknown ones, or another number of weights, and if its weights
    reward more of what is better the less there is."""
    if not task.rewards:
        raise FtjaxError(
            "task.rewards: names no reward; expected metrics that `ftjax metrics` lists, such as number_match, or your "
            "own functions as file.py:name (or task.environment). Functions that only the config of a run folder names "
            "are not run: name them in the command"
        )
    weights = task.reward_weights or [1.0] * len(task.rewards)
    if len(weights) != len(task.rewards):
        raise FtjaxError(
            f"task.reward_weights: expected {len(task.rewards)} numbers, one for each of task.rewards; found "
            f"{len(weights)}"
        )
    for name, weight in zip(task.rewards, weights, strict=True):
        if not _is_model(name) and metrics.find(name, "task.rewards").higher is False and weight > 0:
            raise FtjaxError(
                f"task.reward_weights: less of {name} is better, and a weight of {weight:g} rewards more of it; "
                "expected a weight below 0"
            )


def _is_model(name: str) -> bool:
    """Whether an entry of task.rewards is the directory of a reward model."""
    return name not in metrics.METRICS and Path(name).is_dir()


def _judge(path: str, tokenizer, mesh) -> LM:
    """The reward model at a path, on the devices of the mesh."""
    judge = best.reward_model(path, tokenizer, "task.rewards")
    if mesh.empty:
        return judge
    return judge.applied(jax.device_put(judge.variables, NamedSharding(mesh, PartitionSpec())))


def _reward(name: str, answer: str, row: dict, references: list[str], place: str, settings) -> float:
    metric = metrics.find(name, "task.rewards")
    if metric.compares and not any(text.strip() for text in references):
        raise FtjaxError(f"{place}: has no answer, with which the reward {name} of task.rewards compares")
    try:
        value = metric.row(answer, references, row, settings)
    except FtjaxError as error:
        raise FtjaxError(f"{place}, answer {answer!r}: {error}") from error
    if value is None:
        raise FtjaxError(
            f"{place}, answer {answer!r}: task.rewards {name!r} returned None; expected a finite number for each answer"
        )
    return value


# ---------------------------------------------------------------------------------------------- environments


class Answer(NamedTuple):
    """What follows a prompt: K tokens, D of which the model drew, and the distribution that it drew them from.

    Attributes:
        ids: The K token ids.
        own: (K,) bool, whether the model drew the token; the others are an environment's.
        log_probs: (D,) float32, see decoding.Drawn.
        kept: (D, ceil(V / 8)) or (D, 0) uint8, see decoding.Drawn.
        ended: Whether an end token ended it; in an environment, whether the environment did.
        turns: Number of texts of the model.
    """

    ids: list[int]
    own: np.ndarray
    log_probs: np.ndarray
    kept: np.ndarray
    ended: bool
    turns: int = 1


@dataclasses.dataclass
class Episode:
    """An episode while it goes on. Only the first process has a `world`, an object of the user's class."""

    place: str
    recipe: Prompts
    prompt: list[int]
    talk: Rendered | None  # the conversation up to the next answer; None: plain text
    world: Any
    ids: list[int] = dataclasses.field(default_factory=list)  # after the prompt
    own: list[bool] = dataclasses.field(default_factory=list)
    drawn: list[Answer] = dataclasses.field(default_factory=list)
    reward: float = 0.0
    done: bool = False

    def add(self, one: Answer, text: str, reply: str | list, tokenizer) -> None:
        """Add a text of the model and the environment's reply, which is not trained."""
        ids: list[int] = []
        if self.talk is None and not self.done:
            ids = tokenise.continuation(tokenizer, reply)
        elif not self.done:
            reply = [{"role": "user", "content": reply}] if isinstance(reply, str) else reply
            then = template.asked({"messages": reply}, self.place).messages
            ids = tokenise.reply(self.talk, text, then, tokenizer, self.place, self.recipe.end)
            ids = ids[one.ended and ids[:1] == one.ids[-1:] :]  # the model has ended its answer itself
            answer = {"role": "assistant", "content": text}
            self.talk = dataclasses.replace(self.talk, messages=(*self.talk.messages, answer, *then))
        self.ids += one.ids + ids
        self.own += [True] * len(one.ids) + [False] * len(ids)
        self.drawn.append(one)

    def answer(self) -> Answer:
        """The whole episode, without what follows the model's last token."""
        K = 1 + max(i for i, own in enumerate(self.own) if own)
        joined = (np.concatenate(values) for values in zip(*((one.log_probs, one.kept) for one in self.drawn)))
        return Answer(self.ids[:K], np.array(self.own[:K]), *joined, self.done, len(self.drawn))


def episodes(
    lm, variables, part: prepare.Part, rows: np.ndarray, config, seed: tuple[int, ...], how
) -> list[tuple[list[int], Answer, float]]:
    """Play an episode of task.environment from each row.

    Args:
        lm: The model and its tokenizer.
        variables: The Flax variables.
        part: The rows.
        rows: (R,) index of each episode's example in the part.
        config: The config.
        seed: See decoding.generate.
        how: The group of the config with `temperature`, `top_k` and `top_p`.

    Returns:
        For each of the R episodes the ids of the prompt, the Answer, and the sum of the environment's rewards.

    Raises:
        FtjaxError: If the environment fails or returns something else than it should. It names the row and the turn.
    """
    named, N, worlds = config.task.environment, config.generate.max_new_tokens, {}
    failed = lambda error: user_code.failed(named, "task.environment", error)  # noqa: E731

    def begun() -> list:
        make, prompts = environment(config), []
        for n, i in enumerate(rows):
            try:
                worlds[n] = make()
                prompts.append(worlds[n].reset(copy.deepcopy(part.row(int(i)))))
            except user_code.ERRORS as error:
                raise FtjaxError(f"{part.place(int(i))}, reset: {failed(error)}") from error
            if prompts[-1] is not None and not isinstance(prompts[-1], str | list):
                raise FtjaxError(
                    f"{part.place(int(i))}, reset: task.environment {named!r} returned {prompts[-1]!r:.200}; expected "
                    "a prompt, as text or a list of messages, or None for the prompt of the row"
                )
        return prompts

    def replied(turn: int, going: list[Episode], answers: list[str]) -> list:
        replies = []
        for one, text in zip(going, answers, strict=True):
            at = f"{one.place}, turn {turn + 1}, text {text!r}"
            try:
                found = one.world.step(text)
            except user_code.ERRORS as error:
                raise FtjaxError(f"{at}: {failed(error)}") from error
            if not _is_reply(found, str if one.talk is None else str | list):
                raise FtjaxError(
                    f"{at}: task.environment {named!r} returned {found!r:.200}; expected three values: the reply, as "
                    "text, or as a list of messages if the prompt is one of a chat, the reward, a finite number of at "
                    f"most {metrics.LARGEST:g}, and True or False, whether the episode ends"
                )
            replies.append((found[0], float(found[1]), bool(found[2])))
        return replies

    played = []
    for n, (i, prompt) in enumerate(zip(map(int, rows), hosts.from_first(begun), strict=True)):
        place, recipe, shown = part.place(i), part.recipe(i), part.rendered(i)
        ids = part.examples[i].ids
        if prompt is not None:
            shown = recipe.given(prompt, part.row(i), place)
            (ids,) = encode_prompts([shown], lm.tokenizer, lambda _, place=place: place, recipe.end, True)
        recipe.check_room(ids, place)
        talk = None
        if shown.messages is not None:
            talk = dataclasses.replace(shown, messages=template.before_answer(shown.messages, True))
        played.append(Episode(place, recipe, ids.tolist(), talk, worlds.get(n)))
    for turn in range(config.rollout.turns):
        most = lambda one: one.recipe.max_length - N - len(one.prompt)  # noqa: E731
        going = [one for one in played if not one.done and len(one.ids) <= most(one)]
        if not going:
            break
        texts = [one.prompt + one.ids for one in going]
        new = sample(lm, variables, texts, (*seed, turn), config, how)
        answers = continuations(lm.tokenizer, texts, [one.ids[: len(one.ids) - one.ended] for one in new])
        replies = hosts.from_first(functools.partial(replied, turn, going, answers))
        for one, drawn, text, (reply, reward, one.done) in zip(going, new, answers, replies, strict=True):
            one.reward += reward
            one.add(drawn, text, reply, lm.tokenizer)
    return [(one.prompt, one.answer(), one.reward) for one in played]


def _is_reply(found, kind) -> bool:
    """Whether an environment's step returned (a reply of this kind, finite reward, whether the episode ends)."""
    if not (isinstance(found, tuple | list) and len(found) == 3):
        return False
    reply, reward, ends = found
    finite = isinstance(reward, numbers.Real) and abs(reward) <= metrics.LARGEST
    return isinstance(reply, kind) and finite and isinstance(ends, bool | np.bool_)


def environment(config):
    """The class of task.environment. Raises FtjaxError for one without `reset` and `step`, and for settings that do not
    apply to episodes."""
    named = config.task.environment
    found = user_code.loaded(named, "task.environment")
    if not all(callable(getattr(found, name, None)) for name in ("reset", "step")):
        raise FtjaxError(f"task.environment: {named!r} has no methods reset and step; expected a class with both")
    for key, off in (
        ("task.rewards", ()), ("task.reward_weights", ()), ("evaluate.compare", False), ("generate.best_of", 1),
    ):  # fmt: skip
        group, _, name = key.partition(".")
        if config[group][name] != off:
            raise FtjaxError(
                f"{key}: does not apply to task.environment, which gives the rewards of whole episodes; expected "
                f"{off!r}, found {config[group][name]!r}"
            )
    return found


# ---------------------------------------------------------------------------------------------- rollouts


def collect(lm, variables, data, config, step: int, examples: np.ndarray) -> Collected:
    """See Task.collect: a group of answers to each prompt, drawn by the model and rewarded.

    Draws depend on the seed, the step and the place in the batch alone. Groups whose answers all have the same reward
    are drawn again up to rollout.resample times; those that stay so have the advantage 0, and their rows are noted.
    """
    rollout, rows = config.rollout, np.repeat(examples, config.rollout.group)
    prompts: list = [data.train.examples[int(i)].ids.tolist() for i in rows]
    drawn: list = [None] * len(rows)
    values: dict[str, np.ndarray] = {}
    flat = np.ones(len(rows), bool)
    for attempt in range(1 + rollout.resample):
        (todo,) = np.nonzero(flat)
        if not len(todo):
            break
        seed = config.seed, step, DRAWS, attempt
        if config.task.environment:
            played = episodes(lm, variables, data.train, rows[todo], config, seed, rollout)
            for i, (prompt, one, _) in zip(todo, played, strict=True):
                prompts[i], drawn[i] = prompt, one
            found = {"reward": np.array([reward for _, _, reward in played])}
        else:
            asked = [prompts[i] for i in todo]
            new = sample(lm, variables, asked, seed, config)
            for i, one in zip(todo, new, strict=True):
                drawn[i] = one
            ids = [one.ids[: len(one.ids) - one.ended] for one in new]
            found = rewards(config, data.train, rows[todo], asked, ids, lm.tokenizer)
        for name, x in found.items():
            values.setdefault(name, np.zeros(len(rows)))[todo] = x
        flat = np.repeat(np.ptp(values["reward"].reshape(-1, rollout.group), axis=1) == 0, rollout.group)
    values |= {"flat": flat, "ended": np.array([one.ended for one in drawn])}
    if config.task.environment:
        values["turns"] = np.array([one.turns for one in drawn])
    same = [data.train.place(int(i)) for i in rows[flat][:: rollout.group]]
    batches = updates(lm, variables, data, config, prompts, drawn, values)
    return Collected(batches, {"flat_groups": len(same), "rows": same} if same else {})


def sample(lm, variables, prompts: list[list[int]], seed: tuple[int, ...], config, how=None) -> list[Answer]:
    """An answer to each prompt, drawn as `how` says, config.generate, or config.rollout if it is None. seed: see
    decoding.generate."""
    limits, how = config.generate, how or config.rollout
    drawn = generate(
        lm.model, variables, prompts, max_new_tokens=limits.max_new_tokens, temperature=how.temperature,
        top_k=how.top_k, top_p=how.top_p, seed=seed, batch_size=limits.batch_size,
        weights=how.get("weights", "model"), scored=True, **token_rules(lm, limits.stop),
    )  # fmt: skip
    return [Answer(x.ids, np.ones(len(x.ids), bool), x.log_probs, x.kept, x.ended) for x in drawn]


def updates(lm, variables, data, config, prompts: list[list[int]], drawn: list[Answer], figures: dict) -> list[dict]:
    """The batches of the updates that follow a rollout, see policy.sums.

    Args:
        lm: The model and its tokenizer.
        variables: The Flax variables that the answers were drawn with.
        data: The rows.
        config: The config.
        prompts: Ids of the prompt of each of the R answers, those of a group one after another.
        drawn: The answers.
        figures: {name: (R,) numbers} whose means are reported, with the "reward" among them.
    """
    task, mesh = config.task, jax.sharding.get_abstract_mesh()
    lengths = np.array([len(one.log_probs) for one in drawn])
    batch, order = laid_out(answered(prompts, drawn), data, config, mesh)
    there = batch["weights"] > 0

    def spread(values: list[np.ndarray]) -> np.ndarray:
        """Values (K, ...) of the tokens of each answer as (B, M, ...)."""
        found = np.concatenate([values[i] for i in order])
        out = np.zeros((*there.shape, *found.shape[1:]), found.dtype if found.dtype == np.uint8 else np.float32)
        out[there] = found
        return out

    def gathered(x: np.ndarray) -> list[np.ndarray]:
        """Values (B, M) as those of the tokens of each answer: the inverse of `spread`."""
        parts = np.split(x[there], np.cumsum(lengths[order])[:-1])
        return [parts[i] for i in np.argsort(order)]

    each = lambda values: [np.full(K, x, float) for x, K in zip(values, lengths, strict=True)]  # noqa: E731
    batch["weights"] = spread(each(1 / lengths))
    batch["shares"] = spread(each(policy.shares(lengths, task.policy, most_drawn(config))))
    batch["sampled"] = spread([one.log_probs for one in drawn])
    kept, V = [one.kept for one in drawn], min(lm.model.config.vocab_size, len(lm.tokenizer))
    if not kept[0].shape[1] and V < lm.model.config.vocab_size:
        kept = [np.packbits(np.ones((K, V), bool), axis=1) for K in lengths]
    if kept[0].shape[1]:
        batch["kept"] = spread(kept)
    score = functools.partial(_log_probs, lm.model, temperature=config.rollout.temperature)
    score = functools.partial(score, head_chunk=config.model.head_chunk)
    distance = each(np.zeros(len(drawn)))
    if task.beta:
        base = {name: tree for name, tree in variables.items() if name != "adapter"}
        batch["reference"] = np.asarray(score(base, batch)) * there
        distance = gathered(batch["sampled"] - batch["reference"])
    worth = policy.advantages(figures["reward"], task.policy, config.rollout.group, task.beta, distance)
    batch["advantages"] = spread(worth)
    batch |= {FIGURE + name: spread(each(x)) for name, x in figures.items()}
    if task.updates == 1:
        return [batch]
    batch["old"] = np.asarray(score(variables, batch)) * there
    return [batch | {"fresh": np.full_like(batch["weights"], n == 0)} for n in range(task.updates)]


@functools.partial(xla.jit, static_argnums=0, static_argnames=("temperature", "head_chunk"))
def _log_probs(model, variables, batch, *, temperature: float, head_chunk: int):
    found = causal.log_probs(model, variables, batch, temperature=temperature, head_chunk=head_chunk)
    return constrain(found, None, None)


def answered(prompts: list[list[int]], drawn: list[Answer]) -> list[Example]:
    """Prompts with their answers, of which the tokens that the model drew are trained."""
    return [
        Example(np.array(prompt + one.ids, np.int32), np.concatenate([np.zeros(len(prompt), bool), one.own]))
        for prompt, one in zip(prompts, drawn, strict=True)
    ]


def laid_out(texts: list[Example], data, config, mesh) -> tuple[dict, np.ndarray]:
    """The batch of all texts, and their order in it. Its sizes are rounded up, so that few shapes are compiled."""
    ways, rows, packing = mesh.shape.get("sequence", 1), config.train.batch_size, config.data.packing
    T = data.max_length if packing else tasks.find(config.task.kind).longest(config, data)
    how = {"packing": packing, "buckets": 1, "shuffle": False, "ways": ways}
    if packing:
        parts = sharding.row_ways(mesh) * config.train.accumulate
        rows = _rounded(Batches(texts, rows, T, **how).rows_per_epoch, rows, parts)
    made = Batches(texts, rows, T, **how)
    batch, granule = made[0], math.lcm(8, ways)
    wide = _rounded(batch["tokens"].shape[1], T, granule)
    narrow = _rounded(batch["labels"].shape[1], T if packing else most_drawn(config), granule)
    for name, x in batch.items():
        width = wide if name in ("tokens", "positions", "segment_ids") else min(narrow, wide)
        batch[name] = np.pad(x, [(0, 0), (0, width - x.shape[1])])
    return batch, np.concatenate(made.rows(0))


def _rounded(size: int, most: int, granule: int) -> int:
    """The size rounded up to a multiple of `granule`, of which there are about SIZES up to `most`."""
    step = -(-most // (SIZES * granule)) * granule
    return -(-size // step) * step


def most_drawn(config) -> int:
    """Most tokens that the model draws after a prompt."""
    return config.generate.max_new_tokens * (config.rollout.turns if config.task.environment else 1)


def longest(config, data) -> int:
    """Most tokens of a prompt with its answer, or of an episode."""
    if config.task.environment:
        return data.max_length
    return int(data.train.examples.length.max()) + config.generate.max_new_tokens


def measure(lm, variables, part, config) -> dict[str, float]:
    """See Task.measure: the mean rewards of answers as config.generate says, and the negative mean as the loss."""
    if config.task.environment:
        played = episodes(lm, variables, part, np.arange(len(part)), config, (config.seed,), config.generate)
        reward = float(np.mean([reward for _, _, reward in played]))
        turns = float(np.mean([one.turns for _, one, _ in played]))
        return {"loss": 0.0 - reward, "answers": len(part), "reward": reward, "turns": turns}
    prompts = [part.examples[i].ids.tolist() for i in range(len(part))]
    new = best.continued_tokens(lm, variables, prompts, seed=config.seed, **config.generate.to_dict())
    found = rewards(config, part, np.arange(len(part)), prompts, new, lm.tokenizer)
    means = {name: float(x.mean()) for name, x in found.items()}
    return {"loss": 0.0 - means["reward"], "answers": len(part), **means}


# ---------------------------------------------------------------------------------------------- the task


def check(config, method, spec, data) -> None:
    """See Task.check."""
    task, rollout = config.task, config.rollout
    if task.environment:
        environment(config)
    else:
        check_rewards(task)
    if config.train.batch_size % rollout.group:
        raise FtjaxError(
            f"train.batch_size: {config.train.batch_size} answers cannot be split into groups of "
            f"rollout.group={rollout.group}; expected a multiple"
        )
    if config.train.spike:  # the loss is around 0
        raise FtjaxError(f"train.spike: does not apply to task.kind policy; expected 0, found {config.train.spike:g}")
    if task.beta:
        keeps_base(method, spec, "task.beta", "task.beta=0")


def always(config) -> dict:
    """The options of the objective in training and evaluation."""
    task = config.task
    return {
        "loss": task.policy, "clip": task.clip, "clip_high": task.clip if task.clip_high is None else task.clip_high,
        "beta": task.beta, "temperature": config.rollout.temperature, "head_chunk": config.model.head_chunk,
    }  # fmt: skip


TASK = Task(
    head="causal",
    sums=policy.sums,
    always=always,
    whole_rows=True,
    check=check,
    recipe=recipe,
    collect=collect,
    draws=lambda config: (most_drawn(config), bool(config.task.beta) + (config.task.updates > 1)),
    measure=measure,
    copies=lambda config: config.rollout.group,
    updates=lambda config: config.task.updates,
    longest=longest,
    arrays=("shares", "advantages", "sampled"),
    trained=lambda config, T: T,
    unnamed=0,
    takes=("task.rewards",),
)
