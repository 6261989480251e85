"""The signals that a student may be given beside the logits, by name, and which layer learns from which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from torch import Tensor

from .hidden import attention_divergence, attention_error, cosine, hidden_states, patient

LayerMap: TypeAlias = Literal["uniform", "last"] | Sequence[int]


@dataclass(frozen=True)
class Signal:
    """One loss between two models.

    loss: of the student's tensor, the teacher's, and kept (bool [batch, length]) or None -> a scalar.
    reads: what is handed to it; embeddings: the output of the embedding layer; hidden: the hidden states of one mapped
    layer after the other; inner: the same but for the student's last layer, whose states become its logits; last: those
    of the last layers; attention: the probabilities of one mapped layer after the other, from
    attn_implementation="eager".
    projected: whether the student's tensor goes through a learned projection first if the widths differ; without, the
    widths must be equal. Attention needs equal numbers of heads.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    reads: Literal["embeddings", "hidden", "inner", "last", "attention"]
    projected: bool
    citation: str


SIGNALS: Final[Mapping[str, Signal]] = MappingProxyType(
    {
        "hidden": Signal(hidden_states, "hidden", True, 'Jiao et al. 2020, "TinyBERT", equation 8'),
        "embeddings": Signal(hidden_states, "embeddings", True, 'Jiao et al. 2020, "TinyBERT", equation 9'),
        "attention": Signal(attention_error, "attention", False, 'Jiao et al. 2020, "TinyBERT", equation 7'),
        "attention-kl": Signal(attention_divergence, "attention", False, 'Sun et al. 2020, "MobileBERT"'),
        "patient": Signal(patient, "inner", False, 'Sun et al. 2019, "Patient Knowledge Distillation", equation 7'),
        "cosine": Signal(cosine, "last", True, 'Sanh et al. 2019, "DistilBERT", section 3'),
    }
)


def layer_map(student_layers: int, teacher_layers: int, kind: LayerMap = "uniform") -> tuple[int, ...]:
    """For each of the student's layers the teacher's layer that it learns from, counted from 1.

    So the numbers are indices into `hidden_states`, where 0 is the embeddings; less 1, into `attentions`.
    uniform: layer m from ⌈m · teacher / student⌉, so that the last learns from the last (Jiao et al. 2020, section 4.1:
    3, 6, 9, 12 for 4 of 12). last: from the teacher's last layers, one by one. Without the student's last layer, which
    `patient` leaves out, these are PKD-Skip (2, 4, 6, 8, 10 for 6 of 12) and PKD-Last (7 to 11) of Sun et al. 2019.
    A sequence: as given. Raises ValueError if a layer would have no teacher or the layers would be out of order.
    """
    if student_layers < 1:
        raise ValueError(f"a student of {student_layers} layers has none to be taught")
    if not isinstance(kind, str):
        return _checked(tuple(kind), student_layers, teacher_layers)
    if student_layers > teacher_layers:
        raise ValueError(f"{student_layers} layers of the student can't be mapped to {teacher_layers} of the teacher")
    if kind == "last":
        return tuple(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    if kind == "uniform":
        return tuple(-(-layer * teacher_layers // student_layers) for layer in range(1, student_layers + 1))
    raise ValueError(f"no layer map is called {kind}; there are uniform and last, or a list of layers")


def _checked(layers: tuple[int, ...], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    listed = ", ".join(map(str, layers))
    if len(layers) != student_layers:
        raise ValueError(f"the layer map {listed} names {len(layers)} layers for {student_layers} of the student")
    if any(not 1 <= layer <= teacher_layers for layer in layers):
        raise ValueError(f"the layer map {listed} leaves the teacher's layers 1 to {teacher_layers}")
    if list(layers) != sorted(layers):
        raise ValueError(f"the layer map {listed} goes back; layers are named from the first to the last")
    return layers
