"""An encoder fine-tuned here and in transformers: `python scripts/bench_encoders.py speed|quality|tags ...`.

speed: training steps by turns in one process, as many rows a step on either side, float32, AdamW, every parameter
trained. PyTorch pads each batch to its longest row, as transformers' DataCollatorWithPadding does; ours come in buckets
of like length. Prints rows a second of the best turn, their ratio, and the share of our tokens that is no padding.
quality: the same recipe (AdamW, linear decay, one epoch, dropout 0.1) by transformers' Trainer and by `ftjax.train` on
the same rows, once a seed; prints accuracy on dev of each and the difference of their means.
tags: likewise on WNUT17 (five epochs, warm-up of a tenth, weight decay 0.01), by entity F1 on dev, as seqeval counts it
on either side.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import bench_common
import numpy as np

RATES = {"full": 5e-5, "lora": 5e-4, "head": 1e-3}


def read(file: Path) -> list[tuple[str, int]]:
    """(text, label) of every row of an SST-2 file."""
    lines = file.read_text(encoding="utf-8").split("\n")[1:]
    return [(text, int(label)) for label, text in (line.split("\t") for line in lines if line)]


def config(args, method: str, run_dir: str, train: Path):
    from ftjax import config as configs

    c = configs.default()
    c.run_dir, c.model.path = run_dir, str(args.model)
    c.data.update(train=str(train), test=str(args.data / "dev.tsv"), split=(1.0, 0.0, 0.0), max_length=128, buckets=12)
    c.task.update(kind="classify", labels=("negative", "positive"))
    c.tuning.update(method=method, targets=("query", "value") if method == "lora" else ())
    c.optim.update(lr=RATES[method], schedule="linear", warmup=0.0, weight_decay=0.0)
    c.train.update(epochs=1.0, batch_size=args.batch, save_every=10**6)
    c.log.tensorboard = False
    c.export.formats = ()
    return c


def torch_model(args, method: str):
    """The model that transformers trains by a method: all of it, LoRA by peft, or pooler and classifier alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    if method == "lora":
        import peft

        lora = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=["query", "value"], task_type="SEQ_CLS",
            modules_to_save=["pooler.dense", "classifier"],
        )  # fmt: skip
        model = peft.get_peft_model(model, lora)
    elif method == "head":
        for name, p in model.named_parameters():
            p.requires_grad = name.startswith(("bert.pooler.", "classifier."))
    return model


def speed(args) -> dict:
    """Rows a second on either side, by turns of `args.steps` steps."""
    import jax
    import torch
    from transformers import AutoTokenizer

    from ftjax.data.batches import Batches
    from ftjax.data.prepare import prepare
    from ftjax.hub import families, weights
    from ftjax.training import sharding
    from ftjax.training.program import build, fill_defaults, with_task
    from ftjax.tuning import Spec

    scratch = tempfile.mkdtemp()
    c = config(args, "full", scratch, args.data / "train.tsv")
    c.data.limit = 40 * args.batch
    fill_defaults(c)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    family, shape = families.read_config(args.model)
    data = prepare(c, tokenizer, shape.max_positions, pool="first")
    shape = with_task(c, family, shape, args.model, 2)
    batches = Batches(data.train.examples, args.batch, data.max_length, buckets=c.data.buckets)
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
        spec = Spec(shape, families.linear_names(family, shape), c.tuning, family)
        program = build(c, spec, mesh, np.dtype("float32"), 1000)
        base = weights.read_params(args.model, family, shape, program.base_places, new_head=jax.random.key(0))
        trained, frozen = program.begin(jax.random.key(0), base)
        state = program.init_state(trained)

        model = torch_model(args, "full").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # ours has none here
        adam = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
        rows = [(data.train.rendered(i).prompt, int(data.train.examples.targets[i])) for i in range(len(data.train))]
        order = np.random.default_rng(0).permutation(len(rows))

        def ours(step):
            nonlocal state
            state, report = program.step(state, frozen, batches[step % len(batches)])
            return float(report["loss"])

        def theirs(step):
            chosen = [rows[i] for i in order[np.arange(step * args.batch, (step + 1) * args.batch) % len(rows)]]
            batch = tokenizer([text for text, _ in chosen], padding=True, return_tensors="pt")
            loss = model(**batch, labels=torch.tensor([label for _, label in chosen])).loss
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            return float(loss)

        best = dict.fromkeys(("ftjax", "torch"), float("inf"))
        for step in range(len(batches)):  # every shape once
            ours(step)
        theirs(0)
        for turn in range(args.turns):
            for name, run in (("ftjax", ours), ("torch", theirs)):
                start = time.perf_counter()
                for step in range(args.steps):
                    run(turn * args.steps + step)
                best[name] = min(best[name], (time.perf_counter() - start) / args.steps)
    return {
        **{f"{name}_rows_s": round(args.batch / seconds, 1) for name, seconds in best.items()},
        "time_of_torch": round(best["ftjax"] / best["torch"], 2),
        "real_tokens": round(batches.efficiency, 3),
    }


def quality(args, method: str) -> dict:
    """Accuracy on dev by either side, for each seed."""
    import ftjax

    rows = read(args.data / "train.tsv")
    found = {"ftjax": [], "transformers": []}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            chosen = np.random.default_rng(seed).permutation(len(rows))[: args.rows or None]
            part = Path(scratch) / "train.tsv"
            part.write_text("label\tsentence\n" + "".join(f"{rows[i][1]}\t{rows[i][0]}\n" for i in chosen))
            c = config(args, method, f"{scratch}/run", part)
            c.seed, c.train.dropout = seed, 0.1
            result = ftjax.train(c, say=lambda text: None)
            found["ftjax"].append(result.results["test"]["metrics"]["accuracy"]["value"])
            if not args.alone:
                found["transformers"].append(trainer(args, method, [rows[i] for i in chosen], seed, scratch))
        print(json.dumps({"method": method, "seed": seed, **{k: v[-1:] for k, v in found.items()}}), flush=True)
    means = {name: round(float(np.mean(values)), 4) for name, values in found.items() if values}
    return {"method": method, "rows": args.rows or len(rows), "seeds": args.seeds, **means}


def trainer(args, method: str, rows: list[tuple[str, int]], seed: int, scratch: str) -> float:
    """Accuracy on dev after transformers' Trainer took the same recipe."""
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(seed)
    tokenizer, dev = AutoTokenizer.from_pretrained(args.model), read(args.data / "dev.tsv")

    def encode(rows):
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows)]

    settings = TrainingArguments(
        output_dir=f"{scratch}/torch", num_train_epochs=1, per_device_train_batch_size=args.batch,
        learning_rate=RATES[method], lr_scheduler_type="linear", weight_decay=0.0, seed=seed, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    run = Trainer(
        torch_model(args, method),
        settings,
        train_dataset=encode(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    run.train()
    logits = run.predict(encode(dev)).predictions
    return float(np.mean(logits.argmax(-1) == [label for _, label in dev]))


TAGS = {"lr": 1e-4, "epochs": 5, "batch": 16, "warmup": 0.1, "decay": 0.01}


def tags(args) -> dict:
    """Entity F1 on WNUT17's dev rows by either side, for each seed."""
    import ftjax
    from ftjax import config as configs
    from ftjax.data.read import read_table

    tables = {part: read_table(str(args.data / f"{part}.conll")) for part in ("train", "dev")}
    rows = {part: [table.row(i) for i in range(len(table))] for part, table in tables.items()}
    found = {"ftjax": [], "transformers": []}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            c = configs.default()
            c.seed, c.run_dir, c.model.path = seed, f"{scratch}/run", str(args.model)
            c.data.update(train=str(args.data / "train.conll"), test=str(args.data / "dev.conll"))
            c.data.update(split=(1.0, 0.0, 0.0), max_length=128, buckets=12)
            c.task.kind, c.tuning.method = "tag", "full"
            c.optim.update(lr=TAGS["lr"], schedule="linear", warmup=TAGS["warmup"], weight_decay=TAGS["decay"])
            c.train.update(epochs=float(TAGS["epochs"]), batch_size=TAGS["batch"], dropout=0.1, save_every=10**6)
            c.log.tensorboard, c.export.formats = False, ()
            result = ftjax.train(c, say=lambda text: None)
            told = [json.loads(line) for line in Path(f"{scratch}/run/predictions.jsonl").open()]
            found["ftjax"].append(entity_f1([row["tags"] for row in rows["dev"]], [row["predicted"] for row in told]))
            assert abs(found["ftjax"][-1] - result.results["test"]["metrics"]["f1"]["value"]) < 1e-9
            if not args.alone:
                found["transformers"].append(tagger(args, rows, seed, scratch))
        print(json.dumps({"seed": seed, **{k: v[-1:] for k, v in found.items()}}), flush=True)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items() if values} | TAGS


def entity_f1(truth: list[list[str]], told: list[list[str]]) -> float:
    """Micro F1 of entities by seqeval, which reads tags as conlleval.pl does."""
    from seqeval.metrics import f1_score

    return float(f1_score(truth, told))


def tagger(args, rows: dict[str, list[dict]], seed: int, scratch: str) -> float:
    """Entity F1 on dev after transformers' Trainer took the same recipe; the first token of a word carries its tag."""
    import torch
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    names = sorted({tag for row in rows["train"] for tag in row["tags"]})

    def encode(rows):
        batch = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=128)
        out = []
        for i, row in enumerate(rows):
            words = batch.word_ids(i)
            first = [w is not None and w != before for w, before in zip(words, [None, *words])]
            labels = [names.index(row["tags"][w]) if f else -100 for w, f in zip(words, first)]
            out.append({"input_ids": batch["input_ids"][i], "labels": labels})
        return out

    warmup = math.ceil(TAGS["warmup"] * TAGS["epochs"] * math.ceil(len(rows["train"]) / TAGS["batch"]))
    settings = TrainingArguments(
        output_dir=f"{scratch}/torch", num_train_epochs=TAGS["epochs"], per_device_train_batch_size=TAGS["batch"],
        learning_rate=TAGS["lr"], lr_scheduler_type="linear", warmup_steps=warmup, weight_decay=TAGS["decay"],
        seed=seed, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(names))
    collate = DataCollatorForTokenClassification(tokenizer)
    run = Trainer(model, settings, train_dataset=encode(rows["train"]), data_collator=collate)
    run.train()
    dev = encode(rows["dev"])
    told = run.predict(dev).predictions.argmax(-1)
    predicted = []
    for row, example, said in zip(rows["dev"], dev, told, strict=True):
        tags = [names[t] for t, label in zip(said, example["labels"]) if label != -100]
        predicted.append(tags + ["O"] * (len(row["tags"]) - len(tags)))
    return entity_f1([row["tags"] for row in rows["dev"]], predicted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "quality", "tags"))
    parser.add_argument("--model", type=Path, required=True, help="directory of an encoder such as all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2's, or WNUT17's, train and dev files")
    parser.add_argument("--methods", nargs="*", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rows", type=int, default=10_000, help="of train, drawn by the seed; 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alone", action="store_true", help="quality: ftjax only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="speed: of a turn")
    parser.add_argument("--turns", type=int, default=3)
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    if args.what == "quality":
        bench_common.report((quality(args, method) for method in args.methods), args.out)
    else:
        bench_common.report([{"speed": speed, "tags": tags}[args.what](args)], args.out)


if __name__ == "__main__":
    main()
