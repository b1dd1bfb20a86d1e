from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from pydantic import BaseModel, Field, ValidationError

import ptee
from ptee._common.errors import DataError, PteeError, UnknownName
from ptee._common.validation import FrozenConfig, Number, Whole, checked, from_pydantic, named


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
    ({"T": 3}, UnknownName, "T=3 is unknown. Choices: inner, name, sizes.", "T"),
    ({"": 3}, UnknownName, "''=3 is unknown. Choices: inner, name, sizes.", "''"),
    ({"a\nb": 3}, UnknownName, "'a\\nb'=3 is unknown. Choices: inner, name, sizes.", "'a\\nb'"),
    ({"inner": {"int": 1}}, UnknownName, "inner.int=1 is unknown. Choices: lr.", "inner.int"),
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
    assert str(from_pydantic(refusal.value)) == "width is missing."


def test_a_config_does_not_change():
    with pytest.raises(ValidationError):
        Inner().lr = 3


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("DataLoader worker (pid 17) is killed by signal: Killed. ", "killed by signal: Killed"),
        ("DataLoader worker (pid(s) 17, 18) exited unexpectedly", "exited unexpectedly"),
        ("DataLoader worker (pid 17) exited unexpectedly with exit code 3. Details are lost", "with exit code 3"),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_an_error_of_torch_is_replaced_only_where_a_process_that_loads_images_has_ended(said, reason):
    @checked
    def function() -> None:
        raise RuntimeError(said)

    with pytest.raises(DataError if reason else RuntimeError, match=re.escape(reason or said)):
        function()


@checked
def fitted(
    model: object,
    number: int = 1,
    *,
    share: float = 0.5,
    some: int | None = None,
    is_on: bool = False,
    about: str = "",
    lines: Sequence[str] = (),
    named: Mapping[str, object] | None = None,
    log: Callable[[str], None] | None = None,
    **changes: object,
) -> tuple[object, ...]:
    return model, number, share, some, is_on, about, lines, named, log, changes


WRONG = [
    ("number", "3", "number='3' must be a whole number."),
    ("number", True, "number=True must be a whole number."),
    ("share", float("nan"), "share=nan must be a finite number."),
    ("some", 3.5, "some=3.5 must be a whole number."),
    ("is_on", "no", "is_on='no' must be True or False."),
    ("is_on", None, "is_on=None must be True or False."),
    ("about", ["x"], "about=['x'] must be text."),
    ("lines", "own", "lines='own' must be a list, such as ['own']."),
    ("lines", None, "lines=None must be a list."),
    ("named", ["x"], "named=['x'] must be a mapping, such as {'mine': ...}."),
    ("named", "x", "named='x' must be a mapping, such as {'x': 'x'}."),
    ("log", "print", "log='print' must be a function."),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=[f"{name} {value}" for name, value, _ in WRONG])
def test_an_argument_of_the_wrong_kind_is_refused_by_name(name, value, said):
    with pytest.raises(PteeError) as refusal:
        fitted(object(), **{name: value})
    assert (str(refusal.value), refusal.value.argument) == (said, name)


@named
def quick(number: int, *, soft: bool = False) -> str:
    return number + "" if soft else str(number)


def test_an_unknown_argument_of_what_is_called_often_is_named_and_other_errors_stay():
    assert quick(3) == "3"
    with pytest.raises(PteeError, match=r"^quick\(\) has no argument 'sfot'\. Did you mean 'soft'\?"):
        quick(3, sfot=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        quick()
    with pytest.raises(TypeError, match="unsupported operand"):
        quick(3, soft=True)


def test_by_position_too():
    with pytest.raises(PteeError, match=r"^number='3' must be a whole number\.$"):
        fitted(object(), "3")


def test_arguments_of_the_right_kind_reach_the_function_as_they_are():
    given = {"share": 1, "some": np.int64(2), "is_on": np.True_, "lines": ["own"], "named": {"a": 1}, "log": print}
    assert fitted(None, 3, about="x", other=[], **given) == (
        *(None, 3, 1, np.int64(2), np.True_, "x", ["own"], {"a": 1}, print, {"other": []}),
    )


@pytest.mark.parametrize("name", ["augment", "calibrate", "compare", "evaluate", "fit", "train", "tune"])
def test_the_public_functions_refuse_a_flag_or_number_of_the_wrong_kind_before_they_begin(name):
    function = getattr(ptee, name)
    hints = {
        name: hint for name, hint in function.__annotations__.items() if hint in ("bool", "int", "int | None", "str")
    }
    assert hints
    for argument in hints:
        with pytest.raises(PteeError, match=rf"^{argument}=<object object at .* must be "):
            function(**{argument: object()})
