"""``python -m motorcade.core --boot-fd N``: a core started by exec instead of fork."""

import argparse
import socket

from motorcade.core.main import run

parser = argparse.ArgumentParser(prog="motorcade.core", description="The core process; the supervisor starts it.")
parser.add_argument("--boot-fd", type=int, required=True, help="inherited SOCK_SEQPACKET socket to the supervisor")
raise SystemExit(run(socket.socket(fileno=parser.parse_args().boot_fd)))
