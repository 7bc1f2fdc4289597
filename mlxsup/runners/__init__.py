"""Acts: one child process each, from spawn to gone."""
