"""KTO on CommonGen: sentences of people are desirable, those of the model of the quick start are not.

It starts from the merged model of the quick start, which is also the reference, and takes both sentences of each pair
of scripts/make_preferences.py as single answers. The coverage of the given words rises from 0.417 to 0.456.
"""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("dpo_commongen.py"))
    c.run_dir = "runs/kto"
    c.task.loss = "kto"
    return c
