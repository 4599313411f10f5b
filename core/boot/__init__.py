"""Boot loading: kernel images, initrd, the boot protocols and the ACPI tables."""
