from __future__ import annotations

import pytest
import torch

from ptee._common.devices import resolve_device
from ptee._common.errors import DeviceError


def test_the_cpu_is_always_there():
    assert resolve_device("cpu:0") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", 1.5, 10**40])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(DeviceError, match=rf"There is no device '{name}' on this machine\. Possible: cpu"):
        resolve_device(name)
