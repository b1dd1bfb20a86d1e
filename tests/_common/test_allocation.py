"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ptee._common.allocation import _OF_THEIR_OWN

PAGES = """
import resource, sys
from ptee._common.allocation import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(done, faults())
"""


def run(what, **environment):
    plain = {k: v for k, v in os.environ.items() if k not in _OF_THEIR_OWN}
    ran = subprocess.run([sys.executable, "-c", PAGES, what], capture_output=True, text=True, env=plain | environment)
    done, faults = ran.stdout.split()
    return done == "True", int(faults)


def test_the_next_tensor_has_the_memory_of_the_last():
    done, faults = run("keep")
    if not done:
        pytest.skip("the C library is not glibc")
    assert faults < run("leave")[1] / 10


def test_what_the_user_has_told_the_c_library_stays():
    assert not run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]
