"""What GGUF calls a model's hyperparameters and tensors, of the families that llama.cpp computes as transformers does.

Each family is a row of `FAMILIES`: the values of config.json entries that llama.cpp's graph has built in are listed, so
that a model with another value is refused rather than computed wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, PoolingType, RopeScalingType, get_tensor_name_map
from torch import Tensor

from .source import Source

_GATED: Final = {"hidden_act": ("silu", "swish")}
_CAUSAL: Final = {"is_decoder": (False,), "add_cross_attention": (False,)}


@dataclass(frozen=True)
class Family:
    """classes: of transformers, whose output llama.cpp gives. fixed: entries of the config with the values that may
    stand there. ropes: types of rotary embeddings; none where positions are learned. paired: rotary embeddings turn
    neighbours, not halves, so that rows of q and k are put in another order. unused: prefixes of parameters that don't
    contribute to the output.
    """

    arch: MODEL_ARCH
    classes: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    ropes: tuple[str, ...] = ()
    paired: bool = False
    unused: tuple[str, ...] = field(default=())


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": Family(MODEL_ARCH.LLAMA, ("LlamaForCausalLM",), _GATED, ("default", "linear", "llama3"), paired=True),
        "mistral": Family(MODEL_ARCH.LLAMA, ("MistralForCausalLM",), _GATED, ("default", "linear"), paired=True),
        "qwen2": Family(MODEL_ARCH.QWEN2, ("Qwen2ForCausalLM",), _GATED, ("default", "linear")),
        "qwen3": Family(
            *(MODEL_ARCH.QWEN3, ("Qwen3ForCausalLM",), {**_GATED, "attention_bias": (False,)}, ("default", "linear"))
        ),
        "gpt2": Family(
            MODEL_ARCH.GPT2,
            ("GPT2LMHeadModel",),
            {
                **{"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "add_cross_attention": (False,)},
                **{"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
            },
        ),
        "bert": Family(
            MODEL_ARCH.BERT,
            ("BertModel",),
            {**_CAUSAL, "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh")},
            unused=("pooler.",),
        ),
    }
)
PAIRED: Final = (".self_attn.q_proj", ".self_attn.k_proj")


def misfit(source: Source) -> str | None:
    """Why llama.cpp doesn't compute this model, as a clause; None if it does."""
    config, kind = source.model.config, source.checkpoint.config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        return f"its model type is {kind}, and of those that llama.cpp runs, this knows {', '.join(FAMILIES)}"
    name = type(source.model).__name__
    if name not in family.classes:
        return f"it is a {name}, and llama.cpp gives the output of a {' or '.join(family.classes)}"
    for entry, allowed in family.fixed.items():
        if (value := getattr(config, entry, allowed[0])) not in allowed:
            return f"its config.json has {entry}: {json.dumps(value)}, and llama.cpp computes with {allowed[0]}"
    rope = _rope(config)
    if family.ropes and rope["rope_type"] not in family.ropes:
        return f"its rotary embeddings are of type {rope['rope_type']}, and here {', '.join(family.ropes)} are known"
    if family.ropes and (part := float(rope.get("partial_rotary_factor", 1.0))) != 1.0:
        return f"its config.json has partial_rotary_factor: {part}, and llama.cpp turns whole heads"
    lost = next((name for name, place in names(source) if place is None), None)
    return None if lost is None else f"{lost} has no place among the tensors of {architecture(source)}"


def names(source: Source) -> Iterator[tuple[str, str | None]]:
    """Every parameter of the model with its name in GGUF, None where there is none; without a head that is tied to the
    embedding, which llama.cpp takes in its place.
    """
    family, embedding = family_of(source), None
    places = get_tensor_name_map(family.arch, int(source.model.config.num_hidden_layers))
    for name in source.model.state_dict():
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place == "token_embd.weight":
            embedding = source.names.owner(name)
        if not name.startswith(family.unused) and (place != "output.weight" or source.names.owner(name) != embedding):
            yield name, place


def family_of(source: Source) -> Family:
    """Of a model that `misfit` has nothing to say of."""
    return FAMILIES[source.checkpoint.config["model_type"]]


def architecture(source: Source) -> str:
    """llama.cpp's word for the model's graph."""
    return MODEL_ARCH_NAMES[family_of(source).arch]


def row_order(source: Source, name: str) -> Tensor | None:
    """In what order llama.cpp takes the rows of a parameter, an index [out]; None for as they are.

    transformers turns entry i of a head together with entry i + d/2, llama.cpp's llama entry 2i with 2i + 1.
    """
    if not (family_of(source).paired and name.rpartition(".")[0].endswith(PAIRED)):
        return None
    width, rows = _head(source.model.config), len(source.model.get_parameter(name))
    return torch.arange(rows).reshape(-1, 2, width // 2).transpose(1, 2).reshape(-1)


def rope_factors(source: Source) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, fp32 [head / 2]; None if by one number or none."""
    rope = _rope(source.model.config)
    if rope["rope_type"] != "llama3":
        return None
    frequencies = source.model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float()
    plain = torch.arange(0, 2 * len(frequencies), 2).float() / (2 * len(frequencies))
    return float(rope["rope_theta"]) ** -plain / frequencies


def describe(writer: GGUFWriter, source: Source) -> None:
    """Write the hyperparameters."""
    config, family = source.model.config, family_of(source)
    size = int(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * size
    )
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    if family.ropes:
        _describe_rope(writer, config)
    if family.arch == MODEL_ARCH.BERT:
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
        writer.add_pooling_type(_pooling(source))


def _describe_rope(writer: GGUFWriter, config: Any) -> None:
    rope, head = _rope(config), _head(config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _context(config: Any) -> int:
    """Tokens that llama.cpp attends over as the model does: no more than a sliding window, which its graphs lack."""
    slides = any("sliding" in kind for kind in getattr(config, "layer_types", None) or ("sliding",))
    window = getattr(config, "sliding_window", None) if slides else None
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _pooling(source: Source) -> PoolingType:
    """As sentence-transformers pools, where it says so."""
    file = source.checkpoint.folder / "1_Pooling" / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if told.get("pooling_mode_mean_tokens"):
        return PoolingType.MEAN
    return PoolingType.CLS if told.get("pooling_mode_cls_token") else PoolingType.NONE
