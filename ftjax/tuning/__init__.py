"""The tuning methods, one file each. Importing this package fills METHODS."""

from ftjax.tuning import dora, full, ia3, lora, parts, prefix, prompt, ptuning  # noqa: F401  each registers itself
from ftjax.tuning.base import METHODS, Method, Spec, begun, ignored, of_peft, register

__all__ = ["METHODS", "Method", "Spec", "begun", "ignored", "of_peft", "register"]
