"""Sentiment of film reviews: LoRA on every linear map of MiniLM, on SST-2.

Dev accuracy after three epochs, seed 0: 0.892 (0.873 to 0.913), with model.dtype=bfloat16 model.unroll=0, faster
on CPUs with AMX. One epoch without dropout on 98 % of the rows: 0.874 (0.852 to 0.897).
"""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("sst2_minilm_full.py"))
    c.run_dir = "runs/sst2_minilm_lora"
    c.tuning.method = "lora"
    c.tuning.rank = 16
    c.tuning.alpha = 32.0
    c.optim.lr = 1e-3
    c.optim.warmup = 0.06
    c.optim.weight_decay = 0.0
    c.train.epochs = 3.0
    return c
