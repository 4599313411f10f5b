"""The bridge to other programs' backends: a vhost-user front-end behind a device's slot (docs/vhost-user.md)."""
