"""Control messages over ZeroMQ: the core's end (ControlServer, ROUTER) and a sidecar's (ControlClient, DEALER).

Who is who. A ROUTING_ID is whatever its sender claims, and ZAP's identity frame is empty for ipc (measured,
libzmq 4.3.5), so neither names a peer. What does: SO_PEERCRED, which libzmq hands to the ZAP handler as
``localhost:UID:GID:PID``. The handler admits one connection of each process that was announced by expect(), and
answers with a token as User-Id. libzmq attaches that to every message of the connection, where the peer's own
properties cannot replace it. The server goes by tokens alone. Sidecars set no ROUTING_ID (libzmq
invents one) and ROUTER_HANDOVER is off: claiming another connection's id gets a peer ignored, not the route.

What is not bounded. libzmq bounds a frame, not the number of frames of a message, and holds a message until its
last frame: a sidecar that never ends one makes the core grow. It cannot answer a ping meanwhile, so
the core's heartbeat is what ends it.

Readiness. A ZeroMQ socket's FD is edge-triggered and any call on the socket may swallow the edge. Both classes
therefore keep their FDs in an epoll instance of their own (``fileno()``), with an eventfd beside them that is
written whenever something is left to do after a call.
"""

from __future__ import annotations

from motorcade.proto.client import ControlClient, Refused
from motorcade.proto.server import ControlServer, Gone, OnAnswer, Outcome, Timeout

__all__ = ["ControlClient", "ControlServer", "Gone", "OnAnswer", "Outcome", "Refused", "Timeout"]
