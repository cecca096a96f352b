"""One module a broker: its configuration, its users, and how it is told of changes."""
