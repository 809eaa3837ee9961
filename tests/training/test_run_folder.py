"""Whose a run folder is."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest

import ftjax
from ftjax import cli, config
from ftjax.assets import resolve
from ftjax.errors import FtjaxError, of_disk
from ftjax.files import drafted, write_jsonl
from ftjax.hub import fingerprint
from ftjax.hub.resolve import check_out
from ftjax.training import provenance
from ftjax.training.checkpoint import Checkpoints, steps_in
from ftjax.training.run_folder import base_folder, claim, locked

BASE = Path(resolve("builtin:stories260K"))


@pytest.fixture(scope="module")
def base():
    return fingerprint.record(BASE, "builtin:stories260K")


def settings(run_dir: Path):
    c = config.default()
    c.run_dir = str(run_dir)
    return c


def test_a_run_that_never_took_a_step_gives_way_to_another(tmp_path, base):
    c = settings(tmp_path / "run")
    assert not claim(c, base, "rows")
    (tmp_path / "run" / "before.json").write_text("{}")
    c.optim.lr = 0.5
    assert not claim(c, base, "rows") and not (tmp_path / "run" / "before.json").exists()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert claim(c, base, "rows")
    c.optim.lr = 0.25
    with pytest.raises(FtjaxError, match="holds another run: optim.lr was 0.5, is 0.25"):
        claim(c, base, "rows")
    c.optim.lr = 0.5
    with pytest.raises(FtjaxError, match="the rows in its data files are not those that it was started on"):
        claim(c, base, "other rows")


def test_a_run_tells_how_each_of_its_processes_ended_and_no_secret(tmp_path, base, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setattr(
        sys, "argv", ["train", "--key=correct horse battery", "hf_abcdefghijkl", "https://me:pw@x.org/a"]
    )
    file = tmp_path / "run" / "run.json"
    claim(settings(tmp_path / "run"), base, "rows")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert json.loads(file.read_text())["starts"][-1]["ended"] is None
    for error, told in (
        (KeyboardInterrupt(), "stopped"),
        (FtjaxError("hf_abcdefghijkl"), "FtjaxError: ***"),
        (None, "finished"),
    ):
        claim(settings(tmp_path / "run"), base, "rows")
        with contextlib.suppress(KeyboardInterrupt, FtjaxError), provenance.recorded(file):
            if error:
                raise error
        starts = json.loads(file.read_text())["starts"]
        assert starts[-1]["ended"] == told
    assert len(starts) == 4 and starts[0]["command"] == "train '--key=***' *** https://***@x.org/a"
    assert starts[0]["packages"]["jax"] == jax.__version__ and set(starts[0]["devices"]) == {"cpu"}


def test_digests_decide_and_not_the_names_of_files(tmp_path, base):
    c = settings(tmp_path / "run")
    c.data.mixture = ({"train": "old/a.jsonl", "weight": 1.0}, {"train": "old/b.jsonl", "weight": 2.0})
    claim(c, base, "rows")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    moved = config.copy(c)
    moved.model.path, moved.data.validation = "new/base", "new/validation.jsonl"
    scored = {"evaluate.metrics": ("length",)}  # may change, as evaluate.metrics may
    moved.data.mixture = ({"train": "new/a.jsonl", "weight": 1.0} | scored, {"train": "new/b.jsonl", "weight": 2.0})
    assert claim(moved, base, "rows")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["path"] == "new/base"
    with pytest.raises(FtjaxError, match="data.mixture was .*; the rows in its data files are not"):
        claim(c, base, "other rows")
    moved.data.mixture = ({"train": "new/a.jsonl", "weight": 1.0}, {"train": "new/b.jsonl", "weight": 3.0})
    with pytest.raises(FtjaxError, match="holds another run: data.mixture was"):
        claim(moved, base, "rows")
    changed = base | {"weights": base["weights"] | {"config.json": "0" * 32}}
    with pytest.raises(FtjaxError, match="model.path was .*of the base's files, config.json was .* is 00000000"):
        claim(c, changed, "rows")


def test_a_policy_goes_on_with_the_draws_of_its_start(tmp_path, base):
    """How other tasks answer may change."""
    c = settings(tmp_path / "run")
    claim(c, base, "rows")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    c.generate.max_new_tokens = 8
    assert claim(c, base, "rows")
    c = settings(tmp_path / "policy")
    c.task.kind = "policy"
    claim(c, base, "rows")
    (tmp_path / "policy" / "metrics.jsonl").write_text("")
    c.generate.max_new_tokens = 8
    with pytest.raises(FtjaxError, match="generate.max_new_tokens was 64, is 8"):
        claim(c, base, "rows")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, base, overwrite):
    c = settings(tmp_path)
    c.overwrite = overwrite
    theirs = {"results.json": "{}", "full/model.bin": "x", "checkpoints/12/x": "x", "run.json": '{"name": "theirs"}'}
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(FtjaxError, match="contains files that no run wrote, such as checkpoints, and these are not"):
        claim(c, base, "rows")
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs


def test_one_process_works_on_a_run(tmp_path):
    run, lock = tmp_path / "run", tmp_path / "run" / "lock"
    with locked(run):
        with pytest.raises(FtjaxError, match=rf"run is in use: process {os.getpid()} of .*, since 20.* works on this"):
            locked(run).__enter__()
        said = json.loads(lock.read_text())
    assert not lock.exists()
    # A killed process leaves its lock; its number may have gone to another process since.
    lock.write_text(json.dumps(said | {"started": "another boot 1"}))
    with locked(run):
        assert json.loads(lock.read_text()) == said | {"since": json.loads(lock.read_text())["since"]}
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    with locked(run):
        pass
    lock.write_text("")  # on a full disk
    os.utime(lock, (0, 0))
    with locked(run):
        pass
    with pytest.raises(KeyError), locked(run):
        raise KeyError
    assert list(run.iterdir()) == []


def test_the_commit_of_a_hub_name_is_used_again(tmp_path, base, monkeypatch):
    import shutil

    import huggingface_hub

    head = ["one"]

    def snapshot_download(name, revision, **options):
        return str(tmp_path / "hub" / "snapshots" / (revision or head[0]))

    for commit in ("one", "two"):
        shutil.copytree(BASE, tmp_path / "hub" / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    c = settings(tmp_path / "run")
    c.model.path = "owner/model"
    folder = base_folder(c)
    claim(c, fingerprint.record(folder, c.model.path), "rows")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["base"]
    assert folder.name == kept["revision"] == "one"
    head[0] = "two"
    assert base_folder(c).name == "one"
    assert fingerprint.find(kept, tmp_path / "run", c.model.path, "", "key").name == "one"
    c.model.revision = "two"
    assert base_folder(c).name == "two"
    shutil.rmtree(tmp_path / "hub" / "snapshots" / "one")  # the cache was cleaned, and the hub has the commit
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision, **o: str(BASE) * (revision == "one")
    )
    assert fingerprint.find(kept, tmp_path / "run", "owner/model", "", "key") == BASE


def test_a_full_disk_leaves_no_draft_and_the_same_command_goes_on(tmp_path, base, monkeypatch):
    c = settings(tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError) as error:
            claim(c, base, "rows")
    assert of_disk(error.value) == f"{tmp_path / 'run' / 'run.json'}: No space left on device"
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "run.json.host-1.part").write_text("{")  # of a process that was killed
    assert not claim(c, base, "rows")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["[]", '{"host": 3}', '{"host": "a", "pid": "b"}', "{", ""])
def test_a_lock_that_is_no_lock_is_taken_over_when_it_is_old(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(FtjaxError, match="is in use"), locked(tmp_path):
        pass
    os.utime(tmp_path / "lock", (0, 0))
    with locked(tmp_path):
        pass


def test_errors_of_libraries_for_disks_are_known():
    assert of_disk(ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]")).startswith("RESOURCE_EXHAUSTED")
    assert of_disk(FileExistsError(errno.EEXIST, "File exists", "a")).startswith("a: a file, or a link to nothing")
    assert not of_disk(ValueError("no")) and not of_disk(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_a_command_in_a_folder_that_is_gone_says_so(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        pyarrow.memory_map(str(tmp_path / "x"))  # an error that has its file in the message alone
    assert str(tmp_path / "x") in of_disk(error.value)
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError) as error:
        Path.cwd()
    assert of_disk(error.value) == "the folder that this command runs in does not exist any more; change to another one"


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(tmp_path, bound_by_permissions):
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    assert steps_in(tmp_path) == [4] and steps_in(tmp_path / "other") == []
    (tmp_path / "checkpoints").chmod(0)
    for read_only in (True, False):
        with pytest.raises(PermissionError, match="checkpoints"):
            Checkpoints(tmp_path, read_only=read_only)


def test_folders_in_a_loop_of_links_are_named(tmp_path):
    for link, to in (("a", "b"), ("b", "a")):
        (tmp_path / link).symlink_to(tmp_path / to)
    for write in (lambda: Checkpoints(tmp_path / "a/run"), lambda: drafted(check_out(tmp_path / "a/out")).__enter__()):
        with pytest.raises(OSError) as error:
            write()
        assert of_disk(error.value).startswith(str(tmp_path / "a")) and error.value.errno == errno.ELOOP


def test_check_names_what_is_damaged_and_nothing_else(tmp_path, capsys):
    base, rows, run = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copytree(BASE, base)
    rows.write_text("".join(json.dumps({"prompt": f"{i} dogs", "completion": " ran home"}) + "\n" for i in range(20)))
    c = config.default()
    c.run_dir, c.model.path = str(run), str(base)
    c.data.update(train=str(rows), split=(0.8, 0.2, 0.0), cache="", buckets=1)
    c.train.update(steps=2, batch_size=4, eval_every=1, keep=2, log_every=1)
    c.log.tensorboard, c.evaluate.compare, c.tuning.init = False, False, "pissa"
    c.export.formats = ("adapter", "merged")
    ftjax.train(c, say=lambda text: None)
    capsys.readouterr()

    def wrong():
        code = cli.main(["check", str(run)])
        lines = capsys.readouterr().out.splitlines()
        return code, {line.partition(": ")[0] for line in lines if not line.endswith(": ok")}, len(lines)

    assert wrong() == (0, set(), 9)
    array = next(file for file in (run / "checkpoints" / "2" / "optimizer").rglob("0*") if file.is_file())
    cases = {
        base / "generation_config.json": {"the base's files", "the rows"},
        base / "tokenizer_config.json": {"the tokenizer's files"},
        rows: {"the rows"},
        array: {"checkpoints/2"},
        run / "start.safetensors": {"start.safetensors"},
        run / "metrics.jsonl": {"metrics.jsonl"},
        run / "adapter" / "adapter_model.safetensors": {"adapter"},
        run / "merged" / "config.json": {"merged"},
        run / "merged" / "model.safetensors": {"merged"},
    }
    for file, expected in cases.items():
        kept = file.read_bytes() if file.is_file() else None
        other = kept.replace(b"dogs", b"cats", 1) if file == rows else (kept or b"{}")
        if file == run / "metrics.jsonl":
            other = kept.replace(b'"loss": ', b'"loss": 1', 1)
        elif file.suffix == ".json":
            other = other.rstrip() + b" \n\n"
        elif file != rows:
            other = kept[:-1] + bytes([kept[-1] ^ 1])
        assert other != kept
        file.write_bytes(other)
        code, found, _ = wrong()
        assert code == 1 and found & expected and found <= expected | {"the rows"}, (file, found)
        if file.name == "model.safetensors":
            with pytest.raises(FtjaxError, match=f"^{re.escape(str(file))}: the file has changed since it was written"):
                ftjax.load(run / "merged")
        file.write_bytes(kept) if kept is not None else file.unlink()
    assert wrong()[0] == 0
    marker = run / "merged" / "ftjax.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"checksums": {"../run.json": 1}}))
    with pytest.raises(FtjaxError, match="ftjax.json: expected names of files in this folder; found '../run.json'"):
        ftjax.load(run / "merged")
    assert cli.main(["check", str(tmp_path)]) == 2


def test_a_large_file_of_an_export_is_read_again_only_after_a_change(tmp_path, monkeypatch):
    from ftjax import seals

    monkeypatch.setattr(seals, "LARGE", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reads = []
    read = seals._checksum
    monkeypatch.setattr(seals, "_checksum", lambda file: (reads.append(file.name), read(file))[1])
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(f"weights {name}".encode())
    kept = {name: read(tmp_path / name) for name in ("a", "b")}
    looked = lambda **how: (reads.clear(), seals.changed(tmp_path, kept, **how), sorted(reads))[1:]  # noqa: E731
    assert [looked(again=False) for _ in range(2)] == [([], ["a", "b"])] * 2  # just written: not believed yet
    monkeypatch.setattr(seals, "SETTLED", 0)
    assert [looked(again=False) for _ in range(2)] == [([], ["a", "b"]), ([], [])]
    assert looked() == ([], ["a", "b"])  # as `ftjax check`
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    assert looked(again=False)[0] == ["a", "b"]  # swapped, with the sizes and times of before
    for place in (tmp_path / "cache").rglob("*.json"):
        place.write_text(place.read_text().replace('"crc": ', '"crc": 1'))
    assert looked(again=False) == (["a", "b"], ["a", "b"])  # a record that was changed is not believed
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file, not a folder")
    assert looked(again=False) == (["a", "b"], ["a", "b"])


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_jsonl(tmp_path / "pipe", [{"a": 1}])
    assert os.read(reader, 99) == b'{"a": 1}\n' and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_dev_stdout_goes_behind_what_a_file_of_the_output_has_already(tmp_path):
    program = "from ftjax.files import *; print(1); write_jsonl(Path('/dev/stdout'), [{'a': 2}]); print(3)"
    (tmp_path / "log").write_text("0\n")
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", program], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == '0\n1\n{"a": 2}\n3\n'


def test_a_full_disk_leaves_the_old_picture_and_the_old_export_whole(tmp_path):
    import resource

    from ftjax.evaluation.pictures import plot_losses
    from ftjax.hub.peft import write_adapter

    history = [{"step": i, "loss": 1.0 * i} for i in range(9)]
    write = lambda x: write_adapter(tmp_path / "out", {"a": np.full(9999, x, "f")}, {}, None, "base")  # noqa: E731
    plot_losses(history, tmp_path / "loss.png")
    write(1)
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # bytes of a file: as a full disk, after some were written
    try:
        with pytest.raises(OSError) as error:
            plot_losses(history[:5], tmp_path / "loss.png")
        with pytest.raises(FtjaxError, match=f"^{tmp_path / 'out'}: cannot be written: .*File too large.*is whole"):
            write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert of_disk(error.value) == f"{tmp_path / 'loss.png'}: File too large"
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before
    write(2)
