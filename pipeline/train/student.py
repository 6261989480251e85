"""The model that is trained: what its config.json says, where its weights come from, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.headers import TensorInfo
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.dense import Dense
from modelzip.weights.float import Float
from modelzip.weights.kinds import empty
from modelzip.weights.layouts import MODELZIP, quantization_config
from modelzip.weights.trainable import holds_codes
from modelzip.weights.value import CompressedWeight

from ..layer_config import counted_anew, require_countable
from ..weights_now import weights_now

if TYPE_CHECKING:  # which is planned on students
    from .changes import Change


CLASSIFIER: Final = "ForSequenceClassification"
Start: TypeAlias = Literal["whole", "layers", "copy", "random", "principal", "exits"]
_SPELLINGS: Final = {dtype: spelling for spelling, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Student:
    """config: its config.json. origin: the checkpoint that its weights come from.

    start: whole: all of the origin's weights; layers: those of some layers; copy: the leading part of each; random;
    principal: random but for an embedding by the origin's principal axes; exits: the origin within, random exits.
    layers: of the origin, by their places in the student. has_new_head: whether the origin has no classifier.
    changes: linears that the method puts its own modules in place of, by name. layout: in which they are written.
    """

    config: Mapping[str, Any]
    origin: Checkpoint
    start: Start = "whole"
    layers: tuple[int, ...] = ()
    has_new_head: bool = False
    changes: Mapping[str, Change] = field(default_factory=dict)
    layout: str = MODELZIP

    def checkpoint(self) -> Checkpoint:
        """What will be written, as far as headers go: nothing of it can be read yet."""
        shell = replace(self.origin, config=self.written_config(layout=MODELZIP))
        parts = self._compressed_parts()
        tensors = {}
        for name, tensor in stored(skeleton(shell), dtype=self.origin.dtype).items():
            if name.removesuffix(".weight") not in parts:
                tensors[name] = self._info(name, tensor)
        for module, found in parts.items():
            tensors |= {name: replace(info, name=name) for name, info in _within(module, found).items()}
        return replace(shell, tensors={name: info for name, info in tensors.items() if name not in self.shared})

    def _compressed_parts(self) -> dict[str, dict[str, TensorInfo]]:
        """The stored tensors of each module whose weight goes out compressed, by suffix."""
        parts = {}
        if self.start == "whole" and self.quantization is not None:
            names = NameMap(skeleton(self.origin), self.origin)
            found = {
                own: {suffix: self.origin.tensors[name] for suffix, name in names.parts(module).items()}
                for module, own in self._renamed(self.quantization["modules"]).items()
            }
            parts = {own: stored for own, stored in found.items() if stored}  # a resized plain weight has none
        for module, change in self.changes.items():
            parts[module] = {suffix: self._info(suffix, one) for suffix, one in change.after.tensors().items()}
        return parts

    def _info(self, name: str, tensor: Tensor) -> TensorInfo:
        nbytes = tensor.numel() * tensor.element_size()
        return TensorInfo(name, _SPELLINGS[tensor.dtype], tuple(tensor.shape), nbytes, self.origin.folder, 0)

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The origin's quantization_config in modelzip's own words, whatever its layout; None if nothing is compressed.

        Raises CheckpointError for layouts that modelzip doesn't read.
        """
        before = self.origin.quantization
        if before is None or before.get("quant_method") == MODELZIP:
            return before
        model = skeleton(self.origin)
        names = NameMap(model, self.origin)
        now = weights_now(self.origin, find_structure(model, self.origin, names=names), names)
        metas = {name: weight.meta() for name, weight in now.items() if weight.kind != Dense.kind}
        if any(meta["kind"] == Float.kind for meta in metas.values()):
            raise CheckpointError(
                f"{self.origin.source} holds floats in the layout of compressed-tensors, which no training goes on "
                "from: quantize the original again, with layout: modelzip."
            )
        return quantization_config(metas, layout=MODELZIP, linears=())

    @cached_property
    def shared(self) -> dict[str, str]:
        """Parameters and parts of compressed modules that the origin stores once for several: each, and the one it is.

        They are learned once, too.
        """
        own = (self.quantization or {}).get("shared", {}) if self.start == "whole" else {}
        modules = self._renamed(name.rpartition(".")[0] for pair in own.items() for name in pair)

        def here(name: str) -> str:
            module, _, leaf = name.rpartition(".")
            return f"{modules[module]}.{leaf}"

        return {here(target): here(source) for target, source in own.items()}

    def _renamed(self, modules: Iterable[str]) -> dict[str, str]:
        """What modules of the origin are called in the student, which may have a head around it."""
        model = skeleton(replace(self.origin, config=self._plain_config()))
        known = {name for name, _ in model.named_modules()}
        return {name: name if name in known else f"{model.base_model_prefix}.{name}" for name in modules}

    def _plain_config(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.items() if key != "quantization_config"}

    def written_config(self, metas: Mapping[str, Any] | None = None, *, layout: str | None = None) -> dict[str, Any]:
        """config.json of the output. metas: what the changed modules have become; without, what is planned."""
        config, before = self._plain_config(), self.quantization if self.start == "whole" else None
        if before is None and not self.changes:
            return config
        own = before if before is not None else {"modules": {}}
        modules = {name: own["modules"][theirs] for theirs, name in self._renamed(own["modules"]).items()}
        modules |= {name: change.after.meta() for name, change in self.changes.items()} | dict(metas or {})
        layout = self.layout if layout is None else layout
        linears = []
        if layout != MODELZIP:
            model = skeleton(replace(self.origin, config=config))
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        made = quantization_config(modules, layout=layout, linears=linears, shared=self.shared)
        return {**config, "quantization_config": {**own, **made} if layout == MODELZIP else made}

    def split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, CompressedWeight]]:
        """A trained state without the changed modules' weights and what is shared, and what the former have become."""
        rest = {name: tensor for name, tensor in state.items() if name not in self.shared}
        made = {}
        for module, change in self.changes.items():
            inside = f"{module}."
            tensors = {name.removeprefix(inside): rest[name] for name in state if name.startswith(inside)}
            made[module] = change.frozen(tensors)
            for name in tensors:
                if name != "bias":
                    del rest[inside + name]
        return rest, made


def _within(module: str, parts: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {f"{module}.{suffix}": info for suffix, info in parts.items()}


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a checkpoint was saved from, or an empty text."""
    return str((config.get("architectures") or [""])[0])


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether the model gives one row of logits for a whole text."""
    return architecture(config).endswith(CLASSIFIER)


def class_names(model: Any) -> tuple[str, ...]:
    """A classifier's classes in the order of their ids; empty for one that predicts a number."""
    config = model.config
    if config.num_labels == 1 or config.problem_type == "regression":
        return ()
    return tuple(str(config.id2label[place]) for place in range(config.num_labels))


def with_classes(checkpoint: Checkpoint, names: Sequence[str], padding: int | None) -> dict[str, Any]:
    """The config of the same model with a classifier for these classes, or for a number if there are none.

    padding: the token that fills short texts. Raises CheckpointError if transformers has no classifier of this kind.
    """
    config_class: Any = type(skeleton(checkpoint).config)
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if config_class not in mapping:
        raise CheckpointError(
            f"{checkpoint.source} is a {checkpoint.config.get('model_type')} model, for which transformers "
            f"{transformers.__version__} has no classifier: take task: language-modelling, or another model."
        )
    shown = list(names) or ["LABEL_0"]
    config = {
        **checkpoint.config,
        "architectures": [mapping[config_class].__name__],
        "id2label": {str(place): name for place, name in enumerate(shown)},
        "label2id": {name: place for place, name in enumerate(shown)},
        "problem_type": "single_label_classification" if names else "regression",
    }
    if padding is not None and config.get("pad_token_id") is None:
        config["pad_token_id"] = padding
    return config


def with_layers(teacher: Checkpoint, layers: Sequence[int]) -> dict[str, Any]:
    """The teacher's config with these of its layers. Raises CheckpointError if it hasn't got them or needs all."""
    count = len(layer_names(teacher))
    wrong = [layer for layer in layers if layer >= count]
    if wrong:
        raise CheckpointError(f"{teacher.source} has the layers 0 to {count - 1}, and none with the number {wrong[0]}.")
    config = skeleton(teacher).config
    require_countable(config)
    return counted_anew(teacher.config, config, layers)


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """Module paths of the layers. Raises CheckpointError for a model with two stacks of them."""
    names = [block.name for block in find_structure(skeleton(checkpoint), checkpoint).blocks]
    stacks = {name.rpartition(".")[0] for name in names}
    if len(stacks) > 1:
        raise CheckpointError(
            f"{checkpoint.source} has {len(stacks)} stacks of layers ({', '.join(sorted(stacks))}), and a subset is "
            "taken of one: name the student by student_config."
        )
    return names


def untrainable(checkpoint: Checkpoint) -> str | None:
    """A part of a sentence that says why a compressed checkpoint can't be trained; None if it can."""
    config = checkpoint.quantization
    if config is None:
        return None
    if config.get("quant_method") != MODELZIP:
        return f"holds integers ({config.get('quant_method')}), which have no gradient"
    for name, meta in config["modules"].items():
        if holds_codes(empty(meta)):
            return f"holds {name} as integers, which have no gradient"
    return None


def stored(
    model: Any, *, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's tensors as a checkpoint holds them: tied ones once, under transformers' names.

    dtype: of floating ones, None: as they are. state: the model's state dict where it isn't the model's own.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    whole = model.state_dict() if state is None else state
    kept = {name: tensor for name, tensor in whole.items() if name not in tied}
    vars(model).pop("_weight_conversions", None)  # named as for a model made from scratch, whatever the input's names
    found = revert_weight_conversion(model, kept)
    return {
        name: tensor.detach().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in found.items()
    }


def parameters_of(checkpoint: Checkpoint) -> int:
    """How many numbers a checkpoint holds."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())
