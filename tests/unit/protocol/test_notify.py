"""Supervisors are told in sd_notify's words, and their absence stops nobody."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hpc_gym.protocol.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_fields_arrive_in_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        notify(READY=1, STATUS="serving\nFAKE=1")
        assert listener.recv(1000) == b"READY=1\nSTATUS=serving FAKE=1"


def test_without_a_listener_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    notify(READY=1)
