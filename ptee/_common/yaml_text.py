"""YAML, read strictly: values that mean one thing, and errors that know their line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ptee._common.errors import first_line
from ptee._common.files import LONGEST_KEY


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values and numbers: in `precision: no`, no is a word, and 1e-2 is a number; 010 and 1:30 are words, too.

    Aliases are refused, because a few lines of them can stand for more values than a machine can hold, and so are a key that
    stands there twice and tags (!!int). `<<`, which would merge mappings, is a key like any other.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """PyYAML calls this for each value."""
        if (tag := getattr(self.peek_event(), "tag", None)) is not None:  # would go around the rules for plain values
            raise self.fault(f"tags ({tag[:LONGEST_KEY]}) are not read here: write the value alone")
        if self.check_event(yaml.AliasEvent):
            raise self.fault("aliases (*name) are not read here: write the value again")
        return super().compose_node(parent, index)

    def fault(self, text: str, node: Any = None) -> yaml.YAMLError:
        """An error that knows its line."""
        return yaml.MarkedYAMLError(problem=text, problem_mark=(node or self.peek_event()).start_mark)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """PyYAML calls this for each mapping."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise self.fault(f"{key.value[:LONGEST_KEY]!r} stands there twice: keep one of them", key)
            seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":int", ":float", ":timestamp", ":merge", ":value"))
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|false|False"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|nan)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text; a yaml.YAMLError if it has none, also where the library raises others, as for `!!int x`."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as why:
        raise yaml.YAMLError(first_line(why)) from why
