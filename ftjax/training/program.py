"""The training step of a config with all its inputs as shapes. `train` fills the shapes with arrays; `plan` needs no
arrays.

B rows, T tokens, M trained tokens a row at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ftjax import config as configs
from ftjax import tasks, xla
from ftjax.errors import FtjaxError, check_known
from ftjax.hub import families, weights
from ftjax.lm import quantiser
from ftjax.loading import shape_of
from ftjax.models import attention_backends, remat
from ftjax.models.axes import by_rows
from ftjax.models.config import TABLES, layers_with
from ftjax.models.quantised import is_quantised, quantised_size
from ftjax.models.transformer import BEHIND, Transformer
from ftjax.objectives import hidden
from ftjax.training import privacy, sharding
from ftjax.training.optimizer import multipliers, optimizer, schedule
from ftjax.training.step import State, compile_step, init_state
from ftjax.tree import flatten, map_paths
from ftjax.tuning import METHODS, Spec


class Program(NamedTuple):
    """The functions and shapes of a run, before any array exists. Trees of shapes hold jax.ShapeDtypeStruct."""

    model: Transformer
    mesh: jax.sharding.Mesh
    base: dict  # shapes of the model's own parameters
    trained: dict  # shapes of what is trained
    frozen: dict  # shapes of what is not
    base_places: dict  # shardings of the three
    trained_places: dict
    frozen_places: dict
    state_places: State
    read_dtype: jnp.dtype  # that the base is read in
    quantise: Callable  # path -> the function that quantises this parameter of the base as it is read, or None
    begin: Callable  # (key, base) -> (trained, frozen); base is given away
    variables: Callable  # (trained, frozen) -> what the model is applied to
    rate: Callable  # step -> learning rate
    init_state: Callable  # trained -> State
    step: Callable  # (state, frozen, batch) -> (state, report); the state is given away


def fill_defaults(config) -> None:
    """Set the fields that the config leaves to the tuning method. Raises FtjaxError for an unknown method."""
    name = config.tuning.method
    check_known(name, METHODS, "tuning.method: unknown method")
    if config.optim.lr is None:
        config.optim.lr = METHODS[name].lr
    if config.train.batch_size is None:
        config.train.batch_size = METHODS[name].batch_size


def rows_multiple(config, sizes, shape) -> int:
    """The number that the rows of a batch must be a multiple of: microbatches over the parts of a mesh, each of whole
    groups of a mixture of tokens.

    Args:
        config: The whole config.
        sizes: {mesh axis: size}; an axis that is missing has the size 1.
        shape: The ModelConfig.
    """
    return by_rows(sizes) * config.train.accumulate * max(shape.mixing, 1)


def check_rows(config, mesh, shape) -> None:
    """Raise FtjaxError if the batch is no `rows_multiple`. shape: the ModelConfig."""
    rows, ways = config.train.batch_size, sharding.row_ways(mesh)
    if rows % (needed := rows_multiple(config, mesh.shape, shape)):
        groups = f", in groups of {shape.mixing} rows" * (shape.mixing > 1)
        raise FtjaxError(
            f"train.batch_size: {rows} rows cannot be split into {config.train.accumulate} microbatches over {ways} "
            f"parts of the mesh{groups}; a multiple of {needed} can"
        )


def check_mixing(config, shape) -> None:
    """Raise FtjaxError for what a mixture of tokens cannot be trained with. shape: the ModelConfig."""
    if not shape.mixing:
        if config.train.mixing_temperature != configs.FIELDS["train.mixing_temperature"].default:
            raise FtjaxError("train.mixing_temperature: this model is no mixture of tokens; leave it out")
        return
    values = configs.flat(config)
    for key, fits, why in (
        ("task.kind", config.task.kind == "causal", "other tasks compare or label single rows; set it to causal"),
        ("data.packing", not config.data.packing, "packed rows have other documents at a position; set it to False"),
        ("privacy.epsilon", not config.privacy.epsilon, "the loss of an example depends on the others; set it to 0"),
        ("mesh.expert", config.mesh.expert == 1, "every device computes all experts of its own groups; set it to 1"),
        ("tuning.method", METHODS[config.tuning.method].of_parameters, "PEFT has no such model; set it to full"),
    ):
        if not fits:
            raise FtjaxError(
                f"{key}: {values[key]} is not for a mixture of tokens, which mixes {shape.mixing} rows of a "
                f"batch: {why}"
            )


def check_remat(config, device) -> None:
    """Raise FtjaxError if model.remat needs a host memory that `device` cannot address."""
    preset = remat.PRESETS.get(config.model.remat)
    if preset and preset.offload and remat.HOST not in {m.kind for m in device.addressable_memories()}:
        raise FtjaxError(
            f"model.remat: {config.model.remat} keeps tensors in the host's {remat.HOST} memory, which JAX does not "
            f"offer for {device.device_kind}; full or attention keep less on the device without it"
        )


def check_method(config, family, shape) -> None:
    """Raise FtjaxError if the tuning method does not suit the model, if it cannot train modules beside it, or for what
    a mixture of tokens cannot be trained with."""
    name = config.tuning.method
    check_mixing(config, shape)
    if config.tuning.modules_to_save and METHODS[name].peft_type not in ("LORA", "IA3"):
        raise FtjaxError(
            f"tuning.modules_to_save: {name} cannot train modules beside what it trains itself; lora, dora and ia3 can"
        )
    if new := [key for key in ("add_tokens", "pad_vocabulary_to") if config.data[key]]:
        if not METHODS[name].of_parameters and METHODS[name].peft_type != "LORA":
            raise FtjaxError(
                f"data.{new[0]}: PEFT has no form for rows of new tokens beside {name}; set tuning.method to lora, "
                "dora or full"
            )
        if tasks.find(config.task.kind).head == "masked":
            raise FtjaxError(
                f"data.{new[0]}: a head for task.kind masked has a bias for each token, for which PEFT has no form; "
                "leave it out"
            )
        if config.tuning.init_from:
            raise FtjaxError(
                f"data.{new[0]}: a run that starts from an adapter (tuning.init_from) cannot add rows to its base; "
                "leave it out, or merge the adapter into its base and start from that model"
            )
        if config.model.quantise != "none" and config.model.quantise_tables:
            raise FtjaxError(
                f"data.{new[0]}: rows of a quantised table cannot be trained; set model.quantise_tables to False"
            )
    if METHODS[name].causal_only and not shape.causal:
        raise FtjaxError(
            f"tuning.method: {name} puts virtual tokens before a row, which needs a causal model; in a "
            f"{family.model_type} model every token sees all others. Use lora"
        )


def with_teacher(config, shape) -> None:
    """Set config.distil.width and, if there are none, config.distil.layers, if the run compares hidden states.

    Args:
        config: The run's config.
        shape: The ModelConfig of the student.

    Raises:
        FtjaxError: If the student or its teacher is no encoder, or for layers that they do not have.
    """
    distil, path = config.distil, config.task.reference
    if not distil.hidden:
        return
    teacher = shape_of(path)
    for key, one in (("model.path", shape), ("task.reference", teacher)):
        if one.causal:
            raise FtjaxError(
                f"distil.hidden: {key} is a decoder, and hidden states of encoders are compared. A decoder learns from "
                "its teacher's distributions, with task.kind causal and distil.hidden=0"
            )
    every = ((i, round(i * teacher.layers / shape.layers)) for i in range(shape.layers + 1))
    distil.width, distil.layers = teacher.width, distil.layers or tuple(every)
    if wrong := [pair for pair in distil.layers if pair[0] > shape.layers or pair[1] > teacher.layers]:
        raise FtjaxError(
            f"distil.layers: the pair {wrong[0]} is of layers that are not there: the student has the layers 0 to "
            f"{shape.layers}, and {path} has 0 to {teacher.layers}"
        )


def check_new_head(new: list[str], trained: dict, config) -> None:
    """Raise FtjaxError if a newly initialised module of the head would not be trained. trained: tree of the trained
    parameters."""
    paths = set(flatten(trained))
    if left := [path for path in new if not any(p.startswith(f"{path}/") or p == path for p in paths)]:
        raise FtjaxError(
            f"tuning.method: {config.tuning.method} would not train {', '.join(left)}, which the model's files do "
            "not have, so that it would keep its random start; set tuning.method to full"
        )


def with_task(config, family, shape, folder, labels: int):
    """The model's shape with the head that config.task needs. labels: number of labels.

    Raises FtjaxError for a task that the family has no head for.
    """
    return families.with_head(family, shape, tasks.find(config.task.kind).head, labels, folder, config.task.pool)


def kernels(config, device) -> attention_backends.Kernels:
    """The Kernels of attention of a config's model on a device, or on any object with a `platform`."""
    several = config.data.packing or tasks.find(config.task.kind).texts > 1  # documents a row
    capability = getattr(device, "compute_capability", "")
    return attention_backends.choose(config.model.attention, device.platform, capability, several)


def check_attention(config, spec: Spec, mesh, dtype, lengths: list[int]) -> str:
    """A line about the kernel of attention that rows of these lengths get, or an empty text. Raises FtjaxError if the
    kernel that model.attention names cannot compute them."""
    shape, prefix = spec.model, METHODS[config.tuning.method].virtual_tokens(spec) > 0
    rows, runs = config.train.batch_size // config.train.accumulate, kernels(config, mesh.devices.flat[0])
    how = prefix, bool(config.train.dropout), mesh.shape
    cases = [attention_backends.case_of(runs, shape, dtype, rows, T, *how) for T in lengths]
    return attention_backends.settle(config.model.attention, cases)


def build(config, spec: Spec, mesh, dtype, steps: int, attention=None) -> Program:
    """Build the Program of a config.

    Its functions must be traced with `mesh` in force: `jax.set_mesh`, or `jax.sharding.use_abstract_mesh` if its
    devices are not on this machine. Shapes and shardings are the same without.

    Args:
        config: A config whose defaults are filled in.
        spec: The model and its tuning.
        mesh: The devices.
        dtype: Dtype of computation.
        steps: Number of steps, for the schedule.
        attention: The model's Kernels, for a mesh without devices; None: by the devices, or XLA's without devices.

    Raises:
        FtjaxError: If the method changes parameters that model.quantise would quantise, or if the mesh cannot split
            the model.
    """
    method, shape = METHODS[config.tuning.method], spec.model
    if (ways := mesh.shape.get("expert", 1)) > 1 and (not shape.experts or shape.experts % ways):
        raise FtjaxError(
            f"mesh.expert: {ways} devices cannot deal the {shape.experts} experts of this model in equal parts among "
            "themselves; set it to 1, or to a divisor of the number of experts"
        )
    if (ways := mesh.shape.get("sequence", 1)) > 1 and layers_with(shape, "delta"):
        raise FtjaxError(
            f"mesh.sequence: {ways} devices cannot share the tokens of a row, because layers with the delta rule need "
            "the state before them; set it to 1, and split rows (data, fsdp) or heads (tensor)"
        )
    dropout, ema = config.train.dropout or 0.0, config.train.ema
    if attention is None:
        concrete = isinstance(mesh, jax.sharding.Mesh)
        attention = kernels(config, mesh.devices.flat[0]) if concrete else attention_backends.Kernels()
    model = Transformer(shape, dtype, config.model.remat, config.model.unroll, dropout, config.train.neftune, attention)
    frozen_dtype = dtype if config.model.frozen_dtype == "auto" else jnp.dtype(config.model.frozen_dtype)
    trained_dtype = jnp.dtype(config.model.trained_dtype)
    base = weights.param_shapes(shape, frozen_dtype)
    small = quantiser(config.model.quantise, config.model, frozen_dtype)
    kept = map_paths(lambda path, x: jax.eval_shape(small(path), x) if small(path) else x, base)

    def begin(key, base):
        trained, frozen = method.init(key, base, spec)
        trained = trained | hidden.maps(key, config.distil, shape.width)
        return jax.tree.map(lambda x: x.astype(trained_dtype), trained), frozen

    trained, frozen = jax.eval_shape(begin, jax.random.key(0), kept)
    if not jax.tree.leaves(trained):
        raise FtjaxError(
            f"tuning.method: {config.tuning.method} trains no parameter of this model; check tuning.targets"
        )
    if quantised_size(frozen) != quantised_size(kept) or quantised_size(trained):
        raise FtjaxError(
            f"model.quantise: {config.model.quantise} quantises kernels that must stay frozen, but tuning.method "
            f"{config.tuning.method} as set here trains or changes some; set model.quantise to none"
            + ", or model.quantise_tables to False"
            * config.model.quantise_tables
        )
    if config.distil.hidden and all(path.startswith(BEHIND) for path in flatten(trained)):
        raise FtjaxError(
            f"distil.hidden: tuning.method {config.tuning.method} as set here trains nothing that the hidden states "
            "depend on; take another method, or set it to 0"
        )
    if config.privacy.epsilon and any(path.endswith("scalar/scale") for path in flatten(trained)):
        raise FtjaxError(
            f"privacy.epsilon: tuning.method {config.tuning.method} has the factors of this model's blocks, which have "
            "no gradient, and the noise of private training would change them; set tuning.method to lora"
        )
    left = [path for path in TABLES if path in flatten(frozen) and path not in flatten(trained)]
    if config.tuning.token_ids and left:
        raise FtjaxError(
            f"data.add_tokens: tuning.method {config.tuning.method} as set here would not train the rows of new tokens "
            f"in {' and '.join(left)}; set it to lora, dora or full"
        )
    trained_places = sharding.parameter_shardings(trained, shape, mesh, method.axes)
    frozen_places = sharding.parameter_shardings(frozen, shape, mesh, method.frozen_axes)

    def variables(trained, frozen):
        own, maps = hidden.divided(trained)
        return method.variables(own, frozen, spec) | maps

    rate = schedule(config.optim, steps, config.optim.lr)
    first, last = config.train.mixing_temperature
    temperature = lambda step: first * (last / first) ** (step / max(steps - 1, 1))  # noqa: E731
    layer_ids = functools.partial(method.layer_ids, spec=spec)
    optim = optimizer(config.optim, rate, multipliers(config.optim, shape.layers, method.lr_scale, layer_ids))
    moments = sharding.optimizer_shardings(optim, trained, trained_places, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    guarded, spike = config.train.on_bad_step != "stop" or config.train.spike > 0, config.train.spike
    guard = dict.fromkeys(("losses", "skipped", "in_a_row"), everywhere) if guarded else None
    state_places = State(everywhere, trained_places, moments, trained_places if ema else None, guard)
    options = xla.options(mesh.size, config.train.deterministic)
    step = compile_step(
        state_places, options, sums=tasks.objective(config, model), variables=variables, optimizer=optim,
        seed=config.seed, accumulate=config.train.accumulate, ema=ema, spike=spike,
        gradients=privacy.gradients_of(config), temperature=temperature if shape.mixing else None,
    )  # fmt: skip
    return Program(
        model=model, mesh=mesh, base=base, trained=trained, frozen=frozen,
        base_places=sharding.parameter_shardings(base, shape, mesh), trained_places=trained_places,
        frozen_places=frozen_places, state_places=state_places, read_dtype=frozen_dtype if frozen else trained_dtype,
        quantise=small, begin=jax.jit(begin, donate_argnums=1, out_shardings=(trained_places, frozen_places)),
        variables=variables, rate=jax.jit(rate), step=step,
        init_state=jax.jit(functools.partial(init_state, optim, ema=ema, guarded=guarded), out_shardings=state_places),
    )  # fmt: skip


def placed(shapes, places):
    """Shapes with their shardings, for compiling without arrays."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def shard_bytes(shapes) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def gradient_bytes(program: Program) -> int:
    """Bytes that one device holds of the gradients, which are kept in float32."""
    as_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), program.trained)
    return shard_bytes(placed(as_float32, program.trained_places))


def count(shapes) -> int:
    """Number of values in a tree of shapes; a quantised kernel counts as the kernel that it represents."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes, is_leaf=is_quantised))


def total(program: Program) -> int:
    """Number of values of the model that is trained, adapters included. Trained rows of a stack, which have places in
    the frozen stack too, count once."""
    frozen = flatten(program.frozen)
    twice = [x for path, x in flatten(program.trained).items() if path in frozen]
    return count((program.trained, program.frozen)) - count(twice)


def arguments(program: Program, B: int, T: int, M: int, config) -> tuple:
    """(state, frozen, batch) of a step as shapes with shardings."""
    task, distil = tasks.find(config.task.kind), config.distil
    state = jax.eval_shape(program.init_state, program.trained)
    arrays = dict.fromkeys(("tokens", "positions", "segment_ids"), (T, (), "int32"))
    arrays |= {"loss_index": (M, (), "int32"), "labels": (M, *task.target(program.model.config.head.labels))}
    arrays |= dict.fromkeys(("weights", *task.arrays), (M, (), "float32"))
    if distil.hidden:
        arrays["reference"] = T, (len(distil.layers), distil.width), "float32"
    elif task.once(config) or "reference" in task.arrays:
        arrays["reference"] = M, task.per_token(config, program.model.config.vocab_size), "float32"

    def array(name, width, more, dtype):
        shape = B, width, *more
        places = sharding.batch_sharding(program.mesh, name, shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=places)

    batch = {name: array(name, *how) for name, how in arrays.items()}
    return placed(state, program.state_places), placed(program.frozen, program.frozen_places), batch
