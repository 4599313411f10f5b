"""The entropy sidecar: virtio-rng, and the kit's example."""
