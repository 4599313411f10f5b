"""Command lines of QEMU and StratoVirt, as a machine of ours: `vmmctl run`. Nothing else imports this."""
