"""Freezing a running machine into a template, and going on from one."""
