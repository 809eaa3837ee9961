"""The one config of a run: every field with its unit and its reason; reading, overriding and checking it.

A config file is Python with `get_config()`, which starts from `default()` and sets what differs. `load()` reads such a
file, applies overrides from the command line and validates; nothing is accepted that `default()` does not name.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import traceback
from pathlib import Path

import ml_collections
from ml_collections.config_dict import placeholder

from ftjax.errors import FtjaxError, nearest


def default() -> ml_collections.ConfigDict:
    """Every field of a run. `None` means: derived later, and the derived value is written to the run folder."""
    c = ml_collections.ConfigDict()
    c.run_dir = "runs/default"  # everything that a run writes lies in here; the same folder again means resume
    c.overwrite = False  # True: start anew, deleting what an earlier run wrote to run_dir; other files there stay
    c.seed = 0  # initial adapters, dropout, order of rows, split, sampling

    c.model = model = ml_collections.ConfigDict()
    model.path = "builtin:stories260K"  # model directory, hub name, or `builtin:` for what ftjax carries
    model.revision = ""  # branch, tag or commit of a hub name; empty: its default branch
    model.dtype = "auto"  # compute: float32 | bfloat16; auto: bfloat16 on GPU and TPU, float32 on CPU
    model.trained_dtype = "float32"  # stored dtype of what is trained; small updates vanish in bfloat16
    model.frozen_dtype = "auto"  # stored dtype of what is not; auto: the compute dtype
    model.quantise = "none"  # none | int8 | nf4: frozen kernels of the blocks, a half or a quarter of bfloat16's bytes
    model.quantise_tables = False  # with it, the table of embeddings and the head in int8 too, of whatever kind the
    # kernels are: a sixth of an 8B model's bytes, which QLoRA leaves as they are
    model.double_quantise = True  # nf4: its scales in 8 bits too, as QLoRA has it; False: in float32
    model.remat = "none"  # none | full: recompute a block in its backward pass, memory for about a third more time;
    # in between, keep `attention` (what its products and it give) or `products` (what all give); offload: what a block
    # gets waits in the host's memory; offload_products: all of these do; auto: the fastest that fits
    model.attention = "auto"  # auto | xla | cudnn | splash | tokamax: kernels of training; auto: cudnn on GPUs, splash
    # on TPUs, where they can serve, else xla, which is the fastest on CPUs
    model.unroll = 1  # layers per scan iteration; 0: all. Unrolling may run faster and compiles slower
    model.head_chunk = 0  # tokens whose logits a device holds at once; 0: those of 64 MiB on CPUs, of 1 GiB elsewhere

    c.tuning = tuning = ml_collections.ConfigDict()
    tuning.method = "lora"  # a row of ftjax.tuning.METHODS
    tuning.init_from = ""  # PEFT adapter directory or hub name whose tensors are where training starts; its shape,
    # rank, scale and targets are then the run's
    tuning.rank = 16
    tuning.alpha = 32.0  # the update is scaled by alpha / rank, see rslora
    tuning.dropout = 0.0  # on the adapter's input
    tuning.targets = ()  # names as PEFT matches them, one regular expression `re:...`, or all-linear; empty: the
    # method's own, all-linear for LoRA and DoRA, keys, values and the feed-forward's last map for IA3
    tuning.feedforward = ()  # ia3: targets whose input is scaled, not their output; empty: the feed-forward's last map;
    # none: no target's
    tuning.rslora = False  # scale by alpha / sqrt(rank), so that updates do not shrink with the rank
    tuning.init = "default"  # default | gaussian | orthogonal | pissa | olora: where A and B of LoRA start
    tuning.rank_pattern = ()  # (("regex of a module name", rank), ...): the first match wins over `rank`
    tuning.alpha_pattern = ()  # (("regex of a module name", alpha), ...)
    tuning.virtual_tokens = 50  # prompt, prefix, ptuning: trained tokens before every row, which take its positions
    tuning.prompt_init = "vocab"  # vocab | text | random: prompt and prefix start as tokens drawn from the vocabulary,
    # as those of prompt_text, or as noise, from which they rarely learn
    tuning.prompt_text = ""  # best says what to do; repeated or cut to virtual_tokens
    tuning.prompt_ids = ()  # tokens of prompt_text, from the run's tokenizer
    tuning.prefix_projection = False  # prefix: made by two dense layers while it is trained
    tuning.encoder = "mlp"  # mlp | lstm: what makes the prompt of ptuning
    tuning.encoder_hidden = 0  # width of the layers that make a prompt or prefix; 0: as wide as what they read
    tuning.layers = 0.25  # last_layers: how many; a share of all if below 1. A quarter gives most of what full training
    # does (Lee et al. 2019, What Would Elsa Do?)
    tuning.layers_with = ("final_norm",)  # last_layers: what is trained behind them: final_norm | lm_head
    tuning.pattern = ()  # pattern: regular expressions; what one matches as a whole is trained: the name of a tensor in
    # the model's files (`model.layers.3.mlp.up_proj.weight`) or our path (`layers/mlp/up_proj/kernel`)

    c.data = data = ml_collections.ConfigDict()
    data.train = "builtin:commongen/train.jsonl"  # file, glob, comma-separated list, directory, builtin: or hub name
    data.validation = ""  # like train; empty: split off from train by `split`
    data.test = ""  # like train; empty: split off from train by `split`
    data.split = (0.8, 0.1, 0.1)  # train, validation, test shares, used where a file is not named
    data.columns = ()  # names of the columns of .csv and .tsv files whose first line is a row and does not name them
    data.label = ""  # column with a row's class, where there is one; empty: task.kind takes the first of the usual
    # names, `label`, `category`, ...
    data.stratify = ""  # column whose values `split` deals out in equal shares; empty: data.label, or none
    data.group = ()  # columns; rows that share a value of one of them stay in one part
    data.group_near = 0.0  # rows at least this alike (Jaccard of word 3-grams) stay in one part; 0: off
    data.decontaminate = ()  # sources that no training row may overlap; `validation`, `test`: the run's own parts
    data.mixture = ()  # ({"name": "a", "train": "a.jsonl", "weight": 0.7}, ...): sources trained together, each with
    # any other field of `data` for itself, such as "prompt" or "clean.near"; what it does not set is as here
    data.temperature = 1.0  # mixture without weights: shares go by rows ** (1 / temperature); 1: by size
    data.limit = 0  # use only so many rows of train, after shuffling with the seed; 0: all
    data.shots = 0  # classify: use only so many rows of train of each label, drawn by the seed; 0: all
    data.form = "auto"  # auto | text | prompt | instruction | messages | sharegpt | preference | template; auto goes by
    # the columns
    data.template = ""  # chat template of all rows: tokenizer | alpaca | chatml | llama-3 | mistral | gemma | phi |
    # plain; empty: the tokenizer's for messages; other rows stand as they are
    data.system = ""  # system text of conversations that bring none
    data.prompt = ""  # template over columns, such as "Words: {src}\nSentence:"; sets form to template
    data.completion = ""  # template over columns, such as " {tgt}"
    data.end = ""  # token that ends an answer where no chat template does; empty: the tokenizer's end-of-text
    data.train_on = "assistant"  # assistant: every answer | last: the last answer | all: every token
    data.max_length = 512  # tokens of a row, or of a packed row; capped by the model's positions
    data.long = "truncate"  # truncate | drop | raise: rows longer than max_length
    data.packing = False  # several rows in one, kept apart by segment ids
    data.buckets = 4  # padded lengths that unpacked batches may have; each compiles once
    data.workers = 2  # threads that build batches ahead of the device
    data.streaming = False  # rows pass through files on disk, chunk by chunk: for sets larger than memory
    data.processes = 0  # processes that render and tokenise; 0: by the number of rows and cores
    data.cache = "auto"  # folder of tokenised rows; auto: ~/.cache/ftjax/data; empty: keep none
    data.cache_size = 20_000_000_000  # bytes of `cache`; what was used longest ago goes first

    data.clean = clean = ml_collections.ConfigDict()
    clean.parts = ("train",)  # which of data.train, data.validation and data.test; the last two come from their makers
    clean.unicode = ""  # NFC | NFKC; empty: as it is
    clean.mojibake = False  # mend text that was decoded by the wrong table
    clean.whitespace = False  # strip ends; one blank for several; at most one empty line; indentation stays
    clean.control = False  # remove control and zero-width characters, line ends and tabs aside
    clean.exact = False  # drop rows whose text is that of an earlier one, case, punctuation and white space aside
    clean.near = 0.0  # drop rows at least this alike to an earlier one that stays (Jaccard of word 3-grams); 0: off
    clean.columns = ()  # columns that duplicates are judged by; empty: all text
    clean.empty = False  # drop rows that training would refuse for an empty answer or a missing cell; rows of no known
    # form: those without any text in `columns`
    clean.min_chars = 0  # drop rows with a shorter answer
    clean.max_chars = 0  # drop rows with longer text in all; 0: off
    clean.max_ratio = 0.0  # drop rows whose answer is so many times longer than the prompt; 0: off
    clean.personal = "keep"  # keep | mask | drop: e-mail addresses, phone and card numbers, keys
    clean.drop = ()  # regular expressions: rows with a match in any text are dropped; ^ and $ are the ends of a line

    data.augment = augment = ml_collections.ConfigDict()
    augment.copies = 0  # synthetic rows made of each training row by ops and function, which take turns; 0: off
    augment.ops = ("word_dropout", "word_swap", "char_noise", "case")  # rows of ftjax.data.augment.OPS
    augment.rate = 0.1  # share of a text's words, or letters, that an op touches; one at least
    augment.columns = ()  # columns with text that ops alter; must be named: an answer or a label never is
    augment.prompts = ()  # further templates like data.prompt: each makes one more synthetic row of every row
    augment.function = ""  # "file.py:name": name(row: dict, rng: numpy Generator) -> row, or None for no row

    c.task = task = ml_collections.ConfigDict()
    task.kind = "causal"  # causal: the next token | classify: one label a text | multilabel: several | regress: numbers
    # | tag: a label a word | span: where a question's answer stands in a text | masked: hidden tokens of plain text |
    # embed: texts that belong together lie near each other
    task.text = ""  # column with the text; empty: the first of the usual names, `sentence`, `text`, ...; tag: with the
    # list of words; span: with the question; embed: with the first text
    task.pair = ""  # column with a second text, read together with the first; span: with the text that holds the
    # answer; embed: with the text that belongs to the first
    task.labels = ()  # names of labels in the order of their ids; empty: those of the model's files where it has a head
    # for them, or else as training rows have them; regress: of the numbers
    task.class_weights = ()  # weight of each label in the loss, in the order of their ids; ("balanced",): by how rare
    # it is, so that each label weighs as much as any other
    task.balanced = False  # each label is as many of an epoch's rows as any other, rare ones drawn more often
    task.focal = 0.0  # γ of the focal loss, by which what is known well already counts less; 0: off
    task.threshold = ""  # two labels, or multilabel: figure by which thresholds are chosen on validation rows: f1 |
    # mcc | balanced_accuracy | accuracy; empty: 0.5
    task.group = ""  # column by whose values figures are told apart
    task.subwords = "first"  # tag: the first token of a word carries its tag, or all do; predicted by the first
    task.stride = 128  # span: tokens that a window of a long text shares with the one before
    task.max_answer = 30  # span: tokens of a predicted answer at most
    task.no_answer = False  # span: some questions have no answer (SQuAD v2.0); empty is then a prediction too
    task.mask_rate = 0.15  # masked: share of a text's tokens that are hidden
    task.whole_words = False  # masked: all tokens of a word are hidden, or none
    task.pool = "auto"  # mean | cls: a text's vector, and what a head over its labels reads, is the mean of its tokens'
    # states, or that of the first; auto: embed the mean, labels what the model's class reads
    task.temperature = 0.05  # embed: cosines are divided by it; the lower, the more the nearest wrong texts count

    c.optim = optim = ml_collections.ConfigDict()
    optim.name = "adamw"  # adamw | adafactor | lion | sgd | muon
    optim.lr = placeholder(float)  # peak learning rate; None: the method's default
    optim.schedule = "cosine"  # constant | linear | cosine | wsd (warm-up, stable, decay)
    optim.warmup = 0.03  # share of all steps if below 1, else steps
    optim.decay = 0.2  # wsd only: share of all steps spent decaying at the end
    optim.final_lr = 0.0  # share of the peak reached at the end of the schedule
    optim.weight_decay = 0.0  # decoupled; matrices only, norms and biases are spared
    optim.b1 = 0.9  # momentum of sgd too
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.clip_norm = 1.0  # global norm; 0 turns clipping off
    optim.layer_decay = 1.0  # each layer learns this many times as fast as the one above it, embeddings as one below
    # the lowest; 1: all alike. 0.7 to 0.95 keep low layers near what pretraining made of them
    optim.lora_plus = 1.0  # B of LoRA learns this many times as fast as A; 1: as A

    c.train = train = ml_collections.ConfigDict()
    train.batch_size = placeholder(int)  # rows (packed rows when packing) a step; None: the method's default
    train.accumulate = 1  # microbatches a step; batch_size must be a multiple of it
    train.epochs = 3.0  # passes over train; ignored where steps is set
    train.steps = 0  # optimizer steps; 0: by epochs
    train.label_smoothing = 0.0
    train.dropout = placeholder(float)  # residual, embedding and attention dropout; None: none, as LLaMA; GPT-2 had 0.1
    train.neftune = 0.0  # alpha: noise on embeddings in training, within alpha / sqrt(tokens x width); 0: off. 5 to 15
    # improve answers of chat models (Jain et al. 2023, NEFTune)
    train.cache_features = True  # where the head alone is trained, for more than an epoch: compute the states that it
    # reads once, and keep them in a file of run_dir while the run lasts
    train.ema = 0.0  # decay a step of an exponential moving average of what is trained, which is validated and exported
    # in its place; 0: off
    train.log_every = 10  # steps between lines of metrics.jsonl
    train.eval_every = 0  # steps between validations; 0: ten times a run
    train.patience = 0  # stop after so many validations without a better loss; 0: never
    train.save_every = 0  # steps between checkpoints, beside each best one; 0: at every validation
    train.keep = 1  # latest checkpoints kept beside the best

    c.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # rows split, weights whole; -1: all devices that the others leave; 0: all axes are chosen for the
    # devices and the model, and the reason is told
    mesh.fsdp = 1  # rows split, weights split and gathered for use
    mesh.sequence = 1  # tokens of a row split, for rows too long for one device; weights split as by fsdp
    mesh.tensor = 1  # heads, feed-forward and vocabulary split

    c.evaluate = ev = ml_collections.ConfigDict()
    ev.batch_size = 0  # rows a step; 0: as train.batch_size
    ev.rows = 0  # validation rows used during training; 0: all
    ev.compare = False  # generate on held-out rows before and after training, score, and write results.json
    ev.compare_rows = 0  # distinct held-out prompts generated for; 0: all
    ev.compare_on = "test"  # validation | test
    ev.metrics = ("rouge_l",)  # rows of ftjax.evaluation.metrics.METRICS; or "file.py:name" of a function of your own
    ev.words = ""  # column with the given words, for the metric `coverage`
    ev.passage = ""  # column with the text that answers should keep to, for the metric `unsupported`; empty: references
    ev.forgetting = ""  # text file; the loss on it before and after says what was forgotten
    ev.samples = 5  # generations shown side by side

    c.compare = comp = ml_collections.ConfigDict()
    comp.contenders = ("zero-shot", "few-shot", {"name": "tuned"})  # the first is what the others are judged against.
    # Rows of ftjax.verdict.baselines.PROMPTS: the base model, so asked; `majority`: the commonest label; a run folder,
    # adapter, model directory or hub name; or a dict: its "name", any field of the config that it is trained with,
    # such as "tuning.method", and of "prompt" (of PROMPTS), "shots" and "model" (a path) what differs
    comp.metric = ""  # what the verdict is about; empty: the first of evaluate.metrics, or the task's accuracy
    comp.seeds = 3  # runs of what is trained, and draws of examples, from config.seed on
    comp.shots = 3  # examples before a question
    comp.between = "\n\n"  # behind each example, where rows are no conversation; an answer ends there too
    comp.documents = ""  # rows or a folder of text files, whose passages `retrieval` puts before a question
    comp.passages = 2  # that a question gets
    comp.passage_words = 80  # of a passage at most
    comp.context = "Context:\n{passages}\n\n"  # how they stand before a question
    comp.curve = ()  # amounts of rows of train, (500, 1000, 2000, ...), that contenders are trained on as well: their
    # learning curves, each with its law, and what more rows would bring
    comp.curve_shots = ()  # classify: the same in rows of each label
    comp.curve_of = ()  # names of those contenders; empty: all that are trained
    comp.curve_steps = 0  # optimizer steps of each of these runs at least, where train.steps is 0
    comp.curve_to = ()  # amounts, also such as are not there, at which the law is asked
    comp.ballots = 0  # questions whose answers are written down to be rated blindly, two by two; 0: none
    comp.divergence = 64  # questions on whose answers a tuned model is compared with its base, token by token; 0: none
    comp.unsafe = ""  # rows with a `prompt` or `messages` that should be refused
    comp.harmless = ""  # the same of such that should not
    comp.device_hour = 0.0  # dollars of an hour of this machine's devices; 0: costs are told in seconds alone
    comp.tokens_in = 0.0  # dollars per million tokens of a prompt, where the base is asked at a hosted endpoint
    comp.tokens_out = 0.0  # and of an answer
    comp.storage = 0.0  # dollars per gigabyte and month of what was trained
    comp.requests = 0  # a month, for which costs are told; 0: none

    c.generate = gen = ml_collections.ConfigDict()
    gen.max_new_tokens = 64
    gen.temperature = 0.0  # 0: greedy
    gen.top_k = 0  # 0: off
    gen.top_p = 1.0  # 1: off
    gen.batch_size = 32
    gen.stop = ()  # strings of one token each that end an answer beside the model's own end tokens

    c.export = export = ml_collections.ConfigDict()
    export.formats = (
        "auto",
    )  # adapter | merged | full, written to run_dir at the end; auto: adapter where there is one
    export.checkpoint = "best"  # best | last
    export.dtype = "auto"  # auto: as the model was; float32 | bfloat16 | float16
    export.shard_size = 5_000_000_000  # bytes a safetensors file at most

    c.log = log = ml_collections.ConfigDict()
    log.tensorboard = True  # event files under run_dir/tensorboard
    log.wandb = ""  # Weights & Biases project; needs the extra `wandb`; empty: off
    log.profile = ""  # FIRST:LAST, such as 10:13: steps, both ends included, of which an XProf trace and a summary of
    # where their time went are written to run_dir; empty: none
    log.compilation_cache = True  # reuse compiled programs across runs (~/.cache/ftjax/xla)
    return c.lock()


CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.trained_dtype": ("float32", "bfloat16"),
    "model.frozen_dtype": ("auto", "float32", "bfloat16"),
    "model.quantise": ("none", "int8", "nf4"),
    "model.attention": ("auto", "xla", "cudnn", "splash", "tokamax"),
    "model.remat": ("none", "auto", "products", "attention", "offload_products", "full", "offload"),
    "task.kind": ("causal", "classify", "multilabel", "regress", "tag", "span", "masked", "embed"),
    "task.subwords": ("first", "all"),
    "task.pool": ("auto", "mean", "cls"),
    "task.threshold": ("", "f1", "mcc", "balanced_accuracy", "accuracy"),
    "data.form": ("auto", "text", "prompt", "instruction", "messages", "sharegpt", "preference", "template"),
    "data.train_on": ("assistant", "last", "all"),
    "data.clean.unicode": ("", "NFC", "NFKC"),
    "data.clean.personal": ("keep", "mask", "drop"),
    "data.long": ("truncate", "drop", "raise"),
    "tuning.init": ("default", "gaussian", "orthogonal", "pissa", "olora"),
    "tuning.prompt_init": ("vocab", "text", "random"),
    "tuning.encoder": ("mlp", "lstm"),
    "optim.name": ("adamw", "adafactor", "lion", "sgd", "muon"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "evaluate.compare_on": ("validation", "test"),
    "export.checkpoint": ("best", "last"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
}


def load(path: str | Path, overrides: list[str] = ()) -> ml_collections.ConfigDict:
    """Config of a `.py` file with `get_config()`, or of a `.json` file that a run wrote; overridden and validated.

    overrides: `dotted.key=value`; a value is a Python literal, or else a string in which \\n and \\t are line end and
    tab. Raises FtjaxError that names the file, the key, what was expected and the nearest key.
    """
    path = Path(path)
    if not path.is_file():
        there = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FtjaxError(f"--config: {path} is not a file{nearest(str(path), there)}")
    config = from_dict(_json(path)) if path.suffix == ".json" else _python(path)
    override(config, overrides)
    return config


def override(config, overrides: list[str]) -> None:
    """Apply `dotted.key=value` texts to a config in place, and validate it. Raises FtjaxError as `load` does."""
    for text in overrides:
        _override(config, text)
    validate(config)


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise FtjaxError(f"{path} line {error.lineno}: invalid JSON: {error.msg}") from None
    return content.get("config", content)


def _python(path: Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"ftjax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (AttributeError, TypeError, KeyError) as error:
        # ml_collections says which key, of which type, and the nearest one; file and line are ours to add.
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        raise FtjaxError(f"{path} line {lines[-1] if lines else 1}: {str(error).strip()}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise FtjaxError(f"{path}: get_config() returned {type(config).__name__}; start from ftjax.config.default()")
    return config


def _override(config, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise FtjaxError(f"--config.{override}: expected --config.{key}=VALUE")
    _set(config, key, _literal(text), f"--config.{key}")


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # A shell hands over a line end as two characters; in a template, and in a pattern too, it means one.
        return {"true": True, "false": False}.get(text, text.replace("\\n", "\n").replace("\\t", "\t"))


def _set(config, key: str, value, said: str) -> None:
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node[part] if isinstance(node, ml_collections.ConfigDict) and part in node else None
    if not isinstance(node, ml_collections.ConfigDict) or last not in node:
        raise FtjaxError(f"{said}: no such key{nearest(key, flat(config))}")
    if isinstance(node[last], ml_collections.ConfigDict):
        raise FtjaxError(f"{said}: names a group; its keys are {', '.join(node[last])}")
    kind = node.get_type(last)
    if isinstance(value, int | float) and not isinstance(value, bool) and kind is str:
        value = str(value)
    if isinstance(value, str) and kind is tuple:
        value = (value,)
    # bool is an int to Python, and to ml_collections; to a reader of a config it is not.
    if isinstance(value, bool) != (kind is bool) and not (value is None and node[last] is None):
        raise FtjaxError(_wrong_type(said, kind, node[last], value))
    try:
        node[last] = value
    except (TypeError, ValueError):
        raise FtjaxError(_wrong_type(said, kind, node[last], value)) from None


def _wrong_type(said: str, kind: type, default, value) -> str:
    example = "" if default is None else f", such as {default!r}"
    return f"{said}: expected {kind.__name__}{example}; found {value!r}"


def flat(config) -> dict:
    """{"optim.lr": value, ...}: every leaf by its dotted key."""
    out = {}
    for key, value in config.items(preserve_field_references=False):
        if isinstance(value, ml_collections.ConfigDict):
            out |= {f"{key}.{k}": v for k, v in flat(value).items()}
        else:
            out[key] = value
    return out


def from_dict(values: dict) -> ml_collections.ConfigDict:
    """The way back from `config.to_dict()`, also through JSON; keys that this version does not know are an error."""
    config = default()

    def fill(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict):
                fill(value, f"{prefix}{key}.")
            else:
                _set(config, prefix + key, _tuples(value), prefix + key)

    fill(values, "")
    return config


def copy(config) -> ml_collections.ConfigDict:
    """A copy that may be changed freely; raises FtjaxError for a config with keys that `default()` does not have."""
    return from_dict(config.to_dict())


# Fields of `data` that no source of a mixture has for itself.
OF_ALL = ("mixture", "temperature", "decontaminate", "max_length", "long", "packing", "buckets", "workers", "processes")
OF_ALL += ("streaming", "cache", "cache_size")


def sources(config) -> list[tuple[str, ml_collections.ConfigDict, float | None]]:
    """(name, its own `data` group, weight) of every source that is trained: of `data` itself, or of `data.mixture`.

    An entry of a mixture sets what differs from `data`; fields of its inner groups by dotted keys, "clean.near". Named
    parts other than train are its own: where it names none, they are split off its rows. Raises FtjaxError that names
    the entry and the key.
    """
    data = config.data
    if not data.mixture:
        return [("", data, None)]
    found = []
    for number, entry in enumerate(data.mixture, 1):
        said = f"data.mixture entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("train"), str):
            raise FtjaxError(f'{said}: expected a dict with "train", such as {{"train": "a.jsonl", "weight": 0.7}}')
        whole = from_dict(config.to_dict())
        whole.data.update(train="", validation="", test="", mixture=())
        for key, value in entry.items():
            if key in ("name", "weight"):
                continue
            if key.split(".")[0] not in data:
                raise FtjaxError(f"{said}: {key}: no such key{nearest(key, [*data, 'name', 'weight'])}")
            if key in OF_ALL:
                raise FtjaxError(f"{said}: {key!r} holds for all sources: set data.{key}")
            _set(whole, f"data.{key}", _tuples(value), f"{said}: {key}")
        weight = entry.get("weight")
        if weight is not None and (not isinstance(weight, int | float) or weight <= 0):
            raise FtjaxError(f"{said}: weight: expected a number above 0; found {weight!r}")
        found.append((str(entry.get("name") or Path(entry["train"]).stem), whole.data, weight))
    names = [name for name, _, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise FtjaxError(f'data.mixture: two sources are called {twice!r}; give each a "name" of its own')
    if len({weight is None for _, _, weight in found}) > 1:
        raise FtjaxError("data.mixture: give every source a weight, or none of them")
    return found


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def compile_patterns(patterns, key: str) -> list[re.Pattern]:
    """Regular expressions in which ^ and $ are the ends of a line; raises FtjaxError naming `key` for a bad one."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.MULTILINE))
        except (re.error, TypeError) as error:
            raise FtjaxError(f"{key}: {pattern!r} is no regular expression: {error}") from None
    return compiled


def validate(config) -> None:
    """Check every choice and range that can be checked without reading a file. Raises FtjaxError naming the key."""
    values = flat(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise FtjaxError(f"{key}: {values[key]!r}{nearest(values[key], choices)}; one of {', '.join(choices)}")

    def need(key, holds, expected):
        if not holds(values[key]):
            raise FtjaxError(f"{key}: expected {expected}; found {values[key]!r}")

    for key in (
        "tuning.rank",
        "tuning.virtual_tokens",
        "data.max_length",
        "data.buckets",
        "data.workers",
        "train.accumulate",
        "train.log_every",
    ):
        need(key, lambda v: v >= 1, "at least 1")
    for key in (
        "generate.max_new_tokens",
        "generate.batch_size",
        "train.keep",
        "export.shard_size",
    ):
        need(key, lambda v: v >= 1, "at least 1")
    for key in (
        "model.head_chunk",
        "train.steps",
        "train.eval_every",
        "train.patience",
        "train.save_every",
        "data.limit",
        "data.shots",
        "model.unroll",
    ):
        need(key, lambda v: v >= 0, "0 or more")
    for key in ("data.clean.min_chars", "data.clean.max_chars", "data.clean.max_ratio", "data.augment.copies"):
        need(key, lambda v: v >= 0, "0 or more")
    if config.task.kind != "classify":
        need("data.shots", lambda v: v == 0, "0 where task.kind is not classify; data.limit is for rows of any kind")
    need("data.clean.parts", lambda v: set(v) <= {"train", "validation", "test"}, "of train, validation and test")
    compile_patterns(values["data.clean.drop"], "data.clean.drop")
    for key in ("optim.weight_decay", "optim.clip_norm", "optim.warmup", "generate.temperature", "generate.top_k"):
        need(key, lambda v: v >= 0, "0 or more")
    need("task.focal", lambda v: v >= 0, "0 or more")
    need("task.stride", lambda v: v >= 0, "0 or more")
    need("task.max_answer", lambda v: v >= 1, "at least 1")
    need("task.mask_rate", lambda v: 0 < v <= 1, "a share above 0")
    need("task.temperature", lambda v: v > 0, "more than 0")
    if config.task.kind == "embed":
        need("train.accumulate", lambda v: v == 1, "1: a text is told from all others of its batch, which microbatches "
             "do not see; model.remat=full saves memory instead")  # fmt: skip
    need("train.neftune", lambda v: v >= 0, "0 or more")
    for key in ("tuning.dropout", "train.label_smoothing", "train.ema"):
        need(key, lambda v: 0 <= v < 1, "a share from 0 to below 1")
    for key in ("optim.final_lr", "optim.decay", "generate.top_p"):
        need(key, lambda v: 0 <= v <= 1, "a share from 0 to 1")
    need("optim.lr", lambda v: v is None or v > 0, "more than 0")
    need("tuning.layers", lambda v: v > 0, "more than 0")
    need("tuning.layers_with", lambda v: set(v) <= {"final_norm", "lm_head"}, "of final_norm and lm_head")
    need("optim.layer_decay", lambda v: 0 < v <= 1, "more than 0 and at most 1")
    need("optim.lora_plus", lambda v: v > 0, "more than 0")
    need("data.temperature", lambda v: v > 0, "more than 0")
    for key in ("data.group_near", "data.clean.near", "data.augment.rate"):
        need(key, lambda v: 0 <= v <= 1, "a share from 0 to 1")
    need("train.batch_size", lambda v: v is None or v >= 1, "at least 1")
    need("train.dropout", lambda v: v is None or 0 <= v < 1, "a share from 0 to below 1")
    need("train.epochs", lambda v: v > 0, "more than 0")
    need(
        "data.split", lambda v: len(v) == 3 and min(v) >= 0 and abs(sum(v) - 1) < 1e-6, "three shares that add up to 1"
    )
    for key in ("compare.seeds", "compare.passages", "compare.passage_words"):
        need(key, lambda v: v >= 1, "at least 1")
    for key in ("shots", "ballots", "divergence", "device_hour", "tokens_in", "tokens_out", "storage", "requests"):
        need(f"compare.{key}", lambda v: v >= 0, "0 or more")
    for key in ("curve", "curve_shots", "curve_to"):
        need(f"compare.{key}", lambda v: all(isinstance(n, int) and n > 0 for n in v), "numbers of rows, above 0")
    need(
        "log.profile",
        lambda v: not v or ((n := re.fullmatch(r"(\d+):(\d+)", v)) and 1 <= int(n[1]) <= int(n[2])),
        "FIRST:LAST, numbers of two steps from 1 on, such as 10:13",
    )
    need("compare.curve_steps", lambda v: v >= 0, "0 or more")
    need("compare.context", lambda v: v.count("{passages}") == 1, "a text with {passages} in it once")
    need("tuning.encoder_hidden", lambda v: v >= 0, "0 or more")
    by_text = config.tuning.prompt_init == "text"
    need("tuning.prompt_text", lambda v: bool(v) == by_text, "a text where tuning.prompt_init is text, else none")
    for key in ("tuning.rank_pattern", "tuning.alpha_pattern"):
        need(key, lambda v: all(isinstance(p, tuple) and len(p) == 2 for p in v), "pairs of (pattern, value)")
    if config.data.mixture:
        for name, data, _ in sources(config):
            whole = from_dict(config.to_dict())
            whole.data = data
            try:
                validate(whole)
            except FtjaxError as error:
                raise FtjaxError(f"data.mixture: {name}: {error}") from None
