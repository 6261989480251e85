"""Which linears a method that trains puts its own modules in place of, and what each of them will be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from modelzip.checkpoints.blocks import Linear, find_structure
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings import DistillSettings
from modelzip.compressors.distill.settings_students import Lsq
from modelzip.compressors.trained import TRAINED, entries_kept
from modelzip.recipes.match import matches
from modelzip.recipes.schema import Stage
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.trainable import holds_codes
from modelzip.weights.value import CompressedWeight

from ..forms import described, fitted, taken_group
from ..module_plan import value_dtype
from ..portable import choose_layout
from ..weights_now import weights_now
from .fit import Problems

MEND: Final = {"prune": "take a higher sparsity", "distill": "take fewer bits or larger groups"}


@dataclass(frozen=True)
class Change:
    """What is to become of one linear while the model is trained. before, after: on the meta device."""

    settings: DistillSettings
    before: CompressedWeight
    after: CompressedWeight
    transposed: bool
    note: str = ""

    def mounted(self, module: nn.Module) -> nn.Module:
        """The module that is trained in place of this one, from its weight and bias."""
        if isinstance(module, CompressedLinear):
            value: CompressedWeight = module.weight_value
        else:
            weight = module.get_parameter("weight").detach()
            value = Dense(weight.T.contiguous() if self.transposed else weight)
        bias: Any = getattr(module, "bias", None)
        return TRAINED[type(self.settings)].mount(value, bias, self.settings, self.after)

    def frozen(self, tensors: Mapping[str, Tensor]) -> CompressedWeight:
        """What the trained module's tensors, by their names in it, have become."""
        return TRAINED[type(self.settings)].freeze(tensors, self.settings, self.after)

    def rates(self) -> dict[str, float | None]:
        """The learning rates of the module's parameters beside weight and bias; None: the common one."""
        named = TRAINED[type(self.settings)].rates
        return {name: None if key is None else getattr(self.settings, key) for name, key in named.items()}


@dataclass(frozen=True)
class Changes:
    """All of them, by the module's name in the student. layout: of the result. notes: what the plan says of them."""

    of: Mapping[str, Change]
    layout: str = MODELZIP
    notes: tuple[str, ...] = ()


def plan_changes(stage: Stage, student: Checkpoint, problems: Problems) -> Changes:
    """The changes that a stage's method makes of a student. student: its headers as they would be without changes."""
    if type(stage.settings) not in TRAINED:
        return Changes({})
    model = skeleton(student)
    names = NameMap(model, student)
    structure = find_structure(model, student, names=names)
    now = weights_now(student, structure, names)
    linears = [linear for block in structure.blocks for linear in block.linears]
    chosen = [linear for linear in linears if not left_alone(stage.ignore, linear.name)]
    made = _changes(stage.settings, chosen, now, problems)
    _check(stage, made, len(linears), problems)
    weights = {name: weight for name, weight in now.items() if weight.kind != Dense.kind}
    weights |= {name: change.after for name, change in made.items()}
    _check_codes(weights, made, student, problems)
    layout, reason = choose_layout("auto", weights, structure, checkpoint=student, names=names)
    notes = _notes(made, len(linears))
    if layout == MODELZIP:
        why = f" ({reason})" if reason else ""
        notes.append(f"the result is in modelzip's own layout{why}: opening it needs `import modelzip.weights`")
    return Changes(made, layout, tuple(notes))


def left_alone(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a pattern names this module, or one that it is a part of."""
    parts = name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(matches(pattern, path) for pattern in patterns for path in paths)


def _changes(
    settings: DistillSettings, linears: list[Linear], now: Mapping[str, CompressedWeight], problems: Problems
) -> dict[str, Change]:
    method = TRAINED[type(settings)]
    counts = entries_kept([now[linear.name] for linear in linears], settings)
    made = {}
    for linear, count in zip(linears, counts, strict=True):
        if linear.sharers:
            problems.add(
                f"{linear.name} serves {linear.sharers[0]} too, and {settings.method} would take them apart: leave it "
                "out with --ignore, or do this first and share the layers then."
            )
            break
        before = now[linear.name]
        taken, note = (settings, "") if holds_codes(before) else fitted(settings, linear.shape)
        if note:
            note = f"{note}: {taken_group(taken)} is taken"
        if holds_codes(before):
            note = "starts from the grid that it has"
        after = method.expect(before, taken, count, value_dtype(before))
        if isinstance(after, str):
            problems.add(f"{linear.name}: {after}, or leave it out with --ignore.")
        else:
            made[linear.name] = Change(taken, before, after, linear.transposed, note)
    return made


def _check(stage: Stage, made: Mapping[str, Change], linears: int, problems: Problems) -> None:
    if problems.sentences:
        return
    if not made:
        problems.add(f"nothing is left to {stage.kind}: all {linears} linears of the blocks are ignored.")
        return
    before = sum(change.before.nbytes for change in made.values())
    after = sum(change.after.nbytes for change in made.values())
    is_healed = isinstance(stage.settings, Lsq) and all(holds_codes(change.before) for change in made.values())
    if after >= before and not is_healed:
        problems.add(
            f"the trained matrices ({after:,} bytes) would not be smaller than they are ({before:,} bytes); "
            f"{MEND[stage.kind]}."
        )


def _check_codes(
    weights: Mapping[str, CompressedWeight], made: Mapping[str, Change], student: Checkpoint, problems: Problems
) -> None:
    """What holds integers and isn't learned by this method can't be carried through a training."""
    for name, weight in weights.items():
        if name not in made and holds_codes(weight):
            problems.add(
                f"{name} is held as integers, which have no gradient: let lsq train it as well (it is ignored), or "
                "train first and quantize then."
            )
            return


def _notes(made: Mapping[str, Change], linears: int) -> list[str]:
    notes = []
    noted = [change.note for change in made.values() if change.note]
    for note in dict.fromkeys(noted):
        notes.append(f"{note} for {noted.count(note)} of {len(made)} modules")
    if len(made) < linears:
        notes.append(f"{linears - len(made)} of {linears} linears are ignored")
    first = next(iter(made.values()), None)
    if first is not None and getattr(first.settings, "masking", "") == "threshold":
        notes.append("how many weights go is learned: sizes are those at the stage's sparsity")
    return notes


def forms(changes: Mapping[str, Change]) -> str:
    """What most of the changed linears become, in words."""
    words = [described(change.after) for change in changes.values()]
    return max(words, key=words.count) if words else ""
