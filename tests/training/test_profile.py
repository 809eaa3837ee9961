"""Profiles: that the parts of the traced time add up to it, and what a trace of each kind of device is read as."""

import itertools
import json
import re

import pytest
from jax.profiler import ProfileData

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.training import profile
from ftjax.training.profile import Known


def test_a_run_writes_a_trace_and_where_its_time_went(tmp_path):
    """A run of 3 steps, of which 1 to 9 were to be traced."""
    folder, said, c = tmp_path / "run", [], configs.default()
    c.update(run_dir=str(folder))
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=40, buckets=1, split=(1.0, 0.0, 0.0))
    c.tuning.rank = 4
    c.train.update(steps=3, batch_size=4)
    c.log.update(tensorboard=False, compilation_cache=False, profile="1:9")
    result = ftjax.train(c, said.append)

    assert list((folder / "profile").rglob("*.xplane.pb"))
    found = json.loads((folder / "profile.json").read_text())
    assert found["steps"] == [1, 2, 3] and found["devices"] == 1
    assert sum(found["kinds"].values()) == pytest.approx(found["step_ms"])
    assert sum(found["parts"].values()) + found["kinds"]["idle"] == pytest.approx(found["step_ms"])
    assert 0 < found["matmul_share"] < 1 and 0 < found["attention_share"] < 1 and 0 < found["idle_share"] < 1
    assert all(found["parts"][part] > 0 for part in ("attention's projections", "feed-forward", "head"))
    names = [re.sub(r"[.\d]+$", "", op["name"]) for op in found["longest"]]
    assert found["longest"][0]["ms"] >= found["longest"][-1]["ms"] > 0 and "while" not in names

    table, said = (folder / "profile.txt").read_text(), "\n".join(said)
    assert "matrix products" in table and table.strip() in said
    assert result.files["profile"] == str(folder / "profile.txt")
    assert "step 9 lies beyond the run's end; it has 3 steps" in said and "steps 4 to 9: the run ended before" in table
    assert found["compiled_in"] == [1] and "for batches of new shapes: step 1;" in table


@pytest.mark.parametrize("asked", ["10", "13:10", "0:3", "10-13", "a:b", "steps=1:2"])
def test_a_value_that_names_no_steps_is_refused(asked):
    with pytest.raises(FtjaxError, match="log.profile: expected FIRST:LAST"):
        configs.override(configs.default(), [f"log.profile={asked}"])


def test_every_moment_is_dealt_out_once():
    known = {
        name: Known(kind, "", "") for name, kind in (("dot", "matmul"), ("add", "elementwise"), ("sum", "collective"))
    }
    # 0-10: nothing until 2; dot alone; dot and add; add beside a collective; the collective alone from 7; nothing.
    operations = [(2, 5, "dot"), (4, 7, "add"), (6, 9, "sum"), (-5, 1e-9, "dot"), (12, 20, "add")]
    found = profile.shares(operations, (1, 10), known)
    assert found == {"": 2, "dot": 2.5, "add": 2.5, "sum": 2}
    assert sum(profile.shares(operations, (0, 30), known).values()) == pytest.approx(30)


HLO = """\
HloModule jit_train_step, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} bitcast(%p)
  ROOT %t = f32[8,8]{0,1} transpose(%b), dimensions={1,0}
}

%fused.1 (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %e = f32[8,8]{1,0} exponential(%q)
  ROOT %d = f32[8,8]{1,0} dot(%e, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(train_step)/layers/mlp/up_proj/dot_general"}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %fusion = f32[8,8]{0,1} fusion(%x), kind=kLoop, calls=%fused
  %fusion.1 = f32[8,8]{1,0} fusion(%fusion), kind=kOutput, calls=%fused.1
  %cublas = f32[8,8]{1,0} custom-call(%fusion.1), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(train_step)/layers/attn/q_proj/dot_general"}
  %exp = f32[8,8]{1,0} exponential(%cublas), metadata={op_name="jit(train_step)/layers/attn/exp"}
  ROOT %all-reduce.1 = f32[8,8]{1,0} all-reduce(%exp), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_what_instructions_are():
    known = profile.describe(HLO)
    kinds = {name: known[name].kind for name in ("fusion", "fusion.1", "cublas", "exp", "all-reduce.1")}
    assert list(kinds.values()) == ["copy", "matmul", "matmul", "elementwise", "collective"]
    assert known["fusion.1"].part == "feed-forward" and known["fusion"].part == profile.REST
    assert known["cublas"].part == "attention's projections" and known["exp"].part == "attention"


def plane(name, line, events, id):
    """The text of a plane with one line; events: (name, start, duration in nanoseconds, hlo_op or "")."""
    told = "".join(
        f"event_metadata {{ key: {i} value {{ id: {i} name: {json.dumps(event[0])} }} }} "
        for i, event in enumerate(events, 1)
    )
    stats = 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } '
    rows = ""
    for i, (_, start, long, op) in enumerate(events, 1):
        stat = f"stats {{ metadata_id: 1 str_value: {json.dumps(op)} }}" if op else ""
        rows += f"events {{ metadata_id: {i} offset_ps: {start * 1000} duration_ps: {long * 1000} {stat} }} "
    return f'planes {{ id: {id} name: "{name}" {told} {stats} lines {{ id: 1 name: "{line}" {rows} }} }} '


HOST = plane("/host:CPU", "python", [(profile.WINDOW, 0, 100, ""), ("elsewhere", 0, 50, "")], 1)
# name of the plane, of the line, and as such a device names instructions
TRACES = {
    "tpu": (
        "/device:TPU:0",
        "XLA Ops",
        [("%fusion = f32[8,8] fusion(%x)", 0, 10, ""), ("%fusion.1 = ...", 10, 40, "")],
    ),
    "gpu": (
        "/device:GPU:0",
        "Stream #14(Compute)",
        [("loop_fusion", 0, 10, "fusion"), ("nvjet_x", 10, 40, "fusion.1")],
    ),
}


@pytest.mark.parametrize("device", TRACES)
def test_each_kind_of_accelerator_is_read(device, tmp_path):
    """Two devices that work in 50 of 100 nanoseconds, and a plane whose lines hold no operations."""
    name, line, events = TRACES[device]
    text = HOST + plane(name, line, events, 2)
    text += plane(name[:-1] + "1", line, events, 3) + plane(name[:-1] + "2", "XLA Modules", events, 4)
    file = tmp_path / "one.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    found = profile.summary(file, [HLO], [7, 8], device)
    assert found["devices"] == 2 and found["step_ms"] == pytest.approx(50e-6)
    assert found["kinds"]["copy"] == pytest.approx(5e-6) and found["kinds"]["matmul"] == pytest.approx(20e-6)
    assert found["parts"]["feed-forward"] == pytest.approx(20e-6) and found["idle_share"] == pytest.approx(0.5)


def test_what_no_program_names_is_told_by_its_name():
    names = ("ncclDevKernel_AllReduce", "cutlass_80_gemm", "MemcpyD2D", "loop_add_fusion", "mystery")
    operations = [profile.Operation(name, "", 0, 1, "") for name in names]
    found = [profile.by_name(operation).kind for operation in operations]
    assert found == ["collective", "matmul", "copy", "elementwise", "other"]
    assert profile.by_name(profile.Operation("fusion.3", "", 0, 1, "convolution fusion %fusion.3")).kind == "matmul"


def test_kernels_of_cuda_graphs_are_told_by_their_own_names(tmp_path):
    """Names as an H200 traced them; all that the trace tells of their operation is the graph."""
    kernels = {
        "loop_rsqrt_fusion_1": (10, "elementwise"),
        "nvjet_sm90_tss_128x128_64x6_2x1_v_bz_TNT": (20, "matmul"),
        "void cudnn::fusion::fmha_reduce_head<true>(void const*)": (5, "matmul"),
        "memcpy128": (15, "copy"),
    }
    starts = itertools.accumulate((long for long, _ in kernels.values()), initial=0)
    events = [(name, start, long, "command_buffer_23") for start, (name, (long, _)) in zip(starts, kernels.items())]
    file = tmp_path / "one.xplane.pb"
    text = HOST + plane("/device:GPU:0", "Stream #14(Memset,Compute)", events, 2)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    found = profile.summary(file, [HLO], [1], "gpu")
    kinds = {"matmul": 25e-6, "elementwise": 10e-6, "copy": 15e-6, "idle": 50e-6, "collective": 0, "other": 0}
    assert found["kinds"] == pytest.approx(kinds)
    assert found["parts"][profile.GRAPHS] == pytest.approx(50e-6)
    assert found["longest"][0]["name"].startswith("nvjet_sm90") and found["longest"][2]["name"] == "loop_rsqrt_fusion_1"
    assert profile.NO_GRAPHS in profile.table(found | {"compiled_in": []})
