"""The device backends, each a process of its own, and the runtime that they share."""
