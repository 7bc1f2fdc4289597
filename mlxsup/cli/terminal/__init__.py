"""Pictures in the terminal: what it can show (`abilities`), where they are drawn (`canvas`), what is written (`graphics`)."""
