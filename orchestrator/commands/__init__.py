"""vmmctl's commands, one module a group: ``add_parser(subparsers)`` is light, the work imports what it needs."""
