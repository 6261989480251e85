"""Forwards held at the doors of modules: order, identity of what is handed over, and outputs to the bit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from modelzip.checkpoints import parking
from modelzip.checkpoints.spill import Spill
from modelzip.checkpoints.walk import Stop, Walk


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Model(nn.Module):
    """Two blocks of two linears that share their input, a norm before and a head after; real weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        for block in self.blocks:
            y = block(y)
        return self.head(y if scale is None else y * scale)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.left(x)) * self.right(input=x)


BLOCKS = ["blocks.0", "blocks.1"]


def inputs(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(size, 6, generator=generator)} for size in sizes]


def walk(model: nn.Module, batches: list[dict[str, Tensor]], blocks: list[str] = BLOCKS, outside=None) -> Walk:
    return Walk(model, batches, blocks=blocks, outside=outside or (lambda name: None), spill=Spill(1 << 40))


def to_the_end(walking: Walk, batch: int = 0) -> list[Stop]:
    stops = [walking.advance(batch)]
    while stops[-1].module is not None:
        stops.append(walking.advance(batch))
    return stops


def blocks_of(models, family: str) -> list[str]:
    """Names of a family's blocks in the order in which they run."""
    stacks = models.FAMILIES[family].stacks
    return [f"{stack}.{index}" for stack in stacks for index in range(models.LAYERS)]


def family_batch(models, model: nn.Module) -> dict[str, Tensor]:
    batch = {"input_ids": models.tokens()}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = models.tokens(length=7, seed=1)
    return batch


def test_stops_come_in_execution_order_with_what_a_plain_forward_hands_over(family, models):
    model, blocks = models.FAMILIES[family].build(), blocks_of(models, family)
    model.config.use_cache = False
    batch = family_batch(models, model)
    handed: list[tuple[str, Tensor]] = []

    def note(name):
        return lambda module, args, kwargs: handed.append((name, [*args, *kwargs.values()][0].clone()))

    handles = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in blocks]
    plain = model(**batch)
    for handle in handles:
        handle.remove()
    walking = walk(model, [batch], blocks)
    *stops, end = to_the_end(walking)
    walking.close()
    assert [stop.module for stop in stops] == [name for name, _ in handed] == blocks
    for name, tensor in plain.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(end.output[name], tensor), name


def test_every_stops_input_has_the_values_of_a_plain_forward():
    model, (batch,) = Model(), inputs(5)
    first = model.norm(batch["x"])
    walking = walk(model, [batch])
    assert torch.equal(walking.advance(0).input, first)
    assert torch.equal(walking.advance(0).input, model.blocks[0](first))
    walking.close()


def test_the_input_is_the_very_tensor_that_the_module_is_handed():
    model = Model()
    walking = walk(model, inputs(5))
    walking.stop_at(["blocks.0.left", "blocks.0.right"])
    seen = {}
    for name in ("blocks.0", "blocks.0.left", "blocks.0.right"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda module, args, kwargs, output, name=name: seen.update({name: [*args, *kwargs.values()][0]}),
            with_kwargs=True,
        )
    handed = {stop.module: stop.input for stop in to_the_end(walking)[:-1]}
    walking.close()
    assert set(seen) < set(handed)
    assert all(seen[name] is handed[name] for name in seen)


def test_linears_that_share_an_input_stop_with_the_same_tensor():
    walking = walk(Model(), inputs(5))
    walking.stop_at(["blocks.0.left", "blocks.0.right"])
    block, left, right, after = to_the_end(walking)[:4]
    walking.close()
    assert [stop.module for stop in (block, left, right, after)] == [
        BLOCKS[0],
        "blocks.0.left",
        "blocks.0.right",
        BLOCKS[1],
    ]
    assert block.input is left.input is right.input
    assert after.input is not right.input


def test_a_module_that_is_passed_by_stops_no_more():
    walking = walk(Model(), inputs(5))
    walking.stop_at(["blocks.0.left", "blocks.0.right"])
    walking.pass_by("blocks.0.right")
    assert [stop.module for stop in to_the_end(walking)] == ["blocks.0", "blocks.0.left", "blocks.1", None]
    walking.close()


def test_a_weight_exchanged_while_a_batch_waits_is_the_one_it_runs_with():
    model, batches = Model(), inputs(5)
    before = model(**batches[0])
    walking = walk(model, batches)
    walking.stop_at(["blocks.1.right"])
    while walking.advance(0).module != "blocks.1.right":
        pass
    model.blocks[1].right.weight.data = model.blocks[1].right.weight.data * 2
    output = walking.advance(0).output
    walking.close()
    assert torch.equal(output, model(**batches[0]))
    assert not torch.allclose(output, before)


def test_batches_of_different_sizes_that_take_turns_do_not_mix():
    model, batches = Model(), inputs(5, 1, 9)
    truth = [model(**batch) for batch in batches]
    walking = walk(model, batches)
    outputs = {}
    for _ in range(3):
        for batch in range(len(walking)):
            outputs[batch] = walking.advance(batch).output
    walking.close()
    assert all(torch.equal(outputs[batch], truth[batch]) for batch in range(3))


def test_where_every_batch_waits_is_known_and_its_end_too():
    walking = walk(Model(), inputs(5, 4))
    assert [stop.module for stop in walking.at] == [None, None]
    walking.advance(0)
    walking.advance(1)
    walking.advance(1)
    assert [stop.module for stop in walking.at] == ["blocks.0", "blocks.1"]
    with walking.input(1) as tensor:
        assert tensor is walking.at[1].input
    walking.advance(1)
    assert walking.at[1] == Stop(None)
    walking.close()


def test_modules_outside_the_blocks_are_announced_before_they_run_and_those_inside_never_are():
    model, called = Model(), []

    def outside(name):
        called.append(name)
        model.get_submodule(name).weight.data.fill_(2.0)

    walking = walk(model, inputs(5), outside=outside)
    first = walking.advance(0)
    assert called == ["norm"]
    assert float(first.input.std()) == pytest.approx(2.0, rel=0.1)  # the norm ran with the weight that it was given
    to_the_end(walking)
    walking.close()
    assert called == ["norm", "head"]


def test_weights_on_meta_are_enough_for_blocks_that_no_batch_has_reached():
    model, (batch,) = Model(), inputs(5)
    truth = model(**batch)
    weights = {name: tensor.clone() for name, tensor in model.blocks[1].state_dict().items()}
    model.blocks[1].to("meta")
    walking = walk(model, [batch])
    walking.advance(0)
    walking.advance(0)
    model.blocks[1].to_empty(device="cpu").load_state_dict(weights)
    assert torch.equal(walking.advance(0).output, truth)
    walking.close()


def test_an_error_inside_the_forward_reaches_the_caller():
    model, (batch,) = Model(), inputs(5)
    walking = walk(model, [{**batch, "scale": torch.ones(4)}])
    walking.advance(0)
    walking.advance(0)
    with pytest.raises(RuntimeError, match="must match the size"):
        walking.advance(0)
    walking.close()


def test_leaving_a_batch_frees_what_it_held_and_the_others_go_on():
    model, batches = Model(), inputs(5, 4)
    walking = walk(model, batches)
    held = weakref.ref(walking.advance(0).input)
    walking.advance(1)
    assert held() is not None
    walking.leave(0)
    assert held() is None
    assert walking.at[0] == Stop(None)
    assert torch.equal(to_the_end(walking, 1)[-1].output, model(**batches[1]))
    walking.close()


def test_after_closing_the_model_is_as_it_was():
    model, (batch,) = Model(), inputs(5)
    truth = model(**batch)
    walking = walk(model, [batch, batch], outside=lambda name: pytest.fail("called after closing"))
    assert any(module._forward_pre_hooks for module in model.modules())
    walking.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**batch), truth)


def test_closing_frees_what_waiting_batches_held():
    walking = walk(Model(), inputs(5, 4))
    held = [weakref.ref(walking.advance(batch).input) for batch in range(2)]
    walking.close()
    assert [ref() for ref in held] == [None, None]


def test_a_plain_call_while_batches_wait_does_not_stop():
    model, batches = Model(), inputs(5, 4)
    truth = [model(**batch) for batch in batches]
    walking = walk(model, batches)
    walking.advance(0)
    assert torch.equal(model(**batches[1]), truth[1])
    assert torch.equal(to_the_end(walking)[-1].output, truth[0])
    walking.close()


def test_what_waits_is_parked_while_there_is_room_and_else_spilled(monkeypatch, tmp_path):
    monkeypatch.setattr(parking, "LEAST_BYTES", 1)
    model, batches = Model(), inputs(*range(5, 13))
    wanted = [model(**batch) for batch in batches]
    spill = Spill(sum(batch["x"].nbytes for batch in batches[:4]), tmp_path)
    walking = Walk(model, batches, blocks=BLOCKS, outside=lambda name: None, spill=spill)
    for _ in BLOCKS:
        for batch in range(len(batches)):
            walking.advance(batch)
    parked = [at.input.untyped_storage().resizable() is False for at in walking.at]
    spilled = [at.input.untyped_storage().nbytes() == 0 for at in walking.at]
    assert any(parked)
    assert any(spilled)
    assert not any(one and other for one, other in zip(parked, spilled, strict=True))
    for batch, output in enumerate(wanted):
        assert torch.equal(walking.advance(batch).output, output)
    assert not walking._parking._seen
    walking.close()
    assert not list(tmp_path.iterdir())
