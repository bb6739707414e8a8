from pathlib import Path

import pytest

from engine import machine


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue\nGCC 12.2.0",
            "580.159.03",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  x", "570.86"),
        ("something else", None),
        (None, None),
    ],
)
def test_the_drivers_version_is_found(monkeypatch, tmp_path: Path, text, version) -> None:
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(machine, "_DRIVER_FILE", path)
    assert machine.find_machine().gpu_driver == version
