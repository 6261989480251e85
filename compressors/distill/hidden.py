"""Losses between what happens inside two models: hidden states, embeddings and attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .logits import mean_where


class Projection(nn.Module):
    """W [student width, teacher width], learned beside the student and thrown away after training.

    One of them serves all layers (Jiao et al. 2020, equation 8), another one the embeddings (equation 9). It starts
    orthogonal, so that lengths are kept, where the paper says nothing of its start.
    """

    def __init__(self, student_width: int, teacher_width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(student_width, teacher_width))
        nn.init.orthogonal_(self.weight, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., student width] -> [..., teacher width]"""
        return hidden @ self.weight.to(hidden.dtype)


def hidden_states(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states or embeddings [batch, length, width], the student's projected before.

    kept: bool [batch, length]; padding counts in no mean, unlike in the authors' code.
    Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", equations 8 and 9.
    """
    return mean_where((student.float() - teacher.float()).square().mean(-1), kept)


def patient(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """Squared distance of the hidden states of the first token, each scaled to length 1, mean over the batch.

    student, teacher: [batch, length, width], of the same width. kept isn't looked at: the first token is [CLS].
    Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", equation 7, a single layer's term.
    """
    first, second = (F.normalize(hidden[:, 0].float(), dim=-1) for hidden in (student, teacher))
    return (first - second).square().sum(-1).mean()


def cosine(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """1 - cosine between hidden states [batch, length, width], mean over kept tokens.

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3.
    """
    return mean_where(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), kept)


def attention_error(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention probabilities [batch, heads, query, key], over pairs of kept tokens.

    kept: bool [batch, length]. Jiao et al. 2020, "TinyBERT", equation 7, of probabilities in place of the paper's
    unnormalised scores, which transformers doesn't give out. Both models need attn_implementation="eager" and must
    have the same number of heads.
    """
    pairs = None if kept is None else kept[:, :, None] & kept[:, None, :]
    return mean_where((student.float() - teacher.float()).square().mean(1), pairs)


def attention_divergence(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of attention probabilities [batch, heads, query, key], mean over heads and kept queries.

    kept: bool [batch, length]. The attention transfer of Sun et al. 2020, "MobileBERT", and Wang et al. 2020, "MiniLM".
    Keys that the teacher doesn't look at at all count 0. What else holds of `attention_error` holds here.
    """
    student, teacher = student.float(), teacher.float()
    tiny = torch.finfo(torch.float32).tiny
    terms = teacher * (teacher.clamp(min=tiny).log() - student.clamp(min=tiny).log())
    return mean_where(terms.sum(-1).mean(1), kept)
