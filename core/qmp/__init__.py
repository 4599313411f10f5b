"""The QMP server: wire rules, commands and events."""
