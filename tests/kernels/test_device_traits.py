"""Which kernels are for which device, and for which Triton."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton")

import triton

from flashtensors.kernels import device_traits


def test_gluon_is_there_where_tests_hold_it_to_what_it_does() -> None:
    assert device_traits.has_gluon.__wrapped__()


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git1"])
def test_gluon_of_other_tritons_is_not_trusted(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert not device_traits.has_gluon.__wrapped__()
    assert f"Triton {version}: its Gluon has not been tried; install Triton 3.6 to 3.9" in caplog.text


def test_a_gluon_without_a_name_that_kernels_use_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, package: str | None = None) -> None:
        raise ImportError("cannot import name 'mbarrier'")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert not device_traits.has_gluon.__wrapped__()
    assert "cannot import name 'mbarrier'" in caplog.text
