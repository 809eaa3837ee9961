"""Hold every family of decoders against transformers and peft, on tiny random models drawn by seed.

    python scripts/check_families.py --seeds 8 --out docs/models.md
    python scripts/check_families.py gemma2 "llama, yarn" --seeds 8 --out docs/models.md

For each model: logits of rows that are padded on the left, on the right and packed, against each document alone in
transformers; whether a packed document changes its neighbours; greedy answers token for token; the exported directory
loaded by transformers; and a LoRA on all linear maps and experts, loaded by peft, with its gradients against PyTorch's,
under one preset of remat. Needs torch, transformers and peft.

The programs are compiled as those of the tests are: the same arithmetic, without the optimisations that cost most time.
With `--double`, both sides compute the same models in float64. A difference that is there in float32 and not in float64
is rounding, which the model enlarges.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import haste

os.environ.setdefault("XLA_FLAGS", haste.FLAGS)  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
import torch

DOUBLE = "--double" in sys.argv
if DOUBLE:  # before any module asks for these names: whatever is cast to float32 on either side is cast to float64
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double

import tiny  # noqa: E402

from ftjax.decoding import generate  # noqa: E402
from ftjax.hub import weights  # noqa: E402
from ftjax.hub.family_table import FAMILIES  # noqa: E402
from ftjax.hub.peft import write_adapter  # noqa: E402
from ftjax.models.transformer import Transformer  # noqa: E402
from ftjax.tree import flatten  # noqa: E402

T, V = 20, 50
REMAT = ("none", "products", "attention", "full")
TYPES = ("full_attention", "sliding_attention")
FIGURES = ("left", "right", "packed", "leak", "answers", "export", "lora", "gradients")


def sizes(rng, multiple: bool = False, even: int = 2) -> dict:
    """Sizes of a model. multiple: its width is a multiple of its heads; even: heads are multiples of this size."""
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2])
    head = even * int(rng.choice([2, 3, 4]))
    heads = int(kv_heads * group)
    return {
        "vocab_size": V,
        "hidden_size": heads * head if multiple else heads * int(rng.choice([6, 8, 10])),
        "intermediate_size": int(rng.choice([20, 24, 28])),
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": int(kv_heads),
        "max_position_embeddings": 32,
        "tie_word_embeddings": bool(rng.integers(2)),
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | ({} if multiple else {"head_dim": head})


def experts(rng, key: str) -> dict:
    used = int(rng.choice([1, 2, 3]))
    return sizes(rng, multiple=True) | {key: int(rng.choice([4, 5, 8])), "num_experts_per_tok": used}


def gpt_oss(rng) -> dict:
    shape = experts(rng, "num_local_experts") | flags(rng, "attention_bias") | {"head_dim": int(rng.choice([4, 6]))}
    shape |= {
        "sliding_window": int(rng.choice([4, 7])),
        "layer_types": types(rng),
        "swiglu_limit": uniform(rng, 0.3, 2),
    }
    return shape | {"rope_parameters": scaling(rng, "yarn") | {"truncate": bool(rng.integers(2))}}


def types(rng) -> list[str]:
    return [TYPES[i] for i in rng.permutation([0, 1, int(rng.integers(2))])]


def uniform(rng, low, high) -> float:
    return float(np.round(rng.uniform(low, high), 3))


def flags(rng, *names) -> dict:
    return {name: bool(rng.integers(2)) for name in names}


def scaling(rng, kind: str, turned: int = 0) -> dict:
    """The rotary parameters of a kind; turned: dimensions of a head that turn, which longrope needs."""
    rope = {"rope_type": kind, "rope_theta": float(rng.choice([100.0, 1e4, 5e5]))}
    if kind != "default":
        rope["factor"] = uniform(rng, 1.5, 8)
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = int(rng.choice([8, 16]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": uniform(rng, 2, 5)}
    if kind == "yarn":
        rope |= [{}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"beta_fast": 4.0, "truncate": False}][rng.integers(3)]
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rope[name] = [uniform(rng, 1, 4) for _ in range(turned // 2)]
    return rope


def llama(rng, kind="default", **more) -> dict:
    shape = sizes(rng)
    return shape | flags(rng, *more) | {"rope_parameters": scaling(rng, kind, shape["head_dim"])}


def gemma(rng, **more) -> dict:
    cap = float(rng.choice([2.0, 5.0]))
    shape = sizes(rng) | {"sliding_window": int(rng.choice([4, 7])), "layer_types": types(rng)}
    shape |= {"query_pre_attn_scalar": int(rng.choice([5, 16])), "final_logit_softcapping": cap}
    shape["hidden_size"] = 4 * shape["num_attention_heads"]
    return shape | flags(rng, "attention_bias") | more


def gemma3(rng) -> dict:
    """A model that reads images too, whose text part is a gemma3_text."""
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = {"tie_word_embeddings": bool(rng.integers(2))}
    text = gemma(rng, **of_types(rng, str(rng.choice(["default", "linear"]))), final_logit_softcapping=None) | tied
    tokens = {"image_token_index": V, "boi_token_index": V + 1, "eoi_token_index": V + 2, "mm_tokens_per_image": 4}
    return tokens | tied | {"text_config": text, "vision_config": vision | {"image_size": 8, "patch_size": 4}}


def of_types(rng, kind) -> dict:
    """Rotary parameters of layers with and without windows."""
    return {"rope_parameters": {TYPES[0]: scaling(rng, kind), TYPES[1]: scaling(rng, "default")}}


def phi3(rng) -> dict:
    shape, kind = sizes(rng, multiple=True, even=4), str(rng.choice(["default", "longrope"]))
    share = float(rng.choice([0.5, 1.0]))
    rope = scaling(rng, kind, int(shape["hidden_size"] // shape["num_attention_heads"] * share))
    original = rope.get("original_max_position_embeddings", 16)
    shape |= {"sliding_window": [None, 6][rng.integers(2)], "original_max_position_embeddings": original}
    return shape | {"rope_parameters": rope | {"partial_rotary_factor": share}}


def smollm3(rng) -> dict:
    slides = bool(rng.integers(2))
    shape = sizes(rng) | {"no_rope_layers": [int(x) for x in rng.permutation([0, 1, 1])]}
    return shape | {"use_sliding_window": slides, "sliding_window": 5 if slides else None}


def granite(rng) -> dict:
    names = "embedding_multiplier", "attention_multiplier", "residual_multiplier"
    scales = {name: uniform(rng, 0.2, 2) for name in names}
    return sizes(rng) | flags(rng, "attention_bias", "mlp_bias") | scales | {"logits_scaling": uniform(rng, 0.2, 3)}


def cohere2(rng) -> dict:
    shape = sizes(rng, multiple=True) | {"sliding_window": 5, "layer_types": types(rng)}
    return shape | flags(rng, "attention_bias") | {"logit_scale": uniform(rng, 0.1, 2)}


def neox(rng) -> dict:
    shape = sizes(rng, multiple=True, even=4) | flags(rng, "attention_bias", "use_parallel_residual")
    share = float(rng.choice([0.25, 0.5, 1.0]))
    del shape["num_key_value_heads"]
    return shape | {"rope_parameters": scaling(rng, "default") | {"partial_rotary_factor": share}}


def glm4(rng) -> dict:
    shape = sizes(rng, even=4) | flags(rng, "attention_bias")
    share = float(rng.choice([0.5, 1.0]))
    return shape | {"rope_parameters": scaling(rng, "default") | {"partial_rotary_factor": share}}


def hybrid(rng) -> dict:
    shape, heads = sizes(rng, even=4) | flags(rng, "attention_bias"), int(rng.choice([1, 2]))
    kinds = [("linear_attention", "full_attention")[i] for i in rng.permutation([0, 0, 1])]
    shape |= {"layer_types": kinds, "linear_conv_kernel_dim": int(rng.choice([2, 4])), "linear_num_key_heads": heads}
    shape |= {"linear_num_value_heads": heads * int(rng.choice([1, 3])), "linear_key_head_dim": int(rng.choice([4, 6]))}
    # A norm of the first token's output, which may be close to 0, would enlarge rounding errors without this epsilon.
    shape |= {"linear_value_head_dim": int(rng.choice([4, 7])), "rms_norm_eps": float(rng.choice([1e-3, 1e-2]))}
    rope = scaling(rng, "default") | {"partial_rotary_factor": float(rng.choice([0.25, 0.5]))}
    return shape | {"rope_parameters": rope}


def qwen3_5(rng) -> dict:
    """A model that reads images too, whose text part is a qwen3_5_text."""
    text = hybrid(rng)
    # Sections of the positions of images, which are equal in texts.
    text["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: V + i for i, name in enumerate(names)}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return tokens | tied | {"text_config": text, "vision_config": vision}


def gemma4(rng) -> dict:
    shape, heads = sizes(rng), [1, 2, 3]
    shape |= {"num_hidden_layers": 5, "sliding_window": int(rng.choice([4, 7]))}
    # Values and outputs are normalised, and rounding errors of small ones would be enlarged without this epsilon.
    shape |= flags(rng, "attention_bias") | {"rms_norm_eps": float(rng.choice([1e-3, 1e-2]))}
    shape |= {name: bool(rng.integers(3)) for name in ("attention_k_eq_v", "use_double_wide_mlp")}
    shape["layer_types"] = [*types(rng), TYPES[rng.integers(2)], TYPES[0]]
    shape["num_kv_shared_layers"] = int(rng.choice([0, 1, 2, 2]))
    shape["global_head_dim"] = 2 * int(rng.choice([2, 3, 5]))
    shape["num_global_key_value_heads"] = int(rng.choice([n for n in heads if shape["num_attention_heads"] % n == 0]))
    width = int(rng.choice([0, 5, 6, 7]))
    shape["hidden_size_per_layer_input"] = width or 5 * bool(shape["num_kv_shared_layers"])  # transformers cannot
    # compute shared keys without these inputs
    shape |= {"vocab_size_per_layer_input": V, "final_logit_softcapping": [None, 3.0][rng.integers(2)]}
    full = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": float(rng.choice([0.25, 0.5]))}
    return shape | {"rope_parameters": {TYPES[0]: full, TYPES[1]: scaling(rng, "default")}}


def gemma4_whole(rng) -> dict:
    """A model that reads images too, whose text part is a gemma4_text."""
    text = gemma4(rng)
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 4, "patch_size": 4, "position_embedding_size": 16}
    names = ("image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id")
    tokens = {name: V + i for i, name in enumerate((*names, "eoa_token_index"))}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return tokens | tied | {"text_config": text, "vision_config": vision}


# name -> (model_type, rng -> what config.json says)
DRAWS = {
    **{
        f"llama, {kind}": ("llama", lambda rng, kind=kind: llama(rng, kind, attention_bias=1, mlp_bias=1))
        for kind in ("linear", "dynamic", "llama3", "yarn", "longrope")
    },
    "qwen2, yarn": ("qwen2", lambda rng: llama(rng, "yarn")),
    "qwen3, yarn": ("qwen3", lambda rng: llama(rng, "yarn", attention_bias=1)),
    "mixtral": ("mixtral", lambda rng: experts(rng, "num_local_experts") | {"sliding_window": 6}),
    "qwen3_moe": (
        "qwen3_moe",
        lambda rng: (
            experts(rng, "num_experts") | flags(rng, "norm_topk_prob", "attention_bias") | {"moe_intermediate_size": 12}
        ),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        lambda rng: (
            experts(rng, "num_experts")
            | flags(rng, "norm_topk_prob", "qkv_bias")
            | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
        ),
    ),
    "qwen3_moe, dense layers": (
        "qwen3_moe",
        lambda rng: (
            experts(rng, "num_experts") | {"moe_intermediate_size": 12, "mlp_only_layers": [int(rng.integers(3))]}
        ),
    ),
    "qwen2_moe, dense layers": (
        "qwen2_moe",
        lambda rng: (
            experts(rng, "num_experts")
            | flags(rng, "norm_topk_prob", "qkv_bias")
            | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2}
        ),
    ),
    "olmoe": (
        "olmoe",
        lambda rng: (
            experts(rng, "num_experts")
            | flags(rng, "norm_topk_prob", "attention_bias")
            | {"clip_qkv": [None, 0.5][rng.integers(2)]}
        ),
    ),
    "gpt_oss": ("gpt_oss", gpt_oss),
    "gemma2": ("gemma2", lambda rng: gemma(rng, attn_logit_softcapping=uniform(rng, 1, 3))),
    "gemma3_text": (
        "gemma3_text",
        lambda rng: gemma(rng, **of_types(rng, str(rng.choice(["default", "linear"])))),
    ),
    "gemma3": ("gemma3", gemma3),
    "gemma4_text": ("gemma4_text", gemma4),
    "gemma4": ("gemma4", gemma4_whole),
    "olmo2": ("olmo2", lambda rng: sizes(rng) | flags(rng, "attention_bias")),
    "olmo3": (
        "olmo3",
        lambda rng: (
            sizes(rng)
            | flags(rng, "attention_bias")
            | {"sliding_window": 5, "layer_types": types(rng)}
            | of_types(rng, str(rng.choice(["default", "yarn"])))
        ),
    ),
    "phi3": ("phi3", phi3),
    "smollm3": ("smollm3", smollm3),
    "granite": ("granite", granite),
    "cohere2": ("cohere2", cohere2),
    "gpt_neox": ("gpt_neox", neox),
    "starcoder2": ("starcoder2", lambda rng: sizes(rng) | flags(rng, "use_bias") | {"sliding_window": 6}),
    "glm4": ("glm4", glm4),
    "qwen3_5_text": ("qwen3_5_text", hybrid),
    "qwen3_5": ("qwen3_5", qwen3_5),
    "ernie4_5": ("ernie4_5", lambda rng: sizes(rng) | flags(rng, "use_bias")),
    "seed_oss": (
        "seed_oss",
        lambda rng: sizes(rng) | flags(rng, "attention_bias", "attention_out_bias", "mlp_bias"),
    ),
}


def auto(model_type: str):
    """The class of transformers that finds the class of a whole model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    row = FAMILIES.get(model_type)
    return AutoModelForImageTextToText if row and row.text else AutoModelForCausalLM


def draw(name: str, seed: int):
    """(a random model of transformers, its settings)."""
    from transformers import AutoConfig

    kind, settings = DRAWS[name]
    settings = settings(np.random.default_rng(seed))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    # Only this implementation computes all that a config may say, such as bounded scores.
    build = functools.partial(auto(kind).from_config, config, attn_implementation="eager")
    model = build()
    scalars = [x for name, x in model.named_buffers() if name.endswith("layer_scalar")]  # in files, but not trained
    with torch.no_grad():
        for p in (*model.parameters(), *scalars):
            p.add_(torch.randn_like(p) * 0.1)
    exact = build(dtype=torch.float32)  # with --double, constants too are those of float64
    exact.load_state_dict(model.state_dict())
    return exact.eval(), settings


def rows(docs, packed) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segments (8, T): docs padded left, and right, `packed` in one row, and that row with other
    tokens in its second document."""
    out = np.zeros((3, 8, T), np.int32)

    def put(row, at, doc, segment):
        out[:, row, at : at + len(doc)] = doc, np.arange(len(doc)), np.full(len(doc), segment)

    for i, doc in enumerate(docs):
        put(i, T - len(doc), doc, 1)
        put(3 + i, 0, doc, 1)
    for row in (6, 7):
        at = 0
        for segment, doc in enumerate(packed, 1):
            put(row, at, (doc + 1) % V if (row, segment) == (7, 2) else doc, segment)
            at += len(doc)
    return tuple(out)


def check(name: str, seed: int, answers: bool = True) -> dict[str, float]:
    """The figures of one model: largest differences, and for `answers` the number of tokens that differ."""
    model, _ = draw(name, seed)
    pair, found = tiny.read(model), {}
    docs, packed = tiny.documents((20, 13, 5), V, seed), tiny.documents((9, 6, 5), V, seed + 1)
    inputs = [jnp.asarray(x) for x in rows(docs, packed)]
    got = np.asarray(tiny.jit(lambda params: pair.model.apply({"params": params}, *inputs))(pair.params))
    alone = [tiny.torch_logits(model, doc[None])[0] for doc in docs]
    each = [(got[i, T - len(doc) :], got[3 + i, : len(doc)]) for i, doc in enumerate(docs)]
    for side, which in (("left", 0), ("right", 1)):
        found[side] = max(np.abs(pieces[which] - want).max() for pieces, want in zip(each, alone, strict=True))
    want = np.concatenate([tiny.torch_logits(model, doc[None])[0] for doc in packed])
    found["packed"] = np.abs(got[6] - want).max()
    others = np.r_[0:9, 15:20]
    found["leak"] = np.abs(got[6] - got[7])[others].max()
    assert np.abs(got[6] - got[7])[9:15].max() > 1e-3
    if answers:
        prompt = docs[1][:9]  # longer than the shortest original length of longrope, which may not be crossed
        new = 4
        wanted = model.generate(
            torch.tensor(prompt[None]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
        )
        said = generate(pair.model, {"params": pair.params}, [prompt.tolist()], max_new_tokens=new)[0]
        found["answers"] = int((np.array(said) != wanted[0, len(prompt) :].numpy()).sum())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # a wrong name is only a warning to peft
        out = Path(folder)
        if pair.family.text:  # the other parts come from there
            model.save_pretrained(out / "source")
        source = out / "source" if pair.family.text else None
        weights.write_model(out / "model", pair.params, source, pair.family, pair.model.config)
        pad = {} if source else {"pad_token_id": 0}
        theirs, info = auto(pair.family.model_type).from_pretrained(
            out / "model", attn_implementation="eager", output_loading_info=True, **pad
        )
        assert not any(info.values()), info
        found["export"] = np.abs(tiny.torch_logits(theirs.eval(), docs[0][None]) - alone[0]).max()
        found |= of_lora(pair, theirs, docs[0], out / "adapter", REMAT[seed % len(REMAT)])
    return {name: float(x) for name, x in found.items()}


def of_lora(pair, theirs, doc, folder: Path, remat: str) -> dict[str, float]:
    """Differences of logits and of gradients of a LoRA on all linear maps of the blocks and on experts."""
    from peft import PeftModel

    targets = ("all-linear", *(("gate_up_proj", "down_proj") if pair.model.config.experts else ()))
    pair = tiny.tuned(pair, method="lora", rank=2, alpha=4, targets=targets)
    with jax.enable_x64(False):  # the same adapter with --double
        method, trained, frozen = tiny.start(pair)
        keys = iter(jax.random.split(jax.random.key(7), 100))
        trained = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), trained)
    trained, frozen = jax.tree.map(lambda x: x.astype(jnp.float32), (trained, frozen))
    model = Transformer(pair.model.config, remat=remat)

    def loss(trained):
        y = model.apply(method.variables(trained, frozen, pair.spec), jnp.asarray(doc[None]))
        p = jax.nn.log_softmax(y[0, :-1])
        return -jnp.take_along_axis(p, jnp.asarray(doc[1:, None]), 1).mean(), y

    (_, logits), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(trained)

    def of_peft(tree) -> dict[str, np.ndarray]:
        """PEFT's tensors, which are float32, as the sum of what is rounded and what this leaves."""
        rounded = jax.tree.map(lambda x: x.astype("float32"), tree)
        rest = jax.tree.map(lambda x, most: x - most, tree, rounded)
        most, rest = (method.to_peft(part, frozen, pair.spec)[1] for part in (rounded, rest))
        return {name: x.astype(jnp.float32) + rest[name] for name, x in most.items()}

    write_adapter(folder, of_peft(trained), method.to_peft(trained, frozen, pair.spec)[0], None, "base")
    adapted = PeftModel.from_pretrained(theirs, folder, is_trainable=True).eval()
    ids = torch.tensor(doc[None])
    y = adapted(ids).logits
    torch.nn.functional.cross_entropy(y[0, :-1], ids[0, 1:]).backward()
    want = {name.replace(".default", ""): p.grad.numpy() for name, p in adapted.named_parameters() if p.requires_grad}
    got = of_peft(gradient)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    error = max(np.abs(got[name] - want[name]).max() / max(np.abs(want[name]).max(), 1e-3) for name in want)
    assert all(np.abs(g).max() > 0 for g in flatten(gradient).values())
    return {"lora": np.abs(np.asarray(logits) - y.detach().numpy()).max(), "gradients": error}


def rows_of(names, seeds: range) -> dict[str, str]:
    """{family: a row of a Markdown table with the worst figures of its models}, each printed once it is known."""
    out = {}
    for name in names:
        # With --double there are no answers: the cache has whole numbers of 32 bits.
        found = [check(name, seed, answers=not DOUBLE) for seed in seeds]
        worst = (max(each.get(figure, np.nan) for each in found) for figure in FIGURES)
        figures = " | ".join(f"{x:.1e}".replace("0.0e+00", "0") for x in worst)
        out[name] = f"| {name} | {seeds[0]}-{seeds[-1]} | {figures} |"
        print(out[name], flush=True)
        jax.clear_caches()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("families", nargs="*", help=f"default: all; {'; '.join(DRAWS)}")
    parser.add_argument("--seeds", type=int, default=8, help="models of each family")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--out", type=Path, help="Markdown file whose table gets the rows of these families")
    arguments = parser.parse_args()
    rows = rows_of(arguments.families or DRAWS, range(arguments.first, arguments.first + arguments.seeds))
    if arguments.out:
        text = arguments.out.read_text(encoding="utf-8")
        kept, old = text[: text.rindex("| family |")], text[text.rindex("| family |") :].splitlines()[2:]
        rows = {line.split(" | ")[0].removeprefix("| "): line for line in old} | rows
        head = f"| family | seeds | {' | '.join(FIGURES)} |\n|{' --- |' * (len(FIGURES) + 2)}\n"
        arguments.out.write_text(kept + head + "\n".join(rows.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
