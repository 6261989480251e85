"""Pico models, one a family, built in code with random weights: small enough that a test takes a fraction of a second.

Every family is a row of `FAMILIES`: how to build it, and what must be found in it, stated independently of our code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, HIDDEN, INNER, LAYERS = 96, 32, 48, 2
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADED = {**_DECODER, "head_dim": 8}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_LLAMA = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_ATTENTION = _LLAMA[:4]
_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_BART_SELF = tuple(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out"))
_BART_CROSS = tuple(f"encoder_attn.{name}_proj" for name in ("k", "v", "q", "out"))
_T5_SELF = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{name}" for name in "qkvo")
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def _switch_experts(layer: int) -> tuple[str, ...]:
    experts = f"layer.{layer}.mlp.experts.expert_"
    return tuple(f"{experts}{expert}.{name}" for expert in range(4) for name in ("wi", "wo"))


_FUSED = tuple(f"mlp.experts.{expert}.{name}" for expert in range(4) for name in ("gate_up_proj", "down_proj"))


@dataclass(frozen=True)
class Family:
    """A model class with a pico config, and the truth about its structure."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    stacks: dict[str, tuple[str, ...]]  # path of a list of blocks -> linears in each block
    left_alone: dict[str, str] = field(default_factory=dict)  # what must be reported as untouched -> reason (its start)
    tied: frozenset[str] = frozenset()
    fused: tuple[str, ...] = ()  # in each block, the linears that its fused experts are taken apart into

    def build(self, *, seed: int = 0, **changes: Any) -> nn.Module:
        """The model in fp32 and eval mode, every parameter random: a wrong tensor anywhere shows in the logits."""
        config = getattr(transformers, self.config_class)(**{**self.config, **changes})
        model: nn.Module = getattr(transformers, self.model_class)(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
        return model

    def expected_linears(self, *, layers: int = LAYERS) -> list[str]:
        blocks = [(f"{stack}.{index}", names) for stack, names in self.stacks.items() for index in range(layers)]
        return [f"{block}.{name}" for block, names in blocks for name in names]

    def compressed_linears(self) -> list[str]:
        """What a stage compresses that takes experts apart."""
        blocks = [f"{stack}.{index}" for stack in self.stacks for index in range(LAYERS)]
        return self.expected_linears() + [f"{block}.{name}" for block in blocks for name in self.fused]


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _DECODER, {"model.layers": _LLAMA}, {"lm_head": "output head"}),
    "llama-tied": Family(
        *("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, {"model.layers": _LLAMA}),
        {"lm_head": "output head, tied", "model.embed_tokens": "embedding, tied"},
        frozenset({"lm_head.weight", "model.embed_tokens.weight"}),
    ),
    "mistral": Family("MistralForCausalLM", "MistralConfig", _HEADED, {"model.layers": _LLAMA}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _DECODER, {"model.layers": _LLAMA}),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _HEADED, {"model.layers": _LLAMA}),
    "gemma": Family(
        *("GemmaForCausalLM", "GemmaConfig", _HEADED, {"model.layers": _LLAMA}),
        tied=frozenset({"lm_head.weight", "model.embed_tokens.weight"}),
    ),
    "gemma2": Family(
        *("Gemma2ForCausalLM", "Gemma2Config", _HEADED, {"model.layers": _LLAMA}),
        tied=frozenset({"lm_head.weight", "model.embed_tokens.weight"}),
    ),
    "gemma3": Family(
        *("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADED, {"model.layers": _LLAMA}),
        tied=frozenset({"lm_head.weight", "model.embed_tokens.weight"}),
    ),
    "phi": Family(
        *("PhiForCausalLM", "PhiConfig", _DECODER),
        {"model.layers": (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")},
    ),
    "phi3": Family(
        *("Phi3ForCausalLM", "Phi3Config", _DECODER),
        {"model.layers": ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")},
    ),
    "opt": Family(
        *("OPTForCausalLM", "OPTConfig"),
        {**_ENCODER, "ffn_dim": INNER, "word_embed_proj_dim": 16},
        {"model.decoder.layers": (*_BART_SELF, "fc1", "fc2")},
        {"model.decoder.project_in": "outside the blocks", "model.decoder.embed_tokens": "embedding"},
        frozenset({"lm_head.weight", "model.decoder.embed_tokens.weight"}),
    ),
    "gpt2": Family(
        *("GPT2LMHeadModel", "GPT2Config"),
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
        {"transformer.h": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        {"transformer.wpe": "embedding"},
        frozenset({"lm_head.weight", "transformer.wte.weight"}),
    ),
    "gpt-neox": Family(
        *("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER),
        {
            "gpt_neox.layers": (
                *("attention.query_key_value", "attention.dense"),
                *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            )
        },
        {"lm_head": "output head"},
    ),
    "bert": Family(
        "BertModel", "BertConfig", _ENCODER, {"encoder.layer": _BERT}, {"pooler.dense": "outside the blocks"}
    ),
    "bert-classifier": Family(
        *("BertForSequenceClassification", "BertConfig", _ENCODER, {"bert.encoder.layer": _BERT}),
        {"classifier": "outside the blocks"},
    ),
    "bert-mlm": Family(
        *("BertForMaskedLM", "BertConfig", _ENCODER, {"bert.encoder.layer": _BERT}),
        {"cls.predictions.decoder": "output head, tied"},
        frozenset({"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"}),
    ),
    "minilm": Family(
        *("BertModel", "BertConfig", {**_ENCODER, "hidden_size": 24, "intermediate_size": 96}, {"encoder.layer": _BERT})
    ),
    "roberta": Family(
        *("RobertaForMaskedLM", "RobertaConfig", _ENCODER, {"roberta.encoder.layer": _BERT}),
        {"lm_head.dense": "outside the blocks"},
        frozenset({"lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"}),
    ),
    "distilbert": Family(
        *("DistilBertForSequenceClassification", "DistilBertConfig"),
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": 4},
        {
            "distilbert.transformer.layer": (
                *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
                *("ffn.lin1", "ffn.lin2"),
            )
        },
        {"pre_classifier": "outside the blocks", "classifier": "outside the blocks"},
    ),
    "t5": Family(
        *("T5ForConditionalGeneration", "T5Config"),
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4},
        {
            "encoder.block": (*_T5_SELF, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            "decoder.block": (*_T5_SELF, *_T5_CROSS, "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
        },
        {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding"},
        frozenset({"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}),
    ),
    "bart": Family(
        *("BartForConditionalGeneration", "BartConfig"),
        {
            **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "max_position_embeddings": 64},
            **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": INNER for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        },
        {
            "model.encoder.layers": (*_BART_SELF, "fc1", "fc2"),
            "model.decoder.layers": (*_BART_SELF, *_BART_CROSS, "fc1", "fc2"),
        },
        tied=frozenset(
            {
                *("model.shared.weight", "lm_head.weight"),
                *("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
            }
        ),
    ),
    "mixtral": Family(
        *("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, {"model.layers": _ATTENTION}),
        {
            "model.layers.0.mlp.gate": "router",
            "model.layers.0.mlp.experts.gate_up_proj": "fused experts",
            "model.layers.1.mlp.experts.down_proj": "fused experts",
        },
        fused=_FUSED,
    ),
    "qwen2-moe": Family(
        *("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 24}),
        {"model.layers": (*_ATTENTION, *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")))},
        {
            "model.layers.0.mlp.gate": "router",
            "model.layers.0.mlp.shared_expert_gate": "router",
            "model.layers.0.mlp.experts.gate_up_proj": "fused experts",
        },
        fused=_FUSED,
    ),
    "qwen3-moe": Family(
        *("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEADED, **_EXPERTS}, {"model.layers": _ATTENTION}),
        {"model.layers.1.mlp.gate": "router", "model.layers.1.mlp.experts.down_proj": "fused experts"},
        fused=_FUSED,
    ),
    "switch": Family(
        *("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig"),
        {
            **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS},
            **{"num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
            "num_decoder_layers": LAYERS,
        },
        {
            "encoder.block": (*_T5_SELF, *_switch_experts(1)),
            "decoder.block": (*_T5_SELF, *_T5_CROSS, *_switch_experts(2)),
        },
        {"decoder.block.1.layer.2.mlp.router.classifier": "router"},
        frozenset({"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}),
    ),
}


def saved(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The family's model written to `folder` by transformers; options are save_pretrained's."""
    FAMILIES[name].build().to(dtype).save_pretrained(folder, **options)
    return folder


def tokens(*, count: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids [count, length] without the special ones."""
    return torch.randint(4, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module) -> Iterator[Tensor]:
    """All floating outputs of one forward pass."""
    inputs = {"input_ids": tokens()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(length=7, seed=1)
    for value in model(**inputs, return_dict=True, use_cache=False).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
