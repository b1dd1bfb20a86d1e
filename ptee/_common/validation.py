"""Typed settings: pydantic models whose errors are one line that names the argument, its value and what is possible."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError
from typing_extensions import ParamSpec, Self

from ptee._common.errors import Argument, PteeError, RunError, UnknownName, ended_worker, first_line, possible
from ptee._common.files import read_object
from ptee._common.text import as_shares, printable, shown

P = ParamSpec("P")
R = TypeVar("R")
BATCH_SIZE = 128  # the default of every function and command that makes batches
LARGEST_IMAGE = 3 * 2048**2  # numbers in one image; a record that asks for more would take gigabytes
LONGEST_NAME = 255  # letters of a name in a record
LONGEST_PATH = 1024  # and of any other text there
LARGEST_LIMIT = 10  # of shares and costs, above which a number was meant as a percentage
LEAST_CONFIDENCE = 50  # of a percentage: nobody wants a guarantee that is kept by chance
LONGEST_VALUE = 60  # letters of a value that a message repeats


def _plain(value: Any) -> Any:
    """NumPy's numbers and truth values as Python's own; anything else as it is."""
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's, without importing it
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def whole(value: Any) -> int | None:
    """A whole number of any kind, such as NumPy's, as Python's own; None for a truth value and for anything else."""
    try:
        return None if type(value).__name__ in ("bool", "bool_") else operator.index(value)  # NumPy's have either name
    except TypeError:
        return None


def is_name(text: Any) -> bool:
    """Whether a record may have this name: a text in one line, not too long, without control characters."""
    return isinstance(text, str) and len(text) <= LONGEST_NAME and _is_printable(text)


def _is_printable(text: str) -> bool:
    return printable(text) == text and {"\n", "\t"}.isdisjoint(text)


def _printable(text: str) -> str:
    if not _is_printable(text):
        raise PydanticCustomError("unprintable", "Input should be text without control characters")
    return text


Whole = Annotated[int, BeforeValidator(_plain), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_plain), Field(strict=True, allow_inf_nan=False)]
YesNo = Annotated[StrictBool, BeforeValidator(_plain)]
Text = Annotated[str, Field(strict=True)]
Name = Annotated[Text, Field(max_length=LONGEST_NAME), AfterValidator(_printable)]

# What arguments of functions may be, by their type hints; what has another hint is looked at by the function itself.
KINDS: dict[str, Any] = {
    "bool": YesNo, "int": Whole, "int | None": Whole | None, "float": Number, "str": Text, "Sequence[str]": Sequence[Text],
    "Mapping": Mapping[Any, Any] | None, "Callable": Callable[..., Any] | None, "Log | None": Callable[..., Any] | None,
}  # fmt: skip


class ReadRecord(BaseModel):
    """A frozen part of what ptee wrote. A later version may have written more, which is not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FrozenConfig(BaseModel):
    """A frozen set of settings. A value that cannot be is refused with a one-line `PteeError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise from_pydantic(error, fields=type(self).model_fields) from None

    def changed(self, **changes: Any) -> Self:
        """A checked copy with some fields changed. Fields that were never set still follow their default."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})


C = TypeVar("C", bound=FrozenConfig)


def read_record(kind: type[C], file: Path, largest: int, schema: int, again: str) -> tuple[C, dict[str, Any]]:
    """A record of ptee's in a file of at most so many bytes, of this schema or an older one; and its values as they stand there.

    `again` says how to make another, where it is damaged.
    """
    try:
        values = read_object(file, largest)
    except (OSError, ValueError) as why:
        raise RunError(f"{file} cannot be read: {first_line(why)} {again}") from why
    version = values.get("schema_version")
    if isinstance(version, int) and version > schema:
        raise RunError(f"{file} has schema version {version!s:.40}, and this ptee reads up to {schema}. Upgrade ptee.")
    try:
        return kind(**values), values
    except PteeError as why:
        raise RunError(f"{file}: {why} {again}") from why


def checked_with(
    also: Iterable[str] = (), instead: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`checked` for a function that takes arguments of the names `also` besides, by **. `instead`: as of `require_arguments`."""
    return lambda function: checked(function, also, instead)


def checked(
    function: Callable[P, R], also: Iterable[str] = (), instead: Mapping[str, str] | None = None
) -> Callable[P, R]:
    """The function, which refuses unknown arguments, and truth values, numbers, texts, lists and functions of the wrong type, by name.

    Both before it begins. Where a process that loads images is ended meanwhile, the error says what to do.
    """
    names = list(inspect.signature(function).parameters)
    kinds: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        if (kind := KINDS.get(hint) or KINDS.get(hint.partition("[")[0])) is not None:
            kinds[name] = (kind, None)
    arguments: Any = create_model("Arguments", **kinds)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        require_arguments(function, kwargs, also=also, instead=instead)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        try:
            arguments(**{name: value for name, value in given.items() if name in kinds})
        except ValidationError as error:
            raise from_pydantic(error, example=True) from None
        try:
            return function(*args, **kwargs)
        except PteeError as why:
            _give_value(why, given)
            raise
        except RuntimeError as why:
            if (ended := ended_worker(why, given=given.values())) is None:
                raise
            raise ended from why

    return call


def named(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose error for an unknown argument names the nearest one, and whose errors say what was given.

    For what is called often: it costs nothing before an error.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            require_arguments(function, kwargs)
            raise
        except PteeError as why:
            _give_value(why, dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs)
            raise

    return call


def _give_value(error: PteeError, given: Mapping[str, Any]) -> None:
    """An error about an argument says what was given for it, also where whoever raised it knew a part of that only."""
    if error.value is None and error.argument is not None:
        error.value = given.get(error.argument)


def require_arguments(
    function: Callable[..., Any],
    given: Iterable[str],
    called: str = "",
    also: Iterable[str] = (),
    instead: Mapping[str, str] | None = None,
) -> None:
    """Refuse names that a function has no arguments for; the nearest one is named. `called`: what the user calls it.

    `also`: what it takes besides, by **. Without them, a function that takes any name is not looked at. `instead`: sentences that say what
    to type in place of arguments that it does not have.

    >>> require_arguments(round, ["digits"])
    Traceback (most recent call last):
    ptee._common.errors.UnknownName: round() has no argument 'digits'. Did you mean 'ndigits'? Choices: ndigits, number.
    """
    parameters = inspect.signature(function).parameters.values()
    if not also and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    own = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
    known = [*own, *also]
    for name in given:
        if name not in known:
            like = [each for each in known if ("." in each) == ("." in name)]  # the path of a setting is near paths
            told = f" {instead[name]}" if instead and name in instead else possible(name, like)
            text = f"{called or function.__name__}() has no argument {name!r:.60}.{told}"
            raise UnknownName(text, argument=name, value=given[name] if isinstance(given, Mapping) else None)


def from_pydantic(error: ValidationError, fields: Iterable[str] = (), example: bool = False) -> PteeError:
    """The first finding of pydantic as an error of one line.

    Of the settings that exist (`fields`), the one nearest to an unknown setting is named. `example`: say what a list or mapping looks
    like in Python.

    >>> class Example(BaseModel):
    ...     lr: Number = Field(0.1, gt=0)
    >>> try:
    ...     Example(lr=-1)
    ... except ValidationError as error:
    ...     print(from_pydantic(error))
    lr=-1 must be above 0.
    """
    findings = error.errors(include_url=False)
    first = findings[0]
    unknown = first["type"] == "extra_forbidden"  # whoever gave it chose its name, and it may look like anything
    path = _place(first["loc"][:-1], _as_given(str(first["loc"][-1]))) if unknown else _place(first["loc"])
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, PteeError):  # from a rule, or from settings inside of these
        return _within(path, inner)
    if unknown:
        return _fault(UnknownName, path, first["input"], f"is unknown.{possible(path, fields)}")
    if first["type"] == "missing":
        return PteeError(f"{path} is missing.", argument=path)
    of_this = [finding for finding in findings if _place(finding["loc"]) == path]
    if all(finding["type"] == "literal_error" for finding in of_this):
        choices = [choice for finding in of_this for choice in _choices(finding)]
        return _fault(UnknownName, path, first["input"], f"is unknown.{possible(str(first['input']), choices)}")
    words = dict.fromkeys(_possible(finding) for finding in of_this)
    such = _example(path, next(iter(words)), first["input"]) if example else ""
    leave_out = " Leave it out for the default." if first["input"] is None and not example else ""
    return _fault(
        PteeError, path, first["input"], f"must be {', or '.join(words)}{such}.{_meant(path, first)}{leave_out}"
    )


def _meant(path: str, finding: Mapping[str, Any]) -> str:
    """A question with the share that may be meant by a percentage, with a blank before it; empty for anything else."""
    value, limit = finding["input"], (finding.get("ctx") or {}).get("lt", math.inf)
    if isinstance(value, str):
        of_share = finding["type"] == "float_type"
    else:
        of_share = limit <= LARGEST_LIMIT and not (path.endswith("confidence") and value < LEAST_CONFIDENCE)
    share = as_shares([value]) if of_share else ""
    return f" Did you mean {share}?" if share else ""


def _example(argument: str, wanted: str, value: Any) -> str:
    """What to type where a list or a mapping is wanted, after a comma; empty if something else is."""
    text = value if isinstance(value, str) and len(value) <= LONGEST_VALUE else None
    if wanted == "a list":
        return "" if text is None else f", such as [{text!r}]"
    if wanted == "a mapping":
        thing = argument[:-1] if argument.endswith("s") else "..."
        return f", such as {{'mine': {thing}}}" if text is None else f", such as {{{text!r}: {text!r}}}"
    return ""


def _as_given(name: str) -> str:
    """The name of a setting that does not exist, in one line."""
    return name[:60] if name.strip() and name.isprintable() else repr(name[:60])


def _place(loc: tuple[int | str, ...], *last: str) -> str:
    """The dotted path of a setting, without the types of a union that pydantic adds to it; `last` stands behind it as it is."""
    parts = [f"[{part}]" if isinstance(part, int) else part for part in loc]
    names = [part for part in parts if re.fullmatch(r"[a-z_][a-z_0-9]*|\[\d+\]", part)]
    names = [name for name in names if name not in ("int", "float", "bool", "str", "none")]
    return ".".join([*names, *last]).replace(".[", "[")


def _choices(finding: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", finding["ctx"]["expected"])


def _possible(finding: Mapping[str, Any]) -> str:
    """What is possible, for a sentence with "must be"."""
    kind, ctx = finding["type"], finding.get("ctx", {})
    if kind == "literal_error":
        return str(ctx["expected"])
    if kind in _LIMITS:
        return _LIMITS[kind].format(**ctx)
    return _KINDS.get(kind) or finding["msg"].replace("Input should be ", "").replace("Input should ", "")


_KINDS = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "callable_type": "a function", "mapping_type": "a mapping", "is_instance_of": "a list", "sequence_str": "a list", "bool_type": "True or False", "string_type": "text", "tuple_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping of settings", "model_attributes_type": "a mapping of settings",
}  # fmt: skip
_LIMITS = {
    "greater_than": "above {gt:.12g}", "greater_than_equal": "{ge:.12g} or more", "less_than": "below {lt:.12g}",
    "less_than_equal": "{le:.12g} or less", "too_short": "a list of {min_length} or more", "too_long": "a list of {max_length} at most",
    "string_pattern_mismatch": "text that fits {pattern}", "string_too_long": "text of {max_length} letters at most",
}  # fmt: skip


def _within(path: str, error: PteeError) -> PteeError:
    """The error of settings that are inside of others, with the whole path."""
    if not path:
        return error
    parts = [Argument(f"{path}.{p.name}", p.value) if isinstance(p, Argument) else p for p in error.parts]
    argument = f"{path}.{error.argument}" if error.argument else path
    return type(error)(*parts, argument=argument, value=error.value)


def _fault(kind: type[PteeError], path: str, value: Any, words: str) -> PteeError:
    return kind(Argument(path, shown(value, LONGEST_VALUE)), f" {words}", argument=path, value=value)
