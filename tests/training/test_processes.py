"""Runs on several real processes of this machine: the curve of one process, whole files, and an end for all."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import haste
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.training import hosts
from ftjax.training.report import read_metrics

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import local_processes  # noqa: E402

DEVICES = 4  # of a run, however many processes share them
WORDS = "dog park run cat tree climb girl ball throw boy kite fly bird song sing fish pond swim".split()


def settings(folder: Path, run_dir: Path, **fields) -> dict:
    """A config of eight steps on a mesh of four devices, weights split over all of them."""
    rows = [{"prompt": f"{a} {b}", "completion": f" The {a} and the {b}" + "." * (i % 4)}
            for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]  # fmt: skip
    for part, some in (("train", rows[:200]), ("validation", rows[200:213]), ("test", rows[220:226])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    c = configs.default()
    c.run_dir = str(run_dir)
    c.data.update({part: str(folder / f"{part}.jsonl") for part in ("train", "validation", "test")})
    c.data.update(cache="", buckets=1)
    c.mesh.update(fsdp=2, tensor=2, data=1)
    c.train.update(steps=8, batch_size=8, log_every=1, eval_every=4)
    c.log.update(tensorboard=False, compilation_cache=False)
    for name, value in fields.items():
        configs._set(c, name, value, name)
    return c.to_dict()


PROCESS = Path(__file__).with_name("process.py")


def environments(processes: int) -> list[dict[str, str]]:
    """What the launcher tells each of so many processes."""
    port = local_processes.free_port()
    told = [local_processes.environment(i, processes, port, [], DEVICES // processes) for i in range(processes)]
    return [t | {"XLA_FLAGS": f"{t['XLA_FLAGS']} {haste.FLAGS}"} for t in told]


@pytest.fixture
def run(forks, tmp_path):
    """run(processes, config, **asked): what each of so many processes came to, see process.py."""

    def run(processes: int, config: dict, **asked) -> list[dict]:
        out = tmp_path / f"{processes}-{len(list(tmp_path.iterdir()))}"
        (tmp_path / "settings.json").write_text(json.dumps({"config": config} | asked))
        told = environments(processes) if processes > 1 else [{"XLA_FLAGS": environments(1)[0]["XLA_FLAGS"]}]
        arguments, program = [str(tmp_path / "settings.json"), str(out)], PROCESS.read_text()
        said = [out.with_suffix(f".said.{i}") for i in range(processes)]
        children = [forks.start(ROOT, text, arguments, program, env) for text, env in zip(said, told, strict=True)]
        assert not any([child.wait() for child in children]), "".join(text.read_text() for text in said)
        return [json.loads(Path(f"{out}.{i}").read_text()) for i in range(processes)]

    return run


def curve(run_dir) -> np.ndarray:
    """(loss, gradient norm) of each step, then the validation losses."""
    rows = read_metrics(run_dir)
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1))
    return np.array(
        [x for _, *values in steps for x in values] + [row["val_loss"] for row in rows if "val_loss" in row]
    )


@pytest.mark.slow
def test_four_processes_train_as_one(run, tmp_path):
    rows = {}
    for n in (1, 4):
        found = run(n, settings(tmp_path, tmp_path / str(n), **{"export.formats": ("adapter", "merged")}))
        rows[n] = [sorted({tuple(span) for span in one["rows"]}) for one in found]
        assert found[0]["said"] and not any(one["said"] for one in found[1:])
    # Of four processes two hold the halves of the same weights, and so read the same rows.
    first, second = [(0, 4)], [(4, 8)]
    assert rows == {1: [[(0, 8)]], 4: [first, first, second, second]}
    one = curve(tmp_path / "1")
    assert len(one) == 18 and one[0] != one[14]
    np.testing.assert_allclose(curve(tmp_path / "4"), one, rtol=1e-5)
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        same_tensors(tmp_path / "4" / file, tmp_path / "1" / file)


@pytest.mark.slow
def test_resume_from_two_processes_to_one_and_back(run, tmp_path):
    """Full training, answers before and after among it, in three parts against one."""
    fields = {"tuning.method": "full", "optim.lr": 1e-3, "evaluate.compare": True, "generate.max_new_tokens": 8}
    fields |= {"export.formats": ("full",), "data.packing": True}
    (whole,) = run(1, settings(tmp_path, tmp_path / "whole", **fields))
    config = settings(tmp_path, tmp_path / "parts", **fields)
    for processes, stop_at in ((2, 2), (1, 5)):
        found = run(processes, config, stop_at=stop_at)
        assert all(one["preempted"] for one in found)
    last = run(2, config)
    assert [one["resumed_from"] for one in last] == [5, 5]
    np.testing.assert_allclose(curve(tmp_path / "parts"), curve(tmp_path / "whole"), rtol=1e-5)
    same_tensors(tmp_path / "parts" / "full" / "model.safetensors", tmp_path / "whole" / "full" / "model.safetensors")
    for state in ("before", "after"):
        ours, theirs = (found[0]["results"][state] for found in (last, [whole]))
        assert ours["rouge_l"] == theirs["rouge_l"]
        np.testing.assert_allclose(ours["perplexity"], theirs["perplexity"], rtol=1e-4)
    assert last[0]["results"] == last[1]["results"]


@pytest.mark.slow
def test_two_processes_run_stages_as_one(run, tmp_path):
    """With replay and an average whose factor is chosen: the same scores of all stages after each, the same model."""
    told = {}
    for n in (1, 2):
        config = settings(tmp_path, tmp_path / str(n), **{"train.steps": 2, "train.eval_every": 2, "optim.lr": 1e-3})
        rows = {f"data.{part}": config["data"][part] for part in ("train", "validation")}
        turned = {"data.prompt": "{completion}", "data.completion": " {prompt}"}
        average = {"replay": 0.5, "average": (0.5, 1.0)}
        config["stages"] = [{"name": "one", **rows}, {"name": "two", **rows, **turned, **average}]
        found = run(n, config)
        told[n] = json.loads((tmp_path / str(n) / "stages.json").read_text())
        assert [one["results"] for one in found] == [told[n]] * n
        assert found[0]["said"] and not any(one["said"] for one in found[1:])
    assert list(told[1]["scores"]) == ["before", "one", "two"]
    for model, scores in told[1]["scores"].items():
        for stage, known in scores.items():
            assert known["loss"] == pytest.approx(told[2]["scores"][model][stage]["loss"], rel=1e-6), (model, stage)
    for stage in ("one", "two"):
        np.testing.assert_allclose(curve(tmp_path / "2" / stage), curve(tmp_path / "1" / stage), rtol=1e-5)
    (file,) = (path.relative_to(tmp_path / "1") for path in (tmp_path / "1").glob("two-average-0.5/*.safetensors"))
    same_tensors(tmp_path / "2" / file, tmp_path / "1" / file)


@pytest.mark.slow
def test_two_processes_leave_out_the_steps_that_one_does_and_go_back_together(run, tmp_path):
    fields = {"train.spike": 1.001, "train.save_every": 1, "export.formats": ("adapter",), "train.eval_every": 8}
    found = {}
    for how, n in (("skip", 1), ("rewind", 2)):
        run_dir = tmp_path / f"{how}{n}"
        run(n, settings(tmp_path, run_dir, **fields | {"train.on_bad_step": how}))
        found[how, n] = json.loads((run_dir / "run.json").read_text())["skipped"]
    steps = lambda entries: [(entry["step"], entry["rows"]) for entry in entries]  # noqa: E731
    assert found["skip", 1] and steps(found["skip", 1]) == steps(found["rewind", 2])
    assert all(entry["back_to"] < entry["step"] for entry in found["rewind", 2])
    file = "adapter/adapter_model.safetensors"  # with a checkpoint of every step, going back is leaving out
    same_tensors(tmp_path / "rewind2" / file, tmp_path / "skip1" / file)


WORLD = """
class World:
    def reset(self, row):
        self.turn = 0

    def step(self, text):
        self.turn += 1
        return " and then", text.count("e") / 10, self.turn == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", [False, True])
def test_two_processes_draw_and_learn_as_one(environment, run, tmp_path):
    """Answers and episodes are drawn by all processes; the first one asks the user's code."""
    (tmp_path / "user.py").write_text(WORLD + "\n\ndef reward(text, references, row):\n    return text.count('e') / 10")
    fields = {"task.kind": "policy", "task.updates": 2, "rollout.group": 4, "generate.max_new_tokens": 6}
    fields |= {"train.batch_size": 16, "rollout.top_k": 20, "data.packing": True, "data.max_length": 64}
    user = str(tmp_path / "user.py")
    fields |= {"task.environment": f"{user}:World"} if environment else {"task.rewards": (f"{user}:reward",)}
    for n in (1, 2):
        run(n, settings(tmp_path, tmp_path / str(n), **fields))
    np.testing.assert_allclose(curve(tmp_path / "2"), curve(tmp_path / "1"), rtol=1e-5, atol=1e-6)
    one, two = ([row for row in read_metrics(tmp_path / str(n)) if "reward" in row] for n in (1, 2))
    assert [row["reward"] for row in one] == pytest.approx([row["reward"] for row in two], abs=1e-6)
    assert len({row["reward"] for row in one}) > 2
    assert max(row["gap"] for row in two) < 1e-5
    file = "adapter/adapter_model.safetensors"
    same_tensors(tmp_path / "2" / file, tmp_path / "1" / file)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_all(failing, tmp_path, capfd):
    config = settings(tmp_path, tmp_path / "run", **{"train.save_every": 1})
    asked = {"config": config, "fail_at": 3, "failing": failing}
    (tmp_path / "settings.json").write_text(json.dumps(asked))
    command = [sys.executable, str(PROCESS), str(tmp_path / "settings.json"), str(tmp_path / "out")]
    assert local_processes.run(command, environments(2), grace=60) == 2
    said = capfd.readouterr().out
    assert f"[{failing}] ftjax: this process alone cannot go on\n" in said
    assert f"[{failing}] ftjax: process {failing} ends, and with it all others\n" in said


@pytest.mark.slow
def test_an_error_of_all_is_told_by_each_and_no_more(tmp_path):
    """Through the launcher and the command line: no process waits for another, and the exit code is 2."""
    done = launch(tmp_path, settings(tmp_path, tmp_path / "run", **{"data.train": "nothing.jsonl"}))
    said, _ = done.communicate(timeout=900)
    assert done.returncode == 2
    for i in range(2):
        assert f"[{i}] ftjax: " in said and "nothing.jsonl" in said
    assert "Traceback" not in said and "ends, and with it" not in said


@pytest.mark.slow
def test_told_to_go_all_keep_a_checkpoint_and_stop(tmp_path):
    config = settings(tmp_path, tmp_path / "run", **{"train.steps": 100_000, "train.eval_every": 50_000})
    running = launch(tmp_path, config)
    said = []
    for line in running.stdout:
        said.append(line)
        if line.startswith("[0] training"):
            break
    while not read_metrics(tmp_path / "run"):
        assert running.poll() is None, "".join(said) + running.stdout.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    rest, _ = running.communicate(timeout=900)
    assert running.returncode == 143, "".join(said) + rest
    (kept,) = (int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    told = f"stopped; the last checkpoint is that of step {kept:,} of 100,000, where the same command goes on"
    assert all(f"[{i}] ftjax: {told}" in rest for i in range(2)), rest
    assert 0 < kept < 50_000 and kept >= read_metrics(tmp_path / "run")[-1]["step"]


def launch(folder: Path, config: dict) -> subprocess.Popen:
    """Two processes of `ftjax train`, started as a person would."""
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "scripts" / "local_processes.py"), "-n", "2", "--cpu-devices", "2", "--"]
    return subprocess.Popen(
        [*command, "train", "--config", str(folder / "config.json")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": haste.FLAGS, "FTJAX_MALLOC": "0"},
    )  # fmt: skip


def same_tensors(ours: Path, theirs: Path) -> None:
    """Two safetensors files hold the same, but for rounding."""
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def clean(monkeypatch, **variables):
    """No launcher's variables but these."""
    for name in (*hosts.VARIABLES, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def asked(monkeypatch):
    """The arguments of every call of jax.distributed.initialize, which then does nothing."""
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_one_process_alone_joins_nobody(monkeypatch, asked):
    for alone in ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        clean(monkeypatch, **alone)
        assert hosts.start() and not asked


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_launchers_are_left_to_jax(variable, monkeypatch, asked):
    clean(monkeypatch, **{variable: "4"})
    hosts.start()
    assert asked == [{"heartbeat_timeout_seconds": hosts.HEARTBEAT}]


def test_variables_come_before_launchers(monkeypatch, asked):
    told = {"FTJAX_COORDINATOR": "node-1:1234", "FTJAX_PROCESSES": "2", "FTJAX_PROCESS": "1"}
    clean(monkeypatch, SLURM_STEP_NUM_TASKS="4", **told)
    hosts.start()
    (arguments,) = asked
    assert arguments["coordinator_address"] == "node-1:1234"
    assert (arguments["num_processes"], arguments["process_id"]) == (2, 1)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"FTJAX_PROCESS": ""}, "FTJAX_PROCESS not; set all of them"),
        ({"FTJAX_COORDINATOR": "node-1"}, "FTJAX_COORDINATOR: 'node-1'; expected host:port"),
        ({"FTJAX_PROCESS": "2"}, "from 0 to one less"),
        ({"FTJAX_PROCESSES": "two"}, "expected the number of processes"),
    ],
)
def test_variables_that_cannot_be_used(change, told, monkeypatch):
    clean(monkeypatch, **{"FTJAX_COORDINATOR": "localhost:1", "FTJAX_PROCESSES": "2", "FTJAX_PROCESS": "0"} | change)
    with pytest.raises(FtjaxError, match=told):
        hosts.start()


def test_processes_that_are_too_late(monkeypatch):
    """The devices of this process are in use: nobody can be joined any more."""
    jax.devices()
    clean(monkeypatch, FTJAX_COORDINATOR="localhost:1", FTJAX_PROCESSES="2", FTJAX_PROCESS="0")
    with pytest.raises(FtjaxError, match="before anything uses a device"):
        hosts.start()


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, as far as a TPU VM of a pod of two machines asks it."""

    said = {
        "worker-network-endpoints": "a:b:10.0.0.1,c:d:10.0.0.2",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\n",
    }

    def do_GET(self):
        text = self.said.get(self.path.rsplit("/", 1)[-1]) if self.headers["Metadata-Flavor"] == "Google" else None
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *args):
        """Says nothing."""


def test_a_tpu_slice_says_how_many_machines_it_has(monkeypatch, asked):
    clean(monkeypatch)
    monkeypatch.delenv("MEGASCALE_NUM_SLICES", raising=False)
    assert hosts.tpu_hosts() is None
    monkeypatch.setattr(hosts, "_tpu_devices", lambda: ["/dev/accel0"])
    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    assert hosts.tpu_hosts() == "6"
    hosts.start()
    assert asked == [{"heartbeat_timeout_seconds": hosts.HEARTBEAT}]
    server.shutdown()
    server.server_close()
    assert hosts.tpu_hosts() == "1"  # nobody knows: a machine with TPUs elsewhere
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")  # on Kubernetes
    assert hosts.tpu_hosts() == "4"
