"""Private training against single examples' gradients by PyTorch, dp-accounting, and the statistics that it assumes."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_encoders
import tiny_labelled
from scipy import stats

import ftjax
from ftjax import config as configs
from ftjax import tasks
from ftjax.data.batches import Poisson
from ftjax.data.read import read_table
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.training import privacy, sharding
from ftjax.training.report import Progress, read_metrics
from ftjax.training.step import init_state, train_step
from ftjax.tree import flatten

CLIP = 0.5
KEY = jax.random.key(3)
DOCS, PROMPTS = tiny.documents((16, 11, 7, 9)), (3, 2, 1, 4)


def rows(docs, prompts, empty=0):
    return tiny.batch([[doc] for doc in docs] + [[]] * empty, [[p] for p in prompts] + [[]] * empty, 16)


def clipped(found: list[dict], clip: float) -> dict:
    """The sum of gradients {path: array}, each scaled down to a norm of at most `clip`, by numpy in float64."""
    total: dict = {}
    for one in found:
        norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in one.values()))
        for path, g in one.items():
            total[path] = total.get(path, 0.0) + np.asarray(g, np.float64) * min(1.0, clip / norm)
    return total


def same(ours: dict, theirs: dict, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(g).max() for g in theirs.values())
    for path, g in theirs.items():
        np.testing.assert_allclose(ours[path], g, atol=tolerance * max(scale, 1), err_msg=path)


def test_clipped_gradients_are_those_of_a_loop_in_pytorch():
    pair = tiny.tuned(tiny.pair("llama-tied"), method="full")
    method, trained, frozen = tiny.start(pair)
    theirs = []
    for doc, prompt in zip(DOCS, PROMPTS):
        pair.torch.zero_grad()
        loss, count = tiny.torch_loss(pair.torch, [doc], [prompt])
        (loss / count).backward()
        theirs.append(tiny.torch_gradients(pair, pair.torch))
    variables = functools.partial(method.variables, spec=pair.spec)
    sums = jax.jit(
        lambda clip: privacy.clipped_sums(
            functools.partial(causal.sums, pair.model), variables, trained, frozen, rows(DOCS, PROMPTS), KEY,
            clip=clip, group=2,
        )[0]
    )  # fmt: skip
    norms = [np.sqrt(sum(np.square(g).sum() for g in one.values())) for one in theirs]
    for clip in (np.median(norms), 1e6):  # some are clipped, or none
        same({path: np.asarray(g) for path, g in flatten(sums(clip)).items()}, clipped(theirs, clip), 2e-6)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("classify", "lora"),
        ("classify", "full"),
        ("classify", "head"),
        ("multilabel", "head"),
        ("regress", "lora"),
        ("regress", "full"),
        ("tag", "lora"),
        ("tag", "head"),
    ],
)
def test_clipped_gradients_are_those_of_a_loop(kind, method, tmp_path):
    head = tasks.find(kind).head
    _, family, shape, params = tiny_encoders.make("bert", head, tmp_path)
    pair = tiny.Pair(None, family, Transformer(shape), params, tiny.spec(family, shape, method=method, rank=2))
    how, trained, frozen = tiny.start(pair)
    rng = np.random.default_rng(0)
    batch = rows(DOCS, PROMPTS, empty=2)
    batch |= {name: batch[name][:, : 5 if kind == "tag" else 1] for name in ("loss_index", "weights")}
    shape_of, dtype = tasks.find(kind).target(shape.head.labels)
    batch["labels"] = rng.integers(0, 2, (*batch["weights"].shape, *shape_of)).astype(dtype)
    sums = functools.partial(tasks.find(kind).sums, pair.model)
    variables = functools.partial(how.variables, spec=pair.spec)

    @jax.jit
    def one(row):
        def loss(trained):
            total, weight, _ = sums(variables(trained, frozen), row)
            return total / weight

        return jax.grad(loss)(trained)

    alone = [flatten(one({name: x[i : i + 1] for name, x in batch.items()})) for i in range(len(DOCS))]
    group = 1 if kind == "tag" else 3  # with 1, the text of 7 tokens and the empty rows are computed without padding
    ours, weight, _ = jax.jit(
        lambda batch: privacy.clipped_sums(sums, variables, trained, frozen, batch, KEY, clip=CLIP, group=group)
    )(batch)
    assert weight == batch["weights"].sum()
    same({path: np.asarray(g) for path, g in flatten(ours).items()}, clipped(alone, CLIP))


def linear(variables, batch, rngs=None):
    """Logistic regression with dropout, as the sums of an objective."""
    x = batch["x"] * jax.random.bernoulli(rngs["dropout"], 0.7, batch["x"].shape)
    loss = jnp.sum(jax.nn.softplus(-batch["y"] * (x @ variables["w"])) * batch["weights"])
    return loss, jnp.sum(batch["weights"]), {"loss": loss}


def toy(count=32, width=50):
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(count, width)), "y": rng.choice([-1.0, 1.0], count), "weights": np.ones(count)}
    return {"w": jnp.zeros(width)}, {name: x.astype(np.float32) for name, x in batch.items()}


def gradient(trained, batch, key=KEY, accumulate=1, **how):
    how = {"clip": CLIP, "noise": 1.5, "expected": 20} | how
    take = lambda trained, frozen: trained  # noqa: E731
    return privacy.gradients(linear, take, trained, {}, batch, key, accumulate, **how)[0]


def test_noise_and_dropout_are_the_same_on_any_devices_and_microbatches():
    trained, batch = toy()
    want = np.asarray(gradient(trained, batch)["w"])
    for accumulate in (2, 4):
        np.testing.assert_allclose(gradient(trained, batch, accumulate=accumulate)["w"], want, rtol=1e-5, atol=1e-7)
    for devices in (2, 8):
        mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = sharding.place_batch(batch, mesh, 32, slice(0, 32))
            got = jax.jit(gradient, static_argnames="accumulate")(trained, placed, accumulate=2)
        np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-7)


def test_a_model_has_the_same_gradient_on_eight_devices():
    pair = tiny.tuned(tiny.pair("llama-tied"), method="lora", rank=2)
    method, trained, frozen = tiny.start(pair)
    batch = rows([*DOCS, *DOCS[::-1]], [*PROMPTS, *PROMPTS])
    sums, variables = functools.partial(causal.sums, pair.model), functools.partial(method.variables, spec=pair.spec)
    f = functools.partial(privacy.gradients, sums, variables, clip=CLIP, noise=0.1, expected=8, accumulate=1)
    want = jax.jit(f)(trained, frozen, batch, key=KEY)
    mesh = sharding.make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        got = jax.jit(f)(trained, frozen, sharding.place_batch(batch, mesh, 8, slice(0, 8)), key=KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.device_get(got), want)


def test_the_noise_is_normal_with_the_stated_deviation():
    trained, batch = {"w": jnp.zeros(20_000)}, {"x": np.zeros((4, 20_000), np.float32), "y": np.ones(4, np.float32)}
    batch["weights"] = np.zeros(4, np.float32)
    draws = np.asarray(gradient(trained, batch, noise=2.0, expected=10)["w"])
    assert stats.kstest(draws / (2.0 * CLIP / 10), "norm").pvalue > 1e-3
    again = np.asarray(gradient(trained, batch, jax.random.key(4), noise=2.0, expected=10)["w"])
    assert abs(np.corrcoef(draws, again)[0, 1]) < 0.04


def test_one_example_moves_the_sum_by_at_most_the_clipping_norm():
    trained, batch = toy()
    quiet = jax.jit(functools.partial(gradient, trained, noise=0.0, expected=1))
    whole = quiet(batch)
    moved, replaced = [], []
    for i in range(8):
        x, weights = batch["x"].copy(), batch["weights"].copy()
        weights[i] = 0
        moved.append(float(optax.tree.norm(optax.tree.sub(whole, quiet(batch | {"weights": weights})))))
        x[i] *= -100
        replaced.append(float(optax.tree.norm(optax.tree.sub(whole, quiet(batch | {"x": x})))))
    assert max(moved) <= CLIP * (1 + 1e-5) and max(moved) > 0.9 * CLIP
    assert CLIP < max(replaced) <= 2 * CLIP * (1 + 1e-5)


def test_batches_draw_each_example_independently():
    lengths = [3, 5, 9] * 20
    examples = [Example(np.arange(n), np.ones(n, bool)) for n in lengths]
    N, expected, steps = len(examples), 6, 3000
    batches = Poisson(examples, expected, 9, steps=steps, multiple=4, seed=5)
    counts, sizes, together, parts = np.zeros(N), [], 0, np.gcd(batches.batch_size, 8)
    for step in range(steps):
        members = np.concatenate(batches.rows(step))
        counts[members] += 1
        sizes.append(len(members))
        together += 0 in members and 1 in members
        for part in np.split(np.array([len(row) and lengths[row[0]] for row in batches.rows(step)]), parts):
            assert (np.diff(part) >= 0).all()
    assert batches.batch_size % 4 == 0 and batches.batch_size >= max(sizes) > batches.batch_size - 4
    q = expected / N
    edges = np.arange(2, 12)  # numbers of examples; the first stands for all below it, the last for all above it
    seen = np.bincount(np.clip(sizes, 2, 11) - 2, minlength=10)
    law = np.diff([0.0, *stats.binom.cdf(edges[:-1], N, q), 1.0])
    assert stats.chisquare(seen, steps * law).pvalue > 1e-3
    assert stats.chi2.sf(((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum(), N) > 1e-3
    assert abs(together - steps * q * q) < 5 * np.sqrt(steps * q * q)
    again = Poisson(examples, expected, 9, steps=steps, multiple=4, seed=5)
    assert all((again[700][name] == x).all() for name, x in batches[700].items())
    ((B, T, M),) = batches.shapes()  # one program, which cuts groups of rows to their own lengths
    assert all((batches[i]["tokens"].shape, batches[i]["labels"].shape) == ((B, T), (B, M)) for i in range(50))
    with pytest.raises(IndexError):
        batches[steps]


def test_the_rows_of_a_person_are_drawn_together_and_clipped_together():
    rng = np.random.default_rng(2)
    unit = rng.permutation(np.repeat(np.arange(24), rng.integers(1, 4, 24)))
    lengths = rng.integers(3, 10, len(unit))
    examples = [Example(np.arange(n), np.ones(n, bool)) for n in lengths]
    batches = Poisson(examples, 6, 9, steps=400, multiple=8, unit=unit, seed=1)
    assert batches.rate == 6 / 24 and batches.batch_size % (8 * 3) == 0
    counts = np.zeros(24)
    for step in range(400):
        persons = np.array([row[0] if len(row) else -1 for row in batches.rows(step)]).reshape(-1, 3)
        drawn = [sorted(rows[rows >= 0]) for rows in persons if (rows >= 0).any()]
        assert all(rows == np.flatnonzero(unit == unit[rows[0]]).tolist() for rows in drawn)
        counts[[unit[rows[0]] for rows in drawn]] += 1
        assert batches[step]["tokens"].shape[1] >= max([lengths[i] for rows in drawn for i in rows], default=0)
    assert stats.chi2.sf(((counts - 100) ** 2 / 75).sum(), 24) > 1e-3

    capped = Poisson(examples, 6, 9, steps=4, multiple=8, unit=unit, most=2, seed=1)
    assert capped.units.shape == (25, 2) and capped.rate == 6 / 24 and (capped.units[-1] < 0).all()
    for person, rows in enumerate(capped.units[:-1]):
        own, rows = np.flatnonzero(unit == person), rows[rows >= 0]
        assert len(set(rows)) == min(2, len(own)) and set(rows) <= set(own)
        assert capped.longest[person] == max(lengths[rows])
    firsts = [np.flatnonzero(unit == person)[: capped.units.shape[1]].tolist() for person in range(24)]
    assert [sorted(rows[rows >= 0]) for rows in capped.units[:-1]] != firsts  # drawn, not the first ones

    trained, batch = toy(24)
    batch["weights"][[2, 4, 5]] = 0  # persons of three rows, some of which are padding
    take = lambda trained, frozen: trained  # noqa: E731
    found = []
    for rows in np.arange(24).reshape(8, 3):
        whole = {name: jnp.asarray(x[rows]) for name, x in batch.items()}
        pull = -0.5 * (whole["y"] * whole["weights"])[:, None] * whole["x"]  # at w = 0
        found.append({"w": np.asarray(pull.sum(0) / whole["weights"].sum())})

    def plain(variables, batch, rngs=None):
        loss = jnp.sum(jax.nn.softplus(-batch["y"] * (batch["x"] @ variables["w"])) * batch["weights"])
        return loss, jnp.sum(batch["weights"]), {"loss": loss}

    def ours(batch, accumulate=1):
        how = {"clip": CLIP, "noise": 0.0, "expected": 1, "unit": 3}
        return privacy.gradients(plain, take, trained, {}, batch, KEY, accumulate, **how)[0]

    want = clipped(found, CLIP)
    same(ours(batch), want)
    same(ours(batch, 4), want)
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        same(jax.jit(ours)(sharding.place_batch(batch, mesh, 24, slice(0, 24))), want)


def test_epsilon_is_that_of_dp_accounting():
    dp = pytest.importorskip("dp_accounting")
    assert privacy.epsilon(1.5, "rdp", 0.04, 2250, 1e-5) == pytest.approx(7.329, abs=1e-3)
    assert privacy.epsilon(1.5, "pld", 0.04, 2250, 1e-5) == pytest.approx(6.769, abs=1e-3)
    noise = privacy.calibrated(3.0, "rdp", 0.02, 300, 1e-5)
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(noise)), 300))
    assert 3.0 - 0.01 < accountant.get_epsilon(1e-5) <= 3.0
    assert privacy.epsilon(noise, "rdp", 0.02, 0, 1e-5) == 0


REFUSED = {
    "data.packing": True, "data.augment.copies": 1, "data.augment.prompts": ("{a}",),
    "data.clean.exact": True, "data.clean.near": 0.9,
    "data.mixture": ({"train": "a"},), "task.balanced": True, "task.class_weights": ("balanced",),
    "task.threshold": "f1", "train.neftune": 5.0, "train.on_bad_step": "skip", "train.spike": 3.0,
    "train.patience": 2, "train.select": "accuracy", "export.checkpoint": "best", "mesh.fsdp": 2,
    "mesh.sequence": 2, "mesh.tensor": 2, "mesh.expert": 2, "task.reference": "there", "optim.ewc": 1.0,
    "task.kind": "embed",
}  # fmt: skip


def test_settings_that_break_the_guarantee_are_refused_with_the_reason(monkeypatch):
    assert REFUSED.keys() >= privacy.REFUSED.keys()
    good = configs.from_dict({"privacy.epsilon": 3.0, "export.checkpoint": "last"})
    with monkeypatch.context() as patch, pytest.raises(FtjaxError, match="runs in one process"):
        patch.setattr(jax, "process_count", lambda: 2)
        privacy.check(good)
    privacy.check(good)
    for key, value in [*REFUSED.items(), *(("task.kind", kind) for kind in ("masked", "span", "preference"))]:
        config = configs.from_dict(configs.flat(good) | {key: value})
        with pytest.raises(FtjaxError, match="examples" if key == "task.kind" else f"{key}: private training"):
            privacy.check(config)
        config.privacy.epsilon = 0.0
        privacy.check(config)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"train.batch_size": 500}, "more than the 200 training examples"),
        ({"privacy.delta": 0.01}, "not below 1 / 200"),
        ({"privacy.noise": 0.3}, "more than privacy.epsilon 2"),
    ],
)
def test_numbers_that_give_no_guarantee_are_refused(more, told, tmp_path):
    part = type("Part", (list,), {"pieces": ()})(range(200))
    flat = {"privacy.epsilon": 2.0, "train.batch_size": 20, "privacy.delta": 1e-4}
    with pytest.raises(FtjaxError, match=told):
        privacy.settle(configs.from_dict(flat | more), part, 100)
    found = [{"who": "ann"}, {"who": "bob"}, {"who": None}]
    table = read_table(tiny_labelled.write(tmp_path / "a.jsonl", found), "data.train")
    piece = type("Piece", (), {"kept": np.array([0, 0, 1]), "table": table})
    part = type("Part", (), {"pieces": (piece,)})
    assert privacy.units("who", part).tolist() == [0, 0, 1]
    for column, kept, message in (("whose", [0], ": no column 'whose'"), ("who", [0, 2], "row 3 has None in 'who'")):
        piece.kept = np.array(kept)
        with pytest.raises(FtjaxError, match=message):
            privacy.units(column, part)
    part = type("Part", (list,), {"pieces": (piece,)})(range(55))
    piece.table = read_table(tiny_labelled.write(tmp_path / "b.jsonl", [{"who": i} for i in range(25)]), "data.train")
    piece.kept = np.array([*range(25), *[1] * 30])
    given = configs.from_dict(flat | {"privacy.unit": "who", "privacy.noise": 9.0})
    with pytest.raises(FtjaxError, match="one person has 31 rows, and a person has 2.2 on average"):
        privacy.settle(given, part, 1)
    given.privacy.unit_most = 4
    privacy.settle(given, part, 1)
    assert given.privacy.unit_rows == 4
    piece.kept = np.array([0, 0, 1])
    with pytest.raises(FtjaxError, match="several examples each"):
        privacy.settle(configs.from_dict(flat), type("Part", (list,), {"pieces": (piece,)})(range(200)), 100)


def test_what_several_private_runs_have_spent_is_added_up(tmp_path):
    assert privacy.together(tmp_path) == ""
    for name, epsilon in (("a", 1.0), ("b", 2.0), ("c/d", None)):
        (tmp_path / name).mkdir(parents=True)
        kept = {"privacy": {"epsilon": epsilon, "delta": 1e-5}} if epsilon else {}
        (tmp_path / name / "run.json").write_text(json.dumps(kept))
    assert "the 2 private runs in" in privacy.together(tmp_path)
    assert "epsilon 3.000 at delta 2e-05" in privacy.together(tmp_path)


def test_what_a_run_that_may_not_be_read_has_spent_is_not_left_out(tmp_path, bound_by_permissions):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"privacy": {"epsilon": 1.0, "delta": 1e-5}}))
    (tmp_path / "c").chmod(0)
    try:
        with pytest.raises(PermissionError, match="/c"):
            privacy.together(tmp_path)
    finally:
        (tmp_path / "c").chmod(0o755)


def test_a_plan_reckons_with_the_rows_of_a_full_step():
    config = configs.from_dict({"train.batch_size": 100, "train.accumulate": 2})
    assert privacy.fullest(config, 1) == 100
    config.privacy.epsilon = 1.0
    assert privacy.fullest(config, 1) == 144 and privacy.fullest(config, 4) == 192
    config.privacy.unit_rows = 3
    assert privacy.fullest(config, 1) == 432


def test_without_the_accountant_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(FtjaxError, match=r"pip install 'ftjax\[privacy\]'"):
        privacy.epsilon(1.0, "rdp", 0.1, 5, 1e-5)


def test_a_run_keeps_its_guarantee_and_resumes_to_the_bit(tmp_path, monkeypatch):
    base = tiny_labelled.make(tmp_path / "bert", "bert")

    def config(run, **more):
        given = {"train__steps": 6, "train__log_every": 1, "train__save_every": 2, "train__eval_every": 3}
        given |= {"privacy__epsilon": 8, "privacy__delta": 1e-3, "export__checkpoint": "last"}
        c = tiny_labelled.config(tmp_path, base, **given | more)
        c.run_dir = str(tmp_path / run)
        return c

    def urandom(byte):
        monkeypatch.setattr(privacy.os, "urandom", lambda count: bytes([byte]) * count)

    urandom(5)
    whole = ftjax.train(config("whole"), say=lambda text: None)
    assert 7.9 < whole.privacy["epsilon"] <= 8 and whole.best_step == 6
    spent = [row["epsilon"] for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert spent == sorted(spent) and spent[-1] == whole.privacy["epsilon"]
    for name in ("run.json", "results.json", "adapter/ftjax.json"):
        assert json.loads((tmp_path / "whole" / name).read_text())["privacy"] == whole.privacy
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert f"({whole.privacy['epsilon']:.3f}, 0.001)-differentially private" in card
    file = tmp_path / "whole" / privacy.SECRET
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == "05" * 32
    others = [path for path in (tmp_path / "whole").rglob("*") if path.is_file() and path != file]
    assert not any(secret in path.read_bytes() for path in others for secret in (b"05" * 32, bytes([5]) * 32))
    ftjax.export(tmp_path / "whole", tmp_path / "out", checkpoint="last")
    assert (tmp_path / "out" / "README.md").read_text() == card

    count, started = Progress.count, []

    def stop(self, tokens):
        count(self, tokens)
        started.append(tokens)
        if len(started) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", stop)
        with pytest.raises(KeyboardInterrupt):
            ftjax.train(config("cut"), say=lambda text: None)
    for key, value in (
        ("privacy__clip", 2.0),
        ("privacy__epsilon", 9.0),
        ("train__steps", 7),
        ("train__batch_size", 8),
    ):
        with pytest.raises(FtjaxError, match="holds another run"):
            ftjax.train(config("cut", **{key: value}), say=lambda text: None)
    urandom(6)
    secret = (tmp_path / "cut" / privacy.SECRET).read_text()
    (tmp_path / "cut" / privacy.SECRET).unlink()
    with pytest.raises(FtjaxError, match="secret: is missing. The run's draws and noise follow from it"):
        ftjax.train(config("cut"), say=lambda text: None)
    (tmp_path / "cut" / privacy.SECRET).write_text("5")
    with pytest.raises(FtjaxError, match="expected the 64 hexadecimal digits that the run wrote; restore the file"):
        ftjax.train(config("cut"), say=lambda text: None)
    (tmp_path / "cut" / privacy.SECRET).write_text(secret)
    again = ftjax.train(config("cut"), say=lambda text: None)
    assert again.resumed_from == 2
    ftjax.train(config("other", train__steps=2), say=lambda text: None)
    found = {
        (run, step): [x["loss"] for x in read_metrics(tmp_path / run) if "loss" in x][:step]
        for run, step in (("whole", 6), ("cut", 6), ("other", 2))
    }
    assert found["cut", 6] == found["whole", 6] and found["other", 2] != found["whole", 6][:2]
    ours, theirs = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("cut", "whole"))
    assert ours == theirs


def test_any_gradient_can_be_given_to_a_step():
    """A gradient of one's own is a function; no file of ftjax changes."""

    def signs(sums, variables, trained, frozen, batch, key, accumulate):
        def loss(trained):
            return sums(variables(trained, frozen), batch, rngs={"dropout": key})[0]

        return jax.tree.map(jnp.sign, jax.grad(loss)(trained)), jnp.float32(1), {"loss": jnp.float32(0)}

    trained, batch = toy()
    sgd = optax.sgd(0.1)
    after, _ = train_step(
        init_state(sgd, trained), {}, batch, sums=linear, variables=lambda trained, frozen: trained, optimizer=sgd,
        seed=0, gradients=signs,
    )  # fmt: skip
    assert set(np.unique(np.abs(after.trained["w"]))) == {np.float32(0.1)}


def test_a_run_keeps_a_guarantee_by_person(tmp_path):
    base = tiny_labelled.make(tmp_path / "bert", "bert")
    given = {"privacy__epsilon": 8, "privacy__delta": 1e-3, "privacy__unit": "who", "export__checkpoint": "last"}
    # A quarter of a pass over the persons; one over the rows has 20 steps.
    c = tiny_labelled.config(tmp_path, base, **given, train__steps=0, train__epochs=0.25, train__batch_size=8)
    c.data.train = tiny_labelled.write(
        tmp_path / "train.jsonl", tiny_labelled.rows(200, 0, who=lambda rng: f"p{rng.integers(60)}")
    )
    found = ftjax.train(c, say=lambda text: None).privacy
    assert found["unit"] == "who" and 8 / 60 <= found["rate"] < 8 / 50  # some persons have no training row
    assert 5 <= json.loads((tmp_path / "run" / "run.json").read_text())["config"]["privacy"]["unit_rows"] < 12
    assert "removing all examples of one who, for 2 steps" in (tmp_path / "run" / "adapter" / "README.md").read_text()
