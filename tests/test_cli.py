"""The command line as a person meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftjax import cli, files, listing, tasks
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.evaluation.metrics import METRICS
from ftjax.hub.family_table import FAMILIES
from ftjax.plan import run
from ftjax.tuning import METHODS

ROOT = Path(__file__).resolve().parents[1]

HEAVY = ("jax", "numpy", "transformers", "datasets", "ml_collections", "orbax", "grain")


def ftjax(*args, cwd=ROOT):
    env = os.environ | {"FTJAX_MALLOC": "0"}
    return subprocess.run([sys.executable, "-m", "ftjax", *args], capture_output=True, text=True, env=env, cwd=cwd)


def test_help_imports_nothing_heavy():
    code = f"import sys, ftjax.cli; ftjax.cli.parser(); sys.exit(any(m in sys.modules for m in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = ftjax("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("train", "evaluate", "generate", "export", "config", "methods"))


def test_the_fields_of_the_config_are_listed_searched_and_explained():
    assert [line.split()[0] for line in listing.fields().splitlines() if line.startswith("  ")] == list(configs.FIELDS)
    optim = [key for key in configs.FIELDS if key.startswith("optim.")]
    assert [line.split()[0] for line in listing.fields("optim").splitlines() if " = " in line] == optim
    found = listing.fields(search="Learning rate")
    assert "optim.lr = None" in found and "optim.layer_decay" in found and "optim.b1" not in found
    assert listing.fields("tuning", "lora_alpha").startswith("tuning.alpha = 32.0\n    scale of the update")
    assert "In other projects: lora_alpha." in listing.fields("tuning.alpha")
    code = "import sys; from ftjax import cli; cli.main(['config', 'optim']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    both = (listing.fields(), listing.fields("data"), listing.methods(), listing.tasks(), listing.metrics())
    assert max(len(line) for text in both for line in text.splitlines()) < 80


@pytest.mark.parametrize(
    "asked, told",
    [
        (("optm",), 'did you mean "optim"?'),
        (("learning_rate",), 'did you mean "optim.lr"?'),
        (("optim.lrr",), 'did you mean "optim.lr"?'),
        (("", "lerning rate"), 'did you mean "learning rate"?'),
        (("optim", "flash attention"), "no field in the group optim"),
    ],
)
def test_an_unknown_name_or_an_empty_search_leads_to_the_nearest(asked, told):
    with pytest.raises(FtjaxError) as error:
        listing.fields(*asked)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "listed, table",
    [
        (listing.methods, set(METHODS) - {"vera"}),  # tests/tuning/method_vera.py, of another test of this process
        (listing.tasks, tasks.FILES),
        (listing.models, FAMILIES),
        (listing.metrics, METRICS),
    ],
)
def test_what_there_is_is_listed_one_line_each(listed, table):
    names = [line.split()[0] for line in listed().splitlines() if not line.startswith(" ")]
    assert sorted(names) == sorted(table)


def test_a_list_may_be_cut_by_its_reader():
    command = f"{sys.executable} -m ftjax config | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "the run\n" and not done.stderr


@pytest.mark.parametrize("merged", [False, True])
def test_a_verb_whose_reader_has_ended_is_quiet_and_keeps_its_files(merged, forks, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i} and {i}."}}\n' for i in range(20)))
    cut = "import os, sys, ftjax.cli; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\n"
    cut += "os.dup2(1, 2)\n" if merged else ""
    rows = ["--data", "a.jsonl", "--model", "builtin:stories260K"]
    answered = ["generate", "--model", "builtin:stories260K", "--prompt", "Once", "--max-new-tokens", "2"]
    for arguments, code in (
        (answered, 128 + signal.SIGPIPE),
        (["data", "preview", *rows], 0),
        (["data", "inspect", *rows, "--out", "report"], 0),
        (["evaluate", *rows, "--out", "scores.json"], 0),
    ):
        assert forks.run(tmp_path, arguments, cut + "sys.exit(ftjax.cli.main())") == (code, ""), arguments
    assert (tmp_path / "scores.json").is_file() and (tmp_path / "report" / "inspect.html").is_file()


def test_output_to_a_full_disk_or_to_none(forks, tmp_path):
    program = "import os, sys, ftjax.cli; {}; sys.exit(ftjax.cli.main())"
    full = 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'
    assert forks.run(tmp_path, ["methods"], program.format(full)) == (2, "ftjax: No space left on device\n")
    assert forks.run(tmp_path, ["methods"], program.format("sys.stdout = None")) == (0, "")


def test_a_folder_that_must_not_be_replaced_or_that_another_process_writes(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n{"text": "Three."}\n')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    split = ["data", "split", "--data", "../a.jsonl", "--out"]
    for out in ".", "..", "/":
        assert cli.main([*split, out]) == 2
        assert "is the folder that this command runs in or one above it" in capsys.readouterr().err
    with files.drafted(tmp_path / "out"):
        assert cli.main([*split, "../out"]) == 2
        assert "another process writes it" in capsys.readouterr().err
    assert cli.main([*split, "../out"]) == 0 and not list((tmp_path / "here").iterdir())
    assert cli.main(["data", "preview", "--data", "../a.jsonl", "--out", "../a.jsonl"]) == 2
    student = ["student", "--layers", "0", "--model"]
    assert cli.main([*student, "builtin:stories260K", "--out", "../small"]) == 0
    assert cli.main([*student, "../small", "--out", "../small"]) == 2
    assert "an export must not replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, told",
    [
        (("trian",), "invalid choice"),
        (("train",), "--config"),
        (("train", "--config", "configs/quickstart.py", "--confg.seed=1"), 'did you mean "--config"?'),
        (("train", "--config", "configs/quikstart.py"), "quickstart.py"),
        (("train", "--config", "configs/quickstart.py", "--config.optim.rate=1"), "no such key"),
        (("train", "--config", "configs/quickstart.py", "--lr=1"), "--config.optim.lr=VALUE sets this field"),
        (("train", "--config", "configs/quickstart.py", "--optim.lr", "1"), "--config.optim.lr=VALUE sets"),
        (("train", "--config", "configs/quickstart.py", "--config.optim.lr", "1"), "expected --config.optim.lr=VALUE"),
        (("train", "--config", "configs/quickstart.py", "--lora_r=8"), "--config.tuning.rank=VALUE sets"),
        (("train", "--config", "configs/quickstart.py", "--profile", "steps=5"), "log.profile: expected FIRST:LAST"),
        (("generate", "--model", "builtin:stories260K"), "--prompt"),
        (("generate", "--model", "m", "--prompt", "x", "--top-p=nan"), "--top-p: expected a number above 0"),
        (("generate", "--model", "m", "--prompt", "x", "--max-new-tokens=0"), "--max-new-tokens: expected a whole"),
        (("generate", "--model", "m", "--prompt", "x", "--out", "tests"), "--out tests: expected the name of a file"),
        (("generate", "--model", "m", "--prompt", "x", "--out", "/dev/fd/77"), "/dev/fd/77: expected the name of"),
        (("plan", "--config", "configs/quickstart.py", "--json=no/such/p.json"), "in a folder that exists"),
        (("plan", "--config", "configs/quickstart.py", "--seconds=inf"), "--seconds: expected a number above 0"),
        (("sweep", "--config", "configs/quickstart.py", "--stale=nan"), "--stale: expected a number of seconds"),
        (("data", "preview", "--config", "configs/quickstart.py", "--rows=-1"), "--rows: expected 1 or more"),
        (("train", "--config", "x" * 300), "is not a file"),
        (("generate", "--model", "no/such/folder/at/all", "--prompt", "x"), "no such folder"),
        (("export", "--run", "tests", "--out", "x"), "is not a run folder"),
    ],
)
def test_wrong_arguments_end_with_one_clear_line(args, told, forks):
    status, said = forks.run(ROOT, list(args))
    assert status == 2
    assert told in said and "Traceback" not in said


@pytest.mark.parametrize(
    "start, args",
    [
        ([str(Path(sys.executable).with_name("ftjax"))], ["data", "inspect", "--data", "rows.jsonl"]),
        ([sys.executable, "-m", "ftjax"], ["--version"]),
    ],
)
def test_files_of_the_current_folder_are_no_modules(tmp_path, start, args):
    """Also where the command starts itself again, to have another allocator."""
    for name in ("numbers", "datasets", "random", "json", "argparse", "glob", "jax"):
        (tmp_path / f"{name}.py").write_text(f"open('ran', 'a').write('{name} ')\nraise SystemExit('{name}.py')\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One", "completion": " two"}\n' * 9)
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "PYTHONSAFEPATH")}
    done = subprocess.run([*start, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr


def test_processes_that_a_command_starts_leave_the_current_folder_too(monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # and put back after the test
    monkeypatch.setenv("FTJAX_MALLOC", "0")
    monkeypatch.setattr(sys, "argv", ["ftjax", "generate", "--model", "builtin:stories260K"])
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])
    assert cli.main() == 2 and os.environ["PYTHONSAFEPATH"] == "1"
    started = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, **how: started.append(command) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.plan(configs.default())
    assert started[0][1:4] == ["-P", "-m", "ftjax.plan.worker"]


def test_generate_writes_json_lines_in_order(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"name": n}) + "\n" for n in ("Lily", "Tom")))
    out = tmp_path / "out.jsonl"
    done = ftjax(
        *("generate", "--model", "builtin:stories260K", "--prompts", str(rows), "--out", str(out)),
        *("--template", "Once upon a time, {name}", "--prompt", "One day,", "--max-new-tokens", "8"),
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["One day,", "Once upon a time, Lily", "Once upon a time, Tom"]
    assert all(a["completion"].strip() for a in answers)


def test_a_line_end_of_the_shell_is_one_in_a_prompt_a_template_and_a_stop(monkeypatch):
    from ftjax.evaluation import run

    asked = {}

    def answer(model, prompts, file, **how):
        asked.update(how, prompts=prompts)
        return []

    monkeypatch.setattr(run, "answer", answer)
    options = {"--prompt": "One day,\\nTim", "--template": "Words: {src}\\n\\tSentence:", "--stop": "\\n"}
    named = [text for option in options.items() for text in option]
    assert cli.main(["generate", "--model", "builtin:stories260K", "--prompts", "rows.jsonl", *named]) == 0
    assert asked["prompts"] == ["One day,\nTim"] and asked["stop"] == ("\n",)
    assert asked["template"] == "Words: {src}\n\tSentence:"  # what data.prompt is by the same text
    config = configs.default()
    configs.override(config, [f"data.prompt={options['--template']}"])
    assert config.data.prompt == asked["template"]


def test_a_bad_prompt_of_several_files_is_named_by_its_own_file(tmp_path, capsys):
    for name, cell in (("a", "Lily"), ("b", None)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": cell}) + "\n")
    files, template = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "Hello {name}"
    asked = ["generate", "--model", "builtin:stories260K", "--prompts", files, "--template", template]
    assert cli.main(asked) == 2
    assert f"{tmp_path}/b.jsonl row 1: " in capsys.readouterr().err
    chats = [{"messages": [{"role": "user", "content": "Who?"}]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    asked = ["generate", "--model", "builtin:stories260K", "--prompt", "One"]
    assert cli.main([*asked, "--prompts", f"{tmp_path}/c.jsonl"]) == 2
    assert f"{tmp_path}/c.jsonl row 1: messages need a chat template" in capsys.readouterr().err
    assert cli.main([*asked, "--chat"]) == 2
    assert "ftjax: --prompt: messages need a chat template" in capsys.readouterr().err


def test_one_prompt_is_answered_piece_by_piece_and_with_the_same_text(tmp_path, capsys, monkeypatch):
    asked = ["generate", "--model", "builtin:stories260K", "--prompt", "One day,\\nTi", "--max-new-tokens", "40"]
    out = tmp_path / "out.jsonl"
    assert cli.main([*asked, "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    capsys.readouterr()
    written = []
    monkeypatch.setattr(sys.stdout, "write", lambda text, write=sys.stdout.write: written.append(text) or write(text))
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == row["prompt"] + row["completion"] + "\n"
    assert len([text for text in written if text]) > 5


def test_evaluate_reports_the_loss_of_rows(tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "report.json"
    rows.write_text("One day, Tom went to the park.\nLily saw a big, red ball.\n")
    done = ftjax("evaluate", "--model", "builtin:stories260K", "--data", str(rows), "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert 1 < report["loss"] < 4 and report["tokens"] > 20
    assert "perplexity" in done.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["generate", "--model", "x"], "generate: expected --prompt TEXT or --prompts FILE"),
        (
            ["generate", "--model", "x", "--prompt", "a", "--template", "{a}"],
            "--template: fills columns of the rows of",
        ),
        (
            ["generate", "--model", "x", "--prompt", "a", "--top-k", "5"],
            "--top-k: has no effect on greedy answers; set",
        ),
        (["generate", "--model", "x", "--prompt", "a", "--top-p", "0.5"], "--top-p: has no effect on greedy answers"),
        (["data", "inspect", "--data", "x", "--ids"], "data inspect: --rows and --ids are for `ftjax data preview`"),
        (["data", "clean"], "data clean: expected --config FILE or --data ROWS"),
        (["data", "clean", "--data", "x"], "data clean: expected --out DIR, a new folder for the files it writes"),
        (["config", "dta"], 'config dta: no such group or field (did you mean "data"?); the groups are model'),
        (["config", "--search", "zzqq"], "no field of the config has these words in its description"),
        (["plan", "--config", "CONFIG", "--devices", "v5e:3x"], "--devices v5e:3x: unknown device"),
        (
            ["sweep", "--config", "CONFIG", "--random", "3"],
            "--random and --optuna draw points from --grid, and there is",
        ),
        (["sweep", "--config", "CONFIG", "--random", "3", "--optuna", "3"], "a positive number of points for either"),
        (
            ["sweep", "--config", "CONFIG", "--grid", "optim.lr=1", "--grid", "optim.lr=2"],
            "the key optim.lr occurs twice",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_told_in_a_sentence(arguments, told, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text("from ftjax import config\n\n\ndef get_config():\n    return config.default()\n")
    assert cli.main([str(file) if x == "CONFIG" else x for x in arguments]) == 2
    said = capsys.readouterr().err
    assert told in said and said.startswith("ftjax: ") and said.count("\n") == 1


@pytest.mark.parametrize("verb, flag", [("evaluate", "--data"), ("predict", "--data"), ("generate", "--prompts")])
def test_what_a_verb_reads_is_never_where_it_writes(verb, flag, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(file)
    for named in (str(file), f"{tmp_path}/a.jsonl,{file}"):
        assert cli.main([verb, "--model", "x", flag, named, "--out", str(tmp_path / "link.jsonl")]) == 2
        assert f"is a file that {flag} reads and would be lost; name another one" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_a_file_that_is_no_text_or_too_long_is_refused_by_name(tmp_path, monkeypatch):
    from ftjax import foreign

    file = tmp_path / "a.json"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(FtjaxError, match="a.json: expected UTF-8: "):
        foreign.read_text(file)
    monkeypatch.setattr(foreign, "LARGEST", 2)
    with pytest.raises(FtjaxError, match="a.json: 3 bytes; expected at most 2"):
        foreign.read_text(file)


def test_a_first_stage_has_nothing_to_replay():
    c = configs.default()
    c.stages = ({"name": "a", "replay": 0.5},)
    with pytest.raises(FtjaxError, match="stages: a: replay: the first stage has no earlier rows; remove it"):
        configs.staged(c)
