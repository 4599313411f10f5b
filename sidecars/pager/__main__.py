"""``python -m motorcade.sidecars.pager --boot-fd N``."""

import argparse

from motorcade.proto import boot
from motorcade.sidecars.pager.main import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fills a Motorcade machine's memory; started by the supervisor.")
    parser.add_argument("--boot-fd", type=int, required=True, help="descriptor of the SOCK_SEQPACKET boot socket")
    try:
        boot_socket = boot.from_fd(parser.parse_args().boot_fd)
    except boot.BootError as e:
        parser.error(str(e))
    raise SystemExit(main(boot_socket))
