"""Every command and every Python block of README and docs runs, in the order in which a reader meets them."""

import re
import shlex
from pathlib import Path

import pytest

from ftjax import assets
from ftjax import config as configs

ROOT = Path(__file__).resolve().parents[1]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command is run as it stands but for its length: few steps and rows, see also `first_rows`, and few programs, of one
# layer and one width.
SMALL = ("model.unroll=1", "data.buckets=1")
SHORT = {
    "train": (
        *SMALL, "train.steps=2", "train.eval_every=2", "evaluate.rows=8", "evaluate.compare_rows=4", "data.limit=64",
    ),
    "compare": SMALL,
    "sweep": SMALL,
}  # fmt: skip


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, file, body) of every fenced block, in order; file: its name for a block that shows a file, or ""."""
    return re.findall(r"```(\w+)(?: (\S+))?\n(.*?)```", text, flags=re.S)


def commands(body: str) -> list[list[str]]:
    """The `ftjax` commands of a shell block, each as its arguments."""
    parts = [part.strip() for line in body.splitlines() for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("ftjax ")]


def first_rows(arguments: list[str], folder: Path) -> list[str]:
    """The override for a run whose config has a test part that comes with ftjax: only its first rows are scored."""
    given = [word.removeprefix("--config.") for word in arguments if word.startswith("--config.")]
    name = configs.load(folder / arguments[arguments.index("--config") + 1], given).data.test
    if arguments[0] != "train" or not name.startswith(assets.PREFIX):
        return []
    short = folder / "short" / name.removeprefix(assets.PREFIX)
    short.parent.mkdir(parents=True, exist_ok=True)
    short.write_text("".join(Path(assets.resolve(name)).read_text().splitlines(keepends=True)[:64]))
    return [f"--config.data.test={short.relative_to(folder)}"]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_lead_somewhere():
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
    found = 0
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"
            found += 1
        notes = set(re.findall(r"\[\^(\w+)\](?!:)", text))
        assert notes == set(re.findall(r"^\[\^(\w+)\]:", text, flags=re.M)), page.name
    assert found > 30 and len((ROOT / "README.md").read_text().splitlines()) < 250


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documentation_runs(tmp_path, forks):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran, seen, env = 0, set(), {"XDG_CACHE_HOME": str(tmp_path)}
    for page in PAGES:
        for language, file, body in blocks(page.read_text()):
            if file:
                (tmp_path / file).write_text(body)
            if language == "python":
                status, said = forks.run(tmp_path, program=body, env=env)
                assert status == 0, f"{page.name}: {body}\n{said}"
                ran += 1
            for arguments in commands(body) if language == "bash" else ():
                if fields := SHORT.get(arguments[0]):
                    arguments += [f"--config.{field}" for field in fields]
                    arguments += first_rows(arguments, tmp_path)
                if tuple(arguments) in seen:
                    continue
                seen.add(tuple(arguments))
                status, said = forks.run(tmp_path, arguments, env=env)
                assert status == 0, f"{page.name}: ftjax {shlex.join(arguments)}\n{said}"
                ran += 1
    assert ran >= 6
