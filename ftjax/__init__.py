"""ftjax: fine-tune a Hugging Face model directory in JAX, and hand back files that PyTorch loads to the same logits."""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for True; typing, where it usually comes from, takes time to import
if TYPE_CHECKING:
    from ftjax import config as config
    from ftjax.errors import FtjaxError as FtjaxError
    from ftjax.evaluation.run import evaluate as evaluate
    from ftjax.evaluation.run import predict as predict
    from ftjax.lm import LM as LM
    from ftjax.loading import load as load
    from ftjax.stages import train as train
    from ftjax.training.export import export as export
    from ftjax.training.loop import Result as Result
    from ftjax.verdict.run import compare as compare
    from ftjax.verdict.sweep import sweep as sweep

# Public name -> the module that it is in, or is. It is imported on first use, so that `import ftjax` costs nothing.
_PUBLIC = {
    "config": "ftjax.config",
    "load": "ftjax.loading",
    "LM": "ftjax.lm",
    "train": "ftjax.stages",
    "Result": "ftjax.training.loop",
    "evaluate": "ftjax.evaluation.run",
    "predict": "ftjax.evaluation.run",
    "export": "ftjax.training.export",
    "sweep": "ftjax.verdict.sweep",
    "compare": "ftjax.verdict.run",
    "FtjaxError": "ftjax.errors",
}
__all__ = [*_PUBLIC, "__version__"]


if not TYPE_CHECKING:  # or any name would be right to them

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f"module 'ftjax' has no attribute {name!r}")
        import importlib

        module = importlib.import_module(_PUBLIC[name])
        return globals().setdefault(name, module if module.__name__ == f"ftjax.{name}" else getattr(module, name))


def __dir__() -> list[str]:
    return sorted(__all__)
