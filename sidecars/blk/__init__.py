"""The blk sidecar: virtio-blk over files and block devices."""
