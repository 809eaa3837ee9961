"""The contenders of a comparison, as `compare.contenders` describes them."""

from __future__ import annotations

import dataclasses
import os.path

from ftjax import assets, tasks
from ftjax import config as configs
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.verdict.baselines import PROMPTS, Prompting

MAJORITY = "majority"
WRITTEN = ("rows", "verdict.html", "verdict.md", "verdict.json", "answers.jsonl", "ballots.csv", "ballots_key.jsonl")
ANSWERING = "generate."  # keys of settings that no training needs


@dataclasses.dataclass(frozen=True)
class Contender:
    """One contender, which is one row of the report.

    Attributes:
        name: Its name.
        kind: `prompt` (the config's model without training), `majority` (the most common label), `model` (a model that
            is read from `source`) or `tuned` (trained with `settings`).
        how: The kind of its prompts.
        shots: Number of examples in a prompt.
        source: A run folder, a model directory or a hub name, of kind `model`.
        settings: {dotted key: value} of the config, of kind `tuned`; of other kinds those of `generate`.
    """

    name: str
    kind: str
    how: Prompting = Prompting()
    shots: int = 0
    source: str = ""
    settings: dict = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in self.name)

    def config(self, base):
        """A copy of a config with this contender's settings."""
        c = configs.copy(base)
        configs.override(c, [f"{key}={value!r}" for key, value in self.settings.items()])
        return c

    def answering(self, base):
        """A copy of a config with this contender's settings of `generate`, by which it answers."""
        own = {key: value for key, value in self.settings.items() if key.startswith(ANSWERING)}
        return dataclasses.replace(self, settings=own).config(base)


def parse(config) -> list[Contender]:
    """The contenders of config.compare.contenders. Raises FtjaxError for one that is not possible, before anything is
    run."""
    entries, found = config.compare.contenders, []
    if config.task.kind != "causal" and not tasks.find(config.task.kind).right:
        able = ", ".join(kind for kind, task in tasks.every().items() if task.right)
        raise FtjaxError(f"compare does not support task.kind {config.task.kind}; expected causal or {able}")
    for number, entry in enumerate(entries, 1):
        where = f"compare.contenders entry {number}"
        contender = _named(entry, config, where) if isinstance(entry, str) else _described(entry, config, where)
        if contender.settings:
            try:
                contender.config(config)
            except FtjaxError as error:
                raise FtjaxError(f"{where}: {str(error).removeprefix('--config.')}") from None
        if config.task.kind == "causal" and contender.kind == MAJORITY:
            raise FtjaxError(f"{where}: {MAJORITY} needs a task with labels, and task.kind is causal; remove it")
        if config.task.kind != "causal" and (contender.kind == "prompt" or contender.how != Prompting()):
            raise FtjaxError(
                f"{where}: {contender.name!r} is a prompt, which needs task.kind causal. With labels, compare "
                f"{MAJORITY}, run folders and trained contenders, such as "
                f"--config.compare.contenders=\"('{MAJORITY}', {{'name': 'tuned'}})\""
            )
        found.append(contender)
    if config.compare.ballots and config.task.kind != "causal":
        raise FtjaxError(
            f"compare.ballots needs generated answers, and task.kind {config.task.kind} has labels; set "
            "compare.ballots=0"
        )
    folders = [contender.folder for contender in found]
    twice = next((c.name for c in found if folders.count(c.folder) > 1), None)
    if twice:
        raise FtjaxError(f'compare.contenders: two contenders have the name {twice!r}; give each a "name" of its own')
    if taken := next((c.name for c in found if c.folder in WRITTEN), None):
        raise FtjaxError(f"compare.contenders: a comparison writes {taken!r} itself; give the contender another name")
    if len(found) < 2:
        raise FtjaxError(f"compare.contenders: expected two or more contenders; found {len(found)}")
    return found


def _named(name: str, config, where: str) -> Contender:
    if name in PROMPTS:
        return Contender(name, "prompt", PROMPTS[name], config.compare.shots)
    if name == MAJORITY:
        return Contender(name, MAJORITY)
    source = name.removeprefix("run:")
    if not (os.path.exists(source) or "/" in source or source.startswith(assets.PREFIX)):
        check_known(
            name, (*PROMPTS, MAJORITY), f"{where}: unknown contender", ', a folder, a hub name, or a dict with a "name"'
        )
    return Contender(source, "model", source=source)


KEYS = ("name", "prompt", "shots", "model")


def _described(entry, config, where: str) -> Contender:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise FtjaxError(f'{where}: expected a text, or a dict with a "name"; found {entry!r}')
    wrong = next((key for key in entry if key not in KEYS and "." not in key), None)
    if wrong:
        raise FtjaxError(
            f"{where}: unknown key {wrong!r}{nearest(wrong, [*KEYS, *configs.flat(config)])}; expected "
            f"{', '.join(KEYS)}, or a field of the config"
        )
    how = entry.get("prompt", "zero-shot")
    check_known(how, PROMPTS, f"{where}: unknown prompt")
    shots = configs.FIELDS["compare.shots"].check(entry.get("shots", config.compare.shots), f"{where}: shots")
    source = entry.get("model", "")
    settings = {key: value for key, value in entry.items() if key not in KEYS}
    trained = [key for key in settings if not key.startswith(ANSWERING)]
    if source and trained:
        raise FtjaxError(f'{where}: a "model" is not trained, so it cannot set {trained[0]}; remove one of the two')
    kind = "model" if source else "tuned" if trained or "prompt" not in entry else "prompt"
    return Contender(name, kind, PROMPTS[how], shots, source.removeprefix("run:"), settings)
