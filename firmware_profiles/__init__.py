"""One TOML per device type; see README.md here for the schema."""
