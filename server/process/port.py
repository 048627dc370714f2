"""The end of a port, at which no connection is lost that a client takes for made.

To close a listening socket resets the connections that wait in it, and those that lack only the
client's last packet. Between the last `accept` and the close there is always a moment. So the
kernel is told first to drop packets that begin a connection: the client sends another a second
later, and is refused then, or reaches the server that replaced this one.
"""

import ctypes
import socket
import struct
import sys

__all__ = ["refuse_newcomers"]

# The option of setsockopt(2) that attaches a filter, which `socket` does not name.
_SO_ATTACH_FILTER = 26

# A filter of packets (bpf(4)), which starts at the TCP header: each line is code, the lines to skip
# if a comparison is true or false, and a number.
_FILTER = (
    (0x30, 0, 0, 13),  # load the byte of the flags
    (0x54, 0, 0, 0x12),  # of these SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # then drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # else keep all of it
)


def refuse_newcomers(listener: socket.socket) -> bool:
    """Let no further connection begin at this port; those that have begun go on.

    Accepted connections inherit the filter. It drops only what begins one, so it does not touch
    them.

    Returns:
        Whether the system does that; only Linux can.
    """
    if not sys.platform.startswith("linux"):
        return False
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in _FILTER))
    program = struct.pack("@HP", len(_FILTER), ctypes.addressof(code))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:  # some sandboxes have no such filter
        return False
    return True
