"""All methods: a family's table of names and settings classes, and their union. A new method is one line in each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from modelzip.compressors.distill.settings import DistillSettings, Labels, Logits
from modelzip.compressors.distill.settings_students import BiLstm, FastBert, Lsq, Sequence
from modelzip.compressors.factorize.settings import Embedding, Kronecker, Share, Svd, SvdLlm, TensorTrain
from modelzip.compressors.prune.settings import Magnitude, Random, SparseGpt, Wanda
from modelzip.compressors.prune.settings_training import GradualMagnitude, Lottery, Movement
from modelzip.compressors.prune.structural_settings import Heads, Layers, Neurons, Vocabulary
from modelzip.compressors.quantize.settings import Gptq, Hqq, QuantizeSettings, Rtn
from modelzip.compressors.quantize.settings_autoround import AutoRound
from modelzip.compressors.quantize.settings_awq import Awq
from modelzip.compressors.quantize.settings_llm_int8 import LlmInt8
from modelzip.compressors.quantize.settings_obq import Obq
from modelzip.compressors.quantize.settings_outliers import Gobo, Spqr
from modelzip.compressors.quantize.settings_quik import Quik
from modelzip.compressors.quantize.settings_smoothquant import SmoothQuant
from modelzip.compressors.quantize.settings_vector import Aqlm, Gptvq, Ipq, Pq
from modelzip.compressors.settings import MethodSettings

QUANTIZE: Final[Mapping[str, type[QuantizeSettings]]] = MappingProxyType(
    {
        **{"rtn": Rtn, "hqq": Hqq, "gobo": Gobo, "awq": Awq, "gptq": Gptq, "spqr": Spqr, "obq": Obq},
        **{"pq": Pq, "ipq": Ipq, "gptvq": Gptvq, "aqlm": Aqlm, "smoothquant": SmoothQuant},
        **{"autoround": AutoRound, "llm-int8": LlmInt8, "quik": Quik},
    }
)
QuantizeMethod = Annotated[
    Rtn | Hqq | Gobo | Awq | Gptq | Spqr | Obq | Pq | Ipq | Gptvq | Aqlm | SmoothQuant | AutoRound | LlmInt8 | Quik,
    Field(discriminator="method"),
]

PRUNE: Final[Mapping[str, type[MethodSettings]]] = MappingProxyType(
    {
        "random": Random,
        "magnitude": Magnitude,
        "wanda": Wanda,
        "sparsegpt": SparseGpt,
        "heads": Heads,
        "neurons": Neurons,
        "layers": Layers,
        "vocabulary": Vocabulary,
        "gradual-magnitude": GradualMagnitude,
        "movement": Movement,
        "lottery": Lottery,
    }
)
PruneMethod = Annotated[
    Random
    | Magnitude
    | Wanda
    | SparseGpt
    | Heads
    | Neurons
    | Layers
    | Vocabulary
    | GradualMagnitude
    | Movement
    | Lottery,
    Field(discriminator="method"),
]

FACTORIZE: Final[Mapping[str, type[MethodSettings]]] = MappingProxyType(
    {
        "svd": Svd,
        "svd-llm": SvdLlm,
        "kronecker": Kronecker,
        "tensor-train": TensorTrain,
        "share": Share,
        "embedding": Embedding,
    }
)
FactorizeMethod = Annotated[Svd | SvdLlm | Kronecker | TensorTrain | Share | Embedding, Field(discriminator="method")]

DISTILL: Final[Mapping[str, type[DistillSettings]]] = MappingProxyType(
    {"labels": Labels, "logits": Logits, "bilstm": BiLstm, "fastbert": FastBert, "sequence": Sequence, "lsq": Lsq}
)
DistillMethod = Annotated[Labels | Logits | BiLstm | FastBert | Sequence | Lsq, Field(discriminator="method")]
