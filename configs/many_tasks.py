"""Three tasks in one run, one adapter for all: sentences from given words, the opinion of a film review, and which of
19 kinds of things a definition is of. The last two are labels that the model writes as text.

    ftjax train --config configs/many_tasks.py

CommonGen comes with ftjax. SST-2 (`label` and `sentence`, from GLUE) and the glosses of WordNet, whose file names no
columns, are to be put under these paths. results.json has the scores of each task before and after training, their mean
and the worst.

The loss is a mean over trained tokens, of which a sentence has several times as many as a label has; so the labels
weigh more. With 1,200 steps of 32 rows, each task scores 4 points or more above a run of its own with 400 steps (one
seed); docs/data.md has the scores.
"""

from ftjax import config

KINDS = ("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "food", "group")
KINDS += ("location", "object", "person", "plant", "possession", "quantity", "state", "substance", "time")
LABELS = {"evaluate.metrics": ("exact_match", "f1_macro"), "split": (0.90, 0.02, 0.08)}

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
        "loss_weight": 2.0,
    },
    LABELS
    | {
        "name": "kinds",
        "train": "wordnet/noun_gloss_lexname.tsv",
        "columns": ("category", "gloss", "word"),
        "label": "category",
        "labels": KINDS,
        "loss_weight": 4.0,
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
    c.train.batch_size = 32
    c.train.steps = 1200
    c.train.eval_every = 300
    c.train.select = "val_mean_loss"
    c.evaluate.rows = 128
    c.evaluate.compare = True
    c.evaluate.compare_rows = 300
    c.generate.max_new_tokens = 48
    c.generate.batch_size = 64
    return c
