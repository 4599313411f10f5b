"""The balloon sidecar: memory that the guest does not need goes back to the host."""
