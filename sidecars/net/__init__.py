"""The net sidecar: virtio-net over taps, passt and socket links."""
