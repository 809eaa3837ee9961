"""Fuzz the readers of overrides and of config.json, guided by the lines that are reached.

    pip install atheris
    python scripts/fuzz_atheris.py -max_total_time=600

The first byte chooses the reader, the others are the text. What leaves a reader and is no FtjaxError ends the program,
and atheris writes the bytes to a file crash-*; scripts/fuzz.py has targets for all other files, without this guidance.
"""

import json
import sys

import atheris

with atheris.instrument_imports(include=["ftjax.config", "ftjax.foreign", "ftjax.hub.families"]):
    from ftjax import config as configs
    from ftjax.errors import FtjaxError
    from ftjax.foreign import parse_json
    from ftjax.hub import families

PLAIN = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64}
PLAIN |= {"intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "max_position_embeddings": 64}


def one(data: bytes) -> None:
    """Read a text by one of the two readers."""
    text = data[1:].decode(errors="replace")
    try:
        if data[:1] < b"\x80":
            configs.override(configs.default(), [text])
        elif isinstance(value := parse_json(text, "config.json"), dict):
            families.from_hf(json.loads(json.dumps(PLAIN)) | value)
    except FtjaxError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
