"""The one config of a run: all fields with their ranges and meanings; reading, overriding and checking a config.

`FIELDS` declares each field: its dotted key, its default, type and range, and, in the comment after it, its meaning and
unit, which `ftjax config` shows. `default()` is built from it. A config file is Python with `get_config()`, which
starts from `default()` and sets the fields that differ. `load()` reads such a file, applies overrides from the command
line and validates. Every field must be declared in `FIELDS`.
"""

from __future__ import annotations

import ast
import datetime
import difflib
import functools
import json
import math
import os.path
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ftjax import tasks, user_code
from ftjax.errors import FtjaxError, nearest
from ftjax.foreign import parse_json, read_text

WORDS = re.compile(r"[\w./:-]+(,[\w./:-]+)+")  # several values as peers write them: q_proj,v_proj


class Field(NamedTuple):
    """The values that a field of the config may have.

    Attributes:
        default: The value in `default()`. None: decided by the run unless the user sets it; None is then a valid value.
        kind: The type of a value, or several types of which it may have one.
        expected: The range in words, for error messages.
        holds: Whether a value of type `kind` is in the range.
        item: For a tuple, the Field of its entries.
        choices: For a text with few possible values, all of them.
        also: Names of the same field in other projects, separated by blanks. Error messages lead from them to the key.
    """

    default: Any
    kind: type | UnionType
    expected: str
    holds: Callable[[Any], bool] = lambda value: True
    item: Field | None = None
    choices: tuple[str, ...] = ()
    also: str = ""

    def read(self, text: str, name: str):
        """The value that a text from the command line means. Raises FtjaxError as `check` does."""
        value = _literal(text)
        if self.kind is str and not isinstance(value, str | tuple | list | dict | None):
            value = text  # it only looks like a number: 123e4567 and 0123456 are commits
        if self.kind is tuple and not isinstance(value, tuple | list | None):
            parts = text.split(",") if WORDS.fullmatch(text) else [text]
            value = tuple(self.item.read(part, name) for part in parts) if self.item else (value,)
        return self.check(value, name)

    def check(self, value, name: str):
        """The value in the form that the config stores: an int for a float becomes a float, and a list becomes a tuple.

        Raises FtjaxError, which starts with `name`, for a value of another type or out of range.
        """
        kept = _tuples((value,) if self.kind is tuple and isinstance(value, str) else value)
        if self.item and isinstance(kept, tuple):
            kept = tuple(self.item.check(item, f"{name}, entry {n}") for n, item in enumerate(kept, 1))
        if self.kind is float and isinstance(kept, int) and not isinstance(kept, bool) and abs(kept) < 2**1023:
            kept = float(kept)
        # bool is an int to Python; to a reader of a config it is not.
        fits = isinstance(kept, self.kind) and isinstance(kept, bool) == (self.kind is bool)
        fits = fits and not (self.kind is float and not math.isfinite(kept))
        if (value is None and self.default is None) or (fits and self.holds(kept)):
            return kept
        or_none = " or None" if self.default is None else ""
        near = nearest(value, self.choices) if isinstance(value, str) else ""
        raise FtjaxError(f"{name}: expected {self.expected}{or_none}; found {_shown(value)}{near}")


def number(default, least=-math.inf, most=math.inf, *, above=-math.inf, below=math.inf, also="") -> Field:
    """A finite number within these bounds."""
    bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
    limits = " and ".join(f"{word} {bound:,}" for word, bound in bounds if math.isfinite(bound))
    holds = lambda value: least <= value <= most and above < value < below  # noqa: E731
    return Field(default, float, f"a number {limits}".strip(), holds, also=also)


def whole(default, least, most=2**31 - 1, *, also="") -> Field:
    """A whole number from `least` to `most`."""
    field = number(default, least, most, also=also)
    return field._replace(kind=int, expected=field.expected.replace("a number", "a whole number"))


def switch(default: bool, also="") -> Field:
    """True or False."""
    return Field(default, bool, "True or False", also=also)


def text(default="", *, empty=True, also="") -> Field:
    """A text, such as a path, a pattern or a template. It may look like a number."""
    holds = lambda value: (empty or value != "") and "\0" not in value  # noqa: E731
    return Field(default, str, "a text" if empty else "a text that is not empty", holds, also=also)


def choice(*choices: str, also="") -> Field:
    """One of these texts, of which the first is the default."""
    listed = ", ".join(choice or "an empty text" for choice in choices)
    return Field(choices[0], str, f"one of {listed}", choices.__contains__, choices=choices, also=also)


def several(default: tuple, item: Field, expected="", holds=lambda value: True, also="") -> Field:
    """A tuple whose entries are valid by `item`."""
    return Field(default, tuple, expected or f"a tuple, each entry {item.expected}", holds, item, also=also)


def pairs(*kinds: type) -> Field:
    """A tuple of pairs: a regular expression, and a number above 0 of one of `kinds`."""
    fits = lambda p: len(p) == 2 and isinstance(p[0], str) and type(p[1]) in kinds and 0 < p[1] < 2**31  # noqa: E731
    item = Field((), tuple, "a pair (pattern, number above 0)", fits)
    return several((), item, "a tuple of pairs (pattern, number above 0)")


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _axis() -> Field:
    return Field(1, int, "-1 or a whole number at least 1", lambda size: size == -1 or 1 <= size < 2**31)


WORD = text(empty=False)
NAME = Field("", str, "a text")  # of a column or label of the rows, which may be anything
COUNT = whole(1, 1)
REMAT = ("auto", "none", "products", "attention", "offload_products", "full", "offload")
FORMS: tuple[str, ...] = ("auto", "text", "prompt", "question", "instruction", "messages", "sharegpt", "preference")
FORMS += ("ranked", "ballot", "template")

# In a comment, `None` means: derived later, and the derived value is written to the run folder.
FIELDS: dict[str, Field] = {
    "run_dir": text("runs/default", empty=False, also="output_dir out_dir"),  # folder for everything that a run writes;
    # starting with the same folder again resumes the run
    "overwrite": switch(False, also="overwrite_output_dir"),  # True: delete what an earlier run wrote to run_dir, and
    # start from the beginning. Other files stay, and a folder without a run is refused
    "seed": whole(0, 0, also="random_seed data_seed"),  # seed of initial adapters, dropout, the order of rows, the
    # split and sampling
    #
    "stages": several((), Field({}, dict, "a dict", lambda entry: all(isinstance(key, str) for key in entry))),  # runs
    # one after another, each from the best model of the one before: ({"name": "facts", "data.train": "a.jsonl"}, ...).
    # A stage sets any field for itself, and "replay": the share of its rows that come from earlier stages, and
    # "average": factors of its model in an average with the one before it, of which validation rows choose one
    #
    # ---- the model
    "model.path": text("builtin:stories260K", empty=False, also="model_name_or_path base_model model_id model_name"),
    # model directory, hub name, or `builtin:` and the name of a model that comes with ftjax
    "model.revision": text(also="model_revision"),  # branch, tag or commit of a hub name; empty: the default branch,
    # or, when a run is resumed, the commit with which it began
    "model.dtype": choice("auto", "float32", "bfloat16", also="torch_dtype bf16 fp16"),  # dtype of computation; auto:
    # bfloat16 on GPU and TPU, float32 on CPU
    "model.trained_dtype": choice("float32", "bfloat16"),  # dtype in which the trained parameters are stored; bfloat16
    # loses small updates
    "model.frozen_dtype": choice("auto", "float32", "bfloat16"),  # dtype in which the other parameters are stored;
    # auto: the dtype of computation
    "model.quantise": choice("none", "int8", "nf4", also="quantize load_in_4bit load_in_8bit quantization_bit"),
    # number format of the frozen kernels of the blocks, which then take a half (int8) or a quarter (nf4) of bfloat16's
    # bytes
    "model.quantise_tables": switch(False),  # if model.quantise is set, also store the embedding table and the head in
    # int8. They are a sixth of an 8B model's bytes, and QLoRA leaves them unquantised
    "model.double_quantise": switch(True, also="bnb_4bit_use_double_quant double_quantization"),  # nf4: store the
    # scales in 8 bits too, as QLoRA does; False: in float32
    "model.remat": choice(*REMAT, also="gradient_checkpointing activation_checkpointing"),
    # what the backward pass recomputes. full: a whole block, which saves memory and takes about a third more time;
    # attention: all but q, k, v and the attention output; products: all but the outputs of matrix products; offload and
    # offload_products: keep a block's input, or the products, in the host's memory; auto: the fastest that fits
    "model.attention": choice(
        "auto", "xla", "cudnn", "splash", "tokamax", also="attn_implementation flash_attention flash_attn"
    ),  # kernel of attention in training; auto: cudnn on GPUs and splash on TPUs if they support the run, otherwise
    # xla, which is the fastest on CPUs
    "model.unroll": whole(1, 0),  # layers per scan iteration; 0: all. Unrolling may run faster and compiles slower
    "model.head_chunk": whole(0, 0),  # tokens whose logits a device holds at once; 0: as many as fit in 64 MiB on CPUs,
    # in 1 GiB elsewhere
    #
    # ---- what is trained
    "tuning.method": text("lora", empty=False, also="peft_type finetuning_type train_type use_dora"),  # what is
    # trained; `ftjax methods` lists the choices
    "tuning.init_from": text(also="adapter_name_or_path lora_model_dir"),  # PEFT adapter directory or hub name:
    # training starts from its tensors, and the run takes its kind, rank, scale and targets
    "tuning.rank": whole(16, 1, also="lora_r lora_rank r"),  # rank of the update of LoRA and DoRA
    "tuning.alpha": number(32.0, above=0, also="lora_alpha"),  # scale of the update, which is multiplied by alpha /
    # rank; see tuning.rslora
    "tuning.dropout": number(0.0, 0, below=1, also="lora_dropout"),  # dropout on the adapter's input, the share of
    # values that are set to 0
    "tuning.targets": several((), WORD, also="target_modules lora_target lora_target_modules"),  # modules that get an
    # adapter: names as PEFT matches them, one regular expression `re:...`, or all-linear; empty: all-linear for
    # LoRA and DoRA; keys, values and the last map of the feed-forward for IA3
    "tuning.feedforward": several((), WORD, also="feedforward_modules"),  # ia3: targets whose input is scaled
    # instead of the output; empty: the last map of the feed-forward; none: no target
    "tuning.modules_to_save": several((), WORD, also="lora_modules_to_save additional_target"),  # lora, dora, ia3:
    # modules that are trained whole beside the adapter, by names as PEFT matches them, such as lm_head, embed_tokens or
    # norm; `bias`: all biases
    "tuning.token_ids": several((), whole(0, 0)),  # ids of the tokens whose rows are trained beside LoRA or DoRA: those
    # of data.add_tokens, and rows that pad the vocabulary; a run fills them in
    "tuning.rslora": switch(False, also="use_rslora"),  # scale by alpha / sqrt(rank), so that updates do not shrink
    # with the rank
    "tuning.init": choice("default", "gaussian", "orthogonal", "pissa", "olora", also="init_lora_weights pissa_init"),
    # how LoRA's A and B start
    "tuning.rank_pattern": pairs(int),  # ranks that differ from tuning.rank: (("regex of a module name", rank), ...);
    # the first match counts
    "tuning.alpha_pattern": pairs(int, float),  # alphas that differ from tuning.alpha: (("regex of a module name",
    # alpha), ...); the first match counts
    "tuning.virtual_tokens": whole(50, 1, also="num_virtual_tokens"),  # prompt, prefix, ptuning: number of trained
    # tokens before every row; they take up positions of the row
    "tuning.prompt_init": choice("vocab", "text", "random", also="prompt_tuning_init"),  # prompt, prefix: how the
    # virtual tokens start: as tokens drawn from the vocabulary, as the tokens of prompt_text, or as noise, from which
    # they rarely learn
    "tuning.prompt_text": text(also="prompt_tuning_init_text"),  # text that the virtual tokens start from; it should
    # describe the task, and is repeated or cut to virtual_tokens
    "tuning.prompt_ids": several((), whole(0, 0)),  # token ids of prompt_text; a run fills them in
    "tuning.prefix_projection": switch(False),  # prefix: compute the prefix by two dense layers while it is trained
    "tuning.encoder": choice("mlp", "lstm", also="encoder_reparameterization_type"),  # ptuning: network that computes
    # the prompt
    "tuning.encoder_hidden": whole(0, 0, also="encoder_hidden_size"),  # width of the layers that compute a prompt or
    # prefix; 0: the width of their input
    "tuning.layers": number(0.25, above=0),  # last_layers: number of layers that are trained, or a share of all layers
    # if below 1. A quarter gives most of the benefit of full training (Lee et al. 2019, What Would Elsa Do?)
    "tuning.layers_with": several(("final_norm",), choice("final_norm", "lm_head")),  # last_layers: modules after these
    # layers that are trained too
    "tuning.pattern": several((), WORD),  # pattern: regular expressions. A parameter is trained if one matches the
    # whole of its name in the model's files (`model.layers.3.mlp.up_proj.weight`) or of its path in ftjax
    # (`layers/mlp/up_proj/kernel`)
    #
    # ---- the data
    "data.train": text("builtin:commongen/train.jsonl", also="dataset dataset_name dataset_path train_file datasets"),
    # training rows: a file, glob, comma-separated list, directory, `builtin:` name or hub name
    "data.earlier": several((), Field({}, dict, "a dict")),  # rows of earlier stages, by which optim.ewc weighs the
    # parameters: entries as in data.mixture. A run of several stages fills it in
    "data.validation": text(also="validation_file eval_dataset eval_file val_file"),  # validation rows, named as in
    # data.train; empty: split off from train by `split`
    "data.test": text(also="test_file test_dataset"),  # test rows, named as in data.train; empty: split off from train
    # by `split`
    "data.split": several(
        (0.8, 0.1, 0.1),
        number(0.0, 0, 1),
        "three shares that add up to 1",
        lambda shares: len(shares) == 3 and abs(sum(shares) - 1) < 1e-6,
        also="val_size val_set_size validation_split",
    ),  # shares of train, validation and test, used where a file is not named
    "data.columns": several((), NAME),  # column names of .csv and .tsv files without a header line
    "data.label": text(also="label_column label_field"),  # column with the label; empty: the first
    # of the usual names, `label`, `category`, ...
    "data.stratify": text(),  # column whose values are equally frequent in all parts of `split`; empty: data.label, or
    # none
    "data.group": several((), WORD),  # columns that keep rows together: rows that share a value of one of them stay in
    # one part
    "data.group_near": number(0.0, 0, 1),  # similarity (Jaccard of word 3-grams) from which rows stay in one part; 0:
    # off
    "data.decontaminate": several((), WORD),  # evaluation sources that no training row may overlap; `validation`,
    # `test`: the run's own parts
    "data.mixture": several((), Field({}, dict, "a dict", lambda entry: all(isinstance(key, str) for key in entry))),
    # sources that are trained together: ({"name": "a", "train": "a.jsonl", "weight": 0.7}, ...). Each may set any other
    # field of `data` for itself, such as "prompt" or "clean.near"; the other fields are those of `data`. It may set
    # "loss_weight" too, a factor of its loss, and "evaluate.metrics", "evaluate.words" and "evaluate.passage"
    "data.temperature": number(1.0, above=0),  # temperature of a mixture without weights: shares are proportional to
    # rows ** (1 / temperature); 1: to the number of rows
    "data.limit": whole(0, 0, also="max_train_samples max_samples"),  # number of training rows used, after shuffling
    # with the seed; 0: all
    "data.shots": whole(0, 0),  # classify: number of training rows used of each label, drawn by the seed; 0: all
    "data.form": choice(*FORMS, also="dataset_format formatting"),  # form of the rows; auto: recognised by their
    # columns
    "data.template": text(also="chat_template"),  # chat template of all rows: tokenizer | alpaca | chatml | llama-3 |
    # mistral | gemma | phi | plain; empty: the tokenizer's for messages, none for other rows
    "data.system": text(also="default_system system_prompt"),  # system message of conversations that have none
    "data.prompt": text(also="prompt_template"),  # template of the prompt over columns, such as "Words:
    # {src}\nSentence:"; sets form to template
    "data.completion": text(),  # template of the completion over columns, such as " {tgt}"
    "data.labels": several((), NAME),  # names of the labels of rows whose answer is a label, in the order of their ids:
    # data.completion writes the name for an id in the column data.label, and the most probable name is the model's
    # answer. Empty: answers are texts
    "data.date": Field("2024-07-26", str, "a day as YYYY-MM-DD", _is_date),  # current day for chat templates that
    # show one, such as Llama 3.2's. It is fixed, so that a config gives the same tokens on any day
    "data.end": text(also="eos_token"),  # token that ends an answer without a chat template; empty: the
    # tokenizer's end-of-text token
    "data.add_tokens": several((), WORD, also="new_tokens add_special_tokens additional_special_tokens tokens_to_add"),
    # texts that become one token each, such as <|user|>: no other token is made of their letters, and answers show
    # them. Rows that the tables of embeddings lack are added, and those of these tokens are trained beside LoRA or DoRA
    "data.pad_vocabulary_to": whole(0, 0, also="pad_to_multiple_of resize_token_embeddings_to_32x"),  # the tables of
    # embeddings get as many rows as the next multiple of this number; 0: they are not padded
    "data.train_on": choice("assistant", "last", "all", also="train_on_inputs"),  # which tokens of a conversation are
    # trained: every answer, the last answer, or every token
    "data.max_length": whole(512, 1, also="max_seq_length max_seq_len sequence_len cutoff_len max_len block_size"),
    # most tokens of a row, or of a packed row; at most the model's positions
    "data.long": choice("truncate", "drop", "raise", also="truncation"),  # what happens to rows above max_length
    "data.packing": switch(False, also="sample_packing pack"),  # put several rows into one, kept apart by segment ids
    "data.buckets": whole(4, 1),  # number of padded lengths that unpacked batches may have; each is compiled once
    "data.workers": whole(2, 1, also="dataloader_num_workers num_workers"),  # number of threads that build batches
    # ahead of the device
    "data.streaming": switch(False),  # pass rows through files on disk, chunk by chunk: for sets larger than memory
    "data.domain_report": text(),  # general text, named as in data.train, that `ftjax data inspect` compares the
    # training rows with: tokens a word, coverage of the vocabulary, new words; empty: none
    "data.processes": whole(0, 0, also="dataset_num_proc num_proc preprocessing_num_workers"),  # number of processes
    # that render and tokenise; 0: by the number of rows and cores
    "data.cache": text("auto", also="cache_dir"),  # folder of tokenised rows, and of what task.reference computes of
    # them; auto: ~/.cache/ftjax/data; empty: none
    "data.cache_size": whole(20_000_000_000, 0, 2**63 - 1),  # most bytes of `cache`; the least recently used files are
    # deleted first
    #
    # ---- cleaning of rows
    "data.clean.parts": several(("train",), choice("train", "validation", "test")),  # parts that are cleaned; published
    # validation and test sets are best left as they are
    "data.clean.unicode": choice("", "NFC", "NFKC"),  # Unicode normal form of all texts; empty: unchanged
    "data.clean.mojibake": switch(False),  # repair text that was decoded with the wrong encoding
    "data.clean.whitespace": switch(False),  # strip both ends, replace several blanks by one, keep at most one empty
    # line; indentation stays
    "data.clean.control": switch(False),  # remove control and zero-width characters except line ends and tabs
    "data.clean.exact": switch(False),  # drop rows whose text repeats an earlier one, except for case, punctuation and
    # white space
    "data.clean.near": number(0.0, 0, 1),  # drop rows at least this similar to an earlier one that stays (Jaccard of
    # word 3-grams); 0: off
    "data.clean.columns": several((), WORD),  # columns by which duplicates are found; empty: the prompt and the answer,
    # i.e. all text that the model reads or is trained to write
    "data.clean.empty": switch(False),  # drop rows that training would refuse because of an empty answer, a missing
    # cell or a missing label; if the form is unknown, rows without any text in `columns`
    "data.clean.min_chars": whole(0, 0),  # drop rows with an answer of fewer characters
    "data.clean.max_chars": whole(0, 0),  # drop rows with more characters in all; 0: off
    "data.clean.max_ratio": number(0.0, 0),  # drop rows whose answer is more than this many times longer than the
    # prompt; 0: off
    "data.clean.personal": choice("keep", "mask", "drop"),  # what happens to e-mail addresses, phone and card numbers
    # and keys: keep them, mask them, or drop the row
    "data.clean.drop": several((), WORD),  # regular expressions: rows with a match in any text are dropped; ^ and $ are
    # the ends of a line
    #
    # ---- synthetic rows
    "data.canaries": whole(0, 0),  # number of canaries, rows of random words, of which about half are planted in the
    # training rows, so that `ftjax audit` can measure what the model keeps of them; 0: off
    "data.augment.copies": whole(0, 0),  # number of synthetic rows made of each training row, by ops and function in
    # turn; 0: off
    "data.augment.ops": several(("word_dropout", "word_swap", "char_noise", "case"), WORD),  # operations that make
    # synthetic rows: rows of ftjax.data.augment.OPS
    "data.augment.rate": number(0.1, 0, 1),  # share of a text's words or letters that an operation changes; at least
    # one
    "data.augment.columns": several((), WORD),  # columns whose text the operations change. They must be named, because
    # an answer or a label must never be changed
    "data.augment.prompts": several((), WORD),  # further templates like data.prompt: each makes one more synthetic row
    # of every row
    "data.augment.function": text(),  # your own operation, "file.py:name": name(row: dict, rng: numpy Generator) ->
    # row, or None for no row
    #
    # ---- the task
    "task.kind": choice(*tasks.FILES, also="task_type problem_type")._replace(
        holds=tasks.known
    ),  # causal: the next token of any text; preference: which of two answers to a prompt is better; policy: answers
    # that the model writes itself and that earn rewards; gkd: as causal, with a teacher (task.reference) also for
    # answers that the model writes itself; classify: one label for a text; multilabel: any number of
    # labels for a text; regress: one or more numbers for a text; reward: how good an answer is, learned from pairs of
    # answers; tag: a label for each word, such as named entities; span: where a text holds the answer to a question;
    # masked: hidden tokens of plain text, to adapt an encoder; embed: vectors that are close for texts that belong
    # together
    "task.text": text(also="text_column text_field dataset_text_field"),  # column with the text; tag: with the list of
    # words; span: with the question; embed: with the first text. Empty: the first of the usual names, `sentence`,
    # `text`, ...
    "task.pair": text(also="text_pair"),  # column with a second text, read together with the first; span: with the text
    # that holds the answer; embed: with the text that belongs to the first
    "task.labels": several((), NAME, also="label_names id2label label_list num_labels"),  # names of the labels in the
    # order of their ids, or of the numbers of regress; empty: those in the model's files if it has a head for labels,
    # otherwise those of the training rows
    "task.labels_as": choice("auto", "names", "ids"),  # whether label cells are names or ids. auto: ids if
    # task.labels or the model's files have the names and all cells are whole numbers, otherwise names. A run whose
    # names came from its rows records `names`, so that numbers in other rows are not read as ids
    "task.class_weights": Field(
        (),
        tuple,
        'a tuple of one number, 0 or more, for each label, or ("balanced",)',
        lambda w: w == ("balanced",) or all(type(n) in (int, float) and 0 <= n < math.inf for n in w),
    ),  # weight of each label in the loss, in the order of their ids; ("balanced",): inversely to the frequency of a
    # label, so that all labels have the same total weight
    "task.balanced": switch(False),  # draw rare labels more often, so that each label has the same number of rows in an
    # epoch
    "task.focal": number(0.0, 0, also="focal_loss_gamma"),  # γ of the focal loss, which down-weights examples that the
    # model already classifies confidently; 0: off
    "task.loss": choice(
        "sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "kto", "orpo", "simpo", "cpo", also="loss_type pref_loss"
    ),  # preference: the loss of a pair. sigmoid: DPO; train.label_smoothing makes it conservative DPO; robust: DPO
    # that expects train.label_smoothing of the pairs to be wrong; sigmoid_norm: DPO of mean log-probabilities; kto: of
    # single answers with a label, or of both answers of a pair; orpo, simpo and cpo need no reference, the others
    # compare with task.reference
    "task.reference": text(also="ref_model ref_model_name_or_path teacher_model_name_or_path"),  # a second model: a
    # directory, hub name, adapter or run folder. causal, gkd, and encoders with distil.hidden: the teacher, see
    # `distil`; empty: none. preference: the model that a loss compares with; empty: the base model without its adapter,
    # in the same parameters, at every step. Its values are computed once before the first step, but those of gkd and
    # hidden states at every step
    "task.desirable_weight": number(1.0, 0, also="kto_chosen_weight"),  # kto: weight of desirable answers in the loss
    "task.undesirable_weight": number(1.0, 0, also="kto_rejected_weight"),  # kto: weight of the other answers
    "task.beta": number(0.1, 0, also="pref_beta dpo_beta kl_coef"),  # preference: factor of the log-probabilities; in
    # DPO, how strongly the model is held to the base. policy: weight of the distance (KL) from the base; 0: none
    "task.margin": number(0.0, 0, also="simpo_gamma gamma"),  # preference: by how much simpo wants the reward of the
    # chosen answer to be greater
    "task.nll_weight": number(0.0, 0, also="rpo_alpha cpo_alpha pref_ftx"),  # preference: weight of the mean negative
    # log-probability of the chosen answer, added to the loss; orpo always has 1
    "task.policy": choice("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", also="advantage_estimator"),
    # policy: the loss. grpo: rewards normalised in each group; dr_grpo: neither by their spread nor by the length of an
    # answer; dapo: grpo as a mean over all tokens; gspo: ratios of whole answers; rloo: the other answers of the group
    # are the baseline; reinforce_pp: rewards normalised over the batch
    "task.rewards": several((), WORD, also="reward_funcs reward_functions"),  # policy: what an answer is worth, the
    # weighted sum of these: metrics that `ftjax metrics` lists, or "file.py:name" of your own functions, which are
    # called as those of evaluate.metrics are, or directories of reward models (task.kind reward)
    "task.environment": text(also="environment_factory env"),  # policy: "file.py:Name" of a class of your own that
    # answers the model for several turns and gives the rewards, instead of task.rewards; see docs/policy.md. Empty:
    # one answer to each prompt
    "task.reward_weights": several((), number(1.0)),  # policy: weight of each of task.rewards; empty: 1 each
    "task.updates": whole(1, 1, also="num_iterations ppo_epochs"),  # policy: number of steps that the same answers are
    # used for. A run validates and saves only after the last of them
    "task.clip": number(0.2, above=0, below=1, also="cliprange epsilon_low"),  # policy: how far below 1 the ratio of
    # new to old probability still counts. gspo needs much smaller ones, such as 3e-4
    "task.clip_high": number(None, above=0, also="epsilon_high"),  # policy: how far above 1 it counts; None: as
    # task.clip. DAPO takes 0.28
    "task.threshold": choice("", "f1", "mcc", "balanced_accuracy", "accuracy"),  # score by which decision thresholds
    # are chosen on validation rows, for two labels or multilabel; empty: the threshold is 0.5
    "task.group": text(),  # column by whose values scores are reported separately
    "task.subwords": choice("first", "all", also="label_all_tokens"),  # tag: which tokens of a word carry its tag; the
    # first one predicts
    "task.stride": whole(128, 0, also="doc_stride"),  # span: number of tokens that successive windows of a long text
    # share
    "task.max_answer": whole(30, 1, also="max_answer_length"),  # span: most tokens of a predicted answer
    "task.no_answer": switch(False, also="version_2_with_negative"),  # span: some questions have no answer (SQuAD
    # v2.0), and an empty answer may be predicted
    "task.mask_rate": number(0.15, above=0, most=1, also="mlm_probability"),  # masked: share of tokens that are hidden
    "task.whole_words": switch(False, also="whole_word_mask wwm"),  # masked: hide all tokens of a word, or none
    "task.pool": choice("auto", "mean", "cls", also="pooling pooling_mode"),  # how a text becomes one vector, which a
    # head over labels reads: mean of its tokens' states, or the state of the first token; auto: the mean for embed, and
    # for labels the vector that the model's class uses
    "task.temperature": number(0.05, above=0),  # embed: number that cosines are divided by; a low temperature gives
    # more weight to the most similar wrong texts
    #
    # ---- distillation from the teacher task.reference, see docs/distillation.md
    "distil.beta": number(0.0, 0, 1),  # the distance to the teacher. 0: forward KL, KL(teacher | student); 1: reverse
    # KL; between: generalised Jensen-Shannon divergence
    "distil.temperature": number(1.0, above=0),  # divisor of the logits of both models in this distance
    "distil.top_k": whole(64, 0),  # number of tokens whose teacher's probabilities are kept for each trained token; all
    # others count as one. 0: all, which takes the size of the vocabulary times 4 bytes of disk for each trained token
    "distil.labels": number(0.5, 0, 1),  # share of the loss of the labels in the loss; the rest is the distance. 0: the
    # distance alone
    "distil.hidden": number(0.0, 0),  # encoders: weight of the distance of the student's hidden states from the
    # teacher's in the loss; 0: none
    "distil.layers": several(
        (), several((), whole(0, 0), "a pair (layer of the student, layer of the teacher)", lambda p: len(p) == 2)
    ),  # pairs of layers whose states are compared, 0: the embeddings, n: the n-th block. Empty: all of the student,
    # each with the teacher's layer at the same share of its depth
    "distil.width": whole(0, 0),  # width of the teacher's hidden states; a run fills it in
    #
    # ---- answers that task.kind policy or gkd draws (see also `generate`)
    "rollout.own": number(0.5, 0, 1, also="lmbda"),  # gkd: share of the steps whose answers the model writes itself;
    # the other steps have those of the rows
    "rollout.group": whole(8, 2, also="num_generations"),  # policy: number of answers to each prompt. train.batch_size
    # counts answers, and must be a multiple
    "rollout.temperature": number(1.0, above=0),  # temperature of the draws
    "rollout.top_k": whole(0, 0),  # draw from the k most probable tokens only; 0: from all
    "rollout.top_p": number(1.0, above=0, most=1),  # draw from the most probable tokens that together reach this
    # probability; 1: from all
    "rollout.turns": whole(8, 1, also="max_turns max_tool_calling_iterations"),  # most turns of the model in an episode
    # of task.environment, each of generate.max_new_tokens tokens at most; data.max_length bounds the whole text
    "rollout.resample": whole(0, 0),  # how often a group is drawn again whose answers all have the same reward, from
    # which nothing can be learnt
    #
    # ---- how it is trained
    "optim.name": choice("adamw", "adafactor", "lion", "sgd", "muon", also="optimizer optim_type"),  # the optimizer;
    # muon: Muon on the matrices of the blocks, AdamW on all other parameters
    "optim.lr": number(None, above=0, also="learning_rate peak_lr max_lr"),  # peak learning rate; None: the method's
    # default
    "optim.schedule": choice("cosine", "constant", "linear", "wsd", also="lr_scheduler_type lr_scheduler lr_schedule"),
    # course of the learning rate; wsd: warm-up, stable, decay
    "optim.warmup": number(0.03, 0, also="warmup_ratio warmup_steps num_warmup_steps"),  # steps in which the learning
    # rate rises from 0, or a share of all steps if below 1
    "optim.decay": number(0.2, 0, 1),  # wsd: share of all steps in which the learning rate falls at the end
    "optim.final_lr": number(0.0, 0, 1, also="min_lr min_lr_ratio cosine_min_lr_ratio"),  # learning rate at the end of
    # the schedule, as a share of the peak
    "optim.weight_decay": number(0.0, 0, also="wd"),  # decoupled weight decay, of matrices only, not of norms and
    # biases
    "optim.start_l2": number(0.0, 0),  # weight of the squared distance of the trained parameters to those before the
    # first step in the loss (L2-SP), against forgetting; 0: none
    "optim.ewc": number(0.0, 0),  # weight of elastic weight consolidation: half the squared distance, each parameter
    # weighted by the diagonal of the Fisher information of the rows of earlier stages; 0: none
    "optim.b1": number(0.9, 0, below=1, also="adam_beta1 beta1 momentum"),  # decay of the first moment per step; the
    # momentum of sgd too
    "optim.b2": number(0.999, 0, below=1, also="adam_beta2 beta2"),  # decay of the second moment per step
    "optim.eps": number(1e-8, above=0, also="adam_epsilon epsilon"),  # number added to the root of the second moment
    "optim.clip_norm": number(1.0, 0, also="max_grad_norm gradient_clipping grad_clip"),  # largest global norm of the
    # gradient; 0: no clipping
    "optim.layer_decay": number(1.0, above=0, most=1, also="llrd layerwise_lr_decay"),  # learning rate of each layer as
    # a share of the one above it, embeddings counting as one below the lowest; 1: all alike. 0.7 to 0.95 keep low
    # layers near their pretrained weights
    "optim.lora_plus": number(1.0, above=0, also="loraplus_lr_ratio"),  # learning rate of LoRA's B as a multiple of A's
    "train.batch_size": whole(
        None, 1, also="per_device_train_batch_size train_batch_size global_batch_size micro_batch_size"
    ),  # rows (packed rows when packing) of a step, over all devices and microbatches; None: the method's default
    "train.accumulate": whole(1, 1, also="gradient_accumulation_steps grad_accum"),  # number of microbatches of a step;
    # batch_size must be a multiple of it
    "train.epochs": number(3.0, above=0, most=1_000_000, also="num_train_epochs num_epochs"),  # number of passes over
    # the training rows; ignored where steps is set
    "train.steps": whole(0, 0, also="max_steps total_steps num_train_steps"),  # number of optimizer steps; 0: by epochs
    "train.label_smoothing": number(0.0, 0, below=1, also="label_smoothing_factor"),  # share of the target's
    # probability that is spread over all tokens or labels
    "train.dropout": number(None, 0, below=1, also="hidden_dropout resid_pdrop"),  # dropout on residuals, embeddings
    # and attention; None: none, as LLaMA; GPT-2 had 0.1
    "train.neftune": number(0.0, 0, also="neftune_noise_alpha noisy_embedding_alpha"),  # alpha of NEFTune: noise on
    # embeddings in training, within alpha / sqrt(tokens x width); 0: off. 5 to 15 improve answers of chat models (Jain
    # et al. 2023, NEFTune)
    "train.balance": number(None, 0, also="router_aux_loss_coef moe_aux_loss_coeff"),  # weight of the load-balance loss
    # of a mixture of experts (Fedus et al. 2022); None: router_aux_loss_coef of the model's config.json if its
    # output_router_logits is true, as in transformers, else 0. With train.accumulate it costs a further forward pass
    "train.router_z": number(0.0, 0, also="router_z_loss_coef moe_z_loss_coeff"),  # weight of the z-loss, which keeps
    # the logits of routers small; 0: off. 0.001 is that of Zoph et al. 2022
    "train.mixing_temperature": several(
        (1.0, 1.0), number(1.0, 0.001, 1000), "a tuple of two numbers from 0.001 to 1,000", lambda ends: len(ends) == 2
    ),  # temperature of a mixture of tokens at the first and at the last step of training, by equal factors between
    # them; towards 0 each expert takes one token of a group
    "train.cache_features": switch(True),  # compute the states that a head reads only once, and keep them in a file of
    # run_dir while the run lasts, where only the head is trained for more than an epoch
    "train.ema": number(0.0, 0, below=1, also="ema_decay"),  # decay per step of an exponential moving average of the
    # trained parameters, which is validated and exported in their place; 0: off
    "train.deterministic": switch(True, also="full_determinism"),  # on a GPU, only take operations that compute the
    # same bits in each run; False trains faster (docs/performance.md). CPUs and TPUs compute the same bits anyway
    "train.on_bad_step": choice("stop", "skip", "rewind"),  # what happens at a step whose loss or gradient norm is NaN
    # or infinite, or whose loss is a spike: stop ends the run; skip changes neither parameters nor the optimizer's
    # state; rewind takes those of the last checkpoint and goes on with the batch after the bad one. Both tell the rows
    # of the batch, and end the run after 10 such steps in a row
    "train.spike": number(0.0, 0),  # a loss above this multiple of the median of the last 50 losses is a spike, see
    # on_bad_step; 0: off. 3 to 10 leave the usual scatter of losses alone
    "train.log_every": whole(10, 1, also="logging_steps log_interval"),  # steps between lines of metrics.jsonl
    "train.eval_every": whole(0, 0, also="eval_steps eval_interval"),  # steps between validations; 0: ten times a run,
    # or fewer, see evaluate.rows
    "train.select": text("val_loss", empty=False, also="metric_for_best_model"),
    # score that the best checkpoint is chosen by, on validation rows: val_loss, or a score of the task, such as mcc,
    # f1_macro or pearson; causal: accuracy, or a metric of generated answers, such as rouge_l; of a mixture also
    # val_mean_loss or val_worst_loss, the mean and the greatest loss of its sources
    "train.patience": whole(0, 0, also="early_stopping_patience"),  # number of validations without a better
    # `train.select` after which training stops; 0: never
    "train.save_every": whole(0, 0, also="save_steps save_interval"),  # steps between checkpoints, beside each best
    # one; 0: at every validation
    "train.keep": whole(1, 1, also="save_total_limit"),  # number of latest checkpoints kept beside the best one
    #
    # ---- private training, see docs/privacy.md
    "privacy.epsilon": number(0.0, 0, also="target_epsilon"),  # train with differential privacy, so that the trained
    # parameters tell at most this much about whether an example was in the training rows; 0: off
    "privacy.delta": number(1e-5, above=0, below=1, also="target_delta"),  # probability with which the guarantee may
    # fail; it must be below 1 / number of examples
    "privacy.clip": number(1.0, above=0, also="l2_norm_clip max_per_sample_grad_norm per_sample_max_grad_norm"),
    # largest norm of the gradient of one example's mean loss; longer gradients are scaled down to it
    "privacy.unit": text(),  # column that names the person a row is about: the guarantee then holds for all rows of a
    # person together, who are drawn and clipped as one, and train.batch_size counts persons; empty: for each row
    "privacy.unit_most": whole(0, 0),  # train on at most this many rows of each person, drawn at random once; 0: on all
    "privacy.unit_rows": whole(1, 1),  # most rows of a person; filled in
    "privacy.accountant": choice("rdp", "pld"),  # how epsilon is computed: rdp: by Rényi divergences, in a moment; pld:
    # by privacy loss distributions, which need less noise for the same epsilon and take seconds
    "privacy.noise": number(None, above=0, also="noise_multiplier"),  # standard deviation of the noise on the sum of
    # clipped gradients, as a multiple of privacy.clip; None: the least that keeps to privacy.epsilon
    #
    # ---- how devices share the work
    "mesh.data": whole(-1, -1),  # devices that share the rows of a batch, each with all weights; -1: all remaining
    # devices, or on a CPU as many as make the run faster; 0: all axes are chosen for the devices
    # and the model, and the reason is printed
    "mesh.fsdp": _axis(),  # devices that share the rows and also the weights, which are gathered for use
    "mesh.expert": _axis(),  # devices that share the rows and deal the experts of a mixture among themselves
    "mesh.sequence": _axis(),  # devices that share the tokens of a row, for rows too long for one device; weights are
    # split as by fsdp
    "mesh.tensor": _axis(),  # devices that share heads, feed-forward and vocabulary
    #
    # ---- evaluation
    "evaluate.batch_size": whole(0, 0, also="per_device_eval_batch_size eval_batch_size"),  # rows of an evaluation
    # step; 0: train.batch_size
    "evaluate.rows": whole(0, 0, also="max_eval_samples"),  # validation rows used during training, the first of each
    # source; 0: all; if train.eval_every is 0 too, validation uses so few rows and is so rare that it takes at most
    # about a fifth of the training
    "evaluate.compare": switch(False),  # generate on held-out rows before and after training, score the answers, and
    # write results.json
    "evaluate.compare_rows": whole(0, 0),  # distinct held-out prompts to generate for; 0: all
    "evaluate.compare_on": choice("test", "validation"),  # part whose prompts `evaluate.compare` uses
    "evaluate.metrics": several(("rouge_l",), WORD, also="compute_metrics eval_metrics"),  # metrics of generated
    # answers, which `ftjax metrics` lists; or "file.py:name" of a function of your own
    "evaluate.words": text(),  # column with the words that an answer should use, for the metric `coverage`
    "evaluate.passage": text(),  # column with the text that should support the answers, for the metric `unsupported`;
    # empty: the references
    "evaluate.forgetting": text(),  # text file; the change of the loss on it shows how much the model has forgotten
    "evaluate.samples": whole(5, 0),  # number of generations shown side by side
    #
    # ---- ftjax compare
    "compare.contenders": several(
        ("zero-shot", "few-shot", {"name": "tuned"}), Field("", str | dict, "a text or a dict")
    ),  # the contenders; the others are compared with the first. Each is a prompt of ftjax.verdict.baselines.PROMPTS
    # for the base model; `majority`: the most common label; a run folder, adapter, model directory or hub name; or a
    # dict: its "name", any field of the config that it is trained with, such as "tuning.method", and "prompt" (of
    # PROMPTS), "shots" and "model" (a path) where they differ
    "compare.metric": text(),  # metric that the verdict is about; empty: the first of evaluate.metrics, or the task's
    # accuracy
    "compare.seeds": whole(3, 1),  # number of runs of each trained contender, and of draws of examples, from
    # config.seed on
    "compare.shots": whole(3, 0),  # number of examples before a question
    "compare.between": text("\n\n"),  # text after each example if rows are not conversations; it also ends an
    # answer
    "compare.documents": text(),  # rows, or a folder of text files, whose passages `retrieval` puts before a question
    "compare.passages": whole(2, 1),  # number of passages that a question gets
    "compare.passage_words": whole(80, 1),  # most words of a passage
    "compare.context": Field(
        "Context:\n{passages}\n\n", str, "a text with {passages} in it once", lambda v: v.count("{passages}") == 1
    ),  # text around the passages before a question
    "compare.curve": several((), COUNT),  # numbers of training rows, (500, 1000, 2000, ...), on which contenders are
    # also trained, for learning curves and a prediction of the gain from more rows
    "compare.curve_shots": several((), COUNT),  # classify: numbers of training rows of each label, like compare.curve
    "compare.curve_of": several((), WORD),  # names of the contenders with a learning curve; empty: all that are trained
    "compare.curve_steps": whole(0, 0),  # least number of optimizer steps of each of these runs, where train.steps is 0
    "compare.curve_to": several((), COUNT),  # numbers of rows, also more than there are, for which the law predicts
    "compare.ballots": whole(0, 0),  # number of questions whose answers are written to a file for blind pairwise
    # rating; 0: none
    "compare.divergence": whole(64, 0),  # number of questions on whose answers a tuned model is compared with its base,
    # token by token; 0: none
    "compare.unsafe": text(),  # rows with a `prompt` or `messages` that should be refused
    "compare.harmless": text(),  # rows with a `prompt` or `messages` that should not be refused
    #
    # ---- prices for ftjax compare, in dollars; without any, costs are in seconds
    "compare.device_hour": number(0.0, 0),  # price of an hour of this machine's devices
    "compare.training_hour": number(0.0, 0),  # price of an hour of training at a service, which bills the steps
    # alone; 0: device_hour for the whole run
    "compare.training_tokens": number(0.0, 0),  # price of a million trained tokens
    "compare.hosting_hour": number(0.0, 0),  # price of an hour of an endpoint with a model of your own, at any
    # load
    "compare.tuned_in": number(0.0, 0),  # price of a million tokens of prompts, at an endpoint with a model of your own
    "compare.tuned_out": number(0.0, 0),  # price of a million tokens of answers there
    "compare.tokens_in": number(0.0, 0),  # price of a million tokens of prompts, at a hosted endpoint of the base
    "compare.tokens_out": number(0.0, 0),  # price of a million tokens of answers there
    "compare.storage": number(0.0, 0),  # price of storing a gigabyte of trained parameters for a month
    "compare.requests": whole(0, 0),  # number of requests a month for which costs are reported; 0: none
    #
    # ---- generation
    "generate.max_new_tokens": whole(64, 1, also="max_tokens max_completion_length"),  # most tokens of an answer
    "generate.temperature": number(0.0, 0),  # temperature of sampling; 0: greedy
    "generate.top_k": whole(0, 0),  # sample from the k most probable tokens only; 0: from all
    "generate.top_p": number(1.0, above=0, most=1),  # sample from the most probable tokens that together reach this
    # probability; 1: from all
    "generate.batch_size": whole(32, 1),  # number of prompts answered at once
    "generate.weights": choice("model", "bfloat16"),  # the parameters that generate answers: unchanged, or with float32
    # kernels rounded to bfloat16, which a CPU reads in half the time; the rest stays in float32
    "generate.best_of": whole(1, 1),  # number of answers that are sampled to each prompt, of which generate.reward
    # chooses one
    "generate.reward": text(also="reward_model reward_model_path"),  # the reward model that chooses: a run folder of
    # task.kind reward, or a model directory with a head of one label
    "generate.stop": several((), WORD, also="stop_strings stop_words"),  # strings of one token each that end an answer,
    # in addition to the model's end tokens
    #
    # ---- the exported files
    "export.formats": several(("auto",), choice("auto", "adapter", "merged", "full")),  # what is written to run_dir at
    # the end; auto: the adapter where there is one
    "export.checkpoint": choice("best", "last", also="load_best_model_at_end"),  # checkpoint that is written
    "export.dtype": choice("auto", "float32", "bfloat16", "float16"),  # dtype of the written files; auto: the base
    # model's
    "export.shard_size": whole(5_000_000_000, 1, 2**63 - 1, also="max_shard_size"),  # most bytes of a safetensors file
    #
    # ---- logs
    "log.tensorboard": switch(True),  # write event files to run_dir/tensorboard
    "log.wandb": text(also="wandb_project report_to"),  # Weights & Biases project; needs the extra `wandb`; empty: off
    "log.profile": Field(
        "",
        str,
        "FIRST:LAST, numbers of two steps from 1 on, such as 10:13",
        lambda v: not v or bool((n := re.fullmatch(r"(\d{1,9}):(\d{1,9})", v)) and 1 <= int(n[1]) <= int(n[2])),
    ),  # steps FIRST:LAST, both included, of which an XProf trace and a summary of their time are written to
    # run_dir; empty: none
    "log.compilation_cache": switch(True),  # reuse compiled programs across runs (~/.cache/ftjax/xla)
}


class Config(ConfigDict):
    """A config or one of its groups, with short errors that lead from a wrong key to the right one."""

    def __setitem__(self, key, value):
        if self.is_locked and key not in self:
            raise FtjaxError(f"{key}: no such key{_right_key(key) or '; this group has ' + ', '.join(self)}")
        try:
            super().__setitem__(key, value)
        except (TypeError, OverflowError):
            raise FtjaxError(f"{key}: expected {self.get_type(key).__name__}; found {_shown(value)}") from None


def default() -> ConfigDict:
    """A config in which every field of `FIELDS` has its default."""
    config = Config()
    for key, field in FIELDS.items():
        *groups, last = key.split(".")
        group = config
        for name in groups:
            if name not in group:
                group[name] = Config()
            group = group[name]
        group[last] = placeholder(field.kind) if field.default is None else _tuples(field.default)
    return config.lock()


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read a config, apply overrides and validate it.

    Args:
        path: A `.py` file with `get_config()`, or a `.json` file that a run wrote.
        overrides: Texts `dotted.key=VALUE`. For a field that is a text, VALUE is the text itself, in which \\n and \\t
            are line end and tab, or a quoted Python string. For other fields it is a Python literal.

    Returns:
        The config.

    Raises:
        FtjaxError: It names the file, the key, what was expected and the nearest key. It is also raised for a .json
            file that names code (`file.py:function`) which no override names, because such a file may come from anyone.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        there = [str(p) for p in path.parent.glob("*.py")] if os.path.isdir(path.parent) else []
        raise FtjaxError(f"--config: {path} is not a file{nearest(str(path), there)}")
    if path.suffix not in (".py", ".json"):
        raise FtjaxError(f"--config: {path}: expected a .py file with get_config(), or the run.json of a run")
    config = recorded(path) if path.suffix == ".json" else _python(path)
    from_record = user_code.not_named_by(overrides, config.to_dict()) if path.suffix == ".json" else []
    override(config, overrides)
    if left := [found for found in from_record if found in set(user_code.named(config.to_dict()))]:
        raise FtjaxError(
            f"--config: {path} names code, {user_code.listed(left)}, and code in a .json file is not run unless the "
            f"command line names it too. If you trust it, add --config.{left[0][0]}={left[0][1]}; if not, set that "
            "field to another value"
        )
    return config


def recorded(path: str | Path) -> ConfigDict:
    """The config in a .json file that a run wrote. Its functions (`file.py:function`) must not be run unless the user
    names them too."""
    content = parse_json(read_text(Path(path)), path)
    content = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise FtjaxError(f"{path}: expected the fields of a config as a JSON object; found {_shown(content)}")
    return from_dict(content, f"{path}: ")


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Apply `dotted.key=VALUE` texts to a config in place, and validate it. Raises FtjaxError as `load` does."""
    method, keys = config.tuning.method, set()
    for text in overrides:
        key, equals, value = text.partition("=")
        where = f"--config.{key}"
        if not equals:
            raise FtjaxError(f"{where}: expected {where}=VALUE")
        _set(config, key, _field(key, where).read(value, where), where)
        keys.add(key)
    validate(config)
    if config.tuning.method != method and config.optim.lr is not None and "optim.lr" not in keys:
        print(
            f"ftjax: warning: optim.lr={config.optim.lr:g} was chosen for tuning.method={method}, and the method is "
            f"{config.tuning.method} here; optim.lr=None takes this method's default",
            file=sys.stderr,
        )


def _python(path: Path) -> ConfigDict:
    get_config = user_code.load(f"{path}:get_config", "--config")
    try:
        config = get_config()
    except user_code.ERRORS as error:
        raise FtjaxError(user_code.failed(f"{path}:get_config", "--config", error)) from error
    if not isinstance(config, ConfigDict):
        raise FtjaxError(f"{path}: get_config() returned {type(config).__name__}; start from ftjax.config.default()")
    if missing := FIELDS.keys() - flat(config).keys():
        raise FtjaxError(f"{path}: {min(missing)}: the config lacks this field; start from ftjax.config.default()")
    return config


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that its documentation names
        return {"true": True, "false": False}.get(text, unescaped(text))


def unescaped(text: str) -> str:
    """A text from the command line. A shell hands over a line end and a tab as two characters each, `\\n` and `\\t`; in
    a prompt, a template and a pattern they mean one."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _shown(value) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        shown = f"{type(value).__name__} of great length"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _right_key(key: str) -> str:
    """` (did you mean "optim.lr"?)` for a key that is misspelt, lies in another group or is called otherwise here."""
    keys = similar(key)
    return f" (did you mean {' or '.join(json.dumps(k) for k in keys)}?)" if keys else nearest(key, FIELDS)


def similar(key: str) -> list[str]:
    """The keys that a wrong key may mean: first those with this name in other projects, last those with a similar
    spelling."""
    group, _, last = str(key).lower().replace("-", "_").rpartition(".")
    ends = {k: k.rpartition(".")[2] for k in FIELDS}
    near = difflib.get_close_matches(last, ends.values(), n=1, cutoff=0.6)
    for fits in (lambda k: last in FIELDS[k].also.split(), lambda k: ends[k] == last, lambda k: ends[k] in near):
        if found := [k for k in FIELDS if fits(k)]:
            return [k for k in found if k == f"{group}.{ends[k]}"] or found
    return []


def _field(key: str, where: str) -> Field:
    if key not in FIELDS:
        within = [k for k in FIELDS if k.startswith(f"{key}.")]
        if within:
            raise FtjaxError(f"{where} is a group of fields; set one of its keys: {', '.join(within)}")
        raise FtjaxError(f"{where}: no such key{_right_key(key)}")
    return FIELDS[key]


def _set(config, key: str, value, where: str) -> None:
    value = _field(key, where).check(value, where)
    *groups, last = key.split(".")
    for name in groups:
        config = config[name]
    config[last] = value


def flat(config: ConfigDict) -> dict[str, Any]:
    """{"optim.lr": value, ...}: all fields by dotted key. Raises FtjaxError if `config` is not a config."""
    if not isinstance(config, ConfigDict):
        pass_this = "ftjax.config.default(), whose fields can be set: config.optim.lr = 1e-4"
        if isinstance(config, str | Path):
            pass_this = f"ftjax.config.load({str(config)!r}), which reads the config in a file"
        elif isinstance(config, dict):
            pass_this = 'ftjax.config.from_dict(...), which takes {"optim.lr": 1e-4} and {"optim": {"lr": 1e-4}}'
        raise FtjaxError(f"expected a config; found {_shown(config)}. Pass {pass_this}")
    out: dict[str, Any] = {}
    for key, value in config.items(preserve_field_references=False):
        if isinstance(value, ConfigDict):
            out |= {f"{key}.{k}": v for k, v in flat(value).items()}
        else:
            out[key] = value
    return out


def from_dict(values: dict, source: str = "") -> ConfigDict:
    """A config from a dict, such as `config.to_dict()` returns or JSON holds.

    Args:
        values: Nested like the config, or by dotted keys. A field that is missing gets its default.
        source: Where the values come from, for error messages; it ends in a blank.

    Returns:
        The config.

    Raises:
        FtjaxError: It names the source, the key and what was expected, for an unknown key or a wrong value.
    """
    config = default()

    def fill(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict) and f"{prefix}{key}" not in FIELDS:
                fill(value, f"{prefix}{key}.")
            else:
                _set(config, f"{prefix}{key}", value, f"{source}{prefix}{key}")

    fill(values, "")
    return config


def copy(config: ConfigDict) -> ConfigDict:
    """A copy that may be changed freely. Raises FtjaxError if `config` is not a config, or has an unknown key or a
    wrong value."""
    return from_dict(flat(config))


_POLICY = ("policy", "clip", "clip_high", "updates", "environment", "reward_weights")
_ANSWERED = ("causal", "preference", "policy", "gkd", "reward")  # tasks whose rows are texts by data.form
_LABELLED = ("classify", "multilabel", "regress", "tag", "span", "masked", "embed")
# (fields, the field by which they have an effect, its values that give them one; empty: all but 0, False and "").
ONLY: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    ((*(f"task.{name}" for name in _POLICY), "rollout.group", "rollout.resample"), "task.kind", ("policy",)),
    (("rollout.turns",), "task.environment", ()),
    (("rollout.own",), "task.kind", ("gkd",)),
    (("rollout.temperature", "rollout.top_k", "rollout.top_p"), "task.kind", ("policy", "gkd")),
    (("task.beta",), "task.kind", ("preference", "policy")),
    (("task.subwords",), "task.kind", ("tag",)),
    (("task.stride", "task.max_answer", "task.no_answer"), "task.kind", ("span",)),
    (("task.mask_rate", "task.whole_words"), "task.kind", ("masked",)),
    (("task.temperature",), "task.kind", ("embed",)),
    (("task.text", "task.pair"), "task.kind", _LABELLED),
    (("task.pool",), "task.kind", ("classify", "multilabel", "regress", "embed", "reward")),
    (("data.form", "data.prompt", "data.completion", "data.system"), "task.kind", _ANSWERED),
    (("data.train_on",), "task.kind", ("causal", "preference", "gkd")),
    (("optim.decay",), "optim.schedule", ("wsd",)),
    (("optim.final_lr",), "optim.schedule", ("cosine", "linear", "wsd")),
    (("optim.b1",), "optim.name", ("adamw", "lion", "sgd", "muon")),
    (("optim.b2",), "optim.name", ("adamw", "lion", "muon")),
    (("optim.eps",), "optim.name", ("adamw", "muon")),
    (("optim.lora_plus",), "tuning.method", ("lora", "dora")),
    (("distil.beta", "distil.temperature", "distil.top_k", "distil.labels"), "task.reference", ()),
    (("privacy.clip", "privacy.unit", "privacy.accountant", "privacy.noise"), "privacy.epsilon", ()),
    (("data.augment.ops", "data.augment.rate", "data.augment.columns", "data.augment.function"),
     "data.augment.copies", ()),
    (("data.temperature",), "data.mixture", ()),
    (("generate.top_k", "generate.top_p"), "generate.temperature", ()),
    (("model.quantise_tables",), "model.quantise", ("int8", "nf4")),
    (("model.double_quantise",), "model.quantise", ("nf4",)),
)  # fmt: skip


def idle(config: ConfigDict) -> list[str]:
    """Lines that name the fields which are set and have no effect because of another field, by the table ONLY. An
    entry of data.mixture may set that other field for itself, and the field too."""
    each = [flat(config), *(flat(source.config) for source in sources(config) if source.name)]
    lines = []
    for keys, by, needed in ONLY:
        without = [values for values in each if not (values[by] in needed if needed else values[by])]
        unused = []
        for key in keys:
            setting = [values for values in each if values[key] != FIELDS[key].default]
            if setting and all(values in without for values in setting):
                unused.append(key)
        if unused:
            lines.append(f"no effect with {by}={without[0][by]!r}: {', '.join(unused)}")
    return lines


# Fields of `data` that no source of a mixture has for itself.
OF_ALL: tuple[str, ...] = ("mixture", "earlier", "domain_report", "temperature", "decontaminate", "max_length", "long")
OF_ALL += ("packing", "buckets", "workers", "processes", "streaming", "cache", "cache_size", "date")
OF_ALL += ("add_tokens", "pad_vocabulary_to")
OF_ENTRY: tuple[str, ...] = ("name", "weight", "loss_weight", "task.kind")  # keys of an entry that are no fields
# Fields outside of `data` that a source of a mixture may set for itself.
OWN: tuple[str, ...] = ("evaluate.metrics", "evaluate.words", "evaluate.passage")


class Source(NamedTuple):
    """A source of training rows.

    Attributes:
        name: Its name; empty without a mixture.
        data: Its own `data` group.
        weight: Its share of an epoch's rows, not normalised; None: by its number of rows.
        loss_weight: Factor of its loss.
        config: The whole config with its own fields, except that `config.data.mixture` is empty.
    """

    name: str
    data: ConfigDict
    weight: float | None
    loss_weight: float
    config: ConfigDict


def sources(config: ConfigDict) -> list[Source]:
    """The sources of training rows: `data` itself, or the entries of `data.mixture`.

    An entry of a mixture sets the fields that differ from `data`, those of its inner groups by dotted keys such as
    "clean.near", and those of OWN by their whole keys. Validation and test files are its own; if it names none, they
    are split off its rows. Raises FtjaxError that names the entry and the key.
    """
    data = config.data
    if not data.mixture:
        return [Source("", data, None, 1.0, config)]
    found: list[Source] = []
    for position, entry in enumerate(data.mixture, 1):
        where = f"data.mixture entry {position}"
        if not isinstance(entry, dict) or not isinstance(entry.get("train"), str):
            raise FtjaxError(f'{where}: expected a dict with "train", such as {{"train": "a.jsonl", "weight": 0.7}}')
        whole = copy(config)
        whole.data.update(train="", validation="", test="", mixture=())
        for key, value in entry.items():
            if key in OF_ENTRY:
                continue
            if key not in OWN and key.split(".")[0] not in data:
                raise FtjaxError(f"{where}: {key}: no such key{nearest(key, [*data, *OF_ENTRY, *OWN])}")
            if key in OF_ALL:
                raise FtjaxError(f"{where}: {key!r} applies to all sources and cannot be set for one; set data.{key}")
            _set(whole, key if key in OWN else f"data.{key}", value, f"{where}: {key}")
        weight = number(None, above=0).check(entry.get("weight"), f"{where}: weight")
        factor = number(1.0, above=0).check(entry.get("loss_weight", 1.0), f"{where}: loss_weight")
        name = str(entry.get("name") or Path(entry["train"]).stem)
        found.append(Source(name, whole.data, weight, factor, whole))
    names = _distinct([source.name for source in found], "data.mixture: two sources")
    if len({source.weight is None for source in found}) > 1:
        raise FtjaxError("data.mixture: give every source a weight, or none of them")
    kinds = {name: entry.get("task.kind", config.task.kind) for name, entry in zip(names, data.mixture)}
    if set(kinds.values()) != {config.task.kind}:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise FtjaxError(
            f"data.mixture: the sources have several task kinds ({listed}), and the model has one head, that of "
            f"task.kind {config.task.kind}. Write labels as text beside sources of texts (task.kind causal, with "
            "data.labels and data.completion), or train heads of several kinds in runs of their own"
        )
    return found


class Stage(NamedTuple):
    """One of the runs of `stages`.

    Attributes:
        replay: Share of its training rows that come from the stages before it.
        average: Factors by which its model may be averaged with the one before it; (1.0,): it is not.
    """

    name: str
    config: ConfigDict
    replay: float
    average: tuple[float, ...]


def staged(config: ConfigDict) -> list[Stage]:
    """The runs that `stages` lists; each is the config with the stage's own fields, in a folder of its own in run_dir.

    Raises FtjaxError that names the stage and the key.
    """
    found: list[Stage] = []
    for position, entry in enumerate(config.stages, 1):
        name = str(entry.get("name", f"stage-{position}"))
        where = f"stages: {name}"
        if name in ("before", "stages.json", "stages.png"):
            raise FtjaxError(f"{where}: is a name that a run of stages uses itself; take another one")
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise FtjaxError(f"{where}: expected a name that can be a folder's: letters, digits, '.', '_' and '-'")
        replay = number(0.0, 0, below=1).check(entry.get("replay", 0.0), f"{where}: replay")
        if replay and not found:
            raise FtjaxError(f"{where}: replay: the first stage has no earlier rows; remove it")
        average = entry.get("average", (1.0,))
        average = average if isinstance(average, tuple | list) else (average,)
        average = several((1.0,), number(1.0, 0, 1), holds=bool).check(average, f"{where}: average")
        own = copy(config)
        own.stages, own.run_dir = (), f"{config.run_dir}/{name}"
        for key, value in entry.items():
            if key in ("run_dir", "overwrite", "stages") or (key == "model.path" and found):
                raise FtjaxError(f"{where}: {key!r} follows from the order of the stages; remove it from this stage")
            if key not in ("name", "replay", "average"):
                _set(own, key, value, f"{where}: {key}")
        try:
            validate(own)
        except FtjaxError as error:
            raise FtjaxError(f"{where}: {error}") from None
        read = [*(stage.config for stage in found if replay or own.optim.ewc), *([own] if replay else [])]
        of = "replay" if replay else "optim.ewc"
        if mixed := [one for one in read if one.data.mixture]:
            raise FtjaxError(
                f"{where}: {of}: the rows of stage {Path(mixed[0].run_dir).name} are a mixture; remove this setting, "
                "or make the rows of that stage one file"
            )
        alike = {*tasks.ANSWERS} if own.task.kind in tasks.ANSWERS else {own.task.kind}
        if others := [one for one in read if one.task.kind not in alike]:
            raise FtjaxError(
                f"{where}: {of}: the rows of stage {Path(others[0].run_dir).name} are for task.kind "
                f"{others[0].task.kind}, and this stage trains task.kind {own.task.kind}; remove this setting"
            )
        if own.tuning.init_from and own.tuning.init_from in (stage.config.tuning.init_from for stage in found):
            raise FtjaxError(
                f"{where}: tuning.init_from: an earlier stage starts from this adapter too, and the model after it has "
                "it merged, so that its change would be added twice; set tuning.init_from for the first of them alone"
            )
        if not own.data.test and not own.data.validation:
            raise FtjaxError(
                f"{where}: name held-out rows in data.validation or data.test, on which later stages are scored too"
            )
        found.append(Stage(name, own, replay, average))
    _distinct([stage.name for stage in found], "stages: two of them")
    return found


def _distinct(names: list[str], what: str) -> list[str]:
    """The names. Raises FtjaxError, which starts with `what`, if two of them are equal."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FtjaxError(f'{what} have the name {twice!r}; give each a "name" of its own')
    return names


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def regular_expression(pattern: str, key: str, flags: int = 0) -> re.Pattern:
    """A regular expression, compiled. Raises FtjaxError naming `key` for an invalid one, and for one that a coming
    version of Python will read in another way."""
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):
            return re.compile(pattern, flags)
    except (re.error, TypeError, FutureWarning) as error:
        raise FtjaxError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


@functools.cache
def drop_patterns(patterns: tuple[str, ...]) -> list[re.Pattern]:
    """Those of data.clean.drop, in which ^ and $ are the ends of a line."""
    return [regular_expression(pattern, "data.clean.drop", re.MULTILINE) for pattern in patterns]


def validate(config: ConfigDict) -> None:
    """Check every field, and combinations of fields, as far as this needs no file.

    Raises:
        FtjaxError: It names the key and what was expected.
    """
    values = flat(config)
    for key in values | FIELDS:
        if key not in values:
            raise FtjaxError(f"{key}: the config lacks this field; start from ftjax.config.default()")
        _field(key, key).check(values[key], key)

    drop_patterns(tuple(values["data.clean.drop"]))
    kind, labels, spike, distil = config.task.kind, config.data.labels, config.train.spike, config.distil
    for key, fits, expected in (
        ("data.shots", kind == "classify" or not config.data.shots,
         "0 where task.kind is not classify; data.limit is for rows of any kind"),
        ("train.accumulate", kind != "embed" or config.train.accumulate == 1,
         "1: each text is compared with all others of its batch, and microbatches would hide them; model.remat=full "
         "saves memory instead"),
        ("train.on_bad_step", config.train.on_bad_step != "rewind" or config.task.updates == 1,
         "stop or skip if task.updates is above 1, because the answers of several steps are drawn at once"),
        ("data.labels", kind in tasks.ANSWERS or not labels,
         "none where task.kind is not causal or gkd; task.labels names the labels of a head"),
        ("data.labels", len(set(labels)) == len(labels) != 1, "two or more names that differ, or none"),
        ("optim.ewc", kind in tasks.ANSWERS or not config.optim.ewc, "0 unless task.kind is causal or gkd"),
        ("distil.hidden", not distil.hidden or config.task.reference, "0 without a teacher in task.reference"),
        ("distil.layers", distil.hidden or not distil.layers, "none where distil.hidden is 0"),
        ("train.spike", spike == 0 or spike > 1, "0 or a number above 1, a multiple of the median loss"),
        ("tuning.prompt_text", bool(config.tuning.prompt_text) == (config.tuning.prompt_init == "text"),
         "a text where tuning.prompt_init is text, else none"),
        ("data.canaries", not (config.data.mixture and config.data.canaries), "0 where data.mixture is set"),
    ):  # fmt: skip
        if not fits:
            raise FtjaxError(f"{key}: expected {expected}; found {_shown(values[key])}")
    if config.data.mixture:
        for source in sources(config):
            try:
                validate(source.config)
            except FtjaxError as error:
                raise FtjaxError(f"data.mixture: {source.name}: {error}") from None
