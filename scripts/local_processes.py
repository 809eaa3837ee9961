"""One run in several real processes on this machine: `python scripts/local_processes.py -n 2 -- train --config FILE`.

What stands behind `--` is a command of ftjax; each process is told the coordinator's address and its own number by
FTJAX_COORDINATOR, FTJAX_PROCESSES and FTJAX_PROCESS. GPUs are dealt out evenly; on a CPU each process has one device,
or `--cpu-devices`. Their lines come out behind `[number]`. When one fails, all others have `--grace` seconds to end by
themselves and are then killed; the exit code is that of the first to fail. SIGTERM goes to all: they keep a checkpoint
and stop, and the same command goes on.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--cpu-devices", type=int, metavar="K", help="run on the CPU, K simulated devices a process")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds from a failure until what is left is killed")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument("command", nargs="+", metavar="-- VERB ...", help="a command of ftjax, such as train")
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"-n: expected 1 or more; found {args.n}")
    if args.cpu_devices is not None and args.cpu_devices < 1:
        parser.error(f"--cpu-devices: expected 1 or more; found {args.cpu_devices}")
    gpus = [] if args.cpu_devices else visible_gpus(os.environ)
    if len(gpus) % args.n:
        parser.error(f"-n: {len(gpus)} GPUs cannot be dealt out to {args.n} processes evenly; CUDA_VISIBLE_DEVICES=0,1 "
                     "chooses some, --cpu-devices 1 leaves them alone")  # fmt: skip
    port = free_port()
    environments = [environment(i, args.n, port, gpus, args.cpu_devices) for i in range(args.n)]
    command = [sys.executable, "-m", "ftjax", *args.command]
    if args.dry_run:
        for settings in environments:
            print(shlex.join([f"{name}={value}" for name, value in settings.items()] + command))
        return 0
    return run(command, environments, args.grace)


def visible_gpus(env) -> list[str]:
    """The GPUs that a process started from here would see, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(process: int, processes: int, port: int, gpus: list[str], cpu_devices: int | None) -> dict[str, str]:
    """What one process has in its environment beside what is there already."""
    told = {
        "FTJAX_COORDINATOR": f"localhost:{port}",
        "FTJAX_PROCESSES": str(processes),
        "FTJAX_PROCESS": str(process),
        "PYTHONUNBUFFERED": "1",
    }
    if gpus:
        share = len(gpus) // processes
        told["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[process * share : (process + 1) * share])
    if cpu_devices:
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        told["JAX_PLATFORMS"] = "cpu"
        told["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={cpu_devices}"])
    return told


def run(command: list[str], environments: list[dict[str, str]], grace: float) -> int:
    """Start one process for each environment and wait for all; returns the exit code of the first that failed, or 0."""
    started = [
        subprocess.Popen(
            command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )
        for settings in environments
    ]  # fmt: skip
    printers = [threading.Thread(target=copy, args=(p.stdout, f"[{i}] ")) for i, p in enumerate(started)]
    # Others fail within milliseconds of the first, by its being gone: a thread for each has them in their order.
    codes = []
    waiters = [threading.Thread(target=lambda process: codes.append(process.wait()), args=(p,)) for p in started]
    for thread in (*printers, *waiters):
        thread.start()

    def pass_on(number, frame):
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal sends Ctrl-C to the processes as well
    kill_at = None
    while len(codes) < len(started):
        if kill_at is None and any(codes):
            kill_at = time.monotonic() + grace
        if kill_at is not None and time.monotonic() > kill_at:
            for process in started:
                process.kill()
        time.sleep(0.05)
    for printer in printers:
        printer.join()
    failed = next(filter(None, codes), 0)
    return failed if failed >= 0 else 128 - failed


def copy(lines, prefix: str) -> None:
    """Print lines as they come, each in one write, so that those of several processes do not mix."""
    with lines:
        for line in lines:
            sys.stdout.write(prefix + line.rstrip("\n") + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
