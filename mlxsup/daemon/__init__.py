"""The daemon: the supervisor behind its HTTP API, with signals, systemd, logging and listening addresses."""
