from __future__ import annotations

from ptee._common.text import shown


def test_a_number_that_python_does_not_write_is_described():
    assert shown(16**5000) == "a number of thousands of digits"
