"""Labelled rows that a model can learn in a minute, tiny random models with tokenizers of whole words, and what PyTorch
makes of results."""

import json

import numpy as np
import tiny_models

from ftjax import config as configs
from ftjax.evaluation.resample import value_of

WORDS = {"good": ("fine", "warm", "clever", "moving"), "bad": ("dull", "flat", "stale", "clumsy")}


def rows(count: int, seed: int, **more) -> list[dict]:
    """Texts whose words tell their label."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        label = str(rng.choice(["bad", "good"], p=[0.3, 0.7]))
        words = [*rng.choice(["a", "the", "film", "it", "was", "of"], 4), *rng.choice(WORDS[label], 2)]
        out.append({"text": " ".join(rng.permutation(words)), "label": label} | {k: f(rng) for k, f in more.items()})
    return out


def write(file, found: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def make(folder, kind: str):
    """A tiny random model directory with a tokenizer of whole words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "film", "it", "was", "of"]
    words += [word for group in WORDS.values() for word in group]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    if kind != "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        special |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    special["model_input_names"] = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = tiny_models.SIZES | {"num_hidden_layers": 2, "initializer_range": 0.2}
    if kind == "modernbert":
        sizes |= {f"{name}_token_id": i for name, i in (("pad", 0), ("bos", 2), ("cls", 2), ("eos", 3), ("sep", 3))}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    if kind == "llama":
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    return folder


def config(tmp_path, model, **overrides):
    c = configs.default()
    c.run_dir = str(tmp_path / "run")
    c.model.path = str(model)
    c.data.update(train=write(tmp_path / "train.jsonl", rows(200, 5)), max_length=16, cache="")
    c.data.test = write(tmp_path / "test.jsonl", rows(40, 1))
    c.data.split = (0.8, 0.2, 0.0)
    c.task.kind = "classify"
    c.train.update(steps=60, batch_size=16, eval_every=20)
    c.optim.lr = 1e-2
    c.tuning.rank = 4
    c.log.tensorboard = False
    configs.override(c, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    return c


def theirs(model, folder, texts: list[str]) -> np.ndarray:
    """Probabilities by transformers, of texts padded together."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits.softmax(-1).numpy()


def values(n: int, reduce) -> dict[str, np.ndarray]:
    """{name: scalar or (K,)} of the figures of n rows themselves, by a Reduce of ftjax.evaluation.resample."""
    return {name: value_of(figure)[0] for name, figure in reduce(np.ones((1, n))).items()}
