"""Best-of-n: several answers are sampled to each prompt, and a reward model chooses one."""

from __future__ import annotations

import numpy as np

from ftjax import cpus
from ftjax.data.batches import by_example
from ftjax.data.labelled import last_token
from ftjax.data.template import Rendered
from ftjax.data.tokenise import Example, encode
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.evaluation.outputs import logits
from ftjax.hub.tokenizer import end_token, show
from ftjax.lm import LM, continuations, continue_tokens
from ftjax.loading import load
from ftjax.progress import doing
from ftjax.training.run_folder import read_record, run_config


def continued(lm: LM, variables, ids: list[list[int]], **how) -> list[str]:
    """As `continued_tokens`, but return the new text of each prompt."""
    return continuations(lm.tokenizer, ids, continued_tokens(lm, variables, ids, **how))


def continued_tokens(
    lm: LM, variables, ids: list[list[int]], *, best_of: int = 1, reward: str = "", stop: tuple[str, ...] = (), **how
) -> list[list[int]]:
    """Continue prompts that are token ids, and choose the best of several answers to each.

    The reward model reads a prompt with an answer, and behind an answer that ended by itself the token with which its
    own rows end; in a chat, all that its template writes there. Of answers with the same score, the first is chosen.

    Args:
        lm: The model and its tokenizer.
        variables: The Flax variables that `lm.model` is applied to.
        ids: The N prompts, lists of token ids.
        best_of: Number of answers that are sampled to a prompt.
        reward: The reward model, anything that ftjax.load reads.
        stop: As in LM.generate.
        how: Further settings of ftjax.decoding.generate.

    Returns:
        The new ids of each prompt, without the token that ends an answer.

    Raises:
        FtjaxError: If the answers would all be alike, or if the reward model cannot score them.
    """
    check_choice(best_of, reward, how.get("temperature") or 0.0)
    many = [prompt for prompt in ids for _ in range(best_of)]
    new = continue_tokens(lm, variables, many, stop=stop, **how)
    if best_of > 1:
        judge = reward_model(reward, lm.tokenizer, "generate.reward")
        found = scores(judge, many, new, how["max_new_tokens"], how.get("batch_size", 32), "generate.reward")
        new = [new[i * best_of + k] for i, k in enumerate(found.reshape(-1, best_of).argmax(1).tolist())]
    return new


def check_choice(best_of: int, reward: str, temperature: float) -> None:
    """Raise FtjaxError for settings by which no answer can be chosen, see `continued_tokens`."""
    if (best_of > 1) != bool(reward):
        lacks, there = ("reward", "best_of") if best_of > 1 else ("best_of", "reward")
        wanted = "the directory of a reward model" if best_of > 1 else "2 or more"
        raise FtjaxError(f"generate.{lacks}: expected {wanted} where generate.{there} is set")
    if best_of > 1 and not temperature:
        raise FtjaxError("generate.temperature: expected more than 0 for generate.best_of; at 0 all answers are alike")


def reward_model(path: str, tokenizer, key: str) -> LM:
    """The reward model at a path, which must have the tokens of `tokenizer`. key: the config's key, for errors."""
    judge = load(path)
    head = judge.model.config.head
    if (head.task, head.labels, head.pool) != ("sequence", 1, "last"):
        raise FtjaxError(f"{key}: {path} is no reward model; expected a head with one label, see `reward`")
    if judge.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise FtjaxError(f"{key}: {path} has other tokens than the model that answers; both need the same")
    end = run_config(path).data.end if read_record(path) is not None else ""
    judge.end_tokens = (end_token(judge.tokenizer, end),)
    return judge


def _ends(judge: LM, prompts: list[list[int]]) -> list[list[int]]:
    """The ids that follow a finished answer to each prompt in the rows that a reward model is trained on."""
    tokenizer, plain = judge.tokenizer, [judge.end_tokens[-1]]
    if not tokenizer.chat_template:
        return [plain] * len(prompts)
    turns = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."})
    (chat,) = encode([Rendered(messages=turns)], tokenizer, "last", end=tokenizer.decode(plain))
    of_chat = chat.ids[np.flatnonzero(chat.trained)[-1] :].tolist()
    closed, opened = (show(tokenizer, list(turns[:1]), generation=goes_on) for goes_on in (False, True))
    # Without white space, which some tokenizers add or drop. A template may open an answer by nothing of its own.
    header = "".join((opened.removeprefix(closed) or opened.partition("Where?")[2]).split())
    texts = ("".join(text.split()) for text in tokenizer.batch_decode(prompts))
    return [of_chat if text.endswith(header) else plain for text in texts]


def scores(
    judge: LM, prompts: list[list[int]], new: list[list[int]], max_new_tokens: int, batch_size: int, key: str
) -> np.ndarray:
    """The scores (N,) that a reward model gives to answers.

    Args:
        judge: The reward model.
        prompts: Ids of the N prompts.
        new: Ids of the N answers, without the token that ends them.
        max_new_tokens: Most tokens of an answer. Shorter ones ended by themselves.
        batch_size: Most texts that are computed at once.
        key: The config's key, for errors.

    Raises:
        FtjaxError: If a text is longer than the model's positions. It is a NotFinite if a score is NaN or infinite.
    """
    ends = _ends(judge, prompts)
    texts = [p + n + end * (len(n) < max_new_tokens) for p, n, end in zip(prompts, new, ends, strict=True)]
    longest = max(map(len, texts))
    if longest > judge.max_tokens:
        raise FtjaxError(
            f"{key}: a prompt with its answer has {longest:,} tokens, and the reward model "
            f"{judge.max_tokens:,} positions; shorten the prompt or lower max_new_tokens"
        )
    arrays = (np.array(text, np.int32) for text in texts)
    examples = [Example(ids, last_token(ids, judge.tokenizer), np.zeros(1, np.float32)) for ids in arrays]
    width = judge.model.config.width
    with doing(f"scoring {len(texts):,} answers"), cpus.dealt(judge.variables, batch_size, width) as variables:
        found = by_example(lambda batch: logits(judge.model, variables, batch), examples, batch_size, longest)
    values = np.concatenate(found)[:, 0]
    if not np.isfinite(values).all():
        raise NotFinite(f"{key}: a score is NaN or infinite, so that answers cannot be compared. {WEIGHTS}")
    return values
