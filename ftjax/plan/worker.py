"""The process that compiles for a plan. Its environment is set before JAX starts. `python -m ftjax.plan.worker JOB`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ftjax import config as configs
from ftjax import tasks
from ftjax.data.batches import GRANULE
from ftjax.data.prepare import prepare
from ftjax.errors import FtjaxError
from ftjax.hub import families, resolve
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import compute_dtype, with_tokens
from ftjax.plan import compiled, search
from ftjax.plan.devices import parse
from ftjax.training import auto_mesh, sharding
from ftjax.training import program as programs
from ftjax.training.job import checked, rounded_up, scheduled
from ftjax.tuning import METHODS, Spec
from ftjax.tuning.adapters import Start


def work(job: dict) -> dict:
    """The result of ftjax.plan.run.plan, for its arguments in `job`."""
    started = time.perf_counter()
    notes: list[str] = []
    config, devices = checked(configs.from_dict(job["config"]), notes.append), parse(job["devices"])
    if config.stages:
        raise FtjaxError("stages: a plan is of one run; set the fields of one stage in a config of its own")
    if job["memory"]:
        devices = devices._replace(device=devices.device._replace(memory=job["memory"]))
    folder = resolve.resolve_model(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    programs.check_method(config, family, shape)
    programs.with_teacher(config, shape)
    if config.data.add_tokens or config.data.pad_vocabulary_to:
        shape = with_tokens(config, shape, tokenizers.of_run(config, folder)[0])
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    if config.tuning.init_from:
        Start(config.tuning).fill(spec)
    config.tuning.prompt_ids = (0,)  # of prompt_text: their number changes no shape
    longest = shape.max_positions - METHODS[config.tuning.method].virtual_tokens(spec)
    device, offloads = devices.device, devices.platform != "cpu"
    machine = auto_mesh.Machine(devices.count, device.memory, device.per_host, devices.platform, offloads=offloads)
    T = min(config.data.max_length, longest)
    chosen = auto_mesh.settle(config, spec, machine, T, compute_dtype(config.model.dtype, devices.platform))
    mesh = sharding.make_mesh(config.mesh, compiled.device_list(devices))
    sizes = {axis: int(n) for axis, n in mesh.shape.items()}
    config.mesh.update(sizes)
    dtype = compute_dtype(config.model.dtype, devices.platform)
    if devices.platform == "gpu":
        config.model.attention = "xla"  # the program is compiled for simulated devices, which have no other
    chosen = [*notes, chosen, auto_mesh.settle_remat(config, spec, machine, sizes, T, dtype)]
    T = -(-T // sizes["sequence"]) * sizes["sequence"]
    M, steps, tokens = _places(config, T), rounded_up(config, config.train.steps) or None, None
    if job["data"]:
        T, M, steps, tokens = _from_data(config, spec, folder, longest, mesh)
    labels = len(config.task.labels) or tasks.find(config.task.kind).unnamed
    shape = programs.with_task(config, family, shape, folder, labels)
    spec = spec._replace(model=shape, names=families.linear_names(family, shape))
    chosen.append(programs.check_attention(config, spec, mesh, dtype, [T]))

    asked = compiled.compile_step(config, spec, devices, T, M, steps or 1, job["quick"])
    asked |= search.described(config, spec, {}, sizes, devices, T) | {"compiled": True}
    out = {
        "devices": {"name": devices.name, "count": devices.count, **devices.device._asdict()},
        "method": config.tuning.method,
        "chosen": [line for line in chosen if line],
        "model": config.model.path,
        "rows": {"batch": config.train.batch_size, "length": T, "labels": M, "from_data": bool(job["data"])},
        "steps": steps,
        "tokens_per_step": tokens or config.train.batch_size * T,
        "asked": asked,
    }
    if asked["fits"]:
        out["time"] = search.roofline(asked, devices)
        if asked["drawing"]:
            out["drawing"] = search.roofline(asked["drawing"], devices)
    if not job["choices"]:
        return out
    estimates = search.Search(config, spec, T, M, steps or 1, asked, devices)
    if asked["fits"]:
        rows = [row for s in search.settings(config, spec, devices) if (row := estimates.try_estimate(s))]
        same = ("mesh", "remat", "batch", "accumulate")
        rows = [asked] + [row for row in rows if any(row[key] != asked[key] for key in same)]
        rows = search.pareto(rows, devices)
        _confirm(rows, config, spec, devices, T, M, steps, started, job["seconds"], job["quick"])
        out["choices"] = search.pareto(rows, devices)
    else:
        out["instead"] = estimates.fitting_instead(devices)
    for row in out.get("choices", []):
        row["time"] = search.roofline(row, devices)
    return out


def _places(config, T: int) -> int:
    """Number of trained positions in a row of T tokens, if nothing is known of the rows."""
    places = T if config.data.packing else tasks.find(config.task.kind).trained(config, T)
    return T if places == T else max(GRANULE, -(-places // GRANULE) * GRANULE)


def _confirm(rows, config, spec, devices, T, M, steps, started, seconds, quick) -> None:
    """Compile the first settings, one after another, as long as there is time for one more. Changes `rows` in place."""
    last = 0.0
    for row in rows:
        if row["compiled"]:
            continue
        if time.perf_counter() - started + last > seconds:
            return
        new = search.changed(config, row["overrides"])
        found = compiled.compile_step(new, spec._replace(tuning=new.tuning), devices, T, M, steps or 1, quick)
        row |= {key: found[key] for key in ("total", "fits", "traffic", "sent", "flops") if key in found}
        row["compiled"] = True
        last = found["compile_seconds"]


def _from_data(config, spec: Spec, folder, longest: int, mesh) -> tuple[int, int, int, float]:
    """(T, M) of the largest batch, the steps of the run, and tokens of a step that are not padding, from the run's
    rows."""
    tokenizer, _ = tokenizers.of_run(config, folder)
    task, head = tasks.find(config.task.kind), programs.with_task(config, spec.family, spec.model, folder, 1).head
    known = families.label_names(folder) if spec.model.head.task == head.task else ()
    data = prepare(config, tokenizer, longest, pool=head.pool, known=known)
    config.task.labels = data.labels
    found = scheduled(config, data, mesh, tokenizer)
    if task.collect:
        T = data.max_length if config.data.packing else task.longest(config, data)
        T += -T % mesh.shape["sequence"]
        return T, _places(config, T), found.steps, config.train.batch_size * T
    _, T, M = max(found.batches.shapes(), key=lambda shape: shape[1:])
    return T, M, found.steps, float(found.tokens) / found.steps


def main() -> int:
    """Returns the exit code: 0, or 2 with a message for input that cannot be used."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = work(job)
    except FtjaxError as error:
        print(error, file=sys.stderr)
        return 2
    Path(job["result"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
