"""The pager: fills the memory of a restored machine from its template while it runs (docs/internals.md, Snapshots)."""
