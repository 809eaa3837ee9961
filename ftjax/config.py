"""The one config of a run: every field with its unit and its reason; reading, overriding and checking it.

A config file is Python with `get_config()`, which starts from `default()` and sets what differs. `load()` reads such a
file, applies overrides from the command line and validates; nothing is accepted that `default()` does not name.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import ml_collections
from ml_collections.config_dict import placeholder

from ftjax.errors import FtjaxError, nearest


def default() -> ml_collections.ConfigDict:
    """Every field of a run. `None` means: derived later, and the derived value is written to the run folder."""
    c = ml_collections.ConfigDict()
    c.run_dir = "runs/default"  # everything that a run writes lies in here; the same folder again means resume
    c.overwrite = False  # True: delete what an earlier run left in run_dir and start anew
    c.seed = 0  # initial adapters, dropout, order of rows, split, sampling

    c.model = model = ml_collections.ConfigDict()
    model.path = "builtin:stories260K"  # model directory, hub name, or `builtin:` for what ftjax carries
    model.revision = ""  # branch, tag or commit of a hub name; empty: its default branch
    model.dtype = "auto"  # compute: float32 | bfloat16; auto: bfloat16 on GPU and TPU, float32 on CPU
    model.trained_dtype = "float32"  # stored dtype of what is trained; small updates vanish in bfloat16
    model.frozen_dtype = "auto"  # stored dtype of what is not; auto: the compute dtype
    model.remat = "none"  # none | full: recompute a block in its backward pass, memory for about a third more time
    model.unroll = 1  # layers per scan iteration; 0: all. Unrolling may run faster and compiles slower
    model.head_chunk = 512  # rows x positions of logits held at once are about this times a batch's rows

    c.tuning = tuning = ml_collections.ConfigDict()
    tuning.method = "lora"  # a row of ftjax.tuning.METHODS
    tuning.rank = 16
    tuning.alpha = 32.0  # the update is scaled by alpha / rank
    tuning.dropout = 0.0  # on the adapter's input
    tuning.targets = ("all-linear",)  # names as PEFT matches them, one regular expression `re:...`, or all-linear
    tuning.rank_pattern = ()  # (("regex of a module name", rank), ...): the first match wins over `rank`
    tuning.alpha_pattern = ()  # (("regex of a module name", alpha), ...)

    c.data = data = ml_collections.ConfigDict()
    data.train = "builtin:commongen/train.jsonl"  # file, glob, comma-separated list, directory, builtin: or hub name
    data.validation = ""  # like train; empty: split off from train by `split`
    data.test = ""  # like train; empty: split off from train by `split`
    data.split = (0.8, 0.1, 0.1)  # train, validation, test shares, used where a file is not named
    data.limit = 0  # use only so many rows of train, after shuffling with the seed; 0: all
    data.form = "auto"  # auto | text | prompt | instruction | messages | template; auto goes by the columns
    data.prompt = ""  # template over columns, such as "Words: {src}\nSentence:"; sets form to template
    data.completion = ""  # template over columns, such as " {tgt}"
    data.loss_on = "completion"  # completion | all: which tokens are trained
    data.max_length = 512  # tokens of a row, or of a packed row; capped by the model's positions
    data.long = "truncate"  # truncate | drop | raise: rows longer than max_length
    data.packing = False  # several rows in one, kept apart by segment ids
    data.buckets = 4  # padded lengths that unpacked batches may have; each compiles once
    data.workers = 2  # threads that build batches ahead of the device

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

    c.train = train = ml_collections.ConfigDict()
    train.batch_size = placeholder(int)  # rows (packed rows when packing) a step; None: the method's default
    train.accumulate = 1  # microbatches a step; batch_size must be a multiple of it
    train.epochs = 3.0  # passes over train; ignored where steps is set
    train.steps = 0  # optimizer steps; 0: by epochs
    train.label_smoothing = 0.0
    train.dropout = placeholder(float)  # residual, embedding and attention dropout; None: none, as LLaMA; GPT-2 had 0.1
    train.log_every = 10  # steps between lines of metrics.jsonl
    train.eval_every = 0  # steps between validations; 0: ten times a run
    train.patience = 0  # stop after so many validations without a better loss; 0: never
    train.save_every = 0  # steps between checkpoints; 0: at every validation
    train.keep = 1  # latest checkpoints kept beside the best

    c.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # rows split, weights whole; -1: all devices that the others leave
    mesh.fsdp = 1  # rows split, weights split and gathered for use
    mesh.tensor = 1  # heads, feed-forward and vocabulary split

    c.evaluate = ev = ml_collections.ConfigDict()
    ev.batch_size = 0  # rows a step; 0: as train.batch_size
    ev.rows = 0  # validation rows used during training; 0: all
    ev.compare = False  # generate on held-out rows before and after training, score, and write results.json
    ev.compare_rows = 0  # distinct held-out prompts generated for; 0: all
    ev.compare_on = "test"  # validation | test
    ev.metrics = ("rouge_l",)  # rows of ftjax.evaluate.metrics.METRICS
    ev.words = ""  # column with the given words, for the metric `coverage`
    ev.forgetting = ""  # text file; the loss on it before and after says what was forgotten
    ev.samples = 5  # generations shown side by side

    c.generate = gen = ml_collections.ConfigDict()
    gen.max_new_tokens = 64
    gen.temperature = 0.0  # 0: greedy
    gen.top_k = 0  # 0: off
    gen.top_p = 1.0  # 1: off
    gen.batch_size = 32
    gen.stop = ()  # strings of one token each that end an answer beside the model's own end tokens

    c.export = export = ml_collections.ConfigDict()
    export.formats = ("adapter",)  # adapter | merged | full, written at the end of training; adapter: full where full
    export.checkpoint = "best"  # best | last
    export.dtype = "auto"  # auto: as the model was; float32 | bfloat16 | float16
    export.shard_size = 5_000_000_000  # bytes a safetensors file at most

    c.log = log = ml_collections.ConfigDict()
    log.tensorboard = True  # event files under run_dir/tensorboard
    log.wandb = ""  # Weights & Biases project; needs the extra `wandb`; empty: off
    log.compilation_cache = True  # reuse compiled programs across runs (~/.cache/ftjax/xla)
    return c.lock()


CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.trained_dtype": ("float32", "bfloat16"),
    "model.frozen_dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "full"),
    "data.form": ("auto", "text", "prompt", "instruction", "messages", "template"),
    "data.loss_on": ("completion", "all"),
    "data.long": ("truncate", "drop", "raise"),
    "optim.name": ("adamw", "adafactor", "lion", "sgd", "muon"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "evaluate.compare_on": ("validation", "test"),
    "export.checkpoint": ("best", "last"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
}
