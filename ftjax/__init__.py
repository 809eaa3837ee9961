"""ftjax: fine-tune a Hugging Face model directory in JAX, and hand back files that PyTorch loads to the same logits."""

from __future__ import annotations

__version__ = "0.1.0"

# Public name -> where it lives. Imported on first use: `import ftjax` costs nothing.
_PUBLIC = {
    "load": "ftjax.loading",
    "LM": "ftjax.lm",
    "train": "ftjax.training.loop",
    "Result": "ftjax.training.loop",
    "evaluate": "ftjax.evaluation.run",
    "predict": "ftjax.evaluation.run",
    "export": "ftjax.training.export",
    "sweep": "ftjax.verdict.sweep",
    "compare": "ftjax.verdict.run",
    "FtjaxError": "ftjax.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ftjax' has no attribute {name!r}")
    import importlib

    return globals().setdefault(name, getattr(importlib.import_module(_PUBLIC[name]), name))


def __dir__():
    return sorted(__all__)
