"""Three tasks in one run, one adapter for all: sentences from given words, the opinion of a film review, and which of
19 kinds of things a definition is of. The last two are labels that the model writes as text.

    ftjax train --config configs/many_tasks.py

CommonGen comes with ftjax. SST-2 (`label` and `sentence`, from GLUE) and the glosses of WordNet, whose file names no
columns, are to be put under these paths. results.json has the scores of each task before and after training, their mean
and the worst.

With 1,200 steps of 32 rows, against 400 steps for a task alone (one seed): sentences 6.2 and reviews 4.8 points above
the run of their own, kinds 8.2 points below it. docs/data.md has the scores.
"""

from ftjax import config

KINDS = ("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "food", "group")
KINDS += ("location", "object", "person", "plant", "possession", "quantity", "state", "substance", "time")
LABELS = {"evaluate.metrics": ("exact_match", "f1_macro"), "split": (0.96, 0.02, 0.02)}

TASKS = (
    {
        "name": "sentences",
        "train": "builtin:commongen/train.jsonl",
        "validation": "builtin:commongen/validation.jsonl",
        "test": "builtin:commongen/test.jsonl",
        "prompt": "Words: {src}\nSentence:",
        "completion": " {tgt}",
        "evaluate.metrics": ("coverage", "rouge_l"),
        "evaluate.words": "src",
    },
    LABELS
    | {
        "name": "reviews",
        "train": "sst2/train.tsv",
        "prompt": "Review: {sentence}\nIt was",
        "completion": " {label}",
        "labels": ("bad", "good"),
    },
    LABELS
    | {
        "name": "kinds",
        "train": "wordnet/noun_gloss_lexname.tsv",
        "columns": ("category", "gloss", "word"),
        "label": "category",
        "labels": KINDS,
        "prompt": "Meaning: {gloss}\nKind:",
        "completion": " {category}",
    },
)


def get_config():
    c = config.default()
    c.run_dir = "runs/many_tasks"
    c.model.unroll = 0
    c.data.mixture = tuple({"weight": 1.0, **task} for task in TASKS)
    c.data.end = "<s>"  # what the stories end with; the tokenizer's own </s> was never pretrained
    c.data.buckets = 2
    c.tuning.rank = 32
    c.tuning.alpha = 64.0
    c.optim.name = "muon"
    c.optim.lr = 1.2e-2
    c.train.batch_size = 48
    c.train.steps = 1500
    c.train.eval_every = 250
    c.train.select = "val_mean_loss"
    c.evaluate.rows = 128
    c.evaluate.compare = True
    c.evaluate.compare_rows = 200
    c.generate.max_new_tokens = 48
    c.generate.batch_size = 64
    return c
