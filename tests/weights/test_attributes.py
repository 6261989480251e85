"""Numbers of heads that a checkpoint sets on modules."""

from __future__ import annotations

import pytest
from torch import nn

from modelzip.weights.attributes import set_attributes


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.dropout = 1


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])


@pytest.mark.parametrize("name", ["layers.1", "model.layers.1"])
def test_a_number_is_set_where_it_is_named_with_or_without_the_base_models_name(name):
    model = Model()
    set_attributes(model, {name: {"num_heads": 3}})
    assert [layer.num_heads for layer in model.layers] == [4, 3]


def test_a_module_that_this_class_lacks_is_passed_by():
    set_attributes(Model(), {"head.attention": {"num_heads": 3}})


@pytest.mark.parametrize(
    "numbers", [{"dropout": 3}, {"forward": 1}, {"n_heads": 3}, {"num_heads": "3"}, {"num_heads": True}]
)
def test_nothing_but_numbers_of_heads_can_be_set(numbers):
    with pytest.raises(ValueError, match="that a checkpoint may set"):
        set_attributes(Model(), {"layers.0": numbers})
