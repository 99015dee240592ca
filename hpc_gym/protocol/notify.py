"""What a process tells its supervisor, in systemd's sd_notify protocol: datagrams of `NAME=value` lines.

Names in use: `READY=1`, `STATUS=text`, `WATCHDOG=1`, and hpc-gym's own `X_SAVING=1|0` (a checkpoint is being written)
and `X_FAILURE=one-line cause`. Protocol: sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**fields: str | int) -> None:
    """Sends the fields in one datagram to `NOTIFY_SOCKET`; does nothing without that variable or without a listener.

    >>> notify(READY=1, STATUS="serving")
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    text = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.setblocking(False)
        # A supervisor that is gone or behind must never block or kill the work.
        with contextlib.suppress(OSError):
            channel.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
