"""Memory that weights live in, on the host and on the device."""
