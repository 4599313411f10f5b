"""The serial sidecar: the 16550's bytes and virtio-console."""
