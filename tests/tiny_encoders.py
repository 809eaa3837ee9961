"""Tiny random encoders, and decoders with a head over labels, made by transformers: the referee's own files."""

import tiny_models

from ftjax.hub import families, weights

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
DISTIL = {"vocab_size": 60, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64}
MODERN = SIZES | {"local_attention": 8, "num_hidden_layers": 4, "pad_token_id": 0} | {
    f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")
}  # fmt: skip
ENCODERS = {
    "bert": ("bert", SIZES),
    "bert-relu": ("bert", SIZES | {"hidden_act": "relu", "layer_norm_eps": 1e-5, "type_vocab_size": 3}),
    "roberta": ("roberta", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": ("distilbert", DISTIL),
    "modernbert": ("modernbert", MODERN),
    "modernbert-biases": (
        "modernbert",
        MODERN
        | {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
        | {"classifier_pooling": "mean", "classifier_activation": "relu", "decoder_bias": False},
    ),
}
CLASSES = {
    "none": "AutoModel",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
DECODERS = {name: tiny_models.VARIANTS[name] for name in ("gpt2", "llama-tied", "mistral", "qwen3")}


def make(name: str, task: str, folder):
    """(transformers' model, our family, our shape, our parameters), of random weights saved by transformers."""
    import torch
    import transformers

    kind, settings = (ENCODERS | DECODERS)[name]
    labels = {} if task == "span" else {"num_labels": 3}
    pad = {} if "pad_token_id" in settings or name == "distilbert" else {"pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings, **labels, **pad)
    model = getattr(transformers, CLASSES[task]).from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    family, shape = families.read_config(folder)
    return model, family, shape, weights.read_params(folder, family, shape)
