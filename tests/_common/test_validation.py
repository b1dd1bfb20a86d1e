from __future__ import annotations

import pytest
from pydantic import BaseModel, Field, ValidationError

from ptee._common.errors import PteeError, UnknownName
from ptee._common.validation import FrozenConfig, Number, Whole, from_pydantic


class Inner(FrozenConfig):
    lr: Number = Field(0.1, gt=0)


class Outer(FrozenConfig):
    name: str = "a"
    inner: Inner = Inner()
    sizes: tuple[Whole, ...] = ()


REFUSED = [
    ({"inner": {"lr": -1}}, PteeError, "inner.lr=-1 must be above 0.", "inner.lr"),
    ({"inner": {"lrr": 1}}, UnknownName, "inner.lrr=1 is unknown. Did you mean 'lr'? Choices: lr.", "inner.lrr"),
    ({"sizes": [1, "b"]}, PteeError, "sizes[1]='b' must be a whole number.", "sizes[1]"),
    ({"name": 3}, PteeError, "name=3 must be text.", "name"),
    ({"nam": 3}, UnknownName, "nam=3 is unknown. Did you mean 'name'? Choices: inner, name, sizes.", "nam"),
    ({"name": ["long"] * 100}, PteeError, f"name={str(['long'] * 100)[:60]}... must be text.", "name"),
]


@pytest.mark.parametrize(("values", "kind", "message", "argument"), REFUSED, ids=[case[2][:20] for case in REFUSED])
def test_an_error_is_one_line_with_the_dotted_path_and_the_value(values, kind, message, argument):
    with pytest.raises(kind) as refusal:
        Outer(**values)
    assert (str(refusal.value), refusal.value.argument) == (message, argument)


def test_an_error_of_any_pydantic_model_says_where_it_is():
    class Row(BaseModel):
        width: int

    with pytest.raises(ValidationError) as refusal:
        Row.model_validate({})
    assert str(from_pydantic(refusal.value, where="exits[2]")) == "exits[2].width is missing."


def test_a_config_does_not_change():
    with pytest.raises(ValidationError):
        Inner().lr = 3
