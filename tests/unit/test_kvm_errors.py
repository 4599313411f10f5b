"""What a host whose KVM will not do is told."""

from __future__ import annotations

import errno
import os

import pytest

from motorcade.core._native import lib
from motorcade.core.kvm import Kvm, KvmError, check
from motorcade.core.vcpustate import msr_values


def test_something_else_than_dev_kvm() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(KvmError, match="KVM_GET_API_VERSION: Inappropriate ioctl") as caught:
            Kvm(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.ENOTTY


def test_a_kvm_of_another_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motorcade.core.kvm.call", lambda *_: 11)
    with pytest.raises(KvmError, match="API version 11, not 12"):
        Kvm(-1)


def test_missing_capabilities_are_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {lib.KVM_CAP_IRQFD, lib.KVM_CAP_XSAVE}

    def answer(_what: str, _fd: int, request: int, arg: int | None = None) -> int:
        return lib.KVM_API_VERSION if request == lib.KVM_GET_API_VERSION else int(arg not in lacking)

    monkeypatch.setattr("motorcade.core.kvm.call", answer)
    with pytest.raises(KvmError, match=r"lacks KVM_CAP_IRQFD, KVM_CAP_XSAVE$"):
        Kvm(-1)


def test_results_of_c_functions() -> None:
    assert check("x", 3) == 3
    with pytest.raises(KvmError, match="the thing: Cannot allocate memory"):
        check("the thing", -errno.ENOMEM)


@pytest.mark.parametrize("record", [b"", b"\0" * 7, b"\x01" + b"\0" * 7, b"\0" * 24, b"\x02" + b"\0" * 23])
def test_msr_records_that_contradict_themselves(record: bytes) -> None:
    with pytest.raises(ValueError, match="record msrs"):
        msr_values(record)
