"""The place where the tests of this folder run: a Linux with a hardware-style KVM."""

import os
import re
from pathlib import Path


def test_kvm_has_hardware_behind_it() -> None:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    assert {"svm", "vmx"} & set(flags[1].split())
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)
