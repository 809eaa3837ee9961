"""One batch of eight rows, however it is cut: microbatches, and eight simulated devices in every mesh there is.

What devices send on each mesh is written down in collectives.txt. B rows, T tokens.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.models.axes import MESH_AXES
from ftjax.models.config import ModelConfig
from ftjax.objectives import causal
from ftjax.training import hlo, sharding
from ftjax.training import program as programs
from ftjax.training.optimizer import optimizer, schedule
from ftjax.training.step import State, compile_step, init_state
from ftjax.tree import flatten
from ftjax.tuning import METHODS

GOLDEN = Path(__file__).with_name("collectives.txt")
B, T, STEPS = 8, 16, 6
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "attention_bias": True,
}

# Every way to write 8 as a product over the mesh's axes, without that of experts.
AXES = tuple(axis for axis in MESH_AXES if axis != "expert")
MESHES = [dict(zip(AXES, n)) for n in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if math.prod(n) == 8]


def told(mesh):
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1)


# name -> (mesh, microbatches)
CUTS = {told(mesh): (mesh, 1) for mesh in MESHES}
CUTS |= {"accumulate=8": ({}, 8), "data=2,fsdp=2,accumulate=2": ({"data": 2, "fsdp": 2}, 2)}
# LoRA on all of them; full training, whose programs take longer to compile, where it differs.
RUNS = [("lora", cut) for cut in CUTS]
RUNS += [("full", cut) for cut in ("fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2,tensor=2")]
RUNS += [("full", "data=2,fsdp=2,accumulate=2")]

# For each mesh: parameter -> into how many parts it is split, as the table of ftjax.models.axes says.
PARTS = {
    "data=8": {"layers/attn/q_proj/kernel": 1, "embed/embedding": 1, "lm_head/kernel": 1},
    "fsdp=2,sequence=2,tensor=2": {
        "layers/attn/q_proj/kernel": 8, "layers/mlp/down_proj/kernel": 8, "embed/embedding": 8, "lm_head/kernel": 8,
        "layers/attn/q_proj/bias": 2, "layers/mlp/down_proj/lora/a": 2, "layers/mlp/down_proj/lora/b": 4,
    },
    "fsdp=8": {
        "layers/attn/q_proj/kernel": 8, "layers/mlp/down_proj/kernel": 8, "embed/embedding": 8, "lm_head/kernel": 8,
        "layers/attn/q_proj/bias": 1, "final_norm/scale": 1, "layers/attn/q_proj/lora/a": 8,
        "layers/attn/q_proj/lora/b": 1, "layers/mlp/down_proj/lora/b": 8,
    },
    "tensor=8": {
        "layers/attn/q_proj/kernel": 8, "layers/attn/k_proj/kernel": 1,  # four KV heads: not cut through
        "layers/attn/q_proj/bias": 8, "layers/attn/o_proj/kernel": 8, "layers/mlp/up_proj/kernel": 8,
        "embed/embedding": 8, "lm_head/kernel": 8, "final_norm/scale": 1, "layers/mlp/up_proj/lora/a": 1,
        "layers/mlp/up_proj/lora/b": 8,
    },
    "data=2,fsdp=2,tensor=2": {
        "layers/attn/q_proj/kernel": 4, "layers/attn/k_proj/kernel": 4, "layers/mlp/down_proj/kernel": 4,
        "embed/embedding": 4, "layers/mlp/down_proj/lora/a": 2, "layers/mlp/down_proj/lora/b": 2,
    },
    "fsdp=4,tensor=2": {
        "layers/attn/q_proj/kernel": 8, "layers/attn/v_proj/kernel": 8, "embed/embedding": 8,
        "layers/attn/v_proj/bias": 2, "layers/attn/v_proj/lora/a": 4, "layers/attn/v_proj/lora/b": 2,
    },
}  # fmt: skip


@functools.cache
def model():
    return tiny.read(tiny.tiny_models.make("llama", SIZES))


def batches():
    """Rows of unequal length, packed ones and empty ones among them, in another order each step."""
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        docs = tiny.documents((16, 11, 3, 7, 8, 9, 2), 64, seed=step)
        rows = [[docs[0]], [docs[1]], [docs[2], docs[6]], [docs[3], docs[4]], [docs[5]], [], [docs[1][:5]], []]
        rows = [rows[i] for i in rng.permutation(B)]
        batch = tiny.batch(rows, [[len(doc) // 3 for doc in row] for row in rows], T)
        for name in ("loss_index", "labels", "weights"):
            batch[name] = np.pad(batch[name], [(0, 0), (0, T - batch[name].shape[1])])
        batch["weights"] *= rng.choice(np.float32((1, 3)), (B, 1))  # the weight of a loss may differ by task
        yield batch


def keep_gradient():
    """An optimizer that passes gradients on and keeps the last one in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params=None: (gradient, gradient)
    )


PROGRAMS = {}  # (method, cut) -> the compiled step, and the bytes of its arguments on the first device


def held_by_one(arrays):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))


@functools.cache
def run(method_name, cut):
    """Losses of STEPS steps, first and last gradients, and the state and frozen tree as they lie on the mesh."""
    mesh_shape, accumulate = CUTS[cut] if cut else ({}, 1)
    # A few of the maps: programs compile the sooner.
    pair = tiny.tuned(model(), method=method_name, rank=4, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    method, trained, frozen = tiny.start(pair)
    shape = pair.model.config
    mesh_shape = dict.fromkeys(MESH_AXES, 1) | mesh_shape
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    config = configs.default().optim
    config.update(weight_decay=0.1, warmup=2)
    optim = optax.chain(keep_gradient(), optimizer(config, schedule(config, STEPS, 2e-3)))
    with jax.set_mesh(mesh):
        places = sharding.parameter_shardings(trained, shape, mesh, method.axes)
        trained = jax.device_put(jax.tree.map(np.asarray, trained), places)
        frozen = jax.device_put(jax.tree.map(np.asarray, frozen), sharding.parameter_shardings(frozen, shape, mesh))
        moments = sharding.optimizer_shardings(optim, trained, places, mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        state_places = State(everywhere, places, moments)
        state = tiny.jit(functools.partial(init_state, optim), out_shardings=state_places)(trained)
        step = compile_step(
            state_places, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
            variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0,
            accumulate=accumulate,
        )  # fmt: skip
        losses, gradients, local = [], [], sharding.local_rows(mesh, B)
        placed = [sharding.place_batch(batch, mesh, B, local) for batch in batches()]
        step = step.lower(state, frozen, placed[0]).compile(tiny.HASTE)
        unread = state.optimizer[0]  # the gradient before is kept, and never read
        PROGRAMS[method_name, cut] = step, held_by_one((state, frozen, placed[0])) - held_by_one(unread)
        for batch in placed:
            state, report = step(state, frozen, batch)
            losses.append(float(report["loss"]))
            gradients.append({path: np.asarray(g) for path, g in flatten(state.optimizer[0]).items()})
    return np.array(losses), (gradients[0], gradients[-1]), state, frozen


@pytest.mark.slow
@pytest.mark.parametrize("method, cut", RUNS)
def test_same_losses_and_gradients_however_the_batch_is_cut(method, cut):
    want, want_gradients, _, _ = run(method, None)
    got, gradients, _, _ = run(method, cut)
    assert want[-1] != want[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for path, g in theirs.items():
            # A has no gradient while B is zero.
            np.testing.assert_allclose(ours[path], g, rtol=0, atol=1e-5 * np.abs(g).max(), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("method, cut", [run for run in RUNS if run[1] in PARTS])
def test_parameters_and_moments_are_split_as_the_table_says(method, cut):
    _, _, state, frozen = run(method, cut)
    adam = state.optimizer[1][1]
    trees = [flatten(state.trained), flatten(frozen), flatten(adam.mu), flatten(adam.nu)]
    checked = 0
    for path, parts in PARTS[cut].items():
        for leaves in trees:
            if path in leaves:
                x, checked = leaves[path], checked + 1
                assert len(x.addressable_shards) == 8
                assert {shard.data.size for shard in x.addressable_shards} == {x.size // parts}, path
    assert checked >= len(PARTS[cut])


@pytest.mark.slow
def test_collectives_are_those_of_the_golden_table():
    """What one device sends in a step of each mesh: a change must be seen, understood and written down."""
    lines = []
    for method, cut in RUNS:
        run(method, cut)
        found = {c.kind: f"{c.count} x, {c.bytes:,.0f} B" for c in hlo.collectives(PROGRAMS[method, cut][0].as_text())}
        lines.append(f"{method} {cut}".ljust(39) + "".join(found.get(kind, "-").rjust(20) for kind in hlo.SENT))
    head = f"jaxlib {jaxlib.__version__}".ljust(39) + "".join(kind.rjust(20) for kind in hlo.SENT)
    if os.environ.get("FTJAX_WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join([head, *lines, ""]))
    want_head, *want = GOLDEN.read_text().splitlines()
    if want_head != head:
        pytest.skip(f"written down for {want_head.split('  ')[0]}; FTJAX_WRITE_GOLDEN=1 writes it anew")
    difference = "\n".join(difflib.unified_diff(want, lines, "collectives.txt", "now", lineterm="", n=0))
    assert not difference, f"if it is meant, FTJAX_WRITE_GOLDEN=1 writes it down:\n{difference}"


@pytest.mark.slow
@pytest.mark.parametrize("method, cut", RUNS)
def test_a_device_holds_its_own_parts_alone(method, cut):
    run(method, cut)
    program, held = PROGRAMS[method, cut]
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("mesh", MESHES, ids=told)
def test_arguments_of_a_device_are_the_total_over_the_shards(mesh):
    """Of a model whose sizes all divide, norms aside: weights and moments over all axes that split them, rows too."""
    shape = ModelConfig(
        vocab_size=1024, width=128, layers=2, heads=8, kv_heads=8, head_dim=16, hidden=256, max_positions=64, tied=False
    )
    config = configs.default()
    config.tuning.method = "full"
    programs.fill_defaults(config)

    def held(sizes):
        abstract = sharding.abstract_mesh(dict.fromkeys(MESH_AXES, 1) | sizes)
        with jax.sharding.use_abstract_mesh(abstract):
            spec = tiny.spec(families.FAMILIES["llama"], shape, method="full")
            program = programs.build(config, spec, abstract, jnp.dtype("float32"), STEPS)
            state, _, batch = programs.arguments(program, B, 64, 64, config)
            return programs.shard_bytes(state), programs.shard_bytes(batch)

    state, batch = held({})
    ours, our_batch = held(mesh)
    assert ours == pytest.approx(state / (mesh["fsdp"] * mesh["sequence"] * mesh["tensor"]), rel=0.02)
    by_rows, by_tokens = mesh["data"] * mesh["fsdp"], mesh["sequence"]
    assert our_batch == pytest.approx(batch / by_rows * (5 / by_tokens + 1) / 6)  # every device knows all places


@pytest.mark.slow
def test_bfloat16_is_summed_in_float32_between_devices():
    """XLA's CPU compiler cannot sum bfloat16 between devices at all, and no other should."""
    config = configs.default()
    config.update_from_flattened_dict(
        {"tuning.method": "full", "model.trained_dtype": "bfloat16", "train.batch_size": B, "optim.lr": 1e-2}
    )
    pair = tiny.tuned(model(), method="full")

    def losses(mesh):
        mesh = sharding.make_mesh(mesh, jax.devices()[: math.prod(mesh.values())])
        with jax.set_mesh(mesh):
            program = programs.build(config, pair.spec, mesh, jnp.dtype("bfloat16"), STEPS)
            base = jax.tree.map(lambda x: np.asarray(x, program.read_dtype), pair.params)
            trained, frozen = program.begin(jax.random.key(0), jax.device_put(base, program.base_places))
            state, out = program.init_state(trained), []
            for batch in batches():
                batch = sharding.place_batch(batch, mesh, B, sharding.local_rows(mesh, B))
                state, report = program.step(state, frozen, batch)
                out.append(float(report["loss"]))
        return np.array(out)

    want, got = losses({"data": 1}), losses({"data": 2, "fsdp": 2, "sequence": 2})
    assert want[-1] < want[0] - 0.01
    np.testing.assert_allclose(got, want, rtol=5e-3)


@pytest.mark.slow
def test_layers_in_two_stacks_on_a_mesh():
    """The frozen lower one and the trained one above it are split as one stack would be."""
    cut = "data=2,fsdp=2,tensor=2"
    want, _, _, _ = run("last_layers", None)
    got, _, state, frozen = run("last_layers", cut)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, parts in PARTS[cut].items():
        if path.startswith("layers/") and path.endswith("/kernel"):
            for x in (flatten(frozen)[path], flatten(state.trained)[f"top_{path}"]):
                assert x.shape[0] == 1 and {shard.data.size for shard in x.addressable_shards} == {x.size // parts}


def test_mesh_that_does_not_fit_the_devices():
    for sizes in ({"data": 3}, {"data": -1, "fsdp": 3}, {"data": 8, "fsdp": -1, "tensor": 2}, {"data": 0}):
        with pytest.raises(FtjaxError, match="does not multiply to the 8 devices"):
            sharding.make_mesh(sizes)
    with pytest.raises(FtjaxError, match="data=-1, fsdp=-1, .* does not multiply to the 1 devices"):
        sharding.make_mesh({"data": -1, "fsdp": -1}, jax.devices()[:1])
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
    assert mesh.shape == {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}


def test_every_parameter_of_every_family_has_a_place():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    for name in tiny.VARIANTS:
        for method_name in ("full", "lora"):
            pair = tiny.tuned(tiny.pair(name), method=method_name)
            method = METHODS[method_name]
            init = functools.partial(method.init, spec=pair.spec)
            trained, frozen = jax.eval_shape(init, jax.random.key(0), pair.params)
            for tree, axes in ((trained, method.axes), (frozen, sharding.parameter_axes)):
                for path, place in flatten(sharding.parameter_shardings(tree, pair.model.config, mesh, axes)).items():
                    place.shard_shape(flatten(tree)[path].shape)  # raises where a part is not whole


def test_batches_go_to_their_rows():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"tokens": np.arange(B * T).reshape(B, T)}
    placed = sharding.place_batch(batch, mesh, B, sharding.local_rows(mesh, B))["tokens"]
    assert sharding.row_ways(mesh) == 4
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert all(shard.data.shape == (2, T) for shard in placed.addressable_shards)
