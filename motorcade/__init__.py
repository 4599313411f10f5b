"""Motorcade: a virtual machine monitor for Linux/KVM made of small processes.

The package's code lives in the top-level folders ``core/``, ``sidecars/``, ``proto/`` and
``orchestrator/``; this folder links to them so that they import as ``motorcade.core`` and so on.
"""

__version__ = "0.1.0"
