"""scripts/local_processes.py: what each process is told, and how all of them end. Runs of ftjax: tests/training."""

import os
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import local_processes  # noqa: E402


def dry(capsys, *args) -> list[tuple[dict[str, str], list[str]]]:
    """(variables, command) of each process that would be started."""
    assert local_processes.main([*args, "--dry-run", "--", "train", "--config", "a b.py"]) == 0
    out = []
    for line in capsys.readouterr().out.splitlines():
        words = shlex.split(line)
        at = words.index(sys.executable)
        out.append((dict(word.split("=", 1) for word in words[:at]), words[at:]))
    return out


def test_each_process_is_told_its_number(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = dry(capsys, "-n", "3")
    assert [variables["FTJAX_PROCESS"] for variables, _ in told] == ["0", "1", "2"]
    assert {variables["FTJAX_PROCESSES"] for variables, _ in told} == {"3"}
    assert len({variables["FTJAX_COORDINATOR"] for variables, _ in told}) == 1
    assert all(command == [sys.executable, "-m", "ftjax", "train", "--config", "a b.py"] for _, command in told)
    assert "CUDA_VISIBLE_DEVICES" not in told[0][0]


def test_gpus_are_dealt_out(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    assert [v["CUDA_VISIBLE_DEVICES"] for v, _ in dry(capsys, "-n", "2")] == ["0,1", "4,5"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false")
    (cpu, _), _ = dry(capsys, "-n", "2", "--cpu-devices", "3")
    assert "CUDA_VISIBLE_DEVICES" not in cpu and cpu["JAX_PLATFORMS"] == "cpu"
    assert cpu["XLA_FLAGS"] == "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=3"


@pytest.mark.parametrize(
    "args, told",
    [
        (["-n", "0", "--", "train"], "-n: expected 1 or more"),
        (["-n", "3", "--", "train"], "4 GPUs cannot be dealt out to 3 processes"),
        (["-n", "2", "--cpu-devices", "0", "--", "train"], "--cpu-devices: expected 1 or more"),
        (["-n", "2"], "the following arguments are required"),
    ],
)
def test_arguments_that_cannot_be_used(args, told, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(SystemExit) as stopped:
        local_processes.main(args)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_lines_say_whose_they_are_and_the_first_failure_ends_all(capfd):
    """One fails, one hangs and is deaf to everything but a kill."""
    body = (
        "import os, signal, sys, time\n"
        "me = os.environ['FTJAX_PROCESS']\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('here is', me, flush=True)\n"
        "sys.exit(3) if me == '1' else time.sleep(600)\n"
    )
    told = [local_processes.environment(i, 2, 1, [], None) for i in range(2)]
    assert local_processes.run([sys.executable, "-c", body], told, grace=1) == 3
    assert set(capfd.readouterr().out.splitlines()) == {"[0] here is 0", "[1] here is 1"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_exit_code_is_that_of_the_first_to_fail(tmp_path):
    """The other sees that it is gone, and fails 100 ms later with a code of its own."""
    os.mkfifo(tmp_path / "pipe")
    body = (
        "import os, time\n"
        "from pathlib import Path\n"
        f"pipe = Path({str(tmp_path / 'pipe')!r})\n"
        "if os.environ['FTJAX_PROCESS'] == '1':\n"
        "    pipe.write_text(str(os.getpid()))\n"
        "    os._exit(2)\n"
        "stat = Path('/proc', pipe.read_text(), 'stat')\n"
        "try:\n"
        "    while stat.read_text().rpartition(')')[2].split()[0] != 'Z':\n"
        "        time.sleep(0.001)\n"
        "except (FileNotFoundError, ProcessLookupError):  # its code was read already\n"
        "    pass\n"
        "time.sleep(0.1)\n"
        "os._exit(1)\n"
    )
    told = [local_processes.environment(i, 2, 1, [], None) for i in range(2)]
    for _ in range(5):
        assert local_processes.run([sys.executable, "-c", body], told, grace=20) == 2


def test_the_exit_code_of_a_process_that_a_signal_ended():
    body = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert local_processes.run([sys.executable, "-c", body], [{}], grace=1) == 137
    assert local_processes.run([sys.executable, "-c", "pass"], [{}, {}], grace=1) == 0
