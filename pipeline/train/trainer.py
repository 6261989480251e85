"""transformers' Trainer, told what a lesson's loss is, in which order to learn, and how to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modelzip.checkpoints.shards import disk_errors
from modelzip.compressors.distill.settings import DistillSettings

from ..progress import Progress
from .lesson import Lesson
from .material import Material
from .order import EpochOrder, LongestFirst
from .rhythm import Beat, Rhythm, checkpoint_at, curve_of
from .undisturbed import undisturbed

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Course:
    """How long and how fast is learned. steps: of the optimizer, in all. seed: of order and dropout."""

    settings: DistillSettings
    steps: int
    beat: Beat
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Learned:
    """state: the student's weights as they are kept, by name. curve: see `curve_of`. kept: the step they are from."""

    state: dict[str, Tensor]
    curve: list[dict[str, Any]]
    kept: int
    steps: int
    stopped_early: bool


class LessonTrainer(Trainer):
    """A Trainer whose model is a Lesson.

    The loss of a step is the mean over all items of its batches, whatever their number and wherever they are: two
    processes, or two accumulated batches, give what one batch of both would give. Only signals are means over the kept
    tokens of one batch, which count by its items, so with them two batches differ a little from one of both.
    """

    def __init__(self, lesson: Lesson, course: Course, *, material: Material, measured: Material | None, work: Path):
        settings = course.settings
        self.order = EpochOrder(material.lengths, batch_size=settings.train_batch_size, seed=course.seed)
        super().__init__(
            model=lesson,
            args=arguments(course, work),
            data_collator=None,
            train_dataset=material,
            eval_dataset=measured,
            compute_loss_func=_already_scaled,
        )
        self.remove_callback(PrinterCallback)
        self._lesson, self._material, self._measured = lesson, material, measured
        if lesson.teacher is not None:  # it is no submodule, so it doesn't move with the lesson
            lesson.teacher.to(self.args.device)

    def get_train_dataloader(self) -> Any:
        """Batches of the material, in the order of the epoch."""
        return self._loader(self._material, self.order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of what is measured on, those of like length together."""
        material = self._measured if eval_dataset is None else eval_dataset
        assert material is not None
        return self._loader(material, LongestFirst(material.lengths))

    def _loader(self, material: Material, sampler: torch.utils.data.Sampler[int]) -> Any:
        size = self.args.per_device_train_batch_size
        places: Any = material
        loader: Any = torch.utils.data.DataLoader(places, batch_size=size, sampler=sampler, collate_fn=material.batch)
        return self.accelerator.prepare(loader)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without those that a method wants no weight decay for."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self._lesson.rates]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, with a group for each learning rate that isn't the common one."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        whole = self.model if model is None else model
        assert whole is not None
        named = dict(whole.named_parameters())
        rates = {name: rate for name, rate in self._lesson.rates.items() if rate is not None and name in named}
        for rate in sorted(set(rates.values())) if is_new else ():
            own = [named[name] for name in named if rates.get(name) == rate and named[name].requires_grad]
            moved = {id(parameter) for parameter in own}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of one step, and how many items they have in all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        count = sum(self._items(batch) for batch in batches)
        return batches, self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def _items(self, batch: dict[str, Tensor]) -> int:
        """What `Lesson` will count in this batch."""
        predicts = self._lesson.objective.predicts
        if predicts == "masked-token":
            return int((batch["labels"] >= 0).sum())
        if predicts == "next-token" and "labels" in batch:
            return int((batch["labels"][:, 1:] >= 0).sum())
        if predicts == "next-token":
            return int(batch["attention_mask"][:, 1:].sum())
        return len(batch["input_ids"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This batch's share of the mean over the step's items, times the processes, which average gradients."""
        found = model(**inputs)
        items = found["items"].sum() if num_items_in_batch is None else num_items_in_batch
        loss = found["loss"].sum() * self.accelerator.num_processes / items.clamp(min=1)
        return (loss, found) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Means over all items: the loss, and the accuracy where there are labels."""
        model = self.model_wrapped
        model.eval()
        totals: dict[str, float] = {}
        for batch in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad():
                found = self.accelerator.gather_for_metrics(model(**self._prepare_inputs(batch)))
            for name, values in found.items():
                totals[name] = totals.get(name, 0.0) + float(values.double().sum())
        metrics = {f"{metric_key_prefix}_loss": totals["loss"] / max(totals["items"], 1)}
        if "correct" in totals:
            metrics[f"{metric_key_prefix}_accuracy"] = totals["correct"] / max(totals["items"], 1)
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Also the optimizer and whatever else the Trainer needs to go on; a full disk is told as one."""
        with disk_errors(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The lesson's tensors, gathered from all processes; what FSDP and DeepSpeed resume from they save beside."""
        self._save(output_dir, self.accelerator.get_state_dict(self.model_wrapped))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The lesson's own tensors under their own names, tied ones once: nothing is renamed on the way."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        whole: dict[str, Tensor] = self._lesson.state_dict() if state_dict is None else state_dict
        twins = _twins(whole)
        save_file({name: whole[name].contiguous() for name in set(twins.values())}, folder / WEIGHTS)


def _already_scaled(*_: Any, **__: Any) -> None:
    """Its presence tells the Trainer that losses are scaled for accumulation; `compute_loss` takes its place."""


def _twins(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the first name of the same tensor: tied ones are stored once."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault((tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.device), name)
        for name, tensor in state.items()
    }


def arguments(course: Course, work: Path) -> TrainingArguments:
    """transformers' arguments. Logging, measuring and saving are left to `Rhythm`."""
    settings = course.settings
    on_cpu = course.device.type == "cpu"
    precision = settings.precision
    if precision == "auto":
        has_bf16 = course.device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if has_bf16 else "fp32"
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    made = TrainingArguments(
        output_dir=str(work),
        max_steps=course.steps,
        per_device_train_batch_size=settings.train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=names[settings.schedule],
        warmup_steps=round(settings.warmup * course.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=course.seed % (1 << 32),
        use_cpu=on_cpu,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        label_names=[],
    )
    if not on_cpu:
        made._n_gpu = min(made.n_gpu, 1)  # several GPUs are used through accelerate launch, not by threads
    return made


def train(
    lesson: Lesson,
    course: Course,
    *,
    material: Material,
    measured: Material | None,
    work: Path,
    resume_from: Path | None,
    progress: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> Learned:
    """Train the lesson's student, from a checkpoint in `work` if one is given.

    In the end every process has the weights that are kept, but where they lie apart (FSDP, ZeRO 3): there only the
    main one has them. callbacks: a method's own schedule.
    """
    with undisturbed(), torch.enable_grad():
        trainer = LessonTrainer(lesson, course, material=material, measured=measured, work=work)
        rhythm = Rhythm(course.beat, order=trainer.order, material=material, seed=course.seed, progress=progress)
        for callback in (rhythm, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        curve = curve_of(trainer.state)
        kept, steps = trainer.state.global_step, trainer.state.global_step
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        if course.beat.keep != "last" and (best := course.beat.best(curve)) is not None:
            kept = best["step"]
            if kept != steps:
                best_state = load_file(checkpoint_at(work, kept) / WEIGHTS)
                state = {name: best_state[twin] for name, twin in _twins(state).items()}
    own = {name.removeprefix("student."): tensor for name, tensor in state.items() if name.startswith("student.")}
    return Learned(own, curve, kept, steps, rhythm.stopped_early)
