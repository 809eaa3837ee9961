"""One of several real processes of a run, told apart by FTJAX_PROCESS as ever; what it came to goes to a file.

Run by test_processes.py: process.py SETTINGS.json OUT
"""

import json
import os
import sys
from pathlib import Path

import jax

import ftjax
from ftjax import config
from ftjax.data.batches import Batches
from ftjax.errors import FtjaxError
from ftjax.training import hosts

# A later start of the same run finds all of its programs.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

asked = json.loads(Path(sys.argv[1]).read_text())
process = os.environ.get("FTJAX_PROCESS", "0")
found = {"rows": [], "said": []}
get, preempted = Batches.get, hosts.preempted


def recorded(self, step, row_slice=slice(None)):
    if self.shuffle:  # of training; validation has an order of its own
        found["rows"].append((row_slice.start, row_slice.stop))
    return get(self, step, row_slice)


def at_step(step):
    """A step that the test wants the run to be preempted, or one process to fail at."""
    if step == asked.get("fail_at") and process == str(asked["failing"]):
        raise FtjaxError("this process alone cannot go on")
    return step == asked.get("stop_at") or preempted(step)


Batches.get, hosts.preempted, hosts.GRACE = recorded, at_step, 2
try:
    result = ftjax.train(config.from_dict(asked["config"]), say=found["said"].append)
    found |= {"steps": result.steps, "resumed_from": result.resumed_from, "results": result.results}
except KeyboardInterrupt:
    found["preempted"] = True
Path(f"{sys.argv[2]}.{process}").write_text(json.dumps(found))
