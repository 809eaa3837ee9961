"""PEFT adapters made by other tools: reading one, adding several, and starting a run from one.

L layers, R rank.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from ftjax import config as configs
from ftjax import tasks
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.foreign import read_json
from ftjax.hub import families, peft, resolve, weights
from ftjax.tree import flatten, unflatten
from ftjax.tuning import tables
from ftjax.tuning.base import METHODS, Method, Spec, begun, of_peft
from ftjax.tuning.whole import PEFT_TASKS

# Field of config.tuning -> its key in adapter_config.json, which may be missing there.
NAMES = {"rank": "r", "alpha": "lora_alpha"}


def read(folder: Path) -> tuple[Method, dict, dict]:
    """Read a PEFT adapter directory. Returns (the method that it is of, its adapter_config.json, {name: tensor})."""
    if not (folder / peft.CONFIG).is_file():
        own = "; a run's own adapter lies in its folder `adapter`" if (folder / "run.json").is_file() else ""
        raise FtjaxError(f"{folder} is not a PEFT adapter: it has no {peft.CONFIG}{own}")
    adapter_config, tensors = peft.read_adapter(folder)
    method = of_peft(adapter_config)
    if method is None:
        known = ", ".join(dict.fromkeys(m.peft_type for m in METHODS.values() if m.peft_type))
        kind = adapter_config.get("peft_type")
        raise FtjaxError(f"{folder / peft.CONFIG}: peft_type {kind!r} is not supported; known: {known}")
    return method, adapter_config, tensors


def task(folder: Path, adapter: tuple[Method, dict, dict], base: Path) -> tuple[str, tuple[str, ...]] | None:
    """The head that an adapter is made for.

    Args:
        folder: The adapter directory.
        adapter: What `read` returned.
        base: The directory of its base model.

    Returns:
        (task.kind, names of the labels), or None if the adapter uses the base's own head. The names are in a file
        beside the adapter, which PEFT does not know.

    Raises:
        FtjaxError: If a tensor of the head is missing.
    """
    method, adapter_config, tensors = adapter
    if adapter_config.get("task_type") == "FEATURE_EXTRACTION":
        return tasks.kind_of("none"), ()
    head = next((head for head, name in PEFT_TASKS.items() if name == adapter_config.get("task_type")), None)
    if head is None:
        return None
    family, shape = families.read_config(base)
    wanted = families.with_head(family, shape, head, 1, base)
    new = tuple(f"{module}/" for module in (*weights.head_is_new(base, family, wanted), "head/out"))
    names = {
        path: f"{method.peft_prefix}{stored.names[0]}" for path, stored in families.tensor_names(family, wanted).items()
    }
    for path, name in names.items():
        if path.startswith(new) and name not in tensors:
            raise FtjaxError(f"{folder}: task_type {PEFT_TASKS[head]}, but tensor {name} of its head is missing")
    file = folder / peft.LABELS
    if file.is_file():
        settings = read_json(file)
        labels = families.labels_in(settings, file)
        return tasks.kind_of(head, settings.get("problem_type") or "", len(labels)), labels
    labels = tuple(f"LABEL_{i}" for i in range(len(tensors[names["head/out/kernel"]])))
    return tasks.kind_of(head, labels=len(labels)), labels


def variables(adapter: tuple[Method, dict, dict], base: dict, spec: Spec) -> dict:
    """The Flax variables of a base model with an adapter.

    Args:
        adapter: What `read` returned.
        base: Parameters of the base, which are not copied.
        spec: The Spec of the base.
    """
    method, *files = adapter
    adapter_config, tensors, base, spec = tables.replaced(*files, base, spec)
    spec = spec._replace(tuning=spec.tuning.copy_and_resolve_references())
    trained, fields = method.from_peft(adapter_config, tensors, base, spec)
    spec.tuning.update(fields)
    _, frozen = begun(method, jax.random.key(0), base, spec)
    return method.variables(jax.tree.map(jnp.asarray, trained), frozen, spec)


def weighted(adapters: dict[str, dict], params: dict, weights: dict[str, float], combine: str) -> dict:
    """One `adapter` collection for the weighted sum of several LoRAs, as PEFT's add_weighted_adapter computes it.

    Args:
        adapters: {name: Flax variables of the model with that adapter}.
        params: Parameters of the base.
        weights: {name: weight} of the adapters to add.
        combine: `cat` concatenates ranks, which gives exactly the sum of w · s · B A. `linear` adds the A and adds the
            B, each times the root of |w · s|, which keeps the rank, but also adds products of one adapter's B with
            another's A.

    Raises:
        FtjaxError: For an unknown name or way, for an adapter that is more than LoRA, and for `linear` on unequal
            ranks.
    """
    check_known(combine, ("cat", "linear"), "combine: unknown way")
    found = {}  # path of a map -> [(weight · scale, a, b), ...]
    for name, weight in weights.items():
        found_in = pick(adapters, name)
        leaves = flatten(found_in.get("adapter", {}))
        base = flatten(params)
        other = sorted({path.split("/")[-2:][0] for path in leaves if "/lora/" not in path})
        if not leaves or any(base.get(path) is not x for path, x in flatten(found_in["params"]).items()):
            other = ["whole parameters"]
        if other:
            raise FtjaxError(
                f"adapter {name!r} contains {', '.join(other)}; only adapters with nothing but LoRA can be combined"
            )
        for path in dict.fromkeys(path.rsplit("/", 1)[0] for path in leaves):
            a, b, scale = (leaves[f"{path}/{leaf}"] for leaf in ("a", "b", "scale"))
            factor = weight * scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim))
            found.setdefault(path, []).append((factor, a, b))
    out = {}
    for path, parts in found.items():
        if combine == "cat":
            a = jnp.concatenate([factor * a for factor, a, _ in parts], axis=-2)
            b = jnp.concatenate([b for _, _, b in parts], axis=-1)
        else:
            if len({a.shape for _, a, _ in parts}) > 1:
                ranks = ", ".join(str(a.shape[-2]) for _, a, _ in parts)
                raise FtjaxError(f"combine: linear needs adapters of one rank; at {path} they have {ranks}: use cat")
            a = sum(jnp.sign(factor) * jnp.sqrt(jnp.abs(factor)) * a for factor, a, _ in parts)
            b = sum(jnp.sqrt(jnp.abs(factor)) * b for factor, _, b in parts)
        out |= {f"{path}/a": a, f"{path}/b": b, f"{path}/scale": jnp.ones(a.shape[:1] if a.ndim > 2 else ())}
    return unflatten(out)


def pick(adapters: dict, name: str):
    """The adapter of that name. Raises FtjaxError if it was not loaded."""
    if name not in adapters:
        raise FtjaxError(
            f"adapter {name!r}: not loaded{nearest(name, adapters)}; loaded: {', '.join(adapters) or 'none'}"
        )
    return adapters[name]


class Start:
    """The adapter of `tuning.init_from`, from which a run starts."""

    def __init__(self, tuning):
        """Read the adapter. tuning: config.tuning. Raises FtjaxError for a folder without an adapter, or with one of
        another method."""
        self.folder = resolve.resolve(tuning.init_from)
        self.method, self.adapter_config, self.tensors = read(self.folder)
        if METHODS[tuning.method] is not self.method:
            name = next(name for name, method in METHODS.items() if method is self.method)
            raise FtjaxError(
                f"tuning.method: {tuning.method!r}, but tuning.init_from {self.folder} holds an adapter of {name!r}"
            )

    def fill(self, spec: Spec) -> None:
        """Set the fields of spec.tuning that the adapter's tensors decide. Raises FtjaxError if the config sets another
        value."""
        rest, *of_base = tables.find(self.adapter_config, self.tensors, spec)
        if any(of_base):
            raise FtjaxError(
                f"tuning.init_from: {self.folder} replaces tables of embeddings of its base: the vocabulary was "
                "resized, single tokens were trained, or the tables were saved with it. A run cannot train on those: "
                "merge the adapter into its base, where peft is installed, with merge_and_unload, and start from that"
            )
        # A copy of the base's own weight is compared when the base is there.
        own = {name: x for name, x in rest.items() if ".base_layer.weight" not in name}
        _, fields = self.method.from_peft(self.adapter_config, own, weights.param_shapes(spec.model), spec)
        fields |= {ours: self.adapter_config[theirs] for ours, theirs in NAMES.items() if theirs in self.adapter_config}
        tuning, default = spec.tuning, configs.default().tuning
        for key, value in fields.items():
            if tuning[key] != default[key] and tuning[key] != value:
                raise FtjaxError(
                    f"tuning.{key}: {tuning[key]!r}, but the adapter in tuning.init_from {self.folder} has {value!r}; "
                    f"leave tuning.{key} out"
                )
        tuning.update(fields)

    def trained(self, base: dict, spec: Spec, expected: dict) -> dict:
        """The adapter's tensors as the tree that a run trains. expected: tree of its shapes."""
        found, _ = self.method.from_peft(self.adapter_config, self.tensors, base, spec)
        shapes = {path: x.shape for path, x in flatten(expected).items()}
        if {path: x.shape for path, x in flatten(found).items()} != shapes:
            raise FtjaxError(
                f"tuning.init_from: {self.folder} has different tensors than the config trains; set tuning.targets as "
                "in its config"
            )
        return found
