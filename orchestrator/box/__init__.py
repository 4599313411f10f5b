"""A small Linux with a complete KVM, for hosts whose own KVM cannot run a stock kernel."""
