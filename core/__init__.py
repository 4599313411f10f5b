"""The core process: vCPUs, guest memory, interrupts, transport registers, boot loading and QMP."""
