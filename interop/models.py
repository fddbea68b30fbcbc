"""Models of other implementations, both ways: the PyTorch original, and four classes of transformers.

The tables are in `families.py`. Arrays are numpy's, so that a model can pass through without a device.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_type_hints

import jax
import numpy as np

from interop.families import BUFFER, FAMILIES, FLAT, GPT2, GPT_OSS, LLAMA, ORIGINAL_RULES, QWEN3, Arrays, Family, Rule
from transformer.config import TransformerConfig
from transformer.model import shapes_of

# --- Weights ------------------------------------------------------------------------------------------------------


def _rules_of(rules: Iterable[Rule], config: TransformerConfig) -> list[Rule]:
    """The rules for each block, without those for parameters that the model lacks."""
    names, found = shapes_of(config).keys(), []
    for rule in rules:
        for n in range(config.num_blocks if "{n}" in rule.theirs else 1):
            ours = tuple(name.format(n=n) for name in rule.ours)
            if names >= set(ours):
                found.append(Rule(rule.theirs.format(n=n), ours, rule.layout))
    return found


def join_weights(rules: Iterable[Rule], config: TransformerConfig, params: Mapping[str, np.ndarray]) -> Arrays:
    """Our parameters under their names, in their layout."""
    return {
        rule.theirs: np.ascontiguousarray(rule.layout.join(*(params[name] for name in rule.ours)))
        for rule in _rules_of(rules, config)
    }


def as_float32(name: str, array: np.ndarray) -> np.ndarray:
    """A weight as float32. Raises ValueError, which names it, if its numbers are not floats, or not finite."""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        raise ValueError(f"{name}: its numbers are {array.dtype}, and weights are floats")
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: not all of its numbers are finite")
    return array


_NUMBER = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.")


def count_blocks(names: Iterable[str]) -> int:
    """The number of blocks in names of weights, theirs or ours. Raises ValueError if a number is missing."""
    numbers = {int(found[1]) for found in map(_NUMBER.search, names) if found}
    if missing := set(range(len(numbers))) - numbers:
        raise ValueError(f"block {min(missing)}: missing among the weights, whose last is {max(numbers)}")
    return len(numbers)


def require_blocks(key: str, told: Any, names: Iterable[str]) -> None:
    """Raises ValueError if a file's number of blocks is not that of its weights. Ask first: all work grows with it."""
    if told != (there := count_blocks(names)):
        raise ValueError(f"{key}: {told!r} by the config, {there} by the weights")


def split_weights(rules: Iterable[Rule], config: TransformerConfig, weights: Mapping[str, np.ndarray]) -> Arrays:
    """Their weights (or gradients) as our parameters, float32.

    Raises ValueError, which names the weight, if one is missing, unknown, no float, not finite, or of another shape
    than the config's.
    """
    shapes, params, left = shapes_of(config), {}, set(weights)
    for rule in _rules_of(rules, config):
        if rule.theirs not in weights:
            raise ValueError(f"{rule.theirs}: missing among the weights")
        stand_ins = [np.broadcast_to(np.float32(0), shapes[name].shape) for name in rule.ours]
        want, have = rule.layout.join(*stand_ins).shape, weights[rule.theirs].shape
        if have != want and not (rule.layout is FLAT and math.prod(have) == math.prod(want)):
            raise ValueError(f"{rule.theirs}: its shape is {have}, by the config it would be {want}")
        whole = as_float32(rule.theirs, weights[rule.theirs])
        for name, part in zip(rule.ours, rule.layout.split(whole), strict=True):
            params[name] = np.ascontiguousarray(part)
        left.remove(rule.theirs)
    if left:
        raise ValueError(f"{min(left)}: this model has no place for it")
    if missing := shapes.keys() - params.keys():
        raise ValueError(f"{min(missing)}: nothing among the weights gives it")
    return params


# --- Rotary positions and windows ---------------------------------------------------------------------------------


_FAST_SLOW = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("high_freq_factor", "low_freq_factor")}


def _rope_to(config: TransformerConfig) -> dict[str, Any]:
    """The settings in both forms: `rope_parameters`, and the two keys that transformers 4, mlx-lm and others read."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (kind := config.rope_scaling) != "none":
        fast, slow = _FAST_SLOW[kind]
        rope = {"rope_type": kind, "factor": config.yarn_factor}
        rope["original_max_position_embeddings"] = config.yarn_original_context
        rope |= {fast: config.yarn_beta_fast, slow: config.yarn_beta_slow}
    if kind == "yarn":
        rope |= {"truncate": config.yarn_truncate}
        rope |= {"attention_factor": config.yarn_attention_factor} if config.yarn_attention_factor else {}
    theta = {"rope_theta": config.rope_theta}
    return {"rope_parameters": rope | theta, **theta, "rope_scaling": None if len(rope) == 1 else rope}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _rope_from(family: Family, theirs: Mapping[str, Any], context_len: int) -> dict[str, Any]:
    """Our settings from `rope_scaling` (as before transformers 5, with `rope_theta` beside it), or `rope_parameters`.

    `rope_scaling` takes precedence, as in transformers 5.24.
    """
    rope = theirs.get("rope_scaling") or _first(theirs.get("rope_parameters"), family.rope)
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: must be an object, got {rope!r}")
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rope_parameters: {nested[0]} has settings of its own; all layers must have the same")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *_FAST_SLOW):
        raise ValueError(f"rope_type: must be default, yarn or llama3, got {kind!r}")
    if (part := rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor: must be 1, got {part}")
    settings = {"rope_theta": _first(rope.get("rope_theta"), theirs.get("rope_theta"), family.theta)}
    if kind != "default":
        original = rope.get("original_max_position_embeddings") or context_len
        fast, slow = _FAST_SLOW[kind]
        settings |= {
            "rope_scaling": kind,
            "yarn_original_context": original,
            "yarn_factor": _first(rope.get("factor"), context_len / original),
            "yarn_beta_fast": rope.get(fast) or 32.0,
            "yarn_beta_slow": rope.get(slow) or 1.0,
        }
    if kind == "yarn":
        scale = _first(rope.get("attention_factor"), _ratio(rope, settings["yarn_factor"]))
        settings |= {"yarn_truncate": rope.get("truncate", True), "yarn_attention_factor": scale}
    return settings


def _ratio(rope: Mapping[str, Any], factor: Any) -> float:
    """YaRN's attention factor in DeepSeek's files, a ratio of two; without them 0, which means the default."""
    scales: dict[str, Any] = {key: rope.get(key) for key in ("mscale", "mscale_all_dim")}
    if not all(scales.values()):
        return 0.0
    for key, value in {**scales, "factor": factor}.items():
        if type(value) not in (int, float) or not value > 0:
            raise ValueError(f"{key}: must be a number above 0, got {value!r}")
    above, below = (1 + 0.1 * scale * math.log(max(factor, 1)) for scale in scales.values())
    return above / below


def _windows_to(family: Family, config: TransformerConfig) -> dict[str, Any]:
    local = [bool(config.window(n)) for n in range(config.num_blocks)]
    unused = config.context_len if family is GPT_OSS else None  # gpt-oss needs a width even if no layer has a window
    return {
        "sliding_window": config.sliding_window or unused,
        "use_sliding_window": any(local),
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local],
    }


def _windows_from(family: Family, theirs: Mapping[str, Any], num_blocks: int) -> dict[str, Any]:
    window = theirs.get("sliding_window", 4096 if family is QWEN3 else 128)
    if (family is QWEN3 and not theirs.get("use_sliding_window")) or not window:
        return {}
    kinds = theirs.get("layer_types")
    if not kinds and family is QWEN3:
        first = theirs.get("max_window_layers", 28)
        kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(num_blocks)]
    letters = {"sliding_attention": "L", "full_attention": "G"}
    if unknown := [kind for kind in kinds or () if kind not in letters]:
        raise ValueError(f"layer_types: must be of {', '.join(letters)}, got {unknown[0]!r}")
    if kinds and len(kinds) != num_blocks:
        raise ValueError(f"layer_types: {len(kinds)} of them for {num_blocks} layers")
    pattern = "".join(letters[kind] for kind in kinds) if kinds else "LG"
    if "L" not in pattern:
        return {}
    shortest = next(p for p in range(1, len(pattern) + 1) if (pattern[:p] * len(pattern))[: len(pattern)] == pattern)
    return {"sliding_window": window, "window_pattern": pattern[:shortest]}


# --- Whole models -------------------------------------------------------------------------------------------------

_HEAD = "lm_head.weight"  # of all four classes


def from_theirs(theirs: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> tuple[TransformerConfig, Arrays]:
    """A model of one of the four classes: our shape and parameters from its config.json and its weights.

    If the config ties head and embedding, it does what transformers 5.24 does: if they differ, the model is untied, and
    if only the head is there, it is the embedding too. Raises ValueError, `<their key or weight>: <what does not fit>`.
    """
    family = _family(theirs)
    key, default = family.settings["num_blocks"]
    require_blocks(key, _first(theirs.get(key), default), weights)
    config = config_from(theirs)
    names, prefix = {rule.theirs for rule in family.rules}, family.rules[0].theirs.partition(".")[0]
    whole = any(name.startswith(f"{prefix}.") for name in weights)  # else they are of the class without its head
    renamed = {name if whole or name in names else f"{prefix}.{name}": value for name, value in weights.items()}
    ignored = family.constants(config).keys()
    kept = {name: x for name, x in renamed.items() if name not in ignored and not BUFFER.fullmatch(name)}
    if config.tie_embeddings and _HEAD in kept:
        embedding, head = family.rules[0].theirs, kept.pop(_HEAD)
        if not np.array_equal(kept.setdefault(embedding, head), head):
            kept[_HEAD], config = head, replace(config, tie_embeddings=False)
    return config, split_weights(family.rules, config, kept)


def _family(theirs: Mapping[str, Any]) -> Family:
    family = FAMILIES.get(str(theirs.get("model_type")))
    if family is None:
        raise ValueError(f"model_type: must be one of {', '.join(FAMILIES)}, got {theirs.get('model_type')!r}")
    return family


def config_from(theirs: Mapping[str, Any]) -> TransformerConfig:
    """Our shape of a model from the config.json of one of the four classes. ValueError, `<key>: <why not>`, if none."""
    family = _family(theirs)
    if theirs.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights cannot be read; take a bfloat16 or float32 version")
    for key, (value, default) in family.demands.items():
        if theirs.get(key, default) != value:
            raise ValueError(f"{key}: must be {value}, got {theirs.get(key, default)!r}")
    activation = theirs.get(family.activation_key, next(iter(family.activations)))
    if not isinstance(activation, str) or activation not in family.activations:
        raise ValueError(f"{family.activation_key}: must be one of {', '.join(family.activations)}, got {activation!r}")
    given = {ours: _first(theirs.get(key), default) for ours, (key, default) in family.settings.items()}
    keys = {ours: key for ours, (key, _) in family.settings.items()}
    settings = _typed({ours: value for ours, value in given.items() if value is not None}, keys)
    if family is GPT2:
        settings.setdefault("mlp_dim", 4 * settings["embedding_dim"])
    else:
        settings |= _typed(_rope_from(family, theirs, settings["context_len"]), {})
        if "sliding_window" not in family.fixed:
            settings |= _typed(_windows_from(family, theirs, settings["num_blocks"]), {})
    return TransformerConfig(**{**family.fixed, "mlp": family.activations[activation], **settings})


def _typed(settings: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The settings, each of TransformerConfig's type; `keys` are their names in the file, for errors."""
    typed, kinds = {}, get_type_hints(TransformerConfig)
    for name, value in settings.items():
        kind = kinds[name]
        typed[name] = float(value) if kind is float and type(value) is int else value
        if type(typed[name]) is not kind:
            raise ValueError(f"{keys.get(name, name)}: must be of type {kind.__name__}, got {value!r}")
    return typed


class Exported(NamedTuple):
    """A model as one of the classes: its settings there, and what some programs do not read."""

    family: Family
    full: TransformerConfig  # with all biases and scales of the class, zeros and ones if the model lacks them
    caveats: list[str]


def exported_as(config: TransformerConfig) -> Exported:
    """The class of transformers that computes what a model does; ValueError that names what is in the way, if none."""
    if config.has_sinks:
        family = GPT_OSS
    elif config.position == "learned":
        family = GPT2
    else:
        family = LLAMA if config.qk_norm == "none" else QWEN3
    full = _filled_up(family, config)
    mlps = list(family.activations.values())
    there = {**family.fixed, "mlp": full.mlp if full.mlp in mlps else mlps[0]}
    if "head_dim" not in family.settings:
        there |= {"num_kv_heads": full.num_heads, "head_dim": full.embedding_dim // full.num_heads}
    if family is LLAMA and full.embedding_dim % full.num_heads:
        there["num_heads"] = "a divisor of embedding_dim"
    if odd := [name for name, value in there.items() if getattr(full, name) != value]:
        ours = ", ".join(f"{name} {getattr(full, name)!r}" for name in odd)
        has = f"{family.architecture}, has " + ", ".join(f"{name} {there[name]!r}" for name in odd)
        raise ValueError(f"{odd[0]}: no class of transformers has {ours}; the nearest, {has}")
    return Exported(family, full, _caveats(family, full))


def _caveats(family: Family, full: TransformerConfig) -> list[str]:
    """What the programs in docs/travel.md do not read of a model; transformers itself reads all of it."""
    letters = ["L" if full.window(n) else "G" for n in range(full.num_blocks)]
    yarn, wide = full.rope_scaling == "yarn", full.mlp_dim != 4 * full.embedding_dim
    alternate = "L" not in letters or letters == (["L", "G"] * full.num_blocks)[: full.num_blocks]
    told = [
        (family is GPT2 and full.mlp != "gelu_tanh", f"mlx-lm and llama.cpp compute gelu_tanh for mlp {full.mlp}"),
        (family is GPT2 and wide, "mlx-lm and llama.cpp refuse an mlp_dim other than 4 * embedding_dim"),
        (family is GPT2 and not full.tie_embeddings, "mlx-lm refuses an untied head"),
        (family is QWEN3 and "L" in letters, "mlx-lm and llama.cpp ignore sliding_window in Qwen3"),
        (family is QWEN3 and full.qkv_bias, "mlx-lm and llama.cpp refuse attention biases in Qwen3"),
        (yarn and not full.yarn_truncate, "mlx-lm and llama.cpp take yarn_truncate for True"),
        (yarn and full.yarn_attention_factor > 0, "mlx-lm and llama.cpp ignore yarn_attention_factor"),
        (family is GPT_OSS, "mlx-lm reads gpt-oss in its quantised form only"),
        (family is GPT_OSS and not alternate, f"llama.cpp takes window_pattern {full.window_pattern} for LG"),
    ]
    return [text for applies, text in told if applies]


def to_theirs(config: TransformerConfig, params: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Arrays]:
    """The contents of config.json and of the weights file for a model. Raises ValueError as `exported_as` does."""
    family, full, _ = exported_as(config)
    theirs: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    theirs |= {key: value for key, (value, _) in family.demands.items()}
    theirs |= {key: getattr(full, ours) for ours, (key, _) in family.settings.items()}
    activation = next(name for name, mlp in family.activations.items() if mlp == full.mlp)
    theirs |= {family.activation_key: activation, "dtype": "float32"}
    if family is GPT2:
        theirs["n_ctx"] = full.context_len  # its name before transformers 5; mlx-lm and llama.cpp read it
        theirs |= {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": 0.0}
    else:
        theirs |= {**_rope_to(full), "attention_dropout": 0.0}
        if "sliding_window" not in family.fixed:
            theirs |= _windows_to(family, full)
    whole = {name: np.full(x.shape, name.endswith("scale"), x.dtype) for name, x in shapes_of(full).items()}
    whole |= {name: np.asarray(value, np.float32) for name, value in params.items()}
    weights = join_weights(family.rules, full, whole) | family.constants(full)
    if family is GPT2 and full.tie_embeddings:  # the names in OpenAI's own file; mlx-lm reads no others
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    if family is GPT_OSS and full.tie_embeddings:
        weights[_HEAD] = weights[family.rules[0].theirs]  # llama.cpp's gpt-oss has no tied one
    return theirs, weights


def _filled_up(family: Family, config: TransformerConfig) -> TransformerConfig:
    """The same function with the biases and scales that the class always has, and without an unused window."""
    changes: dict[str, Any] = {
        name: getattr(config, name) or bool(family.fixed.get(name))
        for name in ("qkv_bias", "attention_out_bias", "mlp_bias")
    }
    if family is not GPT2:  # the others have one key for both
        either = changes["qkv_bias"] or changes["attention_out_bias"] or family is GPT_OSS  # llama.cpp asks for them
        changes |= {"qkv_bias": either, "attention_out_bias": either}
    if config.norm == "layernorm":
        changes["norm_bias"] = True
    if config.qk_norm == "unscaled" and family is QWEN3:
        changes["qk_norm"] = "scaled"
    if config.attention_sink == "zero":
        changes["attention_sink"] = "logit"  # with zeros
    if not any(config.window(n) for n in range(config.num_blocks)):
        changes["sliding_window"] = 0
    return replace(config, **changes)


def from_original(weights: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> tuple[TransformerConfig, Arrays]:
    """A checkpoint of the PyTorch original, whose shape follows from its weights.

    `metadata` are settings by our names, which must not contradict the weights; without sinks it has to name
    `num_heads`. Raises ValueError, `<weight>: <what does not fit>`.
    """
    weights = {name.removeprefix("_orig_mod."): x for name, x in weights.items() if not BUFFER.fullmatch(name)}
    first = "blocks.0.Attention_Layers."
    for name in ("embed.W_E.weight", "embed.W_pos.weight", f"{first}W_Q.weight", "blocks.0.MLP_Layers.layer1.weight"):
        if name not in weights:
            raise ValueError(f"{name}: missing among the weights")
    sink, head = weights.get(f"{first}sink_scalar"), weights.get("deembed.W_D.weight")
    num_heads = metadata.get("num_heads") if sink is None else sink.size
    if not num_heads:
        raise ValueError("num_heads: cannot be told from weights without sinks, and metadata.json has none")
    tied = head is None or np.array_equal(head, weights["embed.W_E.weight"])
    if tied:
        weights.pop("deembed.W_D.weight", None)
    vocab_size, width = weights["embed.W_E.weight"].shape
    config = TransformerConfig(
        vocab_size=vocab_size,
        context_len=weights["embed.W_pos.weight"].shape[0],
        num_blocks=count_blocks(weights),
        num_heads=num_heads,
        embedding_dim=width,
        head_dim=weights[f"{first}W_Q.weight"].shape[0] // num_heads,
        mlp_dim=weights["blocks.0.MLP_Layers.layer1.weight"].shape[0],
        attention_sink="none" if sink is None else "logit",
        tie_embeddings=tied,
    )
    for name in ("vocab_size", "context_len", "num_blocks", "num_heads", "embedding_dim", "mlp_dim"):
        if metadata.get(name, getattr(config, name)) != getattr(config, name):
            raise ValueError(f"{name}: {metadata[name]!r} in metadata.json, {getattr(config, name)} by the weights")
    return config, split_weights(ORIGINAL_RULES, config, weights)
