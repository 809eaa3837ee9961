"""The command line: `ftjax VERB`. Nothing heavy is imported before a verb is known and its arguments are right."""

from __future__ import annotations

import argparse
import contextlib
import gc
import glob
import io
import os
import signal
import sys
from pathlib import Path

from ftjax import __version__, stops
from ftjax.errors import FtjaxError, nearest, of_disk

EPILOG = """examples:
  ftjax train --config configs/quickstart.py
  ftjax train --config configs/quickstart.py --config.tuning.method=full --config.run_dir=runs/full
  ftjax generate --model runs/quickstart --prompt "Words: dog park run\\nSentence:"
  ftjax compare --config configs/compare_commongen.py
  ftjax data inspect --data rows.jsonl --out report
  ftjax evaluate --model runs/quickstart --data rows.jsonl
  ftjax export --run runs/quickstart --out my-model --format merged
  ftjax config --search "learning rate"
`ftjax VERB --help` explains a verb."""


DATA_VERBS = {
    "inspect": "show what is in the rows, and what is wrong with them",
    "clean": "repair and filter rows as data.clean says",
    "split": "clean, then split rows into train, validation and test",
    "augment": "split, then add synthetic training rows as data.augment says",
    "preview": "show the first batches as the model will get them",
}

LISTS = {
    "methods": "list the tuning methods, for the field tuning.method",
    "tasks": "list the tasks, for the field task.kind",
    "models": "list the model families, and the tasks that each can be trained for",
    "metrics": "list the metrics of generated answers, for the field evaluate.metrics",
}

# Verbs that take --config.KEY=VALUE.
CONFIGURED = ("train", "sweep", "compare", "plan", "data", "evaluate", "predict", "check", "audit")

# Settings of glibc's malloc that keep its pages.
MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=1000000000", "top_pad=268435456")
)

# New objects between two looks for unreachable ones. Imports and tracing make a million objects that stay: by Python's
# 700, an eighth of the time until a run trains goes into looking through them.
COLLECTED = 20_000


def parser() -> argparse.ArgumentParser:
    """The arguments of every verb."""
    top = argparse.ArgumentParser(
        prog="ftjax",
        description="Fine-tune Hugging Face language models in JAX, and hand back files that PyTorch loads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"ftjax {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name, run, help):
        """Start a verb. Returns the function that adds an argument to it: its name, help, default and metavar. The
        default gives the type: False is a switch, and a list is of texts, as the argument may be repeated."""
        epilog = "any field of the config can be set: --config.optim.lr=3e-4; `ftjax config` lists them all"
        sub = verbs.add_parser(
            name, help=help, description=help, allow_abbrev=False, epilog=epilog if name in CONFIGURED else None
        )
        sub.set_defaults(run=run)

        def add(argument, help=None, default=None, metavar=None, **how):
            kinds = {bool: {"action": "store_true"}, list: {"action": "append"}, int: {"type": int}}
            how |= kinds.get(type(default), {"type": float} if isinstance(default, float) else {})
            sub.add_argument(argument, help=help, default=default, **how, **({"metavar": metavar} if metavar else {}))

        return add

    config, model = "a Python file with get_config()", "model directory, hub name, PEFT adapter directory or run folder"
    of_run, of_all = f"{config}, or a run's run.json", f"{config}; its run_dir holds all runs"
    adapter = "a PEFT adapter for --model, which is a base model then; repeat to use several in turn"

    add = verb("train", _train, "fine-tune a model as a config says, or resume a run that was stopped")
    add("--config", of_run, metavar="FILE", required=True)
    traced = "trace these steps, both ends included, and report where their time goes; as --config.log.profile"
    add("--profile", traced, metavar="steps=FIRST:LAST")

    add = verb("sweep", _sweep, "train with every combination of some settings, with several seeds")
    add("--config", of_all, metavar="FILE", required=True)
    add("--grid", "values of one field; may be repeated", [], "KEY=VALUE,...")
    add("--seeds", "runs of each combination, with seeds from the config's on", 1)
    add("--random", "draw N combinations at random; --grid may then be a range, KEY=LOW..HIGH:log", 0, "N")
    add("--optuna", "N combinations that Optuna proposes, from the same lists and ranges", 0, "N")
    add("--halving", "run all combinations briefly, the best third by validation loss longer, and so on", False)
    silent = "take over a run of another process that has given no sign of life for so long"
    add("--stale", silent, 600.0, "SECONDS")

    about = "compare prompts, tuned and other models on the same rows: which is better, at what cost"
    add = verb("compare", _compare, about)
    add("--config", of_all, metavar="FILE", required=True)
    add("--out", "folder of the report; default: the config's run_dir", metavar="DIR")

    about = "report what a run will need: memory, time, money, and which other settings would fit"
    add = verb("plan", _plan, about)
    add("--config", of_run, metavar="FILE", required=True)
    add("--devices", "such as v6e-8, v5p-16, v5p:4x8x8, h200x8, cpu:8; default: cpu:1", "cpu:1")
    add("--data", "read the rows, to know the number of steps and the lengths of rows", False)
    add("--memory", "memory of a device that a program may use; default: by a table", metavar="GIB", type=float)
    add("--price", "price of a device hour; default: by a table, for TPUs", metavar="DOLLARS", type=float)
    add("--share", "share of the devices' peaks that the run will reach", 0.5)
    add("--seconds", "time for compiling other settings; those that are left are estimated", 60.0)
    add("--exact", "let the TPU compiler use its full time", False)
    add("--json", "write the plan there too", metavar="FILE")

    add = verb("data", _data, "look at rows; clean, split or augment them as training would")
    add("step", "; ".join(f"{name}: {text}" for name, text in DATA_VERBS.items()), choices=DATA_VERBS)
    add("--config", of_run, metavar="FILE")
    add("--data", "rows, instead of the config's data.train; no other part is read then")
    add("--model", "model whose tokenizer counts tokens, instead of the config's model.path")
    add("--out", "inspect, clean, split, augment: a new folder; preview: an HTML file")
    add("--rows", "preview: number of batch rows shown", 3)
    add("--ids", "preview: show token ids too", False)

    about = "report loss and perplexity per trained token, and scores of generated answers or of labels"
    add = verb("evaluate", _evaluate, about)
    add("--model", model, required=True)
    add("--adapter", adapter, [], "[NAME=]DIR")
    add("--data", "rows, as data.train takes them; default: the test part of the run's own data")
    of_rows = "config that says how to read the rows; default: the run's own, or the defaults"
    add("--config", of_rows, metavar="FILE")
    add("--generate", "also answer every prompt and score the answers by evaluate.metrics", False)
    add("--out", "write the scores as JSON", metavar="FILE")

    add = verb("predict", _predict, "predict labels, tags of words, answers or vectors of rows")
    add("--model", model, required=True)
    add("--data", "rows, as data.train takes them; they need no labels", required=True)
    add("--out", "write JSON lines there instead of to the terminal; vectors also as .npy", metavar="FILE")

    add = verb("generate", _generate, "continue prompts; the answer to a single one appears while it is made")
    add("--model", model, required=True)
    add("--adapter", adapter, [], "[NAME=]DIR")
    add("--prompt", "a prompt, with \\n for a line end, as in --template and --stop; may be repeated", [])
    of_prompts = "rows with a column `prompt`, with `messages`, or with the columns of --template"
    add("--prompts", of_prompts, metavar="FILE")
    template = 'template of the prompt over the columns of --prompts, such as "Words: {src}"; default: the run\'s'
    add("--template", template)
    add("--chat", "render each prompt by the chat template, as the message of a user", False)
    add("--out", "write JSON lines there instead of text to the terminal", metavar="FILE")
    add("--max-new-tokens", "most tokens of an answer", 64)
    add("--temperature", "of sampling; 0: greedy", 0.0)
    add("--top-k", "sample from the k most probable tokens; 0: from all", 0)
    add("--top-p", "sample from tokens that together have this probability; 1: from all", 1.0)
    add("--stop", "a string that is one token and ends an answer; may be repeated", [])
    add("--best-of", "sample N answers, of which --reward chooses", 1, "N")
    add("--reward", "reward model: run folder or model directory", "", "DIR")
    add("--seed", "seed of sampling", 0)
    add("--batch-size", "number of prompts answered at once", 32)
    add("--weights", "model: weights as they are; bfloat16: rounded, which a CPU reads faster", "model")

    add = verb("export", _export, "write what a run trained as files that PyTorch loads")
    add("--run", "run folder", metavar="DIR", required=True, dest="run_dir")
    add("--out", metavar="DIR", required=True)
    add("--format", "adapter (PEFT), merged or full (a whole model); auto: the adapter if there is one", "auto")
    add("--checkpoint", None, "best", choices=("best", "last"))
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", "of a whole model; auto: the base model's", "auto", choices=dtypes)

    add = verb("student", _student, "write a smaller model of some layers of another, to be taught by distillation")
    add("--model", "model directory, hub name or run folder", metavar="DIR", required=True)
    add("--layers", "the layers that are kept, counted from 0", metavar="N,N,...", required=True)
    add("--out", metavar="DIR", required=True)

    add = verb("check", _check, "say whether a run, and all that it was made from, is as it was written")
    add("run_dir", "run folder", metavar="RUN")

    add = verb("audit", _audit, "attack a run: do losses and canaries tell its training rows from others?")
    add("run_dir", "run folder", metavar="RUN")
    add("--data", "rows of the same source that were not trained on; default: the run's held-out rows", "")
    add("--rows", "most rows of each side", 2000)

    about = "compare a model directory, layer by layer, with transformers and torch"
    verb("check-model", _check_model, about)("model", "directory or hub name of a decoder", metavar="DIR")

    add = verb("upcycle", _upcycle, "write a dense model as a mixture of experts with the same logits")
    add("model", "directory of a llama, mistral or qwen3 model, or of a mixture of tokens", metavar="DIR")
    add("--experts", "number of experts, copies of the dense part", 8, "E")
    add("--top-k", "number of experts of each token", 2, "K")
    add("--mixture-of-tokens", "write a mixture of tokens instead, in groups of G rows; it needs no top-k", 0, "G")
    add("--noise", "noise on experts as a multiple of their own deviation", 0.0)
    add("--seed", "seed of routers and noise", 0)
    add("--out", metavar="DIR", required=True)

    add = verb("config", _list, "list, search and explain the fields of a config")
    add("name", "a group or a field, such as optim or optim.lr", "", "GROUP|KEY", nargs="?")
    add("--search", "only fields whose description has these words", "", "WORDS")
    for name, text in LISTS.items():
        verb(name, _list, text)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a run that `check` finds damaged, or a model that `check-model` finds different; 2 for
        input that cannot be used; 3 for a plan that does not fit; 130 after Ctrl-C; 141 if nothing reads what
        `generate` or `predict` print; 143 after SIGTERM.
    """
    top = parser()
    args, rest = top.parse_known_args(argv)
    overrides = [arg.removeprefix("--config.") for arg in rest if arg.startswith("--config.")]
    unknown = [arg for arg in rest if not arg.startswith("--config.")]
    if unknown or (overrides and args.verb not in CONFIGURED):
        top.error(_unknown(top, args.verb, unknown, rest))
    try:
        if argv is None:
            _Output.only = args.run in (_generate, _predict) and not args.out
            sys.stdout, sys.stderr = _Output.of(sys.stdout), _Output.of(sys.stderr)
            gc.set_threshold(COLLECTED)
            if sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # see ftjax/__main__.py
                os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that this one starts or becomes
            if args.run is not _list:
                _tune_malloc()
        with stops.listening() if argv is None else contextlib.nullcontext():
            if args.run in (_evaluate, _predict, _generate, _plan) or args.verb == "data" and args.step == "preview":
                _check_file(args, "json" if args.run is _plan else "out")
            code = args.run(args, overrides) or 0
            sys.stdout.flush()
            return code
    except FtjaxError as error:
        print(f"ftjax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, Exception) as error:
        _Output.only, stopped = False, isinstance(error, KeyboardInterrupt)
        if not stopped and not stops.heard and (message := of_disk(error)):
            print(f"ftjax: {message}", file=sys.stderr)
            return 2
        if not stopped and not stops.heard:  # a library may make another error of a Ctrl-C
            raise
        print(f"\nftjax: {str(error) if stopped and error.args else 'stopped'}", file=sys.stderr)
        code = 128 + (stops.heard[0] if stops.heard else signal.SIGINT)
        if argv is None:
            stops.leave(code)
        return code


class _Output(io.FileIO):
    """Standard output or standard error. Once its reader, such as `head`, has seen enough, the rest is thrown away, and
    the verb goes on for the files that it writes; with `only`, there are none, and it ends."""

    only = False

    @classmethod
    def of(cls, stream):
        """The text stream that replaces one of Python's own, which is None if the process was started without it."""
        if not isinstance(stream, io.TextIOWrapper):
            return stream or open(os.devnull, "w")
        raw = cls(stream.fileno(), "w", closefd=False)
        by_line = stream.line_buffering or stream.write_through
        return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=by_line)

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.only or not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def _check_file(args, flag: str) -> None:
    """Raise FtjaxError, before anything is computed, if the file that the verb writes at its end cannot be written, or
    is one that the verb reads."""
    path = getattr(args, flag)
    if path is None:
        return
    device = path.startswith(("/dev/", "/proc/")) and not os.path.exists(path)
    if not path or device or os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise FtjaxError(f"--{flag} {path}: expected the name of a file, in a folder that exists")
    if not os.path.exists(path):
        return
    for name in ("data", "prompts", "config"):
        given = getattr(args, name, None)
        if not isinstance(given, str):
            continue
        for file in (given, *given.split(",")):
            if os.path.isfile(file.strip()) and os.path.samefile(file.strip(), path):
                raise FtjaxError(f"--{flag} {path}: is a file that --{name} reads and would be lost; name another one")


def _check_numbers(args, keys: dict[str, str]) -> None:
    """Raise FtjaxError for an argument that is out of the range of the config's field with the same meaning."""
    from ftjax import config

    for name, key in keys.items():
        config.FIELDS[key].check(getattr(args, name), "--" + name.replace("_", "-"))


def _unknown(top, verb: str, unknown: list[str], rest: list[str]) -> str:
    """The error message for arguments that the verb does not have.

    Args:
        top: The parser.
        verb: The verb.
        unknown: The arguments of `rest` that set no field of the config.
        rest: All arguments that the parser does not know.
    """
    spaced = next((arg for arg in rest if arg.startswith("--config.") and "=" not in arg), None)
    if spaced and verb in CONFIGURED:
        return f"{spaced}: expected {spaced}=VALUE"
    name = (unknown or rest)[0].partition("=")[0]
    sub = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices[verb]
    # Without the dashes, which all have in common: --lr is not near --help.
    near = nearest(
        name.lstrip("-"), [option.lstrip("-") for action in sub._actions for option in action.option_strings]
    )
    near = near.replace('"', '"--', 1)
    if not near and verb in CONFIGURED and name.startswith("--"):
        from ftjax import config

        if keys := config.similar(name.removeprefix("--")):
            return f"unknown argument {name}: --config.{keys[0]}=VALUE sets this field of the config"
    return f"unknown argument {name}{near}"


def _tune_malloc() -> None:
    """On a CPU with glibc, start again with an allocator that keeps its pages: a quarter of a small step is page
    faults.

    FTJAX_MALLOC=0 turns it off; GLIBC_TUNABLES that are set already are left alone.
    """
    accelerator = glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not sys.platform.startswith("linux") or accelerator or "GLIBC_TUNABLES" in os.environ:
        return
    if os.environ.get("FTJAX_MALLOC") == "0":
        return
    os.environ["GLIBC_TUNABLES"] = MALLOC
    os.execv(sys.executable, [sys.executable, "-m", "ftjax", *sys.argv[1:]])


def _config(args, overrides, default=None):
    """The config that --config names, with what the command line sets; `default` if it names none."""
    from ftjax import config

    return config.load(args.config, overrides) if args.config else default


def _train(args, overrides) -> None:
    if args.profile is not None:
        overrides = [*overrides, f"log.profile={args.profile.removeprefix('steps=')}"]
    settings = _config(args, overrides)
    from ftjax.stages import train

    train(settings)


def _sweep(args, overrides) -> None:
    if not 0 < args.stale < float("inf"):
        raise FtjaxError(f"--stale: expected a number of seconds above 0; found {args.stale}")
    settings = _config(args, overrides)
    from ftjax.verdict.sweep import sweep

    how = {name: getattr(args, name) for name in ("random", "optuna", "halving", "stale")}
    sweep(settings, args.grid, args.seeds, **how)


def _compare(args, overrides) -> None:
    settings = _config(args, overrides)
    from ftjax.verdict.run import compare

    compare(settings, args.out)


def _plan(args, overrides) -> int:
    from ftjax.plan.run import check_numbers, plan

    check_numbers(**{name: getattr(args, name) for name in ("share", "seconds", "memory", "price")})
    from ftjax.plan.report import report

    settings, memory = _config(args, overrides), args.memory and args.memory * 2**30
    found = plan(settings, args.devices, data=args.data, memory=memory, seconds=args.seconds, exact=args.exact)
    print(report(found, args.price, args.share))
    if args.json:
        _write_json(args.json, found)
    return 0 if found["asked"]["fits"] else 3


def _data(args, overrides) -> None:
    if not args.config and not args.data:
        raise FtjaxError(f"data {args.step}: expected --config FILE or --data ROWS")
    if args.rows < 1:
        raise FtjaxError(f"--rows: expected 1 or more; found {args.rows}")
    if args.step != "preview" and (args.ids or args.rows != 3):
        raise FtjaxError(f"data {args.step}: --rows and --ids are for `ftjax data preview`; leave them out")
    if args.step in ("clean", "split", "augment") and not args.out:
        raise FtjaxError(f"data {args.step}: expected --out DIR, a new folder for the files it writes")
    from ftjax import config

    settings = _config(args, overrides, config.default())
    if args.model:
        settings.model.path = args.model
    if args.data:
        settings.data.update(train=args.data, validation="", test="", mixture=())
    config.override(settings, overrides)
    from ftjax.data import verbs

    if args.step == "preview":
        verbs.show(settings, args.rows, args.ids, args.out)
    elif args.step == "inspect":
        verbs.inspect(settings, args.out)
    else:
        verbs.write(args.step, settings, args.out)


def _evaluate(args, overrides) -> None:
    settings = _config(args, overrides)
    from ftjax.evaluation.outputs import text
    from ftjax.evaluation.run import evaluate

    reports = {}
    for name, model in _models(args):
        reports[name] = evaluate(model, args.data, settings, overrides=overrides, generate=args.generate)
        print((f"{name}:\n" if len(args.adapter) > 1 else "") + text(reports[name]))
    if args.out:
        _write_json(args.out, reports if len(reports) > 1 else reports[name])


def _predict(args, overrides) -> None:
    import functools

    from ftjax.evaluation.run import predict
    from ftjax.files import as_json, replacing, write_jsonl

    rows = predict(args.model, args.data, overrides=overrides, say=functools.partial(print, file=sys.stderr))
    if args.out and args.out.endswith(".npy"):
        if "vector" not in rows[0]:
            raise FtjaxError(f"--out {args.out}: only vectors of texts are written as .npy; name a .jsonl file")
        import numpy as np

        with replacing(Path(args.out)) as draft, open(draft, "wb") as file:
            np.save(file, np.array([row["vector"] for row in rows], np.float32))
        print(f"{len(rows):,} vectors in {args.out}", file=sys.stderr)
        return
    if args.out:
        write_jsonl(Path(args.out), rows)
        print(f"{len(rows):,} predictions in {args.out}", file=sys.stderr)
        return
    for row in rows:
        print(as_json(row))


def _generate(args, overrides) -> None:
    if not args.prompt and not args.prompts:
        raise FtjaxError("generate: expected --prompt TEXT or --prompts FILE")
    if args.template is not None and not args.prompts:
        raise FtjaxError("--template: fills columns of the rows of --prompts, and there are none; add --prompts FILE")
    names = ["max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "weights"]
    chosen = ["best_of", "reward"]
    _check_numbers(args, {n: n if n == "seed" else f"generate.{n}" for n in names + chosen})
    drawn = [name for name, off in (("top_k", 0), ("top_p", 1)) if getattr(args, name) != off]
    if drawn and not args.temperature:
        option = "--" + drawn[0].replace("_", "-")
        raise FtjaxError(f"{option}: has no effect on greedy answers; set --temperature above 0 too")
    from ftjax.config import unescaped
    from ftjax.evaluation.run import answer, stream_answer

    prompts, stop = ([unescaped(text) for text in texts] for texts in (args.prompt, args.stop))
    how = {name: getattr(args, name) for name in names} | {"chat": args.chat, "stop": tuple(stop)}
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    streamed = len(prompts) == 1 and not (args.prompts or args.out or args.reward or args.best_of > 1)
    template = None if args.template is None else unescaped(args.template)
    how |= {} if streamed else {"template": template} | {name: getattr(args, name) for name in chosen}
    rows = []
    for name, model in _models(args):
        title = f"{name}:\n" if len(args.adapter) > 1 else ""
        if streamed:
            prompt, pieces = stream_answer(model, *prompts, **how)
            print(title + prompt, end=bold)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(plain)
            continue
        for row in answer(model, prompts, args.prompts, **how):
            rows.append(row | ({"adapter": name} if name else {}))
            if not args.out:
                print(f"{title}{row['prompt']}{bold}{row['completion']}{plain}")
    if args.out:
        from ftjax.files import write_jsonl

        write_jsonl(Path(args.out), rows)
        print(f"{len(rows):,} answers in {args.out}", file=sys.stderr)


def _models(args):
    """(name, model) of each model to use: --model itself, or with each --adapter, the base being read once."""
    if not args.adapter:
        return [("", args.model)]
    named = {}
    for text in args.adapter:
        name, equals, folder = text.partition("=")
        if not name or (equals and not folder):
            raise FtjaxError(f"--adapter {text}: expected DIR or NAME=DIR")
        if name in named:
            raise FtjaxError(f"--adapter {text}: two adapters have the name {name}; give each its own name by NAME=DIR")
        named[name] = folder if equals else text
    from ftjax.loading import load

    base = load(args.model, adapters=named)
    return [(name, base.with_adapter(name)) for name in named]


def _export(args, overrides) -> None:
    from ftjax.training.export import export

    report = export(args.run_dir, args.out, args.format, checkpoint=args.checkpoint, dtype=args.dtype)
    note = f"; {report['note']}" if "note" in report else ""
    print(f"{report['format']} written to {report['path']}{note}")


def _student(args, overrides) -> None:
    if not all(part.strip().isdigit() for part in args.layers.split(",")):
        raise FtjaxError(f"--layers: expected numbers with commas between them, such as 0,2,4; found {args.layers!r}")
    from ftjax.hub.derived import student

    print(f"student written to {student(args.model, tuple(map(int, args.layers.split(','))), args.out)}")


def _check(args, overrides) -> int:
    from ftjax.training.check import check

    return 0 if check(args.run_dir, overrides=overrides) else 1


def _audit(args, overrides) -> None:
    from ftjax.verdict.audit import audit

    if args.rows < 2:
        raise FtjaxError(f"--rows {args.rows}: expected at least 2")
    audit(args.run_dir, args.data, args.rows, overrides=overrides)


def _check_model(args, overrides) -> int:
    from ftjax.check_model import check
    from ftjax.hub.resolve import resolve_model

    return 0 if check(resolve_model(args.model)) else 1


def _upcycle(args, overrides) -> None:
    from ftjax.hub.resolve import resolve_model
    from ftjax.upcycle import upcycle

    group, used = args.mixture_of_tokens, 1 if args.mixture_of_tokens else args.top_k
    kind = upcycle(resolve_model(args.model), Path(args.out), args.experts, used, args.noise, args.seed, group)
    each = f"which mix groups of {group} rows" if group else f"{used} for each token"
    print(f"{args.out}: a {kind} model of {args.experts} experts, {each}")


def _list(args, overrides) -> None:
    from ftjax import listing

    text = listing.fields(args.name, args.search) if args.verb == "config" else getattr(listing, args.verb)()
    print(text)


def _write_json(path: str, value: dict) -> None:
    from ftjax.files import replace_json

    replace_json(Path(path), value)
