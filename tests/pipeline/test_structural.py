"""The smaller model against the dense one with the same parts masked, in every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)

OUTPUT = {  # what each family's heads and neurons are put together by, and the size of a head
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "bart": ("attn.out_proj", "fc2"),
    "t5": ("o", "DenseReluDense.wo"),
    **dict.fromkeys(
        ("bert", "bert-classifier", "bert-mlm", "minilm", "roberta"), ("attention.output.dense", "output.dense")
    ),
}
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
PLAIN_HEADS = {"llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3"}
NO_HEADS = {"t5": "no query, key, value and output", "switch": "no query, key, value and output"}
EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "switch"}
LAYERS_DIFFER = ["llama", "gpt2", "opt", "gpt-neox", "bert", "distilbert", "bart", "phi3"]
TOLERANCE = 2e-6  # measured: at most 6.8e-7


def outputs_of(family: str, place: int) -> str:
    return OUTPUT.get(family, LLAMA)[place]


def mask(model: nn.Module, name: str, gone: list[int], width: int) -> None:
    """Zero what the linear is fed of these units."""
    columns = torch.tensor([unit * width + i for unit in gone for i in range(width)], dtype=torch.int64)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].index_fill(-1, columns, 0.0),)

    model.get_submodule(name).register_forward_pre_hook(hook)


def linears_of(model: nn.Module, ending: str) -> list[str]:
    """The blocks' linears of this ending; of BERT's two `output.dense`, only the one that is asked for."""
    found = [name for name, _ in model.named_modules() if name.endswith(ending)]
    return [name for name in found if ending != "output.dense" or not name.endswith("attention.output.dense")]


def test_heads_taken_out_are_heads_masked(family, models, saved, tmp_path):
    check_heads(family, "uniform", models, saved, tmp_path)


@pytest.mark.parametrize("name", LAYERS_DIFFER)
def test_heads_taken_out_of_the_whole_model_are_heads_masked(name, models, saved, tmp_path):
    check_heads(name, "global", models, saved, tmp_path)


def check_heads(family, scope, models, saved, tmp_path):
    settings = {"method": "heads", "share": 0.5, "scope": scope}
    folder = saved(family)
    if family in NO_HEADS or (family == "phi3" and scope == "global"):
        with pytest.raises(ProblemsError, match=NO_HEADS.get(family, "can't say what is left")):
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, **settings)
        return
    _, records = help.prune(folder, tmp_path / "out", windows=models.tokens(count=4), **settings)
    model = help.opened(folder)
    for name in linears_of(model, outputs_of(family, 0)):
        (record,) = [one for path, one in records.items() if name.startswith(path)]
        assert record["of"] == 4
        width = model.get_submodule(name).weight.shape[0 if family == "gpt2" else 1] // 4
        mask(model, name, sorted({0, 1, 2, 3} - set(record["kept"])), width)
    assert help.distance(list(models.outputs(help.opened(tmp_path / "out"))), list(models.outputs(model))) < TOLERANCE
    assert help.is_plain(tmp_path / "out") == (scope == "uniform" and family in PLAIN_HEADS | EXPERTS)


def test_neurons_taken_out_are_neurons_masked(family, models, saved, tmp_path):
    check_neurons(family, "uniform", models, saved, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_neurons_taken_out_of_the_whole_model_are_neurons_masked(name, models, saved, tmp_path):
    check_neurons(name, "global", models, saved, tmp_path)


def check_neurons(family, scope, models, saved, tmp_path):
    settings = {"method": "neurons", "share": 0.25, "scope": scope, "criterion": "magnitude"}
    folder = saved(family)
    if family in EXPERTS:
        with pytest.raises(ProblemsError, match="mixture of experts"):
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, **settings)
        return
    _, records = help.prune(folder, tmp_path / "out", **settings)
    model = help.opened(folder)
    assert sum(one["left"] for one in records.values()) == sum(one["of"] for one in records.values()) * 0.75
    for name in linears_of(model, outputs_of(family, 1)):
        (record,) = [one for path, one in records.items() if name.startswith(f"{path}.")]
        mask(model, name, sorted(set(range(record["of"])) - set(record["kept"])), 1)
    assert help.distance(list(models.outputs(help.opened(tmp_path / "out"))), list(models.outputs(model))) < TOLERANCE
    assert help.is_plain(tmp_path / "out") == (scope == "uniform")


def test_whole_groups_of_heads_taken_out_are_heads_masked(models, saved, tmp_path):
    folder = saved("qwen3")
    _, records = help.prune(
        folder, tmp_path / "out", windows=models.tokens(), method="heads", share=0.5, grouped="groups"
    )
    model = help.opened(folder)
    for path, record in records.items():
        assert record["kept"] in ([0, 1], [2, 3])
        mask(model, f"{path}.o_proj", sorted({0, 1, 2, 3} - set(record["kept"])), 8)
    made = help.opened(tmp_path / "out")
    assert (made.config.num_attention_heads, made.config.num_key_value_heads) == (2, 1)
    assert help.distance(list(models.outputs(made)), list(models.outputs(model))) < TOLERANCE


def test_heads_after_neurons_after_heads_are_all_masked_and_planned_before_any_is_taken_out(models, saved, tmp_path):
    stages = [
        {"method": "heads", "share": 0.25, "scope": "uniform"},
        {"method": "neurons", "share": 0.25, "criterion": "magnitude"},
        {"method": "heads", "share": 0.34, "scope": "uniform"},
        {"method": "layers", "drop": [0]},
    ]
    planned = Checkpoint.open(str(saved("bert-mlm")))
    sizes = []
    for stage in stages:
        plan = help.plan_of(planned, tmp_path, **stage)
        planned = plan.result
        sizes.append((plan.bytes_before, plan.bytes_after))
    folder = saved("bert-mlm")
    gone: dict[str, list[list[int]]] = {}
    for number, stage in enumerate(stages):
        plan, records = help.prune(folder, tmp_path / str(number), windows=models.tokens(), **stage)
        assert (plan.bytes_before, plan.bytes_after) == sizes[number]
        folder = tmp_path / str(number)
        for path, record in records.items():
            gone.setdefault(path, []).append(record["kept"])
    model = help.opened(saved("bert-mlm"))
    path = "bert.encoder.layer.1"
    first, second = gone[f"{path}.attention"]
    mask(model, f"{path}.attention.output.dense", sorted({0, 1, 2, 3} - {first[unit] for unit in second}), 8)
    mask(model, f"{path}.output.dense", sorted(set(range(48)) - set(gone[path][0])), 1)
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: args[0])
    assert help.distance(list(models.outputs(help.opened(folder))), list(models.outputs(model))) < TOLERANCE


LAYERED = ["llama", "gemma2", "gemma3", "qwen3", "phi", "opt", "gpt2", "gpt-neox", "bert-mlm", "distilbert", "mixtral"]


@pytest.mark.parametrize("name", LAYERED)
def test_layers_taken_out_are_layers_skipped(name, models, tmp_path):
    models.FAMILIES[name].build(**layers(name, 4)).save_pretrained(tmp_path / "in")
    plan, _ = help.prune(tmp_path / "in", tmp_path / "out", method="layers", drop=[0, 2])
    model = help.opened(tmp_path / "in")
    skip(model, [0, 2])
    made = help.opened(tmp_path / "out")
    assert help.is_plain(tmp_path / "out")
    assert made.config.num_hidden_layers == 2
    assert help.distance(list(models.outputs(made)), list(models.outputs(model))) == 0
    assert plan.notes == ("2 of 4 layers go: 0, 2",)


def layers(family: str, count: int) -> dict[str, int]:
    return {{"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers"): count}


def stack_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def skip(model: nn.Module, gone: list[int]) -> None:
    for layer in gone:

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        stack_of(model)[layer].register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(("name", "stack"), [("bart", "encoder"), ("bart", "decoder"), ("t5", "decoder")])
def test_layers_of_one_of_two_stacks_are_taken_out(name, stack, models, saved, tmp_path):
    help.prune(saved(name), tmp_path / "out", method="layers", drop=[1], stack=stack)
    model = help.opened(saved(name))
    blocks = model.get_submodule({"bart": f"model.{stack}.layers", "t5": f"{stack}.block"}[name])
    blocks[1].register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    made = help.opened(tmp_path / "out")
    assert help.distance(list(models.outputs(made)), list(models.outputs(model))) == 0


@pytest.mark.parametrize("settings", [{"keep": [1, 3]}, {"drop": [2, 0]}, {"every": 2}], ids=str)
def test_layers_are_named_in_three_ways(settings, models, tmp_path):
    models.FAMILIES["llama"].build(num_hidden_layers=4).save_pretrained(tmp_path)
    plan = help.plan_of(Checkpoint.open(str(tmp_path)), tmp_path / "out", method="layers", **settings)
    assert plan.choice == ([0, 2] if settings == {"every": 2} else [1, 3])
    assert not plan.needs_data


def test_similarity_takes_out_the_layers_whose_output_is_most_like_their_input(models, tmp_path):
    model = models.FAMILIES["llama"].build(num_hidden_layers=4)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight *= 0.01
            model.model.layers[layer].mlp.down_proj.weight *= 0.01
    model.save_pretrained(tmp_path / "in")
    _, records = help.prune(
        tmp_path / "in", tmp_path / "out", windows=models.tokens(), method="layers", count=2, criterion="similarity"
    )
    assert records["model.layers"]["kept"] == [1, 3]


@pytest.mark.parametrize("criterion", ["similarity", "greedy"])
def test_a_layer_that_the_others_need_stays_however_little_it_does(criterion, models, tmp_path):
    model = models.FAMILIES["t5"].build(num_layers=3, num_decoder_layers=3)
    with torch.no_grad():
        for part in model.encoder.block[0].layer:
            for linear in (module for module in part.modules() if isinstance(module, nn.Linear)):
                linear.weight *= 1e-4
    model.save_pretrained(tmp_path / "in")
    asked = {"method": "layers", "criterion": criterion, "stack": "encoder"}
    _, records = help.prune(tmp_path / "in", tmp_path / "out", windows=models.tokens(), count=1, **asked)
    (record,) = records.values()
    assert 0 in record["kept"]
    help.opened(tmp_path / "out")


def test_block_influence_is_one_less_the_cosine_of_input_and_output(models, saved):
    from modelzip.pipeline.layer_pruning import block_influence
    from modelzip.pipeline.measure import open_streamed

    streamed = open_streamed(Checkpoint.open(str(saved("llama"))), "float32", torch.device("cpu"))
    windows = models.tokens()
    with torch.no_grad():
        found = block_influence(streamed, [{"input_ids": windows[:1]}, {"input_ids": windows[1:]}])
        states = help.opened(saved("llama"))(windows, output_hidden_states=True).hidden_states
        before, after = states[0].double(), states[1].double()
    cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    assert found[0] == pytest.approx(float((1 - cosine).mean()), rel=1e-5)


@pytest.mark.parametrize(("name", "loss"), [("llama", "language-model"), ("bert-classifier", "self")])
def test_greedy_takes_out_one_layer_after_the_other_by_the_loss_that_is_left(name, loss, models, tmp_path):
    models.FAMILIES[name].build(seed=3, num_hidden_layers=4).save_pretrained(tmp_path / "in")
    windows = models.tokens(count=4, length=12)
    settings = {"method": "layers", "count": 2, "criterion": "greedy"}
    plan, records = help.prune(tmp_path / "in", tmp_path / "out", windows=windows, **settings)
    gone: list[int] = []
    for _ in range(2):
        costs = {}
        for layer in sorted({0, 1, 2, 3} - set(gone)):
            model = help.opened(tmp_path / "in")
            whole = model(windows).logits.detach()
            skip(model, [*gone, layer])
            logits = model(windows).logits.detach()
            if loss == "self":
                wanted = whole.double().softmax(-1)
                cost = (wanted * (wanted.log() - logits.double().log_softmax(-1))).sum(-1).mean()
            else:
                cost = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
            costs[float(cost)] = layer
        gone.append(costs[min(costs)])
    assert records[next(iter(records))]["kept"] == sorted({0, 1, 2, 3} - set(gone))
    assert "the whole model is in memory while they are" in plan.notes


def test_all_mistakes_of_a_stage_are_told_at_once(saved, tmp_path):
    with pytest.raises(ProblemsError) as error:
        help.plan_of(
            Checkpoint.open(str(saved("bert"))),
            tmp_path,
            method="heads",
            share=0.1,
            loss="language-model",
            ignore=["a"],
        )
    assert error.value.sentences == (
        "prune: heads works on the model as a whole and takes no ignore and no rules: 'a'.",
        "prune: BertModel predicts no next token: take the loss auto or self.",
        "prune: share 0.1 of 4 heads a layer takes none out: take a larger share.",
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"drop": [5]}, "there is no layer 5: the 2 layers are counted from 0 to 1"),
        ({"count": 2}, "count 2 leaves nothing of 2 layers"),
        ({"keep": [0, 1]}, "none of the 2 layers goes"),
        ({"drop": [0, 1]}, "all 2 layers go"),
    ],
)
def test_a_choice_of_layers_that_makes_no_sense_is_refused(settings, sentence, saved, tmp_path):
    with pytest.raises(ProblemsError, match=sentence):
        help.plan_of(Checkpoint.open(str(saved("llama"))), tmp_path, method="layers", **settings)


def test_a_model_with_two_stacks_needs_one_named(saved, tmp_path):
    with pytest.raises(ProblemsError, match="choose one with stack"):
        help.plan_of(Checkpoint.open(str(saved("bart"))), tmp_path, method="layers", drop=[1])


def test_a_killed_run_goes_on_where_it_stopped_and_ends_in_the_same_bytes(models, saved, tmp_path, monkeypatch):
    from modelzip.checkpoints.writer import CheckpointWriter

    settings = {"method": "heads", "share": 0.5, "windows": models.tokens()}
    help.prune(saved("bert-mlm"), tmp_path / "whole", **settings)
    write, count = CheckpointWriter.write_part, [0]

    def dying(self: Any, *args: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        write(self, *args, **options)

    monkeypatch.setattr(CheckpointWriter, "write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        help.prune(saved("bert-mlm"), tmp_path / "cut", **settings)
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(
        CheckpointWriter, "write_part", lambda self, part, *a, **o: (written.append(part), write(self, part, *a, **o))
    )
    help.prune(saved("bert-mlm"), tmp_path / "cut", resume=True, **settings)
    assert written == ["bert.encoder.layer.1"]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in files)
