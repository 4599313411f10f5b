"""The user's side: vmmctl, machine.yaml, the supervisor, the run directory and the box."""
