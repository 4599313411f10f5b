"""The control plane: schemas, their one importer, and how messages travel."""
